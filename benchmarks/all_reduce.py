"""Our four all-reduces beside gloo's own, from 1 KB to 64 MB on 4 ranks."""

import statistics
import time

import torch
import torch.distributed as dist

from workshop_utils import collectives, start_ranks, sub_world

TITLE = "All-reduce: ours beside gloo's"
WORLD_SIZE = 4
SIZES_BYTES = [1_000, 8_000, 64_000, 256_000, 1_000_000, 4_000_000, 8_000_000, 16_000_000, 64_000_000]


def contestants() -> dict:
    return {
        "gloo": dist.all_reduce,
        "ring": collectives.ring_all_reduce_,
        "naive": collectives.naive_all_reduce_,
        "tree": collectives.tree_all_reduce_,
        "halving-doubling": collectives.halving_doubling_all_reduce_,
    }


def run() -> str:
    with start_ranks(WORLD_SIZE) as ranks:
        rows = [row(size, measure(ranks, WORLD_SIZE, list(contestants()), size)) for size in SIZES_BYTES]
    head = [f"| bytes | rounds | {' | '.join(contestants())} |", "|---:" * (2 + len(contestants())) + "|"]
    return (
        f"{WORLD_SIZE} ranks with one thread each, float32. All take turns within a round; a barrier before each; "
        "the time is the slowest rank's. gloo: the median in milliseconds. Ours: the median over the rounds of its "
        "time divided by gloo's in the same round, and between which two values the middle half of the rounds "
        "lies. Below 1 is faster than gloo.\n\n" + "\n".join(head + rows)
    )


def row(size_bytes: int, times_s: dict[str, list[float]]) -> str:
    cells = [f"{statistics.median(times_s['gloo']) * 1e3:.2f} ms"]
    for name in list(times_s)[1:]:
        ratios = [ours / gloo for ours, gloo in zip(times_s[name], times_s["gloo"])]
        low, median, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
    return f"| {human(size_bytes)} | {len(times_s['gloo'])} | {' | '.join(cells)} |"


def human(size_bytes: int) -> str:
    return f"{size_bytes // 1_000_000} MB" if size_bytes >= 1_000_000 else f"{size_bytes // 1000} KB"


def measure(ranks, world_size: int, names: list[str], size_bytes: int) -> dict[str, list[float]]:
    """Seconds of each round, of the rank that took longest. More rounds for small tensors, which scatter more."""
    rounds = max(15, min(101, 400_000_000 // size_bytes | 1))
    by_rank = ranks.run(take_turns, world_size, names, size_bytes, rounds)[:world_size]
    return {name: [max(times) for times in zip(*(times_s[name] for times_s in by_rank))] for name in names}


def take_turns(world_size: int, names: list[str], size_bytes: int, rounds: int) -> dict[str, list[float]]:
    """On a rank. Who begins changes from round to round: whoever comes after another finds other caches."""
    times_s = {name: [] for name in names}
    with sub_world(world_size) as inside:
        tensor = torch.zeros(size_bytes // 4)
        for i in range(rounds + 2) if inside else ():
            start = i % len(names)
            for name in names[start:] + names[:start]:
                all_reduce_ = contestants()[name]
                dist.barrier()
                began_s = time.perf_counter()
                all_reduce_(tensor)
                times_s[name].append(time.perf_counter() - began_s)
    return {name: times[2:] for name, times in times_s.items()}  # the first two rounds warm up
