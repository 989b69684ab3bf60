"""What all collectives need first: the ranks of a group, and a tensor cut into pieces. Used by collectives.py and ring.py."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist

from workshop_utils.point_to_point import Transfer


def members(group: dist.ProcessGroup | None) -> tuple[list[int], int]:
    """The group's ranks, as ranks of the default group, and this rank's place among them."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    rank = dist.get_rank()
    if rank not in ranks:
        raise ValueError(f"rank {rank} called a collective of a group it is not in: its ranks are {ranks}")
    return ranks, ranks.index(rank)


def place_of(rank: int, ranks: list[int]) -> int:
    """Where `rank` (of the default group) stands in the group."""
    if rank not in ranks:
        raise ValueError(f"rank {rank} is not in this group: its ranks are {ranks}")
    return ranks.index(rank)


@contextmanager
def flat_view(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in one dimension, contiguous; what is written there is in the tensor afterwards."""
    tensor = tensor.detach()
    flat = tensor.contiguous().view(-1)
    yield flat
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))


def edges_of(num_elements: int, n: int) -> list[int]:
    """Where n chunks begin, and where the last one ends: equal to within one element, nothing padded."""
    return [num_elements * i // n for i in range(n + 1)]


def chunks_of(flat: torch.Tensor, n: int) -> list[torch.Tensor]:
    """n pieces of `flat`, in order; some are empty if there are fewer elements than n."""
    return [flat[low:high] for low, high in pairwise(edges_of(flat.numel(), n))]


def segments_of(chunk: torch.Tensor, segment_bytes: int) -> list[torch.Tensor]:
    """Pieces of at most `segment_bytes`; none if the chunk is empty."""
    num_elements = max(1, segment_bytes // chunk.element_size())
    return list(chunk.split(num_elements)) if chunk.numel() else []


def wait_all(transfers: Iterable[Transfer]) -> None:
    """Start all of them (if `transfers` is a generator), then wait for all."""
    for transfer in list(transfers):
        transfer.wait()
