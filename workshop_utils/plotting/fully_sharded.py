"""Figures of notebook 04: the memory bill, full parameters alive along a step, and what communication takes.

Each function draws one figure that says one thing and returns it. Bytes are bytes: 1 GB = 10**9.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from workshop_utils.memory import BYTES_PER_PARAMETER, zero_bytes
from workshop_utils.plotting import INK, MUTED, rank_color
from workshop_utils.plotting.costs import bytes_label
from workshop_utils.plotting.single_device import KIND_COLORS

STAGES = ("one device, or DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3, FSDP")
DEVICE_BYTES = 80e9  # an A100 or H100 with the larger memory


def draw_memory_bill(
    figure: Figure, num_parameters: int, world_size: int, stage: int = 3, precision: str = "bf16-mixed"
) -> None:
    """A stacked bar of bytes per rank for each ZeRO stage, with one 80 GB device as a line where it is in sight.

    The chosen stage is framed, and its parts have their sizes written under the bars.
    """
    ax = figure.add_axes((0.215, 0.30, 0.745, 0.60))
    bills = [zero_bytes(s, num_parameters, world_size, precision) for s in range(len(STAGES))]
    left = [0.0] * len(STAGES)
    for kind in ("parameters", "gradients", "optimizer"):
        sizes = [bill[kind] for bill in bills]
        label = f"{kind} {bytes_label(bills[stage][kind])}"
        ax.barh(range(len(STAGES)), sizes, left=left, color=KIND_COLORS[kind], label=label, height=0.62)
        left = [start + size for start, size in zip(left, sizes)]
    ax.add_patch(Rectangle((0, stage - 0.37), left[stage], 0.74, fill=False, edgecolor=INK, linewidth=2))
    for row, total in enumerate(left):
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        weight = "bold" if row == stage else "normal"
        ax.text(total + 0.015 * left[0], row, bytes_label(total), va="center", bbox=white, fontweight=weight)
    if DEVICE_BYTES < 1.1 * left[0]:
        ax.axvline(DEVICE_BYTES, color=INK, linewidth=1, linestyle="--")
        ax.text(DEVICE_BYTES, len(STAGES) - 0.5, " 80 GB", ha="left", va="top", fontsize=9)
    ranks = f"{world_size:,} rank" + ("s" if world_size > 1 else "")
    ax.set(yticks=range(len(STAGES)), yticklabels=STAGES, xlim=(0, 1.18 * left[0]), ylim=(-0.6, 4.0))
    each = f"{sum(BYTES_PER_PARAMETER[precision])} bytes for each"
    ax.set(
        xlabel="bytes per rank", title=f"{_count(num_parameters)} parameters on {ranks}, {precision}: {each}"
    )
    ax.xaxis.set_major_formatter(lambda size, _: bytes_label(size) if size else "0")
    ax.invert_yaxis()
    ax.tick_params(left=False)
    figure.legend(ncols=3, loc="lower center", title=STAGES[stage])


def plot_memory_bill(
    num_parameters: int, world_size: int, stage: int = 3, precision: str = "bf16-mixed"
) -> Figure:
    """The bill as a figure of pyplot's: the static one for the notebook."""
    figure = plt.figure(figsize=(7.6, 3.6), layout="none")
    draw_memory_bill(figure, num_parameters, world_size, stage, precision)
    return figure


def memory_bill_figure(
    num_parameters: int, world_size: int, stage: int = 3, precision: str = "bf16-mixed"
) -> Figure:
    """The bill on a figure of its own, outside pyplot: what the widget shows."""
    figure = Figure(figsize=(7.6, 3.6), layout="none", facecolor="white")
    draw_memory_bill(figure, num_parameters, world_size, stage, precision)
    return figure


def describe_memory_bill(num_parameters: int, world_size: int, stage: int, precision: str) -> str:
    """The chosen stage in words, and from how many ranks on it fits."""
    bill = zero_bytes(stage, num_parameters, world_size, precision)
    parts = ", ".join(f"{kind} {bytes_label(size)}" for kind, size in bill.items())
    total = f"{STAGES[stage]}, {precision}: each of {world_size:,} holds {bytes_label(sum(bill.values()))} ({parts}). "
    on_one, on_two = (sum(zero_bytes(stage, num_parameters, n, precision).values()) for n in (1, 2))
    divided_bytes = 2 * (on_one - on_two)
    room_bytes = DEVICE_BYTES - (on_one - divided_bytes)
    if room_bytes < 0 or (room_bytes == 0 and divided_bytes):
        return f"{total}No number of 80 GB devices is enough at this stage."
    first = max(1, math.ceil(divided_bytes / room_bytes)) if divided_bytes else 1
    return f"{total}Devices of 80 GB are enough from {first:,} on; activations are not counted."


def plot_live_bytes(
    title: str, curves: dict[str, list[int]], labels: list[str], limits: dict[str, int]
) -> Figure:
    """Bytes of full parameters alive after each event of one step: a row per curve, all with the same axes.

    curves: {"rank 0": [bytes after event 0, 1, ...]}, a rank's in its colour. labels: what each event was. limits:
    {"largest unit": bytes}, drawn as dashed lines in each row.
    """
    figure, axes = plt.subplots(
        len(curves), 1, figsize=(8.4, 1.3 + 0.72 * len(curves)), sharex=True, sharey=True, squeeze=False
    )
    places = np.arange(len(labels))
    for ax, (name, bytes_alive) in zip(axes[:, 0], curves.items(), strict=True):
        color = rank_color(int(name.split()[1])) if name.startswith("rank ") else INK
        ax.bar(places, np.asarray(bytes_alive) / 1e3, width=1.0, color=color, linewidth=0)
        for limit in limits.values():
            ax.axhline(limit / 1e3, color=MUTED, linewidth=1, linestyle="--")
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set_ylim(0, 1.25 * max(max(limits.values()), *map(max, curves.values())) / 1e3)
    for label, limit in limits.items():
        axes[0, 0].text(
            1.005,
            limit / 1e3,
            f"{label}\n{limit / 1e3:,.0f} KB",
            va="center",
            fontsize=8,
            color=INK,
            transform=axes[0, 0].get_yaxis_transform(),
        )
    axes[-1, 0].set_xticks(places, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes[-1, 0].set_xlim(-0.5, len(labels) - 0.5)
    axes[0, 0].set_title(title)
    figure.supylabel("KB of full parameters", fontsize=9)
    return figure


def plot_communication_share(
    title: str, lines: dict, points: dict | None = None, *, xlabel: str, log: bool = False
) -> Figure:
    """The share of a step that communication takes, in %. lines (predicted) and points (measured) by label are
    {label: (x, shares between 0 and 1)}; points have the colour of their line.
    """
    points = points or {}
    figure, ax = plt.subplots(figsize=(7.2, 3.5))
    colors = plt.get_cmap("viridis_r")(np.linspace(0.18, 1, max(len(lines), 2)))
    for (label, (x, shares)), color in zip(lines.items(), colors):
        ax.plot(x, 100 * np.asarray(shares), color=color, label=label)
        if label in points:
            x, shares = points[label]
            ax.plot(x, 100 * np.asarray(shares), "o", color=color, markeredgecolor="white", markersize=7)
    ax.set(ylim=(0, 104), xlabel=xlabel, ylabel="% of a step", title=title)
    ticks = sorted({value for x, _ in lines.values() for value in x})
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if not log or len(ticks) <= 8:
        ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.grid(True)
    handles, names = ax.get_legend_handles_labels()
    if points:
        handles.append(Line2D([], [], marker="o", linestyle="none", color=MUTED))
        names.append("measured\n(lines: predicted)")
    ax.legend(handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_recorded_shares(recorded: dict) -> Figure:
    """The share of a step that communication takes, a panel for each strategy, from recorded_fsdp.json.

    Points are measured on emulated links, lines are the formula's.
    """
    rows = recorded["shares"]  # [strategy, world_size, gigabits_per_s, step_s, compute_s, predicted_s]
    strategies, rates = list(dict.fromkeys(row[0] for row in rows)), sorted({row[2] for row in rows})
    figure, axes = plt.subplots(1, len(strategies), figsize=(8.0, 3.4), sharey=True, squeeze=False)
    colors = plt.get_cmap("viridis_r")(np.linspace(0.18, 1, len(rates)))
    for ax, strategy in zip(axes[0], strategies):
        for rate, color in zip(rates, colors):
            chosen = [row for row in rows if row[0] == strategy and row[2] == rate]
            worlds, predicted = [row[1] for row in chosen], [row[5] / (row[5] + row[4]) for row in chosen]
            ax.plot(worlds, [100 * share for share in predicted], color=color, label=f"{rate:g} Gb/s")
            measured = [100 * (1 - row[4] / row[3]) for row in chosen]
            ax.plot(worlds, measured, "o", color=color, markeredgecolor="white", markersize=7)
        ax.set(ylim=(0, 104), xscale="log", xlabel="ranks", title=strategy)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(FixedLocator(sorted({row[1] for row in rows})))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.grid(True)
    axes[0, 0].set_ylabel("% of a step is communication")
    handles, names = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], marker="o", linestyle="none", color=MUTED))
    figure.legend(handles, [*names, "measured"], ncols=len(handles), loc="outside lower center")
    return figure


def _count(number: float) -> str:
    for unit, factor in ((" B", 1e9), (" M", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:,.0f}"
