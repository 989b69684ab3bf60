"""ZeRO stage 1 by hand: each rank keeps the optimizer's state for its share of the weights. Notebook 03 teaches it.

All parameters of one dtype lie in one flat tensor, cut into n equal shares, so a share may begin and end inside a
parameter. A rank updates its share, then all shares are gathered.

    | parameter 0     | parameter 1 | parameter 2          | padding |
    | share of rank 0         | share of rank 1         | ...        |

After Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5.1.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from workshop_utils.agreement import all_gather_bytes, check_same, describe
from workshop_utils.ring import ring_all_gather

# Those whose update of one weight depends on that weight's own gradient and state only, so that a tensor may be cut.
ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.ASGD, optim.Rprop),
)


class ShardedOptimizer(optim.Optimizer):
    """`optimizer_cls(params, **optimizer_kwargs)`, with its state divided over the ranks.

    Gives the same weights as the plain optimizer on every rank, provided that all ranks have the same gradients,
    as after `finish_gradient_sync()`. `step` is called by all ranks; it sends (n-1)/n of the parameters' bytes on
    top of what the gradients cost. `param_groups` are the plain optimizer's: change the learning rate there.
    The parameters keep their identity and shape; their memory moves into the flat tensors.

    TypeError for an optimizer whose update is not elementwise (LBFGS, Muon, Adafactor), ValueError, on all
    ranks, if the ranks bring different parameters.
    """

    def __init__(self, params: Iterable, optimizer_cls: type[optim.Optimizer], **optimizer_kwargs):
        if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, ELEMENTWISE)):
            raise TypeError(
                f"{getattr(optimizer_cls, '__name__', optimizer_cls)} cannot be sharded here: tensors are cut "
                "anywhere, so each weight's update must depend on its own gradient only. These do: "
                + ", ".join(kind.__name__ for kind in ELEMENTWISE)
            )
        self._built = False
        whole = optimizer_cls(params, **optimizer_kwargs)  # checks the arguments, fills in the defaults
        super().__init__(whole.param_groups, whole.defaults)
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        check_same([describe(f"parameter {i}", p) for i, p in enumerate(self._parameters)])
        self._group, self._me, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        dtypes = dict.fromkeys(p.dtype for p in self._parameters)
        self._flats = [_Flat([p for p in self._parameters if p.dtype == d], n) for d in dtypes]
        pieces = {id(piece.parameter): piece for flat in self._flats for piece in flat.pieces_of(self._me)}
        self._pieces = [
            pieces.get(id(p)) for p in self._parameters
        ]  # None: nothing of it is in this rank's share
        self._inner = optimizer_cls(self._inner_groups(), **optimizer_kwargs)
        self.state = self._inner.state
        self._built = True

    def add_param_group(self, param_group: dict) -> None:
        if getattr(self, "_built", False):
            raise NotImplementedError(
                "the shares are fixed: build a new ShardedOptimizer with all parameters"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update this rank's share, then gather all shares into the parameters. All ranks call it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for flat in self._flats:
            flat.check_storage()
        for piece in filter(None, self._pieces):
            gradient = piece.parameter.grad
            piece.part.grad = None if gradient is None else gradient.reshape(-1)[piece.low : piece.high]
        for inner, outer in zip(self._inner.param_groups, self.param_groups, strict=True):
            inner.update({key: value for key, value in outer.items() if key != "params"})
        self._inner.step()
        self._inner.zero_grad()
        for flat in self._flats:
            ring_all_gather(flat.memory, flat.share(flat.memory, self._me), self._group)
        return loss

    def state_dict(self) -> dict:
        """What the plain optimizer's state_dict would be: gathered, whole, on every rank. All ranks call it.

        It loads into a plain optimizer, and into a ShardedOptimizer of any world size.
        """
        index = {id(p): i for i, p in enumerate(self._parameters)}
        mine = {i: self.state[p.part] for i, p in enumerate(self._pieces) if p and p.part in self.state}
        state = self._gather_scalars(mine)
        for flat in self._flats:
            numbers = [index[id(p)] for p in flat.parameters]
            for key in sorted({key for i in numbers for key in state.get(i, {})}):
                if any(isinstance(state.get(i, {}).get(key), torch.dtype) for i in numbers):
                    self._gather_tensors(flat, numbers, key, mine, state)
        counts = iter(range(len(self._parameters)))
        groups = [group | {"params": [next(counts) for _ in group["params"]]} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take this rank's share of a whole state, as `state_dict` of this class or the plain optimizer gives it."""
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            expected = [len(group["params"]) for group in self.param_groups]
            raise ValueError(
                f"the state is for groups of {sizes} parameters, this optimizer has groups of {expected}"
            )
        hyperparameters = [
            {k: v for k, v in group.items() if k != "params"} for group in state_dict["param_groups"]
        ]
        for group, saved in zip(self.param_groups, hyperparameters):
            group.update(saved)
        own = [(i, piece) for i, piece in enumerate(self._pieces) if piece is not None]
        state = {
            new: {key: piece.cut(key, value) for key, value in state_dict["state"][i].items()}
            for new, (i, piece) in enumerate(own)
            if i in state_dict["state"]
        }
        numbers = {id(piece.part): new for new, (_, piece) in enumerate(own)}
        groups = [
            saved | {"params": [numbers[id(part)] for part in group["params"]]}
            for saved, group in zip(hyperparameters, self._inner.param_groups)
        ]
        self._inner.load_state_dict({"state": state, "param_groups": groups})
        self.state = self._inner.state

    # -- helpers

    def _inner_groups(self) -> list[dict]:
        by_parameter = {id(p): piece for p, piece in zip(self._parameters, self._pieces)}
        return [
            group | {"params": [by_parameter[id(p)].part for p in group["params"] if by_parameter[id(p)]]}
            for group in self.param_groups
        ]

    def _gather_scalars(self, mine: dict[int, dict]) -> dict[int, dict]:
        """All ranks' state by parameter, with the dtype in place of each tensor that is cut."""
        pieces = {
            i: {
                key: value.dtype if _is_cut(key, value, self._pieces[i]) else value
                for key, value in entry.items()
            }
            for i, entry in mine.items()
        }
        file = io.BytesIO()
        torch.save(pieces, file)
        merged: dict[int, dict] = {}
        for data in all_gather_bytes(file.getvalue(), self._group):
            merged |= torch.load(io.BytesIO(data), weights_only=True)
        return {i: merged[i] for i in sorted(merged)}

    def _gather_tensors(self, flat: "_Flat", numbers: list[int], key: str, mine: dict, state: dict) -> None:
        dtype = next(d for i in numbers if isinstance(d := state.get(i, {}).get(key), torch.dtype))
        whole = torch.zeros(flat.memory.shape, dtype=dtype)
        for i in numbers:
            if i in mine and (piece := self._pieces[i]) is not None:
                start = flat.start_of[id(piece.parameter)]
                whole[start + piece.low : start + piece.high] = mine[i][key]
        ring_all_gather(whole, flat.share(whole, self._me).clone(), self._group)
        for i in numbers:
            if isinstance(state.get(i, {}).get(key), torch.dtype):
                parameter = self._parameters[i]
                start = flat.start_of[id(parameter)]
                state[i][key] = whole[start : start + parameter.numel()].view(parameter.shape).clone()


@dataclass
class _Piece:
    """Elements low to high of a parameter, which lie in this rank's share; `part` is what the optimizer gets."""

    parameter: nn.Parameter
    low: int
    high: int
    part: nn.Parameter

    def cut(self, key: str, value):
        """This piece's part of a state tensor of the whole parameter; a step count is everybody's."""
        if key != "step" and isinstance(value, Tensor) and value.shape == self.parameter.shape:
            return value.reshape(-1)[self.low : self.high].clone()
        return value.clone() if isinstance(value, Tensor) else value


def _is_cut(key: str, value, piece: _Piece) -> bool:
    return key != "step" and isinstance(value, Tensor) and value.shape == piece.part.shape


class _Flat:
    """One memory for the parameters of one dtype, padded to n equal shares."""

    def __init__(self, parameters: list[nn.Parameter], n: int):
        self.parameters, self.n = parameters, n
        total = sum(p.numel() for p in parameters)
        self.memory = torch.zeros(-(-total // n) * n, dtype=parameters[0].dtype)
        self.start_of, start = {}, 0
        for parameter in parameters:
            place = self.memory[start : start + parameter.numel()].view(parameter.shape)
            place.copy_(parameter.detach())
            parameter.data = place
            self.start_of[id(parameter)] = start
            start += parameter.numel()

    def share(self, memory: Tensor, rank: int) -> Tensor:
        return memory.view(self.n, -1)[rank]

    def pieces_of(self, rank: int) -> list[_Piece]:
        size = len(self.memory) // self.n
        pieces = []
        for parameter in self.parameters:
            start = self.start_of[id(parameter)]
            low, high = max(rank * size - start, 0), min((rank + 1) * size - start, parameter.numel())
            if low < high:
                part = nn.Parameter(self.memory[start + low : start + high], parameter.requires_grad)
                pieces.append(_Piece(parameter, low, high, part))
        return pieces

    def check_storage(self) -> None:
        for parameter in self.parameters:
            expected = self.memory.data_ptr() + self.start_of[id(parameter)] * self.memory.element_size()
            if parameter.data_ptr() != expected and parameter.numel():
                raise RuntimeError(
                    f"a parameter of shape {list(parameter.shape)} has moved to other memory since the "
                    "ShardedOptimizer was built (module.to, .data = ...): build the optimizer after that"
                )
