"""The figures of notebook 06: the toy, accuracy against d, d_int90 against D, and LoRA beside random subspaces.

Each function takes data, draws one figure that says one thing, and returns it. No rank appears here, so the colours are
others than the ranks', and every line has a marker of its own as well.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from workshop_utils.intrinsic_dimension import IntrinsicDimension, first_above
from workshop_utils.plotting import INK, MUTED

OURS, THEIRS, LOCAL = "#1f4e8c", "#b5651d", "#5b8c5a"
METHODS = {  # method: (colour, marker)
    "LoRA": ("#b5391d", "o"),
    "random subspace": ("#1f4e8c", "s"),
    "subspace of factors": ("#2a9d8f", "^"),
    "subspace with scales": ("#c99700", "D"),
}
STYLES = {"global": ":", "local": "-."}
LINE_COLORS = {"global": INK, "local": LOCAL}
PERCENTS = (1, 2, 3, 5, 10, 20, 50, 100)


def plot_toy(dims: Sequence[int], losses: Mapping[int, Sequence[float]], answer: int = 10) -> Figure:
    """The least loss against d, a line for each D: {D: [n_dims]}. Values below 1e-30 are drawn there."""
    figure, ax = plt.subplots(figsize=(7.2, 3.2))
    for (D, of_D), color, marker in zip(losses.items(), (OURS, THEIRS), "os"):
        ax.semilogy(dims, [max(loss, 1e-30) for loss in of_D], marker, color=color, label=f"{D:,} parameters")
    ax.axvline(answer, color=MUTED, linestyle=":", linewidth=1.2)
    ax.text(answer + 0.2, 1e-6, f"{answer} constraints,\n{answer} directions", va="center")
    ax.set(xlabel="d, directions that are trained", ylabel="least loss that can be reached")
    ax.set_title("At ten directions the loss falls to rounding error, whatever D")
    ax.set_xticks(list(dims))
    ax.yaxis.set_major_formatter(lambda loss, _: f"{loss:.0e}" if loss < 0.01 or loss > 1e3 else f"{loss:g}")
    ax.legend(loc="lower left")
    return figure


def plot_dimension_curve(
    title: str,
    dims: Sequence[int],
    accuracy_SD: Tensor,
    lines: Mapping[str, tuple[float, int | None]],
    authors: Mapping[int, float],
    *,
    comparable: bool,
) -> Figure:
    """Accuracy against d: mean and spread over the seeds [n_seeds, n_dims], and where it crosses each line.

    lines: {"global": (threshold, d_int90 or None), ...}. authors: {d: accuracy} of Li et al., faint if not comparable.
    """
    figure, ax = plt.subplots(figsize=(7.2, 4.0))
    _draw_curve(ax, dims, accuracy_SD, lines, authors, comparable=comparable)
    ax.set_title(title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def crossing_figure(
    curve: IntrinsicDimension, authors: Mapping[int, float], *, percent: int, definition: str
) -> Figure:
    """The curve and one line, at `percent` of what `definition` means, outside pyplot: what the widget shows."""
    figure = Figure(figsize=(7.6, 4.4), facecolor="white", layout="none")
    ax = figure.add_axes((0.09, 0.30, 0.89, 0.61))
    line = {definition: _crossing(curve, percent, definition)}
    _draw_curve(ax, curve.dims, curve.accuracy, line, authors, comparable=True, percent=percent)
    ax.set_title(f"60,000 images, {curve.settings['projection']}: a line at {percent}%")
    figure.legend(*ax.get_legend_handles_labels(), loc="lower center", ncols=2)
    return figure


def describe_crossing(curve: IntrinsicDimension, *, percent: int, definition: str) -> str:
    """The same in words."""
    threshold, d = _crossing(curve, percent, definition)
    of = "1.0" if definition == "global" else f"{curve.baseline:.3f}, which full training reaches,"
    asked = f"{percent}% of {of} is an accuracy of {threshold:.3f}. "
    if d is None:
        return f"{asked}The mean over {len(curve.seeds)} seeds does not reach it with {curve.dims[-1]:,} directions."
    return f"{asked}The first d of the grid above it: {d:,} of {curve.D:,}, {d / curve.D:.2%}."


def _crossing(curve: IntrinsicDimension, percent: int, definition: str) -> tuple[float, int | None]:
    threshold = curve.threshold(definition, percent / 100)
    return threshold, first_above(curve.dims, curve.accuracy.mean(0).tolist(), threshold)


def _draw_curve(ax, dims, accuracy_SD, lines, authors, *, comparable: bool, percent: int = 90) -> None:
    shown = {d: a for d, a in authors.items() if d >= 0.9 * min(dims)}
    label = "Li et al. 2018" if comparable else "Li et al. 2018: not comparable"
    ax.plot(
        *zip(*shown.items()), "s--", color=THEIRS, alpha=1 if comparable else 0.4, markersize=4, label=label
    )
    mean, seeds = accuracy_SD.mean(0), len(accuracy_SD)
    ax.fill_between(dims, accuracy_SD.amin(0), accuracy_SD.amax(0), color=OURS, alpha=0.2, linewidth=0)
    label = f"ours, mean and range of {seeds} seeds" if seeds > 1 else "ours, one seed"
    ax.plot(dims, mean, "o-", color=OURS, label=label)
    lowest = min(float(accuracy_SD.min()), *shown.values(), *(threshold for threshold, _ in lines.values()))
    bottom = lowest - 0.03
    for name, (threshold, d) in lines.items():
        crossing = "not reached" if d is None else f"d_int{percent} = {d:,}"
        style = {"color": LINE_COLORS[name], "linewidth": 1.1, "linestyle": STYLES[name]}
        ax.axhline(threshold, label=f"{name} line {threshold:.3f}: {crossing}", **style)
        if d is not None:
            ax.vlines(d, bottom, threshold, **style)
    ax.set(xscale="log", ylim=(bottom, None), xlabel="d, directions that are trained", ylabel="test accuracy")
    low, high = min(dims) * 0.9, max(dims[-1], max(shown)) * 1.1
    _plain_ticks(ax, [d for d in (50, 100, 200, 300, 500, 750, 1000, 1500, 3000) if low <= d <= high])


def plot_width_depth(points: Sequence[tuple[str, int, int | None]], authors: tuple[int, int]) -> Figure:
    """d_int90 against D, a point for each (network, D, d_int90). authors: the range of theirs for the FC networks."""
    figure, ax = plt.subplots(figsize=(7.2, 3.6))
    ax.axhspan(
        *authors, color=THEIRS, alpha=0.15, linewidth=0, label="Li et al. 2018, fully connected: range"
    )
    found = [point for point in points if point[2] is not None]
    for fully_connected, color, marker in ((True, OURS, "o"), (False, LOCAL, "^")):
        chosen = [point for point in found if point[0].startswith("FC") == fully_connected]
        ax.plot([D for _, D, _ in chosen], [d for _, _, d in chosen], marker, color=color, markersize=7)
    above = True
    for network, D, d in sorted(found, key=lambda point: point[1]):
        offset = 8 if above and network.startswith("FC") else -15
        ax.annotate(network, (D, d), (0, offset), textcoords="offset points", ha="center")
        above = above != network.startswith("FC")  # neighbours are named on different sides
    ax.set(xscale="log", ylim=(0, 1.25 * max([*authors, *(d for _, _, d in found)])))
    ax.set(
        xlabel="D, all parameters",
        ylabel="global d_int90",
        title="The dimension hardly follows the number of parameters",
    )
    _plain_ticks(ax, (30_000, 50_000, 100_000, 200_000, 500_000, 1_000_000))
    ax.set_xlim(28_000, 1_400_000)
    ax.legend(loc="lower right")
    return figure


def plot_budgets(rows: Sequence[dict]) -> Figure:
    """Test error against the number of trained parameters, a panel for each start; rows of the recorded comparison."""
    figure, axes = _panels(rows)
    for ax, start in axes.items():
        for method, (color, marker) in METHODS.items():
            chosen = [row for row in rows if row["start"] == start and row["method"] == method]
            errors = torch.tensor([[100 * (1 - curve[-1]) for curve in row["curve"]] for row in chosen])
            budgets = [row["budget"] for row in chosen]
            ax.fill_between(budgets, errors.amin(1), errors.amax(1), color=color, alpha=0.18, linewidth=0)
            ax.plot(budgets, errors.mean(1), marker=marker, color=color, label=method)
        _draw_full(ax, rows, start)
        ax.set(xscale="log", xlabel="trained parameters")
        _plain_ticks(ax, budgets)
        ax.tick_params(axis="x", labelrotation=45)
    return _finish(figure, axes)


def plot_convergence(rows: Sequence[dict], scored_after: Sequence[int], budget: int) -> Figure:
    """Test error against steps at one budget, a panel for each start; mean and range over the seeds."""
    figure, axes = _panels(rows)
    steps = [step for step in scored_after if step > 0]
    for ax, start in axes.items():
        for method, (color, marker) in METHODS.items():
            (row,) = [r for r in rows if (r["start"], r["method"], r["budget"]) == (start, method, budget)]
            errors = 100 * (1 - torch.tensor(row["curve"]))[:, -len(steps) :]
            ax.fill_between(steps, errors.amin(0), errors.amax(0), color=color, alpha=0.18, linewidth=0)
            ax.plot(steps, errors.mean(0), marker=marker, color=color, label=method)
        _draw_full(ax, rows, start)
        ax.set(xscale="log", xlabel="steps")
        _plain_ticks(ax, steps[::2] if len(steps) > 5 else steps)
    return _finish(figure, axes)


def _panels(rows):
    starts = list(dict.fromkeys(row["start"] for row in rows))
    figure, axes = plt.subplots(1, len(starts), figsize=(8.4, 4.0), sharey=True, squeeze=False)
    named = dict(zip(axes[0], starts))
    for ax, start in named.items():
        ax.set(
            title=f"from {'a ' if start.startswith('random') else 'the '}{start}{'' if start.startswith('random') else ' base'}"
        )
        ax.set(yscale="log")
        ax.grid(True, axis="y")
    axes[0][0].set_ylabel("test images read wrong, %")
    return figure, named


def _draw_full(ax, rows, start):
    """All parameters trained: a dotted line at the error that this reaches."""
    (row,) = [row for row in rows if row["start"] == start and row["method"] == "full"]
    error = 100 * (1 - sum(curve[-1] for curve in row["curve"]) / len(row["curve"]))
    ax.axhline(error, color=INK, linestyle=":", linewidth=1.2, label=f"all {row['budget']:,} trained")


def _finish(figure, axes):
    for ax in axes:
        ax.yaxis.set_major_locator(FixedLocator(PERCENTS))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda percent, _: f"{percent:g}")
    figure.legend(*next(iter(axes)).get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _plain_ticks(ax, ticks):
    """Ticks at these numbers, written out, on a logarithmic x axis."""
    ax.xaxis.set_major_locator(FixedLocator(list(ticks)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
