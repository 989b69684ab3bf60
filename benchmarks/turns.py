"""How every comparison measures: the contestants take turns within a round, so that they share the machine's moods."""

import time
from collections.abc import Callable, Sequence

WARM_UP = 3  # rounds


def take_turns(
    steps: Sequence[Callable[[], object]],
    rounds: int,
    *,
    repeats: int = 1,
    before: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds of each step in each round: times_s[step][round].

    Who begins changes from round to round: whoever comes after another finds other caches. A turn is `repeats`
    calls, for steps that are too short to time alone; `before` runs before each turn, outside the time (on ranks, a
    barrier).
    """
    times_s = [[] for _ in steps]
    for i in range(WARM_UP + rounds):
        for k in range(len(steps)):
            who = (i + k) % len(steps)
            before()
            times_s[who].append(seconds_of(steps[who], repeats))
    return [times[WARM_UP:] for times in times_s]


def seconds_of(step: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats`."""
    began_s = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began_s) / repeats


def slowest(by_rank: Sequence[list[list[float]]]) -> list[list[float]]:
    """From what `take_turns` gave on each rank: of each step, in each round, the time of the rank that took longest."""
    return [[max(times) for times in zip(*of_ranks, strict=True)] for of_ranks in zip(*by_rank, strict=True)]
