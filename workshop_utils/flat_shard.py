"""Some parameters as one flat tensor, of which every rank keeps a part: what fully_sharded.py is built from.

    n      ranks in the group       full   all parameters one after another, then zeros until n divides their number
    shard  this rank's n-th part    view   one parameter's place in `full`, in the parameter's shape

Between uses, the storage of `full` has 0 bytes. Tensors that autograd saved still refer to it, and find their numbers
there once it is filled again: so a parameter can be gone between forward and backward. Notebook 04 teaches it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from workshop_utils.ring import ring_all_gather, ring_reduce_scatter


class Use(NamedTuple):
    """A parameter is that attribute of that module; `name` is what the whole model calls it."""

    module: nn.Module
    attribute: str
    name: str


class FlatShard:
    """Parameters of one unit that have one dtype and are all trainable or all frozen.

    shard  nn.Parameter, [ceil(numel / n)], in the parameters' dtype: the master copy, for the optimizer
    full   [n * ceil(numel / n)], in `compute_dtype` if that is given and the parameters are floats

    uses: the parameters, and where each is used. They are taken out of their modules, which from now on have a
    plain tensor in their place: a view of `full`, or a stand-in while `full` is empty.
    """

    def __init__(
        self,
        uses: dict[nn.Parameter, list[Use]],
        compute_dtype: torch.dtype | None,
        group: dist.ProcessGroup,
    ):
        self.group, self.n, self.channel = group, group.size(), 0
        self.uses = list(uses.values())
        self.shapes = [parameter.shape for parameter in uses]
        self.numel = sum(shape.numel() for shape in self.shapes)
        first = next(iter(uses))
        self.shard = nn.Parameter(
            first.new_empty(-(-self.numel // self.n)), requires_grad=first.requires_grad
        )
        self.set_shard(list(uses))
        dtype = compute_dtype if compute_dtype is not None and first.is_floating_point() else first.dtype
        self.full = torch.empty(self.n * self.shard.numel(), dtype=dtype, device=first.device)
        self.full_bytes = self.full.nbytes
        self._views = [place.data for place in self._places(self.full)]
        self._stand_ins = [StandIn.of(view, use[0].name) for view, use in zip(self._views, self.uses)]
        self._of_this_graph: tuple[Tensor, ...] | None = None
        for use in (use for uses_of_one in self.uses for use in uses_of_one):
            del use.module._parameters[use.attribute]
        self.free()

    @torch.no_grad()
    def set_shard(self, parameters: list[Tensor]) -> None:
        """Keep this rank's part of the parameters. Padding is zero, and stays zero: so is its gradient."""
        flat = self._flatten(parameters)
        self.shard.copy_(flat.view(self.n, self.shard.numel())[self.group.rank()])

    def gather(self) -> None:
        """Fill `full` from all ranks' shards, unless it is full, and give the modules their parameters."""
        storage = self.full.untyped_storage()
        if storage.nbytes() != self.full_bytes:
            storage.resize_(self.full_bytes)
            ring_all_gather(self.full, self.shard.detach().to(self.full.dtype), self.group, self.channel)
        self._put(self._tensors_to_compute_with())

    def free(self) -> None:
        """Give the memory of `full` back."""
        self.full.untyped_storage().resize_(0)
        self._put(self._stand_ins)

    def new_graph(self) -> None:
        """What is computed from now on belongs to another graph, with a reduce-scatter of its own."""
        self._of_this_graph = None

    def reduce(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        """The shard's gradient: this rank's part of the average over the ranks, in the shard's dtype. Frees `full`.

        The sum is formed in that dtype too: float32 where bfloat16 computes. A parameter that got no gradient
        counts as zero.
        """
        self.free()
        gradient = torch.empty_like(self.shard, requires_grad=False)
        ring_reduce_scatter(gradient, self._flatten(gradients), self.group, self.channel)
        return gradient.div_(self.n)

    def gather_parameters(self) -> list[Tensor]:
        """The parameters as new tensors, in the shard's dtype whatever `full` has."""
        flat = self.shard.new_empty(self.full.numel())
        ring_all_gather(flat, self.shard.detach(), self.group, self.channel)
        return [place.clone() for place in self._places(flat)]

    def _places(self, flat: Tensor) -> list[Tensor]:
        parts = flat[: self.numel].split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def _flatten(self, tensors: list[Tensor | None] | tuple[Tensor | None, ...]) -> Tensor:
        """The tensors (zeros for None) in the order of `full`, padded, in the shard's dtype."""
        flat = self.shard.detach().new_empty(self.n * self.shard.numel())
        flat[self.numel :].zero_()
        for place, tensor in zip(self._places(flat), tensors):
            place.zero_() if tensor is None else place.copy_(tensor)
        return flat

    def _tensors_to_compute_with(self) -> list[Tensor] | tuple[Tensor, ...]:
        if not (torch.is_grad_enabled() and self.shard.requires_grad):
            return self._views
        if self._of_this_graph is None:
            self._of_this_graph = _Gathered.apply(self.shard, self)
        return self._of_this_graph

    def _put(self, tensors) -> None:
        for tensor, uses in zip(tensors, self.uses):
            for use in uses:
                setattr(use.module, use.attribute, tensor)


class _Gathered(torch.autograd.Function):
    """For autograd, the full parameters are computed from the shard. So it sums up the gradients of all uses of the
    parameters, calls this backward once, and accumulates what comes out in shard.grad."""

    @staticmethod
    def forward(ctx, shard: Tensor, flat_shard: FlatShard) -> tuple[Tensor, ...]:
        ctx.flat_shard = flat_shard
        ctx.set_materialize_grads(False)
        return tuple(view.data for view in flat_shard._views)  # .data: new tensors in the same memory

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        return ctx.flat_shard.reduce(gradients), None


class StandIn(torch.Tensor):
    """A parameter that is sharded: tells its shape, dtype and device. To compute with it is an error."""

    _TELLS = ("__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point")

    @classmethod
    def of(cls, view: Tensor, name: str) -> "StandIn":
        """A stand-in in the memory of `view`, which may be empty."""
        stand_in = view.data.as_subclass(cls)
        stand_in.name_in_model = name
        return stand_in

    def __repr__(self) -> str:
        return f"<{self.name_in_model}, sharded: shape {tuple(self.shape)}, {self.dtype}>"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in cls._TELLS:
            return super().__torch_function__(function, types, args, kwargs or {})
        name = next((a.name_in_model for a in args if isinstance(a, cls)), "a parameter")
        raise RuntimeError(
            f"{name} was used while it is sharded, by {function.__name__}. A unit's parameters are whole only while "
            "its module's forward runs, and here forward was not called: another module reads them. Put the type of "
            "the module that reads them, which must contain this one, in unit_types."
        )
