"""What communication costs, as figures: seconds against bytes, and measured beside predicted. Notebook 02 on.

A function draws one figure and returns it. Nothing here belongs to a rank, so no line has a rank's colour.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator

from workshop_utils.plotting import MUTED

_BAR, _MARK = "#44546a", "#d9b84a"


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
