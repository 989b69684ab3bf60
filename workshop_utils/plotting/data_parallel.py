"""Figures of notebook 03: who computes and who sends when, who sees which sample, what data parallelism costs.

A function draws one figure and returns it. Ranks have their colours; what belongs to no rank has none of them.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from workshop_utils.bucket_model import NOTEBOOK_LAYERS, predict_timeline, step_s
from workshop_utils.network import LINKS
from workshop_utils.plotting import INK, MUTED, PAPER, rank_color

Timeline = Sequence[tuple[str, float, float]]  # DataParallel.timeline: (label, began_s, ended_s)

_COMPUTE, _SEND = ("forward", "backward"), "bucket"
_CURVES = ("#44546a", "#c99a2e", "#7b3f61", "#3f8f8a", "#8a8a94")  # no rank's colours


# Compute and communication of one step


def plot_timelines(title: str, panels: dict[str, Sequence[Timeline]]) -> Figure:
    """One panel per label, with two rows per rank: what it computes, and the buckets that it sends meanwhile.

    panels[label][rank] is that rank's timeline, in seconds since its forward began. All panels share one axis.
    """
    world_size = max(len(timelines) for timelines in panels.values())
    figure, axes = plt.subplots(
        len(panels),
        1,
        sharex=True,
        squeeze=False,
        figsize=(9, len(panels) * (0.55 + 0.46 * world_size) + 0.8),
    )
    end_s = max(ended for timelines in panels.values() for t in timelines for _, _, ended in t)
    for ax, (label, timelines) in zip(axes[:, 0], panels.items()):
        for rank, timeline in enumerate(timelines):
            _draw_rank(ax, rank, timeline, end_s)
        ax.set(title=label, ylim=(2.6 * world_size - 0.35, -0.6), xlim=(0, 1.02e3 * end_s))
        ax.set_yticks([2.6 * rank + 0.5 for rank in range(world_size)])
        ax.set_yticklabels([f"rank {rank}" for rank in range(world_size)])
        ax.tick_params(left=False)
        for rank, tick in enumerate(ax.get_yticklabels()):
            tick.set_color(rank_color(rank))
    axes[-1, 0].set_xlabel("ms since the forward began")
    figure.legend(handles=_legend_of_timelines(), loc="outside upper right", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _draw_rank(ax, rank: int, timeline: Timeline, end_s: float, color: str | None = None) -> None:
    color, top = color or rank_color(rank), 2.6 * rank
    for label, began_s, ended_s in timeline:
        left, width = 1e3 * began_s, 1e3 * (ended_s - began_s)
        if label in _COMPUTE:
            alpha = 0.35 if label == "forward" else 1.0
            ax.add_patch(Rectangle((left, top), width, 1.0, facecolor=color, alpha=alpha, linewidth=0))
        elif label.startswith(_SEND):
            ax.add_patch(
                Rectangle(
                    (left, top + 1.05),
                    width,
                    1.0,
                    facecolor="white",
                    edgecolor=color,
                    hatch="////",
                    linewidth=1,
                )
            )
            if width > 0.035 * 1e3 * end_s:
                number = label.removeprefix(_SEND).strip()
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                ax.text(
                    left + width / 2,
                    top + 1.55,
                    number,
                    ha="center",
                    va="center",
                    color=INK,
                    fontsize=9 if color else 7,
                    bbox=box,
                )


def _legend_of_timelines() -> list[Patch]:
    return [
        Patch(facecolor=MUTED, alpha=0.35, label="forward"),
        Patch(facecolor=MUTED, label="backward"),
        Patch(facecolor="white", edgecolor=MUTED, hatch="////", label="all-reduce of a bucket"),
    ]


# The same as the formulas see it


def _draw_predicted(
    figure: Figure, panels: dict[str, Timeline], title: str, measured_s: dict[str, float]
) -> None:
    """One panel per label: what each rank computes, and below it the buckets that it sends. All share one axis."""
    width, height = figure.get_size_inches()
    end_s = max(step_s(timeline) for timeline in panels.values())
    for row, (label, timeline) in enumerate(panels.items()):
        bottom = height - 0.35 - 1.43 * (row + 1)
        ax = figure.add_axes((0.95 / width, (bottom + 0.05) / height, 1 - 1.15 / width, 1.0 / height))
        _draw_rank(ax, 0, timeline, end_s, _CURVES[0])
        seen = f" (measured: {1e3 * measured_s[label]:.0f} ms)" if label in measured_s else ""
        ax.set_title(f"{label}: {1e3 * step_s(timeline):.0f} ms{seen}")
        ax.set(ylim=(2.15, -0.1), xlim=(0, 1.02e3 * end_s))
        ax.set_yticks([0.5, 1.55], ["computes", "sends"])
        ax.tick_params(left=False, labelbottom=row == len(panels) - 1)
    ax.set_xlabel("ms since the forward began")
    figure.legend(handles=_legend_of_timelines(), loc="upper right", ncols=3)
    figure.text(0.01, 1 - 0.1 / height, title, ha="left", va="top", fontweight="bold", fontsize=11)


def plot_bucket_timeline(
    compute_s: float, link: str, world_size: int = 4, measured_s: dict[str, float] | None = None
) -> Figure:
    """One step of notebook 03's eight layers by formula, buckets of 1 MiB: a figure of pyplot's, for the notebook.

    compute_s: forward and backward. link: a name in LINKS. measured_s: {"off": seconds of a step, "on": seconds}.
    """
    panels = _predicted(compute_s, link, world_size)
    measured = {f"overlap {way}": time_s for way, time_s in (measured_s or {}).items()}
    figure = plt.figure(figsize=_timeline_inches(panels), layout="none")
    _draw_predicted(figure, panels, f"By formula: {world_size} ranks, {link}", measured)
    return figure


def bucket_timeline_figure(
    compute_s: float,
    link: str,
    world_size: int = 4,
    bucket_bytes: int = 2**20,
    shown: Sequence[str] = ("off", "on"),
) -> Figure:
    """The same on a figure of its own, outside pyplot: what the widget shows. shown: ("off", "on"), or one of them."""
    panels = _predicted(compute_s, link, world_size, bucket_bytes, shown)
    figure = Figure(figsize=_timeline_inches(panels), facecolor="white", layout="none")
    _draw_predicted(figure, panels, f"By formula: {world_size} ranks, {link}", {})
    return figure


def describe_bucket_timeline(
    compute_s: float, link: str, world_size: int, bucket_bytes: int, shown=("off", "on")
) -> str:
    """Both steps in words, whichever is shown."""
    off, on = _predicted(compute_s, link, world_size, bucket_bytes).values()
    buckets = sum(label.startswith(_SEND) for label, _, _ in on)
    sending_s = sum(ended - began for label, began, ended in on if label.startswith(_SEND))
    return (
        f"{buckets} buckets, {1e3 * sending_s:.3g} ms of sending beside {1e3 * compute_s:.3g} ms of computing. A step takes "
        f"{1e3 * step_s(off):.3g} ms without overlap and {1e3 * step_s(on):.3g} ms with it: "
        f"off / on = {step_s(off) / step_s(on):.2f}."
    )


def _predicted(compute_s, link, world_size, bucket_bytes=2**20, shown=("off", "on")) -> dict[str, Timeline]:
    settings = {"bucket_bytes": bucket_bytes, "world_size": world_size, "link": LINKS[link]}
    return {
        f"overlap {way}": predict_timeline(NOTEBOOK_LAYERS, compute_s, overlap=way == "on", **settings)
        for way in shown
    }


def _timeline_inches(panels) -> tuple[float, float]:
    return 9, 0.85 + 1.43 * len(panels)


# Who sees which sample


def plot_shards(title: str, rows: dict[str, Sequence[Sequence[int]]], num_samples: int) -> Figure:
    """One row per label: for each sample the ranks that see it, as colours; a cross where nobody does.

    rows[label][rank] is the list of that rank's sample indices in an epoch.
    """
    figure, ax = plt.subplots(figsize=(9, 0.9 + 0.5 * len(rows)))
    for y, shards in enumerate(rows.values()):
        for sample in range(num_samples):
            seen_by = [rank for rank, shard in enumerate(shards) for index in shard if int(index) == sample]
            _draw_sample(ax, sample, y, seen_by)
    ranks = range(max(len(shards) for shards in rows.values()))
    handles = [Patch(facecolor=rank_color(rank), label=f"rank {rank}") for rank in ranks]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.set(xlim=(-0.6, num_samples - 0.4), ylim=(len(rows) - 0.45, -0.55), title=title, xlabel="sample")
    ax.set_yticks(range(len(rows)))
    ax.set_yticklabels(list(rows))
    ax.set_xticks(range(0, num_samples, 2))
    ax.tick_params(left=False, bottom=False)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    return figure


def _draw_sample(ax, x: int, y: int, seen_by: list[int]) -> None:
    ax.add_patch(Rectangle((x - 0.42, y - 0.38), 0.84, 0.76, facecolor=PAPER, linewidth=0))
    for place, rank in enumerate(seen_by):
        width = 0.84 / len(seen_by)
        left = x - 0.42 + place * width
        ax.add_patch(
            Rectangle(
                (left, y - 0.38), width, 0.76, facecolor=rank_color(rank), edgecolor="white", linewidth=0.6
            )
        )
    if not seen_by:
        ax.text(x, y, "×", ha="center", va="center", color=INK, fontsize=11)


# Curves


def plot_losses(title: str, curves: dict[str, tuple], *, xlabel: str = "images seen") -> Figure:
    """{label: (x, losses)}. Every second curve is dashed, so that equal ones both show.

    The axis ends a little above where the curves begin: one that leaves it has diverged.
    """
    figure, ax = plt.subplots(figsize=(7.6, 3.6))
    top = 1.4 * max(losses[0] for _, losses in curves.values())
    for place, ((label, (x, losses)), color) in enumerate(zip(curves.items(), _CURVES)):
        ax.plot(x, losses, color=color, label=label, linestyle="--" if place % 2 else "-", linewidth=2)
    ax.set(title=title, xlabel=xlabel, ylabel="training loss", ylim=(0, float(top)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.grid(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_scaling(title: str, world_sizes, steps_per_s, shares, predicted_shares, *, cores: int) -> Figure:
    """Left: steps per second, n measured. Right: the share of a step that goes to communication, beside the formula.

    Lists with one entry for each of `world_sizes`. Where ranks exceed `cores`, the bars are pale.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1))
    x, names = np.arange(len(world_sizes)), [str(n) for n in world_sizes]
    alphas = [1.0 if n <= cores else 0.45 for n in world_sizes]
    for place, (rate, share, alpha) in enumerate(zip(steps_per_s, shares, alphas)):
        left.bar(place, rate, color=_CURVES[0], alpha=alpha, width=0.6)
        left.text(place, rate, f"{rate:.3g}", ha="center", va="bottom", fontsize=9)
        right.bar(place, 100 * share, color=_CURVES[0], alpha=alpha, width=0.6)
        predicted = 100 * predicted_shares[place]
        right.plot([place - 0.38, place + 0.38], [predicted] * 2, color=_CURVES[1], linewidth=3)
    left.set(title=title, ylabel="steps per second", ylim=(0, 1.15 * max(steps_per_s)))
    right.set(title="Communication", ylabel="% of the step", ylim=(0, 100))
    for ax in (left, right):
        ax.set_xticks(x, names)
        ax.set_xlabel("ranks")
    handles = [
        Patch(facecolor=_CURVES[0], label="measured"),
        Patch(facecolor=_CURVES[0], alpha=0.45, label="more ranks than cores"),
        Patch(facecolor=_CURVES[1], label="predicted"),
    ]
    right.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_links(
    title: str, bandwidths, compute_s: float, predicted_s: dict, measured_s: dict, marks: dict
) -> Figure:
    """Seconds of a step against the link's bytes per second, both logarithmic.

    predicted_s: {label: seconds for each of `bandwidths`}; measured_s: {label: (bandwidths, seconds)}, in the colour
    of the prediction of that label; marks: {name: bandwidth} of links to be named.
    """
    figure, ax = plt.subplots(figsize=(8.6, 4.2))
    for (label, times), color in zip(predicted_s.items(), _CURVES):
        ax.plot(bandwidths, times, color=color, label=f"{label}, predicted")
        if label in measured_s:
            ax.plot(*measured_s[label], "o", color=color, markeredgecolor="white", label=f"{label}, measured")
    ax.axhline(compute_s, color=MUTED, linestyle=":", label="compute alone, measured")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="bandwidth of each rank's link",
        ylabel="seconds per step",
        title=title,
    )
    ax.xaxis.set_major_locator(FixedLocator([12.5e6 * 10**k for k in range(6)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda rate, _: _bits(rate))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda time_s, _: f"{time_s:g} s" if time_s >= 1 else f"{1e3 * time_s:g} ms")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 1.6)
    for name, bandwidth in marks.items():
        ax.axvline(bandwidth, color=MUTED, linewidth=0.8, alpha=0.6)
        ax.text(bandwidth, high * 1.5, f"{name} ", rotation=90, ha="right", va="top", color=MUTED, fontsize=8)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _bits(bytes_per_s: float) -> str:
    rate = 8 * bytes_per_s
    return f"{rate / 1e12:g} Tb/s" if rate >= 1e12 else f"{rate / 1e9:g} Gb/s"
