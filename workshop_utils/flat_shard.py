"""What a unit of `FullyShardedDataParallel` is made of: some parameters as one flat tensor, of which a rank keeps 1/n.

    n      ranks in the group       full   all parameters one after another, zeros at the end until n divides their number
    shard  this rank's n-th part    view   one parameter's place in `full`, in the parameter's shape

Between uses the storage of `full` has 0 bytes. The tensors that autograd saved still refer to it, and have numbers
again once it is gathered: that is how a parameter can be gone between forward and backward. Notebook 04 teaches it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from workshop_utils.ring import ring_all_gather, ring_reduce_scatter

Use = tuple[nn.Module, str]  # a parameter is used as this attribute of this module


class FlatShard:
    """Parameters of one dtype, all trainable or all frozen, that are gathered, freed and reduced together.

    `shard` is the nn.Parameter that the optimizer gets: one dimension, ceil(numel / n) elements. `full` has
    `compute_dtype` if that is given and the parameters are floats. Takes the parameters out of their modules.
    """

    def __init__(
        self,
        uses: dict[nn.Parameter, list[Use]],
        compute_dtype: torch.dtype | None,
        group: dist.ProcessGroup,
    ):
        self.uses, self.group = list(uses.values()), group
        self.shapes = [parameter.shape for parameter in uses]
        first = next(iter(uses))
        numel = sum(parameter.numel() for parameter in uses)
        n = group.size()
        self.full = first.detach().new_zeros(-(-numel // n) * n)
        for place, parameter in zip(self.places(self.full), uses):
            place.copy_(parameter.detach())
        mine = self.full.view(n, -1 if numel else 0)[group.rank()].clone()
        self.shard = nn.Parameter(mine, requires_grad=first.requires_grad)
        if compute_dtype is not None and first.is_floating_point():
            self.full = self.full.to(compute_dtype)
        self.full_bytes = self.full.nbytes
        self.views = [
            place.data for place in self.places(self.full)
        ]  # .data: with a version counter of its own
        self._of_this_forward: tuple[Tensor, ...] | None = None
        for module, name in (use for uses_of_one in self.uses for use in uses_of_one):
            del module._parameters[name]
        self.free()

    def places(self, flat: Tensor) -> list[Tensor]:
        """Where each parameter is in a flat tensor, in the parameter's shape."""
        parts = flat[: sum(shape.numel() for shape in self.shapes)].split([s.numel() for s in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def gather(self) -> None:
        """Fill `full` from all ranks' shards, if it is empty, and give the modules their parameters."""
        storage = self.full.untyped_storage()
        if storage.nbytes() != self.full_bytes:
            storage.resize_(self.full_bytes)
            ring_all_gather(self.full, self.shard.detach().to(self.full.dtype), self.group)
        self._put(self._tensors_to_compute_with())

    def free(self) -> None:
        """Give the memory of `full` back. The modules keep stand-ins, which say what is wrong when they are used."""
        self.full.untyped_storage().resize_(0)
        self._put([StandIn.of(view, *use[0]) for view, use in zip(self.views, self.uses)])

    def forget_forward(self) -> None:
        """The next forward starts a new graph."""
        self._of_this_forward = None

    def _tensors_to_compute_with(self):
        """Views of `full`. Trainable ones have a history, the same for all uses in one forward."""
        if not (torch.is_grad_enabled() and self.shard.requires_grad):
            return self.views
        if self._of_this_forward is None:
            self._of_this_forward = _Gathered.apply(self.shard, self)
        return self._of_this_forward

    def _put(self, tensors) -> None:
        for tensor, uses in zip(tensors, self.uses):
            for module, name in uses:
                setattr(module, name, tensor)

    def reduce(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        """This rank's part of the average of all ranks' gradients, in the shard's dtype. Frees `full`.

        The sum is formed in the shard's dtype too (float32 under bf16 compute). A parameter without a gradient
        counts as zeros, as does the padding.
        """
        self.free()
        flat = self.shard.new_zeros(self.full.numel())
        for place, gradient in zip(self.places(flat), gradients):
            if gradient is not None:
                place.copy_(gradient)
        mine = torch.empty_like(self.shard, requires_grad=False)
        ring_reduce_scatter(mine, flat, self.group)
        return mine.div_(self.group.size())

    def gather_exactly(self) -> list[Tensor]:
        """New tensors with all parameters in the shard's own dtype, whatever `full` holds."""
        flat = self.shard.new_empty(self.full.numel())
        ring_all_gather(flat, self.shard.detach(), self.group)
        return [place.clone() for place in self.places(flat)]


class _Gathered(torch.autograd.Function):
    """The shard goes in, the full parameters come out. So backward ends with a reduce-scatter, and autograd adds its
    result to shard.grad. Autograd calls it once all uses of the parameters have given their gradients."""

    @staticmethod
    def forward(ctx, shard: Tensor, flat_shard: FlatShard) -> tuple[Tensor, ...]:
        ctx.flat_shard = flat_shard
        ctx.set_materialize_grads(False)
        return tuple(view.data for view in flat_shard.views)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        return ctx.flat_shard.reduce(gradients), None


class StandIn(torch.Tensor):
    """A parameter while it is sharded: shape, dtype and device, but no numbers. Computing with it is an error."""

    _ANSWERS = ("__get__", "size", "dim", "numel", "stride", "is_floating_point", "element_size", "__repr__")

    @classmethod
    def of(cls, view: Tensor, module: nn.Module, name: str) -> "StandIn":
        stand_in = view.data.as_subclass(cls)
        stand_in._owner = f"{type(module).__name__}.{name}"
        return stand_in

    def __repr__(self) -> str:
        return f"<{self._owner}, sharded, shape {tuple(self.shape)}>"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in cls._ANSWERS:
            return super().__torch_function__(function, types, args, kwargs or {})
        owner = next((a._owner for a in args if isinstance(a, cls)), "a parameter")
        raise RuntimeError(
            f"{owner} was used while it is sharded ({function.__name__}). A unit's parameters are there only during "
            "its own module's forward: here another module reads them, or forward was bypassed. Add the type of the "
            "module that reads them to unit_types."
        )
