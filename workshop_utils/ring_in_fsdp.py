"""Our ring reduce-scatter inside torch's `fully_shard`. Notebook 04 teaches it.

    fully_shard(model, mesh=mesh)
    use_ring_reduce_scatter(model)

gloo's own reduce-scatter is an all-reduce of which it keeps a part: a rank sends 2 S (n-1)/n, the ring 1 S (n-1)/n.
So a training step of fully_shard sends 3 instead of 4. torch 2.11 or newer, tensors in CPU memory.
"""

import torch
import torch.distributed as dist
from torch import nn

from workshop_utils.ring import ring_reduce_scatter


class RingReduceScatter:
    """What `FSDPModule.set_custom_reduce_scatter` takes: it allocates memory, and reduces and scatters.

    It has the methods of torch's ReduceScatter, which is in a private module that takes a second to import.
    """

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """New memory of that size, for an input or an output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: "dist.ReduceOp | dist.ReduceOp.RedOpType",
        async_op: bool = False,
    ) -> dist.Work | None:
        """The i-th rank of `group` gets the i-th part of the ranks' inputs, reduced, in `output_tensor`.

        op: ReduceOp.SUM, AVG, or PREMUL_SUM with its factor; ValueError for any other. With async_op, returns a Work
        that is done already.
        """
        kind = getattr(op, "op", op)  # torch passes a ReduceOp, or its kind where that says everything
        if kind == dist.ReduceOp.PREMUL_SUM:
            input_tensor = input_tensor * op.__getstate__()[1]  # torch 2.11 has no other way to the factor
        elif kind not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(
                f"the ring can sum (SUM), average (AVG) and scale (PREMUL_SUM), but not {kind.name}"
            )
        ring_reduce_scatter(output_tensor, input_tensor, group)
        if kind == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())
        return _Done() if async_op else None


class _Done(dist.Work):
    """Work that was done before anybody could wait for it."""

    def wait(self, timeout=None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def use_ring_reduce_scatter(fsdp_model: nn.Module) -> None:
    """Make every FSDP module in `fsdp_model` reduce and scatter its gradients with our ring.

    fsdp_model: a model after torch's `fully_shard`, which returns it. TypeError if no part of it is sharded.
    """
    sharded = [module for module in fsdp_model.modules() if hasattr(module, "set_custom_reduce_scatter")]
    if not sharded:
        raise TypeError(
            f"no module in this {type(fsdp_model).__name__} is sharded: call torch's fully_shard on it first. "
            "Our own FullyShardedDataParallel has the ring already."
        )
    for module in sharded:
        module.set_custom_reduce_scatter(RingReduceScatter())
