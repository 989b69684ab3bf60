"""The figures of notebook 07: QLoRA.

A function draws one figure and returns it. No line has a rank's colour: int4 is gold, FP4 dark, NF4 teal; full
precision is slate, what a library did is dashed.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from workshop_utils.plotting import INK, MUTED, PAPER
from workshop_utils.quantization import dequantize_blockwise, fp4_levels, nf4_levels, quantize_blockwise

GOLD, TEAL, SLATE = "#c79a1b", "#2a788e", "#44546a"
FORMATS = {
    "int4": {"color": GOLD, "marker": "D"},
    "FP4": {"color": INK, "marker": "s"},
    "NF4": {"color": TEAL, "marker": "o"},
}
KINDS = {"parameters": SLATE, "gradients": GOLD, "optimizer": TEAL, "activations": "#b9b9c4"}
NUM_WEIGHTS = 4096  # of the figure that the widget moves


def format_levels(name: str) -> torch.Tensor:
    """The values of "int4", "FP4" or "NF4" as shares of absmax, rising, each once; float32 [15 or 16]."""
    levels = {"int4": torch.arange(-7, 8) / 7, "FP4": fp4_levels().unique(), "NF4": nf4_levels()}
    if name not in levels:
        raise ValueError(f"unknown format {name!r}: choose one of {', '.join(levels)}")
    return levels[name]


def plot_levels(formats: Mapping[str, Sequence[float]]) -> Figure:
    """Where the levels lie under the bell curve that weights follow: {name: levels, as shares of absmax}.

    The bell is that of weights whose block's absmax is 2.4 standard deviations, the usual one in blocks of 64.
    """
    figure, axes = plt.subplots(len(formats), 1, figsize=(7.2, 0.6 + 1.0 * len(formats)), sharex=True)
    x = np.linspace(-1.04, 1.04, 400)
    bell = np.exp(-((2.4 * x) ** 2) / 2)
    for ax, (name, levels) in zip(np.atleast_1d(axes), formats.items()):
        ax.fill_between(x, bell, color=PAPER, linewidth=0)
        ax.plot(x, bell, color=MUTED, linewidth=1)
        ax.vlines(np.asarray(levels), 0, 1, color=FORMATS[name]["color"], linewidth=2.2)
        ax.set(yticks=[], ylim=(0, 1.08))
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontweight="bold", fontsize=11)
        ax.spines["left"].set_visible(False)
    ax.set(xlabel="weight / absmax of its block", xlim=(-1.04, 1.04))
    figure.suptitle(
        "Sixteen values, three ways to spread them", x=0.01, ha="left", fontsize=11, fontweight="bold"
    )
    return figure


def plot_quantization(name: str = "NF4", block_size: int = 64, outlier: float = 20.0) -> Figure:
    """What one outlier does to the values of its block, and what the other blocks keep.

    4,096 standard normal weights, of which one is set to `outlier` (in standard deviations; 0 sets none). Lines are the
    values that a block can hold, drawn where nearly all weights lie. Raises ValueError for an unknown format.
    """
    figure = plt.figure(figsize=(7.2, 4.2), layout="none")
    _draw_quantization(figure, name, block_size, outlier)
    return figure


def quantization_figure(name: str, block_size: int, outlier: float) -> Figure:
    """The same on a figure of its own, outside pyplot: what the widget shows."""
    figure = Figure(figsize=(7.2, 4.2), layout="none", facecolor="white")
    _draw_quantization(figure, name, block_size, outlier)
    return figure


def _draw_quantization(figure: Figure, name: str, block_size: int, outlier: float) -> None:
    levels = format_levels(name)
    weights = torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(0))
    if outlier:
        weights[block_size // 2] = outlier
    codes, absmax = quantize_blockwise(weights, levels, block_size)
    errors = (dequantize_blockwise(codes, absmax, levels, block_size) - weights).square()
    axes = [figure.add_axes((0.02, bottom, 0.96, 0.315)) for bottom in (0.55, 0.125)]
    titles = ["the block with the outlier" if outlier else "the first block", "another block"]
    for number, (ax, title) in enumerate(zip(axes, titles)):
        block = slice(number * block_size, (number + 1) * block_size)
        ax.set(yticks=[], xlim=(-4.2, 4.2))
        ax.spines["left"].set_visible(False)
        if not len(weights[block]):
            ax.text(
                0, 0.5, "one block holds everything: there is no other", ha="center", va="center", fontsize=11
            )
            ax.set_ylim(0, 1)
            continue
        held = (levels * absmax[number]).numpy()
        used = int((np.abs(held) < 4.2).sum())
        bins = np.linspace(-4.2, 4.2, 61)
        ax.hist(weights[block].numpy(), bins=bins, color="#b9b9c4", density=True, histtype="stepfilled")
        for value in held:
            ax.axvline(value, color=FORMATS[name]["color"], linewidth=1.8)
        ax.set_title(
            f"{title}: {used} of {len(levels)} values in sight, error {errors[block].mean():.4f}",
            fontweight="normal",
        )
    axes[0].tick_params(labelbottom=False)
    axes[1].set_xlabel("weight, in standard deviations")
    shown = f"one outlier of {outlier:g}" if outlier else "no outlier"
    figure.suptitle(
        f"{name}, blocks of {block_size:,}, {shown}: mean squared error {errors.mean():.4f}",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )


def plot_error_by_block(panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Relative squared error against the block size, a panel per kind of weight: {panel: {format: {block size: error}}}."""
    figure, axes = plt.subplots(1, len(panels), figsize=(7.2, 3.4), sharey=True, squeeze=False)
    for ax, (title, formats) in zip(axes[0], panels.items()):
        for name, errors in formats.items():
            style = FORMATS[name] | {"markersize": 7, "markeredgecolor": "white", "label": name}
            ax.plot(list(errors), list(errors.values()), **style)
        sizes = sorted({size for errors in formats.values() for size in errors})
        ax.set(xscale="log", yscale="log", xlabel="weights in a block", title=title)
        ax.xaxis.set_major_locator(FixedLocator(sizes))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}" if size < 1e4 else f"{size / 1024:,.0f}k")
        ax.yaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda error, _: f"{error:g}")
        ax.grid(True, axis="y")
    axes[0][0].set_ylabel("squared error / squared weight")
    axes[0][0].legend(loc="upper left")
    return figure


def plot_errors_by_layer(
    title: str, formats: Mapping[str, Mapping[str, Sequence[float]]], expected: Mapping
) -> Figure:
    """Relative squared error of each weight matrix, a column per kind of layer and a mark per depth.

    formats: {format: {kind of layer: [error of each depth]}}; expected: {format: the error on normal weights}, dashed.
    """
    figure, ax = plt.subplots(figsize=(7.2, 3.8))
    kinds = list(next(iter(formats.values())))
    for position, (name, errors) in enumerate(formats.items()):
        style = FORMATS[name]
        for column, kind in enumerate(kinds):
            spread = np.linspace(-0.08, 0.08, len(errors[kind])) if len(errors[kind]) > 1 else [0]
            x = column + 0.27 * (position - (len(formats) - 1) / 2) + np.asarray(spread)
            label = name if column == 0 else None
            ax.plot(x, errors[kind], linestyle="none", markersize=4, alpha=0.8, label=label, **style)
        ax.axhline(expected[name], color=style["color"], linestyle="--", linewidth=1.2, zorder=0)
    ax.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="squared error / squared weight", title=title)
    ax.set_ylim(bottom=0)
    ax.grid(True, axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_losses(title: str, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Loss of each step, logarithmic, a panel per method: {panel: {label: losses}}.

    The first of a panel is a broad line, the second a thin dashed one on top, so that two equal curves are both seen.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(7.2, 3.5), sharey=True, squeeze=False)
    looks = [{"color": TEAL, "linewidth": 3.6}, {"color": INK, "linewidth": 1.3, "linestyle": (0, (4, 2))}]
    for ax, (name, runs) in zip(axes[0], panels.items()):
        for (label, losses), look in zip(runs.items(), looks):
            ax.plot(np.arange(1, len(losses) + 1), losses, label=label, **look)
        ax.set(xlabel="step", yscale="log")
        ax.set_title(name, fontweight="normal")
        ax.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())  # a power would ask for mathematical fonts
        ax.grid(True, axis="y")
        ax.legend(loc="upper right")
    axes[0][0].set_ylabel("loss of the record")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def plot_bills(title: str, bills: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bytes by kind as stacked bars with the sum in MB: {row: {"parameters" | "gradients" | ...: bytes}}."""
    figure, ax = plt.subplots(figsize=(7.2, 1.3 + 0.5 * len(bills)))
    for kind, color in KINDS.items():
        sizes = [bill.get(kind, 0) / 1e6 for bill in bills.values()]
        left = [
            sum(bill.get(k, 0) for k in list(KINDS)[: list(KINDS).index(kind)]) / 1e6
            for bill in bills.values()
        ]
        if any(sizes):
            ax.barh(list(bills), sizes, left=left, color=color, edgecolor="white", label=kind)
    totals = [sum(bill.get(kind, 0) for kind in KINDS) / 1e6 for bill in bills.values()]
    for row, total in enumerate(totals):
        ax.text(total + 0.015 * max(totals), row, f"{total:,.0f} MB", va="center", fontsize=10)
    ax.set(xlabel="MB", title=title, xlim=(0, 1.2 * max(totals)))
    ax.invert_yaxis()
    ax.grid(True, axis="x")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
