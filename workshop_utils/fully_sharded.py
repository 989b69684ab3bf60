"""Fully sharded data parallel by hand (ZeRO stage 3). Notebook 04 teaches it.

    model = FullyShardedDataParallel(net)               # from here on a rank holds 1/n of the parameters
    optimizer = torch.optim.Adam(model.parameters())    # and of their gradients and moments
    loss_of(model(images), labels).backward()
    model.finish_gradient_sync()
    optimizer.step()

Parameters are gathered, used and freed *unit* by unit, a unit being a layer or a block:

    forward    all-gather the unit's parameters, compute, free them
    backward   all-gather them again, compute, free them, reduce-scatter the gradients

A rank sends 3 S (n-1)/n bytes per step, 2 with reshard_after_forward=False; S is the parameters' bytes, padding
included. Under compute_dtype the gathers send that dtype and the reduce-scatter sends the parameters' own.

Bytes that a rank holds, for Psi float32 parameters on n ranks with Adam: 4 Psi/n parameters, 4 Psi/n gradients and
8 Psi/n moments, 16 Psi/n in all; and while it computes, the full parameters and gradients of a unit or two.
compute_dtype=torch.bfloat16 leaves the 16 Psi/n (float32 gradients need no bfloat16 copy), and halves the rest.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5.3;
Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), section 3.
"""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from workshop_utils.agreement import check_same
from workshop_utils.data_parallel import broadcast_parameters
from workshop_utils.flat_shard import FlatShard, StandIn, Use
from workshop_utils.ring_in_fsdp import RingReduceScatter, use_ring_reduce_scatter

__all__ = ["FullyShardedDataParallel", "RingReduceScatter", "Unit", "use_ring_reduce_scatter"]


class FullyShardedDataParallel(nn.Module):
    """Wraps a module so that its parameters, their gradients and the optimizer's state are divided over the ranks.

    unit_types             a module of one of these types, the outermost where they are nested, is a unit with all
                           parameters inside it. What no unit owns, and what two units share (tied weights), forms
                           the root unit: the whole module. An nn.MultiheadAttention is always a unit, as it uses its
                           out_proj's weight without calling out_proj.
    compute_dtype          torch.bfloat16 or torch.float16: full parameters, and floats that enter a unit or the
                           model, are cast to it. The model's output stays in it.
    reshard_after_forward  False: a unit stays whole from its forward to its backward. Sends less, holds more.

    `parameters()` are the shards: one-dimensional, in the module's dtype. So are their gradients, which are averages
    over the ranks. Parameters and buffers start as rank 0's. A unit that no rank used has gradient None.

    All ranks use the same units in the same order: where one rank uses another, they wait for each other. What a unit
    computes leaves it in tensors (or tuples, lists, dicts of them) that its forward returns. Checkpointing
    (torch.utils.checkpoint, use_reentrant=False): make the checkpointed block a unit, otherwise one unit more is
    whole at a time. torch.nn.utils.clip_grad_norm_ sees this rank's shards only: sum the squares over the ranks.

    Raises ValueError on all ranks if they wrap different modules or divide them differently.
    """

    holds_process_group = True  # ranks that had to leave their group name such objects: build them again

    def __init__(
        self,
        module: nn.Module,
        *,
        unit_types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding),
        compute_dtype: torch.dtype | None = None,
        reshard_after_forward: bool = True,
    ):
        super().__init__()
        _check_arguments(module, unit_types, compute_dtype)
        broadcast_parameters(module)
        self.module = module
        self.compute_dtype, self.reshard_after_forward = compute_dtype, reshard_after_forward
        self._state_keys = list(module.state_dict())
        self._parameter_keys = [key for key, _ in module.named_parameters(remove_duplicate=False)]
        divided = _divide(module, (*unit_types, nn.MultiheadAttention))
        options = f"compute_dtype={compute_dtype}, reshard_after_forward={reshard_after_forward}"
        check_same([options, *(f"unit {_name_of(unit, module)!r}" for unit in divided)])
        self.units = [Unit(self, unit, uses) for unit, uses in divided.items()]
        for channel, flat in enumerate(self._flat_shards(), start=1):
            flat.channel = channel  # so that ranks which disagree on what comes next mix nothing up
        self.shards = nn.ParameterList(flat.shard for flat in self._flat_shards())
        self._finish_is_due = False
        _watch_optimizers(self)

    def forward(self, *args, **kwargs):
        """The module's own forward, on this rank's part of the batch."""
        return self.module(*args, **kwargs)

    def finish_gradient_sync(self) -> None:
        """Call it after the last backward of a step, before optimizer.step(). No full parameter is left after it."""
        self._finish_is_due = False
        self._start_over()

    def full_parameter_bytes(self) -> int:
        """Bytes of full parameters that this rank holds now, read from their storages."""
        return sum(flat.full.untyped_storage().nbytes() for flat in self._flat_shards())

    def full_state_dict(self) -> dict[str, Tensor]:
        """The plain module's state_dict on every rank: same keys, order, shapes and dtypes. Every rank calls it."""
        tensor_of = {
            use[:2]: tensor
            for flat in self._flat_shards()
            for uses, tensor in zip(flat.uses, flat.gather_parameters())
            for use in uses
        }
        state = self.module.state_dict()  # buffers only: the parameters were taken out
        for key in self._state_keys:
            if key in self._parameter_keys:
                path, _, attribute = key.rpartition(".")
                state[key] = tensor_of[self.module.get_submodule(path), attribute]
            state.move_to_end(key)
        return state

    def _flat_shards(self) -> list[FlatShard]:
        return [flat for unit in self.units for flat in unit.flat_shards]

    def _start_over(self) -> None:
        """No unit is whole or in backward, and the next forward makes a new graph."""
        for unit in self.units:
            unit.free()
        for flat in self._flat_shards():
            flat.new_graph()


class Unit:
    """A module whose parameters are gathered and freed together, by hooks around its forward and its backward."""

    def __init__(
        self, model: FullyShardedDataParallel, module: nn.Module, uses: dict[nn.Parameter, list[Use]]
    ):
        self.model, self.name, self.is_root = model, _name_of(module, model.module), module is model.module
        self.in_backward = False
        kinds: dict[tuple, dict[nn.Parameter, list[Use]]] = {}
        for parameter, uses_of_one in uses.items():
            kinds.setdefault((parameter.dtype, parameter.requires_grad), {})[parameter] = uses_of_one
        self.flat_shards = [FlatShard(kind, model.compute_dtype, dist.group.WORLD) for kind in kinds.values()]
        module.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.after_forward, always_call=True)  # after an exception too

    def gather(self) -> None:
        """Make the parameters whole, where they are not."""
        for flat in self.flat_shards:
            flat.gather()

    def free(self) -> None:
        """Only the shards are left."""
        self.in_backward = False
        for flat in self.flat_shards:
            flat.free()

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict):
        """Gather, and cast what comes in. Also runs in the second forward that activation checkpointing makes."""
        if self.is_root and not _backward_is_running():
            self.model._start_over()
        self.gather()
        dtype = self.model.compute_dtype
        if dtype is not None:
            return tree_map_only(
                Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
            )

    def after_forward(self, module: nn.Module, args: tuple, output) -> None:
        """Free, unless backward waits for this very unit; be told when backward gets to an output."""
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if torch.is_grad_enabled():
            for tensor in outputs:
                tensor.register_hook(self.before_backward)
            trainable = any(flat.shard.requires_grad for flat in self.flat_shards)
            if not self.model.reshard_after_forward or (trainable and not outputs and output is not None):
                return  # with no tensor to watch, backward would come unseen
        if not self.in_backward:
            self.free()

    def before_backward(self, gradient: Tensor) -> None:
        """An output's gradient is complete, so this unit is next. Autograd runs a graph in the order of its making,
        backwards: the unit before has ended, and what `_Gathered` did not free (frozen parameters) can go."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "FullyShardedDataParallel cannot differentiate twice: leave out create_graph=True"
            )
        self.model._finish_is_due = True
        for unit in self.model.units:
            if unit.in_backward and not (unit is self or unit.is_root or self.is_root):
                unit.free()
        self.in_backward = True
        self.gather()


def _divide(root: nn.Module, unit_types) -> dict[nn.Module, dict[nn.Parameter, list[Use]]]:
    """Unit -> its parameters and their uses; the root first. A parameter that two units use is the root's."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    uses: dict[nn.Parameter, dict[tuple, Use]] = {}

    def walk(module: nn.Module, path: str, unit: nn.Module | None) -> None:
        if unit is None and isinstance(module, unit_types):
            unit = module
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(root if unit is None else unit)
                use = Use(module, attribute, path + attribute)
                uses.setdefault(parameter, {}).setdefault(use[:2], use)  # a module may have several paths
        for name, child in module.named_children():
            walk(child, f"{path}{name}.", unit)

    walk(root, "", None)
    units: dict[nn.Module, dict[nn.Parameter, list[Use]]] = {root: {}}
    for parameter, found in owners.items():
        owner = found.pop() if len(found) == 1 else root
        units.setdefault(owner, {})[parameter] = list(uses[parameter].values())
    return units


def _name_of(module: nn.Module, root: nn.Module) -> str:
    return next(name for name, found in root.named_modules() if found is module)


def _backward_is_running() -> bool:
    return torch._C._current_graph_task_id() != -1


def _watch_optimizers(model: FullyShardedDataParallel) -> None:
    """Make optimizer.step() on the model's shards an error where finish_gradient_sync() was forgotten."""
    watched = weakref.ref(model)

    def before_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        model = watched()
        if model is not None and model._finish_is_due:
            shards = set(model.shards)
            if any(p in shards for group in optimizer.param_groups for p in group["params"]):
                raise RuntimeError("call finish_gradient_sync() after backward, before optimizer.step()")

    weakref.finalize(model, register_optimizer_step_pre_hook(before_step).remove)


def _check_arguments(module, unit_types, compute_dtype) -> None:
    if not dist.is_initialized():
        raise RuntimeError("FullyShardedDataParallel needs a process group: build it on the ranks")
    if any(isinstance(value, StandIn) for part in module.modules() for value in vars(part).values()):
        raise ValueError("this module was sharded before, so its parameters are gone: build a new one")
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in unit_types):
        raise ValueError(f"unit_types must be module classes, such as (nn.Linear,), got {unit_types!r}")
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype must be a float dtype, such as torch.bfloat16, got {compute_dtype}")
