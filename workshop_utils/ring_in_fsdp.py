"""Our ring reduce-scatter inside torch's `fully_shard`. Notebook 04 teaches it.

gloo's own reduce-scatter is an all-reduce that throws the rest away: it sends 2 S (n-1)/n where the ring sends 1.
Works with torch 2.11 and newer.
"""

import torch
import torch.distributed as dist
from torch import nn

from workshop_utils.ring import ring_reduce_scatter


class RingReduceScatter:
    """What `set_custom_reduce_scatter` wants: `allocate`, and a call with torch's arguments of a reduce-scatter.

    Sums (ReduceOp.SUM), averages (AVG) and scaled sums (PREMUL_SUM) on any group; ValueError for another operation.
    """

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for an input or output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op,
        async_op: bool = False,
    ):
        """output_tensor: this rank's n-th part of the reduced input_tensor. With async_op, something to wait() for."""
        factor = _factor(op, group)
        ring_reduce_scatter(output_tensor, input_tensor, group)
        if factor != 1.0:
            output_tensor.mul_(factor)
        return _Done() if async_op else None


class _Done:
    """The work is done already."""

    def wait(self) -> bool:
        return True


def use_ring_reduce_scatter(fsdp_model: nn.Module) -> None:
    """Let every FSDP module inside `fsdp_model` reduce-scatter its gradients with our ring.

    fsdp_model: what torch's `fully_shard` returned. Raises TypeError if it holds no FSDP module.
    """
    modules = [m for m in fsdp_model.modules() if hasattr(m, "set_custom_reduce_scatter")]
    if not modules:
        raise TypeError(
            f"{type(fsdp_model).__name__} holds no FSDP module: call torch's fully_shard on it first"
        )
    for module in modules:
        module.set_custom_reduce_scatter(RingReduceScatter())


def _factor(op, group: dist.ProcessGroup) -> float:
    """What the sum must be multiplied with."""
    if op == dist.ReduceOp.SUM:
        return 1.0
    if op == dist.ReduceOp.AVG:
        return 1.0 / group.size()
    raise ValueError(f"RingReduceScatter can sum (SUM), average (AVG) and scale (PREMUL_SUM), not {op}")
