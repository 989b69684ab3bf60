"""Our four all-reduces beside gloo's own, from 1 KB to 64 MB on 4 ranks."""

from functools import partial

import torch
import torch.distributed as dist
from cells import milliseconds, number, ratio, section, table
from turns import slowest, take_turns

from workshop_utils import collectives, start_ranks

TITLE = "All-reduce: ours beside gloo's"
WORLD_SIZE = 4
SIZES_BYTES = (1_000, 8_000, 64_000, 256_000, 1_000_000, 4_000_000, 8_000_000, 16_000_000, 64_000_000)
OURS = {
    "ring": collectives.ring_all_reduce_,
    "naive": collectives.naive_all_reduce_,
    "tree": collectives.tree_all_reduce_,
    "halving-doubling": collectives.halving_doubling_all_reduce_,
}


def run(sizes_bytes=SIZES_BYTES) -> dict:
    """A row for each size."""
    with start_ranks(WORLD_SIZE) as ranks:
        rows = [row(size, slowest(ranks.run(measure, size, rounds_for(size)))) for size in sizes_bytes]
    return section(
        TITLE,
        f"{WORLD_SIZE} ranks with one thread each, float32. All take turns within a round; a barrier before each; "
        "the time is the slowest rank's. gloo: the median. Ours: its time divided by gloo's in the same round.",
        table(["size", "rounds", "gloo", *OURS], rows),
    )


def row(size_bytes: int, times_s: list[list[float]]) -> list:
    """times_s: of gloo and of ours, one after the other."""
    size = human(size_bytes)
    ratios = [ratio(ours, times_s[0], f"our {name}, {size}", "gloo") for name, ours in zip(OURS, times_s[1:])]
    return [size, number(len(times_s[0])), milliseconds(times_s[0]), *ratios]


def human(size_bytes: int) -> str:
    return f"{size_bytes // 1_000_000} MB" if size_bytes >= 1_000_000 else f"{size_bytes // 1000} KB"


def rounds_for(size_bytes: int) -> int:
    """More rounds for small tensors, which scatter more."""
    return max(15, min(101, 400_000_000 // size_bytes | 1))


def measure(size_bytes: int, rounds: int) -> list[list[float]]:
    """On a rank."""
    tensor = torch.zeros(size_bytes // 4)
    contestants = [dist.all_reduce, *OURS.values()]
    return take_turns(
        [partial(all_reduce_, tensor) for all_reduce_ in contestants], rounds, before=dist.barrier
    )
