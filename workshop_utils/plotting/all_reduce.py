"""Figures of notebook 02: an all-reduce step by step, and collectives seen on pictures.

A function draws one figure and returns it; only `plot_all_reduce_step` draws on axes that it is given.
Shape letters: R ranks, H height, W width of a picture.
"""

from fractions import Fraction
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path

from workshop_utils.network import ALL_REDUCE_S, Link
from workshop_utils.plotting import INK, MUTED, PAPER, rank_color
from workshop_utils.schedules import Snapshot, Transfer, num_chunks, schedule, simulate, so_far

EMULATED_LINK = Link(latency_s=100e-6, bandwidth_bytes_per_s=25e6)  # 200 Mb/s, as the notebook emulates
_CLOCK_INCHES = 0.95
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
    _draw_held(ax, snapshot, pitch_y)
    for rank in range(world_size):
        _name_rank(ax, snapshot, rank, pitch_y, details)
    _draw_arrows(ax, snapshot, world_size, pitch_y)
    left, right, bottom, top = _extent(algorithm, world_size, details)
    if len(snapshot.held[0]) > 1:
        for chunk in range(len(snapshot.held[0])):
            ax.text(
                -1.0,
                -chunk * pitch_y,
                f"chunk {chunk}",
                ha="right",
                va="center",
                color=MUTED,
                fontsize=9 if details else 8,
            )
    ax.text(
        left + 0.1,
        top - 0.08,
        _step_title(snapshots, step),
        ha="left",
        va="top",
        fontweight="bold",
        fontsize=11,
    )
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.axis("off")


def all_reduce_step_figure(
    algorithm: str, world_size: int, step: int, size_bytes: float = 8_000_000, link: Link = EMULATED_LINK
) -> Figure:
    """One step on a figure of its own, at most 10 x 8.2 inches, outside pyplot: what the stepper shows.

    Under the chunks: the clock of a link like `link` for each rank, for a tensor of `size_bytes`.
    """
    left, right, bottom, top = _extent(algorithm, world_size, details=True)
    inches = min(0.85, 10 / (right - left), 7.2 / (top - bottom))
    width, height = (right - left) * inches, (top - bottom) * inches + _CLOCK_INCHES
    figure = Figure(figsize=(width, height), layout="none", facecolor="white")
    above = _CLOCK_INCHES / height
    plot_all_reduce_step(figure.add_axes((0, above, 1, 1 - above)), algorithm, world_size, step)
    ax = figure.add_axes((0.15 / width, 0.55 / height, 1 - 0.3 / width, 0.3 / height))
    _draw_clock(ax, algorithm, world_size, step, size_bytes, link)
    return figure


def _draw_clock(ax, algorithm: str, world_size: int, step: int, size_bytes: float, link: Link) -> None:
    """A box for each step, as long as it takes, on a line that ends where naive ends."""
    steps = len(schedule(algorithm, world_size))
    ends_s = [_seconds_after(algorithm, world_size, k, size_bytes, link) for k in range(steps + 1)]
    for k, (began_s, ended_s) in enumerate(pairwise(ends_s), start=1):
        color = MUTED if k < step else INK if k == step else "white"
        box = Rectangle(
            (began_s, 0.06), ended_s - began_s, 0.9, facecolor=color, edgecolor=INK, linewidth=0.8
        )
        ax.add_patch(box)
    naive_s = ALL_REDUCE_S["naive"](size_bytes, world_size, link)
    ax.axhline(0.06, color=INK, linewidth=0.8)
    messages, share = so_far(algorithm, world_size, step)
    spent = f"{messages} α + {float(share):.2f} S β = " if step else ""
    rate = f"{8 * link.bandwidth_bytes_per_s / 1e6:g} Mb/s for each rank"
    sent_bytes = float(sum(simulate(algorithm, world_size)[step].sent)) * size_bytes
    below = {"va": "top", "transform": ax.transAxes, "fontsize": 10}
    clock = f"Clock: {spent}{1e3 * ends_s[step]:.0f} of {1e3 * ends_s[-1]:.0f} ms"
    ax.text(0, -0.2, clock, fontweight="bold", **below)
    ax.text(1, -0.2, f"naive: {1e3 * naive_s:.0f} ms", ha="right", **below)
    ax.text(0, -1.0, f"S = {size_bytes / 1e6:g} MB, {rate}; all have sent {sent_bytes / 1e6:.0f} MB", **below)
    ax.set(xlim=(0, naive_s), ylim=(0, 1))
    ax.axis("off")


def _seconds_after(algorithm: str, world_size: int, step: int, size_bytes: float, link: Link) -> float:
    messages, share = so_far(algorithm, world_size, step)
    return messages * link.latency_s + float(share) * size_bytes / link.bandwidth_bytes_per_s


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
    left = -1.0 if chunks == 1 else -2.25
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


def _draw_held(ax, snapshot: Snapshot, pitch_y: float) -> None:
    """A column of chunks for each rank. One collection for all slots, one for all borders: a widget redraws this."""
    world_size = len(snapshot.held)
    slot, slots, colors, borders, full = _CELL / world_size, [], [], [], []
    for rank, chunks in enumerate(snapshot.held):
        for chunk, sources in enumerate(chunks):
            left, bottom = rank * _PITCH_X - _CELL / 2, -chunk * pitch_y - _HEIGHT / 2
            borders.append(_box(left, bottom, _CELL))
            full.append(all(times == 1 for times in sources))
            for source, times in enumerate(sources):
                slots.append(_box(left + source * slot, bottom, slot))
                colors.append(rank_color(source) if times else PAPER)
                if times and world_size <= 5:  # narrower slots have no room for a digit
                    x, y = left + (source + 0.5) * slot, bottom + _HEIGHT / 2
                    ax.text(x, y, source, ha="center", va="center", color="white", fontsize=7)
    ax.add_collection(PolyCollection(slots, facecolors=colors, edgecolors="white", linewidths=0.8))
    edges, widths = [INK if f else MUTED for f in full], [2.0 if f else 0.6 for f in full]
    ax.add_collection(PolyCollection(borders, facecolors="none", edgecolors=edges, linewidths=widths))


def _box(left: float, bottom: float, width: float) -> list[tuple[float, float]]:
    right, top = left + width, bottom + _HEIGHT
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def _name_rank(ax, snapshot: Snapshot, rank: int, pitch_y: float, details: bool) -> None:
    x, y = rank * _PITCH_X, pitch_y - _HEIGHT / 2 - 0.06
    ax.text(x, y, f"rank {rank}", ha="center", color=rank_color(rank), fontweight="bold", fontsize=10)
    if details:
        y = -(len(snapshot.held[rank]) - 1) * pitch_y - _HEIGHT / 2 - 0.2
        counts = f"sent {_units(snapshot.sent[rank])}\ngot {_units(snapshot.received[rank])}"
        ax.text(x, y + 0.1, counts, ha="center", va="top", fontsize=9, linespacing=1.4)


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
