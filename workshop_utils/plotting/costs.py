"""What communication costs, as figures: seconds against bytes, and measured beside predicted. Notebook 02 on.

A function draws one figure and returns it. Nothing here belongs to a rank, so no line has a rank's colour.
"""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from workshop_utils.network import ALL_REDUCE_S, LINKS, all_reduce_steps
from workshop_utils.plotting import MUTED

_BAR, _MARK = "#44546a", "#d9b84a"
ALGORITHM_STYLES = {  # (colour, line); a test keeps the colours apart for those who do not see all of them
    "naive": ("#26262e", ":"),
    "tree": ("#b5821a", "--"),
    "ring": ("#8b4a9c", "-"),
    "halving-doubling": ("#2f8f89", "-."),
}
_FASTEST_INCHES = (8.6, 4.8)


def plot_seconds(title: str, lines: dict, points: dict | None = None) -> Figure:
    """Seconds against bytes, both axes logarithmic. `lines` (predicted) and `points` (measured), by label, are
    {label: (sizes_bytes, times_s)}; the points of a label get the colour of its line.
    """
    points = points or {}
    figure, ax = plt.subplots(figsize=(7.2, 3.9))
    colors = plt.get_cmap("viridis_r")(np.linspace(0.18, 1, len(lines)))
    for (label, (sizes, times)), color in zip(lines.items(), colors):
        ax.plot(sizes, times, color=color, label=label)
        if label in points:
            ax.plot(*points[label], "o", color=color, markeredgecolor="white")
    ax.set(xscale="log", yscale="log", xlabel="bytes of one rank's tensor, S", ylabel="seconds", title=title)
    ax.xaxis.set_major_locator(FixedLocator([10**k for k in range(3, 12)]))
    ax.xaxis.set_major_formatter(lambda size, _: bytes_label(size))
    ax.yaxis.set_major_formatter(lambda time_s, _: _seconds(time_s))
    ax.grid(True)
    handles, labels = ax.get_legend_handles_labels()
    if points:
        handles.append(Line2D([], [], marker="o", linestyle="none", color=MUTED))
        labels.append("measured (lines: predicted)")
    ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_fastest(figure: Figure, world_size: int, link: str, size_bytes: float) -> None:
    """Seconds of each all-reduce against bytes, by network.py's formulas, and which one is fastest where.

    link: a name in LINKS. A vertical line marks `size_bytes`, and the legend ranks the four there. The two bands name the
    fastest of those written by hand in notebook 02, and of all four.
    """
    width, height = figure.get_size_inches()
    sizes = np.geomspace(1e3, 1e9, 121)
    times_s = {
        name: [cost(size, world_size, LINKS[link]) for size in sizes] for name, cost in ALL_REDUCE_S.items()
    }
    ax = figure.add_axes((0.85 / width, 1.45 / height, (width - 3.35) / width, 1 - 1.85 / height))
    here_s = {name: cost(size_bytes, world_size, LINKS[link]) for name, cost in ALL_REDUCE_S.items()}
    for name in sorted(here_s, key=here_s.get):
        color, line = ALGORITHM_STYLES[name]
        label = f"{_seconds(here_s[name])}  {name}"
        ax.plot(sizes, times_s[name], color=color, linestyle=line, linewidth=2.4, label=label)
        ax.plot([size_bytes], [here_s[name]], "o", color=color, markersize=7)
    ax.axvline(size_bytes, color=MUTED, linewidth=1)
    ax.set(xscale="log", yscale="log", xlim=(1e3, 1e9), ylabel="seconds")
    ax.set_title(f"{world_size:,} ranks, {link}")
    ax.xaxis.set(major_locator=FixedLocator([10**k for k in range(3, 10)]), minor_locator=NullLocator())
    ax.xaxis.set_major_formatter(lambda size, _: bytes_label(size))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda time_s, _: _seconds(time_s))
    ax.grid(True)
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        title=f"for {bytes_label(size_bytes)}",
        fontsize=10,
        alignment="left",
    )
    bands = figure.add_axes((0.85 / width, 0.45 / height, (width - 3.35) / width, 0.6 / height), sharex=ax)
    _draw_bands(bands, sizes, times_s)


def _draw_bands(ax, sizes, times_s: dict) -> None:
    """Two rows of colour with names: the fastest at each size, of the first three and of all."""
    rows = {
        "of all four": list(times_s),
        "of naive, tree, ring": [n for n in times_s if n != "halving-doubling"],
    }
    for row, (label, names) in enumerate(rows.items()):
        best = np.array([_first_of_fastest(names, times_s, i) for i in range(len(sizes))])
        starts = [0, *(np.flatnonzero(best[1:] != best[:-1]) + 1), len(sizes) - 1]
        for first, last in pairwise(starts):
            low, high, name = sizes[first], sizes[last], best[first]
            ax.add_patch(
                Rectangle((low, row), high - low, 0.86, color=ALGORITHM_STYLES[name][0], linewidth=0)
            )
            if np.log10(high / low) > 1.1 + 0.5 * (len(name) > 8):
                place = {"ha": "center", "va": "center", "color": "white", "fontweight": "bold"}
                ax.text(np.sqrt(low * high), row + 0.43, name, fontsize=10, **place)
        ax.text(1.02, row + 0.43, label, va="center", transform=ax.get_yaxis_transform(), fontsize=10)
    ax.set(ylim=(0, 2), yticks=[], xlabel="fastest, by bytes of one rank's tensor, S")
    ax.tick_params(bottom=False, labelbottom=False)
    for side in ax.spines.values():
        side.set_visible(False)


def _first_of_fastest(names: list[str], times_s: dict, i: int) -> str:
    """Equal to six digits is a tie: then the first in the list."""
    return min(names, key=lambda name: float(f"{times_s[name][i]:.5e}"))


def plot_fastest(world_size: int, link: str, size_bytes: float) -> Figure:
    """Which all-reduce is fastest where, as a figure of pyplot's: the static one for the notebook."""
    figure = plt.figure(figsize=_FASTEST_INCHES, layout="none")
    draw_fastest(figure, world_size, link, size_bytes)
    return figure


def fastest_figure(world_size: int, link: str, size_bytes: float) -> Figure:
    """The same on a figure of its own, outside pyplot: what the widget shows."""
    figure = Figure(figsize=_FASTEST_INCHES, facecolor="white", layout="none")
    draw_fastest(figure, world_size, link, size_bytes)
    return figure


def describe_fastest(world_size: int, link: str, size_bytes: float) -> str:
    """The fastest at this size in words, and what its time is made of."""
    here_s = {name: cost(size_bytes, world_size, LINKS[link]) for name, cost in ALL_REDUCE_S.items()}
    best_s = min(here_s.values())
    best = [name for name, time_s in here_s.items() if math.isclose(time_s, best_s)]
    latency_s = all_reduce_steps(best[0], world_size) * LINKS[link].latency_s
    found = f"{' and '.join(best)} {'is' if len(best) == 1 else 'are'} fastest"
    return (
        f"{bytes_label(size_bytes)} on {world_size:,} ranks, {link}: {found}, {_seconds(best_s)}. "
        f"{latency_s / best_s:.0%} of that is latency, the rest is bytes. Slowest: {max(here_s, key=here_s.get)}, "
        f"{_seconds(max(here_s.values()))}."
    )


def plot_predicted_measured(title: str, predicted_s: dict, measured_s: dict) -> Figure:
    """One bar per label as measured, and a mark where the formula puts it. Both are {label: seconds}."""
    figure, ax = plt.subplots(figsize=(7.2, 0.9 + 0.42 * len(measured_s)))
    longest = max([*predicted_s.values(), *measured_s.values()])
    for row, (label, time_s) in enumerate(measured_s.items()):
        ax.barh(row, time_s, color=_BAR, height=0.55, label="measured" if row == 0 else None)
        mark = {"label": "predicted"} if row == 0 else {}
        ax.plot([predicted_s[label]] * 2, [row - 0.38, row + 0.38], color=_MARK, linewidth=3, **mark)
        end = max(time_s, predicted_s[label]) + 0.015 * longest
        ax.text(
            end,
            row,
            f"{_seconds(time_s)}, {time_s / predicted_s[label]:.2f} of predicted",
            va="center",
            fontsize=9,
        )
    ax.set(
        yticks=range(len(measured_s)),
        yticklabels=list(measured_s),
        xlim=(0, 1.42 * longest),
        xlabel="seconds",
        title=title,
    )
    ax.invert_yaxis()
    ax.tick_params(left=False)
    ax.legend(loc="lower right")
    return figure


def plot_multihost(rows: list[dict]) -> Figure:
    """Step time against the link's rate, a panel for each strategy, from cluster/compare.py's rows.

    Marks are measured between throttled hosts and on an emulated link, lines are the formula for each.
    """
    strategies = sorted({row["strategy"] for row in rows})
    figure, axes = plt.subplots(1, len(strategies), figsize=(7.2, 3.4), sharey=True, squeeze=False)
    for ax, strategy in zip(axes[0], strategies):
        chosen = [row for row in rows if row["strategy"] == strategy and row["link_mbit"]]
        rates = [row["link_mbit"] for row in chosen]
        for name, measured, predicted, color, mark in (
            ("throttled hosts", "step_s", "predicted_s", _BAR, "o"),
            ("emulated link", "emulated_s", "emulated_predicted_s", _MARK, "s"),
        ):
            ax.plot(rates, [row[predicted] for row in chosen], color=color, label=f"{name}, formula")
            ax.plot(rates, [row[measured] for row in chosen], mark, color=color, label=f"{name}, measured")
        ax.set(xscale="log", yscale="log", xlabel="link, Mb/s each way", title=strategy)
        ax.xaxis.set_major_locator(FixedLocator(rates))
        ax.xaxis.set_minor_locator(FixedLocator([]))
        ax.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(FixedLocator([]))
        ax.yaxis.set_major_formatter(lambda time_s, _: _seconds(time_s))
        ax.grid(True)
    axes[0][0].set_ylabel("one step")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return figure


def bytes_label(size: float) -> str:
    """Three digits and a unit: 31.4 GB, 1.12 TB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.3g} B"


def _seconds(time_s: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if time_s >= factor:
            return f"{time_s / factor:.3g} {unit}"
    return f"{time_s:.3g} s"
