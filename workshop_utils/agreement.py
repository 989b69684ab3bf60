"""Do all ranks hold the same model? Asked once, when something is built that would otherwise hang or mix numbers up.

Used by data_parallel.py and sharded_optimizer.py, notebook 03.
"""

from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workshop_utils.pieces import members
from workshop_utils.ring import ring_all_gather


def all_gather_bytes(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Every rank gets the bytes of all ranks of the group, in rank order; lengths may differ."""
    n = len(members(group)[0])
    lengths = torch.zeros(n, dtype=torch.int64)
    ring_all_gather(lengths, torch.tensor([len(data)]), group)
    rows = torch.zeros(n, int(lengths.max()), dtype=torch.uint8)
    mine = torch.zeros(rows.shape[1], dtype=torch.uint8)
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    ring_all_gather(rows, mine, group)
    return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths.tolist())]


def check_same(lines: Iterable[str], group: dist.ProcessGroup | None = None) -> None:
    """ValueError, on all ranks alike, naming the first rank and the first line that differ from the first rank's."""
    ranks, _ = members(group)
    by_rank = [data.decode().split("\n") for data in all_gather_bytes("\n".join(lines).encode(), group)]
    for rank, there in zip(ranks, by_rank):
        for first, other in zip_longest(by_rank[0], there):
            if first != other:
                raise ValueError(
                    f"the ranks do not hold the same model: rank {rank} has {other or 'nothing'}, where rank "
                    f"{ranks[0]} has {first or 'nothing'}. Build it from the same code and sizes on every rank."
                )


def describe_module(module: nn.Module) -> list[str]:
    """One line for each parameter and buffer; tied ones once, as in `named_parameters`."""
    parameters = [
        describe(f"parameter {name!r}", p) + ("" if p.requires_grad else ", frozen")
        for name, p in module.named_parameters()
    ]
    return parameters + [describe(f"buffer {name!r}", buffer) for name, buffer in module.named_buffers()]


def describe(what: str, tensor: Tensor) -> str:
    return f"{what} of shape {list(tensor.shape)} and dtype {str(tensor.dtype).removeprefix('torch.')}"
