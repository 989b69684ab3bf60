"""The figures of notebook 05: LoRA.

A function draws one figure and returns it. No line has a rank's colour: LoRA's r runs through viridis, full
fine-tuning is dark grey, the last layer alone is gold.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from workshop_utils.plotting import INK, MUTED, PAPER

FULL, LAST, ADAPTER = "#44546a", "#c79a1b", "#2a788e"


def method_style(method: str | int) -> dict:
    """Colour, marker and label of "full", "last layer" or LoRA's r (an int), for matplotlib's plot."""
    if method == "full":
        return {"color": FULL, "marker": "s", "label": "full"}
    if method == "last layer":
        return {"color": LAST, "marker": "D", "label": "last layer"}
    position = 0.9 - 0.18 * np.log2(method)
    return {
        "color": plt.get_cmap("viridis")(max(position, 0.0)),
        "marker": "o",
        "label": f"LoRA r = {method}",
    }


def plot_low_rank(n_in: int, n_out: int, r: int) -> Figure:
    """W [out, in], frozen, beside B [out, r] and A [r, in], drawn to scale."""
    figure, ax = plt.subplots(figsize=(7.2, 2.6))
    gap = 0.09 * n_in
    boxes = [
        (0, 0, n_in, n_out, PAPER, f"W, frozen\n{n_out} x {n_in} = {n_out * n_in:,}"),
        (n_in + 2 * gap, 0, r, n_out, ADAPTER, f"B\n{n_out} x {r}"),
        (n_in + 3 * gap + r, n_out - r, n_in, r, ADAPTER, f"A\n{r} x {n_in}"),
    ]
    for x, y, width, height, color, label in boxes:
        ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=MUTED))
    ax.text(n_in / 2, n_out / 2, boxes[0][5], ha="center", va="center", fontsize=11)
    ax.text(n_in + 2 * gap + r / 2, -0.06 * n_out, f"B  {n_out} x {r}", ha="center", va="top", fontsize=11)
    ax.text(
        n_in + 3 * gap + r + n_in / 2,
        n_out - r - 0.06 * n_out,
        f"A  {r} x {n_in}\n\nB and A, trained: {r * (n_in + n_out):,}",
        ha="center",
        va="top",
        fontsize=11,
    )
    ax.text(n_in + gap, n_out / 2, "+", ha="center", va="center", fontsize=18)
    ax.set(xlim=(-0.01 * n_in, 2 * n_in + 4 * gap + r), ylim=(-0.32 * n_out, 1.02 * n_out), aspect="equal")
    ax.axis("off")
    return figure


def plot_accuracy(title: str, tasks: Mapping[str, Mapping], before: Mapping[str, float]) -> Figure:
    """Accuracy against trainable parameters, a panel per task: the mean over seeds, bars from worst to best.

    tasks: {task: {method: (trainable parameters, [accuracy of each seed])}}; before: {task: accuracy of the base}.
    """
    figure, axes = plt.subplots(1, len(tasks), figsize=(7.2, 3.6), squeeze=False)
    for ax, (task, methods) in zip(axes[0], tasks.items()):
        for method, (count, accuracies) in methods.items():
            seen = 100 * np.asarray(accuracies)
            mean = seen.mean()
            bars = [[mean - seen.min()], [seen.max() - mean]]
            style = method_style(method) | {"markersize": 8, "capsize": 3, "linestyle": "none"}
            ax.errorbar([count], [mean], yerr=bars, markeredgecolor="white", **style)
        ax.set(xscale="log", xlabel="trainable parameters", title=f"{task} (base: {before[task]:.0%})")
        _plain_decades(ax.xaxis)
        ax.grid(True, axis="y")
        ax.margins(x=0.12, y=0.1)
    axes[0][0].set_ylabel("test accuracy, %")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend([h[0] for h in handles], labels, loc="outside lower center", ncol=4)
    return figure


def plot_curves(title: str, curves: Mapping, target: float | None = None) -> Figure:
    """Test accuracy against steps: {method: (steps [n], accuracies [seeds, n])}; bands reach from worst to best."""
    figure, ax = plt.subplots(figsize=(7.2, 3.6))
    for method, (steps, accuracies) in curves.items():
        seen, style = 100 * np.asarray(accuracies), method_style(method)
        ax.plot(steps, seen.mean(axis=0), markersize=6, markeredgecolor="white", **style)
        ax.fill_between(
            steps, seen.min(axis=0), seen.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
        )
    if target is not None:
        ax.axhline(100 * target, color=MUTED, linestyle="--", linewidth=1)
    ax.set(xlabel="steps", ylabel="test accuracy, %", title=title)
    ax.grid(True, axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_singular_values(title: str, values: Mapping, shown: int = 40) -> Figure:
    """Singular values of the updates, largest first, both axes logarithmic: {method: values}; zeros are left out."""
    figure, ax = plt.subplots(figsize=(7.2, 3.4))
    for method, sizes in values.items():
        sizes = np.asarray(sizes)[:shown]
        sizes = sizes[sizes > 1e-4 * sizes[0]]
        ax.plot(np.arange(1, len(sizes) + 1), sizes, markeredgecolor="white", **method_style(method))
    ax.set(xscale="log", yscale="log", xlabel="number of the singular value", ylabel="its size", title=title)
    ax.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    _plain_decades(ax.yaxis)
    ax.grid(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_rank(figure: Figure, values: Mapping, n_in: int, n_out: int, r: int) -> None:
    """Left: the singular values of the updates, with the r strongest of full fine-tuning's marked. Right: numbers trained.

    values: {"full": [...], 8: [...]}, largest first; LoRA's are drawn where r is among them.
    """
    left, right = figure.add_axes((0.085, 0.15, 0.50, 0.73)), figure.add_axes((0.68, 0.15, 0.30, 0.73))
    full = np.asarray(values["full"])
    numbers = np.arange(1, len(full) + 1)
    left.plot(numbers[r:], full[r:], "s", color=MUTED, markerfacecolor="white", markersize=3)
    left.plot(
        numbers[:r], full[:r], "s", color=FULL, markersize=6, label=f"full, the strongest {min(r, len(full))}"
    )
    if r in values:
        sizes = np.asarray(values[r])
        sizes = sizes[sizes > 1e-4 * sizes[0]]
        style = {"color": ADAPTER, "marker": "o", "markersize": 8, "markeredgecolor": "white"}
        left.plot(numbers[: len(sizes)], sizes, label=f"LoRA, r = {r}", **style)
    left.axvline(r + 0.5, color=MUTED, linewidth=1, linestyle="--")
    share = _share(full, r)
    left.set(xscale="log", yscale="log", xlim=(0.85, 1.25 * len(full)), xlabel="number of the singular value")
    top = max(size[0] for size in values.values())
    left.set(ylim=(1e-3 * top, 2 * top), title=f"r = {r}: {share:.0%} of the full update, in squares")
    left.xaxis.set(major_locator=FixedLocator([1, 2, 4, 8, 16, 32, 64, 128]), minor_locator=NullLocator())
    left.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    left.yaxis.set_minor_locator(NullLocator())
    _plain_decades(left.yaxis)
    left.grid(True)
    left.legend(loc="upper right")
    counts = {"W": n_in * n_out, "B and A": r * (n_in + n_out)}
    right.bar(list(counts), list(counts.values()), color=[FULL, ADAPTER], width=0.62)
    for place, count in enumerate(counts.values()):
        right.text(
            place, count, f"{count:,}\n{count / counts['W']:.1%}", ha="center", va="bottom", fontsize=11
        )
    right.set(title="numbers trained", yticks=[], ylim=(0, 1.25 * max(counts["W"], 200 * (n_in + n_out))))
    right.spines["left"].set_visible(False)
    right.tick_params(labelsize=11, bottom=False)


def plot_rank(values: Mapping, n_in: int, n_out: int, r: int = 8) -> Figure:
    """r against singular values and parameters, as a figure of pyplot's: the static one for the notebook."""
    figure = plt.figure(figsize=(8.4, 3.9), layout="none")
    draw_rank(figure, values, n_in, n_out, r)
    return figure


def rank_figure(values: Mapping, n_in: int, n_out: int, r: int) -> Figure:
    """The same on a figure of its own, outside pyplot: what the widget shows."""
    figure = Figure(figsize=(8.4, 3.9), facecolor="white", layout="none")
    draw_rank(figure, values, n_in, n_out, r)
    return figure


def describe_rank(values: Mapping, n_in: int, n_out: int, r: int) -> str:
    """The same in words."""
    count, whole = r * (n_in + n_out), n_in * n_out
    words = (
        f"r = {r} trains {r} x ({n_in} + {n_out}) = {count:,} numbers, {count / whole:.1%} of W's {whole:,}. No matrix of "
        f"rank {r} can hold more than {_share(values['full'], r):.0%} of full fine-tuning's update, in squares."
    )
    if r in values and r > 2:
        words += f" Of the update that LoRA learned with r = {r}, the strongest 2 directions hold {_share(values[r], 2):.0%}."
    return words


def _share(sizes: Sequence[float], r: int) -> float:
    squares = np.asarray(sizes, float) ** 2
    return float(squares[:r].sum() / squares.sum())


def plot_overlaps(title: str, panels: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """phi(i, j) as a number in each cell, a panel per pair of matrices: {label: table}, rows i and columns j from 1."""
    tables = {label: np.asarray(table) for label, table in panels.items()}
    rows = max(len(table) for table in tables.values())
    widths = [table.shape[1] for table in tables.values()]
    figure, axes = plt.subplots(
        1, len(tables), figsize=(7.2, 1.5 + 0.42 * rows), width_ratios=widths, squeeze=False
    )
    for ax, (label, table) in zip(axes[0], tables.items()):
        _numbers(ax, table, 0, 1, lambda value: f"{value:.2f}")
        ax.set(title=label, xlabel="j", xticks=range(table.shape[1]), yticks=range(table.shape[0]))
        ax.set(xticklabels=range(1, table.shape[1] + 1), yticklabels=range(1, table.shape[0] + 1))
    axes[0][0].set_ylabel("i")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def plot_grid(title: str, rows: Sequence, columns: Sequence, values, *, xlabel: str, ylabel: str) -> Figure:
    """Percent as colour and number: values [rows, columns], 0 to 1, the first row at the bottom."""
    values = 100 * np.asarray(values)
    figure, ax = plt.subplots(figsize=(7.2, 1.2 + 0.5 * len(rows)))
    _numbers(ax, values, values.min(), values.max(), lambda value: f"{value:.0f}")
    ax.set(xticks=range(len(columns)), xticklabels=[f"{c:g}" for c in columns], xlabel=xlabel, title=title)
    ax.set(yticks=range(len(rows)), yticklabels=[f"{r:g}" for r in rows], ylabel=ylabel)
    ax.invert_yaxis()
    return figure


def plot_forgetting(title: str, methods: Mapping, base_old: float) -> Figure:
    """The old digits against the new task, a mark per seed: {method: ([new accuracy], [old accuracy])}."""
    figure, ax = plt.subplots(figsize=(7.2, 3.6))
    for method, (new, old) in methods.items():
        style = method_style(method) | {"linestyle": "none", "markersize": 7, "markeredgecolor": "white"}
        ax.plot(100 * np.asarray(new), 100 * np.asarray(old), **style)
    ax.axhline(100 * base_old, color=MUTED, linestyle="--", linewidth=1, zorder=0)
    ax.set(xlabel="new task, test accuracy, %", ylabel="old digits, %", title=title)
    ax.grid(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_drift(title: str, drifts: Mapping[str, Sequence[float]]) -> Figure:
    """Largest difference of a weight from the original after each cycle: {label: [difference of cycle 1, 2, ...]}."""
    figure, ax = plt.subplots(figsize=(7.2, 3.0))
    for (label, values), (color, line) in zip(drifts.items(), ((INK, "-"), (LAST, "-"), (ADAPTER, "--"))):
        ax.plot(
            np.arange(1, len(values) + 1), values, color=color, linestyle=line, linewidth=2.4, label=label
        )
    ax.set(xlabel="cycles of merge and unmerge", ylabel="largest difference in W", title=title)
    ax.set_ylim(bottom=-0.03 * max(max(values) for values in drifts.values()))
    ax.grid(True, axis="y")
    ax.legend(loc="upper left")
    return figure


def _plain_decades(axis) -> None:
    """Powers of ten of a logarithmic axis as 0.1, 1, 1,000."""
    axis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}")
    axis.set_minor_formatter(NullFormatter())


def _numbers(ax, table, low, high, label) -> None:
    """A cell per value, darker where larger, with the value in a colour that can be read on it."""
    ax.imshow(table, cmap="viridis_r", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        dark = (value - low) / ((high - low) or 1) > 0.45
        ax.text(
            column, row, label(value), ha="center", va="center", color="white" if dark else INK, fontsize=9
        )
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def plot_directions(title: str, directions: Mapping[str, Sequence[float]]) -> Figure:
    """Directions in the space of images [784] as pictures, white at 0. A sign is free: all are turned like the last."""
    figure, axes = plt.subplots(1, len(directions), figsize=(7.2, 2.5), squeeze=False)
    last = np.asarray(list(directions.values())[-1])
    for ax, (label, direction) in zip(axes[0], directions.items()):
        pixels = np.asarray(direction) * np.sign(np.dot(direction, last))
        largest = np.abs(pixels).max()
        ax.imshow(pixels.reshape(28, 28), cmap="PuOr", vmin=-largest, vmax=largest)
        ax.set(xticks=[], yticks=[])
        ax.set_title(label, loc="center", fontweight="normal", fontsize=10)
        for spine in ax.spines.values():
            spine.set_visible(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure
