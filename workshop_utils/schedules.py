"""Who sends what to whom, step by step, in each all-reduce. Pure Python: no process and no tensor.

Notebook 02 draws from it, and tests/test_schedules.py holds it against what collectives.py really sends.

The tensor (S bytes) is cut into C equal chunks: C = n for the ring, the largest power of two up to n for
halving-doubling, 1 for naive and tree. n is the world size. In one step a rank sends at most one message and
receives at most one, which is what a full-duplex link of its own can carry at a time. So the cost in the
alpha-beta model is read off a schedule: per step, alpha plus beta times the bytes of its largest message.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

Held = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Transfer:
    """One message: `src` sends its `chunks` to `dst`, which adds them to its own, or takes them over."""

    src: int
    dst: int
    chunks: tuple[int, ...]
    adds: bool


@dataclass(frozen=True)
class Step:
    """The messages that travel at the same time, and what this part of the algorithm is called."""

    phase: str
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Snapshot:
    """What every rank holds after some steps.

    held[rank][chunk][source]: how many times source's numbers are in rank's chunk (finished: 1 everywhere).
    sent, received: per rank, so far, in units of S. `step` is the step that led here, None at the start.
    """

    step: Step | None
    held: Held
    sent: tuple[Fraction, ...]
    received: tuple[Fraction, ...]


def _naive(n: int) -> Iterator[Step]:
    for src in range(1, n):
        yield Step("reduce", (Transfer(src, 0, (0,), adds=True),))
    for dst in range(1, n):
        yield Step("broadcast", (Transfer(0, dst, (0,), adds=False),))


def _tree(n: int) -> Iterator[Step]:
    distances = [1 << i for i in range((n - 1).bit_length())]
    for d in distances:
        pairs = [(low, low + d) for low in range(0, n - d, 2 * d)]
        yield Step("reduce", tuple(Transfer(high, low, (0,), adds=True) for low, high in pairs))
    for d in reversed(distances):
        pairs = [(low, low + d) for low in range(0, n - d, 2 * d)]
        yield Step("broadcast", tuple(Transfer(low, high, (0,), adds=False) for low, high in pairs))


def _ring(n: int) -> Iterator[Step]:
    for k in range(n - 1):
        moves = tuple(Transfer(r, (r + 1) % n, ((r - 1 - k) % n,), adds=True) for r in range(n))
        yield Step("reduce-scatter", moves)
    for k in range(n - 1):
        moves = tuple(Transfer(r, (r + 1) % n, ((r - k) % n,), adds=False) for r in range(n))
        yield Step("all-gather", moves)


def _halving_doubling(n: int) -> Iterator[Step]:
    p = num_chunks("halving-doubling", n)
    everything = tuple(range(p))
    folded = range(p, n)  # ranks beyond the power of two hand their numbers in first and get the sum last
    if folded:
        yield Step("fold in", tuple(Transfer(r, r - p, everything, adds=True) for r in folded))
    distances = [1 << i for i in range((p - 1).bit_length())]
    for d in reversed(distances):
        moves = tuple(Transfer(r, r ^ d, _block(r ^ d, d), adds=True) for r in range(p))
        yield Step("reduce-scatter by halving", moves)
    for d in distances:
        moves = tuple(Transfer(r, r ^ d, _block(r, d), adds=False) for r in range(p))
        yield Step("all-gather by doubling", moves)
    if folded:
        yield Step("hand out", tuple(Transfer(r - p, r, everything, adds=False) for r in folded))


def _block(rank: int, size: int) -> tuple[int, ...]:
    """The aligned block of `size` chunks that holds chunk number `rank`."""
    start = rank // size * size
    return tuple(range(start, start + size))


_SCHEDULES = {"naive": _naive, "tree": _tree, "ring": _ring, "halving-doubling": _halving_doubling}
ALGORITHMS = tuple(_SCHEDULES)


def num_chunks(algorithm: str, world_size: int) -> int:
    """Into how many equal chunks the algorithm cuts the tensor."""
    if algorithm == "ring":
        return world_size
    return 1 << (world_size.bit_length() - 1) if algorithm == "halving-doubling" else 1


def schedule(algorithm: str, world_size: int) -> list[Step]:
    """The steps of an all-reduce in order; empty for one rank. Raises ValueError for an unknown name."""
    if algorithm not in _SCHEDULES:
        raise ValueError(f"unknown algorithm {algorithm!r}: choose one of {', '.join(ALGORITHMS)}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    return list(_SCHEDULES[algorithm](world_size))


def so_far(algorithm: str, world_size: int, step: int) -> tuple[int, Fraction]:
    """What the first `step` steps cost: (messages one after another, S that they carry), the factors of alpha and beta S.

    A step takes as long as its largest message. After the last step these are the factors of network.py's formulas.
    """
    chunks = num_chunks(algorithm, world_size)
    done = schedule(algorithm, world_size)[:step]
    carried = sum(max(len(t.chunks) for t in each.transfers) for each in done)
    return len(done), Fraction(carried, chunks)


def simulate(algorithm: str, world_size: int) -> list[Snapshot]:
    """What every rank holds at the start and after each step: len(schedule) + 1 snapshots."""
    steps = schedule(algorithm, world_size)
    chunks, ranks = num_chunks(algorithm, world_size), range(world_size)
    held: Held = tuple(tuple(tuple(int(s == r) for s in ranks) for _ in range(chunks)) for r in ranks)
    zero = (Fraction(0),) * world_size
    snapshots = [Snapshot(None, held, zero, zero)]
    for step in steps:
        snapshots.append(_apply(step, snapshots[-1], chunks))
    return snapshots


def _apply(step: Step, before: Snapshot, chunks: int) -> Snapshot:
    """One step: every message carries what its sender held before the step."""
    held = [list(rank) for rank in before.held]
    sent, received = list(before.sent), list(before.received)
    for t in step.transfers:
        for chunk in t.chunks:
            incoming, own = before.held[t.src][chunk], held[t.dst][chunk]
            held[t.dst][chunk] = tuple(a + b for a, b in zip(own, incoming)) if t.adds else incoming
        sent[t.src] += Fraction(len(t.chunks), chunks)
        received[t.dst] += Fraction(len(t.chunks), chunks)
    return Snapshot(step, tuple(map(tuple, held)), tuple(sent), tuple(received))
