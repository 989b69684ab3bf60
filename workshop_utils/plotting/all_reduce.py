"""Figures of notebook 02: an all-reduce step by step, and collectives seen on pictures.

A function draws one figure and returns it; only `plot_all_reduce_step` draws on axes that it is given.
Shape letters: R ranks, H height, W width of a picture.
"""

from fractions import Fraction

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path

from workshop_utils.plotting import INK, MUTED, PAPER, rank_color
from workshop_utils.schedules import Snapshot, Transfer, num_chunks, simulate

_CELL = 1.0  # width of what one rank holds of one chunk
_PITCH_X = 1.62  # from one rank's column to the next
_HEIGHT = 0.56


# An all-reduce, step by step


def plot_all_reduce_step(ax, algorithm: str, world_size: int, step: int, *, details: bool = True) -> None:
    """Draw on `ax` what every rank holds after `step` steps, and the messages of that step as arrows.

    A column is a rank, a row is a chunk. A slot is filled once that rank's numbers are in the chunk; a heavy
    border means the chunk holds every rank's. `details` adds the bytes each rank has sent so far, in units of S.
    """
    snapshots = simulate(algorithm, world_size)
    snapshot = snapshots[step]
    pitch_y = _pitch_y(algorithm, world_size)
    for rank in range(world_size):
        _draw_rank(ax, snapshot, rank, pitch_y, details)
    _draw_arrows(ax, snapshot, world_size, pitch_y)
    left, right, bottom, top = _extent(algorithm, world_size, details)
    if len(snapshot.held[0]) > 1:
        for chunk in range(len(snapshot.held[0])):
            ax.text(
                -1.0, -chunk * pitch_y, f"chunk {chunk}", ha="right", va="center", color=MUTED, fontsize=8
            )
    ax.text(
        left, top - 0.08, _step_title(snapshots, step), ha="left", va="top", fontweight="bold", fontsize=11
    )
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.axis("off")


def all_reduce_step_figure(algorithm: str, world_size: int, step: int) -> Figure:
    """One step on a figure of its own, at most 11 inches wide, outside pyplot: what the stepper shows."""
    left, right, bottom, top = _extent(algorithm, world_size, details=True)
    inches = min(0.85, 11 / (right - left))
    figure = Figure(
        figsize=((right - left) * inches, (top - bottom) * inches), layout="none", facecolor="white"
    )
    plot_all_reduce_step(figure.add_axes((0, 0, 1, 1)), algorithm, world_size, step)
    return figure


def plot_all_reduce_steps(algorithm: str, world_size: int) -> Figure:
    """All steps of an all-reduce side by side."""
    num_steps = len(simulate(algorithm, world_size)) - 1
    left, right, bottom, top = _extent(algorithm, world_size, details=False)
    width, height = 0.47 * (right - left), 0.47 * (top - bottom)
    columns = max(1, min(int(12 // width), -(-num_steps // 2)))  # two rows, one for each half, where they fit
    rows = max(1, -(-num_steps // columns))
    figure = plt.figure(figsize=(width * columns, height * rows), layout="none")
    for index in range(num_steps):
        row, column = divmod(index, columns)
        ax = figure.add_axes((column / columns, 1 - (row + 1) / rows, 1 / columns, 1 / rows))
        plot_all_reduce_step(ax, algorithm, world_size, index + 1, details=False)
    return figure


def _pitch_y(algorithm: str, world_size: int) -> float:
    """From one chunk's row to the next: room for the arrows that pass over other columns, at any step."""
    lanes = max(_assign_lanes(_arcs(s))[1] for s in simulate(algorithm, world_size))
    return _HEIGHT + 0.22 + 0.17 * lanes


def _extent(algorithm: str, world_size: int, details: bool) -> tuple[float, float, float, float]:
    """left, right, bottom, top of the drawing in its own units."""
    chunks, pitch_y = num_chunks(algorithm, world_size), _pitch_y(algorithm, world_size)
    bottom = -(chunks - 1) * pitch_y - _HEIGHT / 2 - (0.65 if details else 0.25)
    left = -1.0 if chunks == 1 else -1.9 if details else -2.25
    return left, max((world_size - 1) * _PITCH_X + 1.1, left + 6.5), bottom, pitch_y + 0.45


def describe_step(algorithm: str, world_size: int, step: int) -> str:
    """The same step in words, for those who do not see the figure."""
    snapshots = simulate(algorithm, world_size)
    snapshot = snapshots[step]
    if snapshot.step is None:
        return f"Start: each of the {world_size} ranks holds only its own numbers."
    sentences = [_describe(t, len(snapshot.held[0])) for t in snapshot.step.transfers]
    complete = [sum(all(c) for c in rank) for rank in snapshot.held]
    total = len(snapshot.held[0])
    done = ", ".join(f"rank {r} has {c} of {total}" for r, c in enumerate(complete))
    return f"{_step_title(snapshots, step)}. {' '.join(sentences)} Complete chunks: {done}."


def _describe(t: Transfer, num_chunks: int) -> str:
    if num_chunks == 1:
        what = "everything it holds"
    else:
        what = ("chunk " if len(t.chunks) == 1 else "chunks ") + ", ".join(map(str, t.chunks))
    return f"Rank {t.src} sends {what} to rank {t.dst}, which {'adds' if t.adds else 'keeps'} it."


def _step_title(snapshots: list[Snapshot], step: int) -> str:
    phase = snapshots[step].step.phase if step else "before the first message"
    return f"Step {step} of {len(snapshots) - 1}: {phase}" if step else f"Start: {phase}"


def _draw_rank(ax, snapshot: Snapshot, rank: int, pitch_y: float, details: bool) -> None:
    world_size, left = len(snapshot.held), rank * _PITCH_X - _CELL / 2
    slot = _CELL / world_size
    for chunk, sources in enumerate(snapshot.held[rank]):
        bottom = -chunk * pitch_y - _HEIGHT / 2
        slots = [Rectangle((left + source * slot, bottom), slot, _HEIGHT) for source in range(world_size)]
        colors = [rank_color(source) if times else PAPER for source, times in enumerate(sources)]
        ax.add_collection(PatchCollection(slots, facecolors=colors, edgecolors="white", linewidths=0.8))
        for source, times in enumerate(sources):
            if times and world_size <= 5:  # narrower slots have no room for a digit
                x = left + (source + 0.5) * slot
                ax.text(x, bottom + _HEIGHT / 2, source, ha="center", va="center", color="white", fontsize=7)
        full = all(times == 1 for times in sources)
        edge, width = (INK, 2.0) if full else (MUTED, 0.6)
        ax.add_patch(Rectangle((left, bottom), _CELL, _HEIGHT, fill=False, edgecolor=edge, linewidth=width))
    y = pitch_y - _HEIGHT / 2 - 0.06
    ax.text(
        rank * _PITCH_X, y, f"rank {rank}", ha="center", color=rank_color(rank), fontweight="bold", fontsize=9
    )
    if details:
        y = -(len(snapshot.held[rank]) - 1) * pitch_y - _HEIGHT / 2 - 0.2
        ax.text(
            rank * _PITCH_X, y, f"sent {_units(snapshot.sent[rank])}", ha="center", va="center", fontsize=8
        )
        ax.text(
            rank * _PITCH_X,
            y - 0.26,
            f"got {_units(snapshot.received[rank])}",
            ha="center",
            va="center",
            fontsize=8,
        )


def _units(share: Fraction) -> str:
    return f"{float(share):.2f} S" if share else "nothing"


def _is_wrap(t: Transfer, world_size: int) -> bool:
    """The ring's closing message goes off one side of the figure and comes in on the other."""
    return world_size > 2 and t.src == world_size - 1 and t.dst == 0 and len(t.chunks) == 1


def _arcs(snapshot: Snapshot) -> list[tuple[int, int, int]]:
    """(chunk, src, dst) of every message that must pass over other columns."""
    step, world_size = snapshot.step, len(snapshot.held)
    if step is None:
        return []
    ring = len(step.transfers) == world_size
    return [
        (chunk, t.src, t.dst)
        for t in step.transfers
        for chunk in t.chunks
        if abs(t.src - t.dst) > 1 and not (ring and _is_wrap(t, world_size))
    ]


def _assign_lanes(arcs: list[tuple[int, int, int]]) -> tuple[dict, int]:
    """A height for each arc so that arcs of one row do not lie on each other: ({arc: lane}, lanes needed)."""
    lanes: dict[tuple[int, int, int], int] = {}
    for arc in sorted(arcs, key=lambda a: (a[0], abs(a[1] - a[2]), a[1])):
        chunk, low, high = arc[0], min(arc[1:]), max(arc[1:])
        taken = {
            lane for (c, s, d), lane in lanes.items() if c == chunk and min(s, d) <= high and low <= max(s, d)
        }
        lanes[arc] = next(i for i in range(len(arcs)) if i not in taken)
    return lanes, max(lanes.values(), default=-1) + 1


def _draw_arrows(ax, snapshot: Snapshot, world_size: int, pitch_y: float) -> None:
    if snapshot.step is None:
        return
    lanes, _ = _assign_lanes(_arcs(snapshot))
    for t in snapshot.step.transfers:
        for chunk in t.chunks:
            y, a, b = -chunk * pitch_y, t.src * _PITCH_X, t.dst * _PITCH_X
            lane = lanes.get((chunk, t.src, t.dst))
            if lane is not None:
                height = y + _HEIGHT / 2 + 0.14 + 0.17 * lane
                sign = 1 if b > a else -1
                _arrow(ax, [(a + 0.22 * sign, y + _HEIGHT / 2), (a + 0.22 * sign, height),
                            (b - 0.22 * sign, height), (b - 0.22 * sign, y + _HEIGHT / 2)], t.src)  # fmt: skip
            elif abs(t.src - t.dst) > 1:  # the ring closes
                _arrow(ax, [(a + _CELL / 2, y), (a + _CELL / 2 + 0.42, y)], t.src)
                _arrow(ax, [(b - _CELL / 2 - 0.42, y), (b - _CELL / 2, y)], t.src)
            else:
                sign = 1 if b > a else -1
                _arrow(ax, [(a + sign * _CELL / 2, y), (b - sign * _CELL / 2, y)], t.src)


def _arrow(ax, points: list[tuple[float, float]], src: int) -> None:
    ax.add_patch(
        FancyArrowPatch(path=Path(points), arrowstyle="-|>", mutation_scale=9, linewidth=1.6,
                        color=rank_color(src), shrinkA=0, shrinkB=0)
    )  # fmt: skip


# Collectives on pictures


def plot_collective(title: str, before: list, by_hand: list, by_torch: list) -> Figure:
    """What each rank holds: before, after the hand-written collective, and after torch's.

    Each list has one entry per rank: a picture [H, W], the rank's own share of one [H / R, W], or None.
    """
    world_size, blocks = len(before), {"before": before, "by hand": by_hand, "by torch": by_torch}
    figure = plt.figure(figsize=(10.2, 1.7), layout="none")
    figure.text(0.012, 0.97, title, va="top", fontweight="bold", fontsize=11)
    height = max(
        p.shape[0] * (world_size if p.shape[0] != p.shape[1] else 1) for p in before if p is not None
    )
    top_value = max(float(p.max()) for block in blocks.values() for p in block if p is not None)
    for b, (name, pictures) in enumerate(blocks.items()):
        left = 0.012 + b * 0.334
        figure.text(left, 0.80, name, va="top", color=INK, fontsize=9)
        for rank, picture in enumerate(pictures):
            width = 0.282 / world_size
            ax = figure.add_axes((left + rank * (width + 0.008), 0.05, width, 0.5))
            _draw_picture(ax, rank, world_size, picture, height, top_value)
    return figure


def _draw_picture(ax, rank: int, world_size: int, picture, height: int, top_value: float) -> None:
    canvas = torch.full((height, height), float("nan"))
    if picture is not None:
        first = 0 if picture.shape[0] == height else rank * height // world_size
        canvas[first : first + picture.shape[0]] = picture
    ax.imshow(canvas.numpy(), cmap="gray_r", vmin=0, vmax=top_value)
    ax.set(facecolor=PAPER, xticks=[], yticks=[])
    ax.set_title(f"rank {rank}", color=rank_color(rank), fontsize=8, loc="center", pad=3)
    for side in ax.spines.values():
        side.set(visible=True, color=rank_color(rank), linewidth=1.2)
    if picture is None:
        ax.text(height / 2, height / 2, "nothing", ha="center", va="center", color=MUTED, fontsize=8)
