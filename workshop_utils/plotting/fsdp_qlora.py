"""Figures of notebook 08: bytes predicted and measured, weights that arrived, what a step sends, settings, stability.

Each function draws one figure that says one thing and returns it. MB = 10**6 bytes.
"""

import statistics

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from workshop_utils.plotting import INK, MUTED
from workshop_utils.plotting.single_device import KIND_COLORS

_BAR, _MARK = "#44546a", "#d9b84a"
PARTS = {"frozen, gathered": "#44546a", "trained, gathered": "#86aea6", "gradients, reduced": "#d9b84a"}
_LINES = ("-", "--", ":", "-.")


def plot_by_kind(
    title: str, rows: dict[str, dict[str, float]], marks: dict[str, float] | None = None
) -> Figure:
    """A stacked bar of bytes by kind for each row, in MB; `marks` are totals from elsewhere (predictions), as a line."""
    marks = marks or {}
    figure, ax = plt.subplots(figsize=(7.6, 1.1 + 0.42 * len(rows)))
    kinds = [kind for kind in KIND_COLORS if any(row.get(kind) for row in rows.values())]
    left = np.zeros(len(rows))
    places = np.arange(len(rows))
    for kind in kinds:
        sizes = np.array([row.get(kind, 0) / 1e6 for row in rows.values()])
        ax.barh(places, sizes, left=left, color=KIND_COLORS[kind], label=kind, height=0.62)
        left += sizes
    ends = np.maximum(left, [marks.get(name, 0) / 1e6 for name in rows])
    for place, name, total, end in zip(places, rows, left, ends, strict=True):
        if name in marks:
            ax.plot([marks[name] / 1e6] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=2)
        ax.text(end + 0.012 * ends.max(), place, _megabytes(total), va="center", fontsize=9)
    ax.set(yticks=places, yticklabels=list(rows), xlabel="MB on each rank", title=title)
    ax.set_xlim(0, 1.16 * ends.max())
    ax.invert_yaxis()
    ax.tick_params(left=False)
    handles, labels = ax.get_legend_handles_labels()
    if marks:
        handles.append(Line2D([], [], color=INK, linewidth=2))
        labels.append("predicted")
    figure.legend(handles, labels, ncols=len(handles), loc="outside lower center")
    return figure


def plot_arrivals(title: str, weights: dict[str, Tensor]) -> Figure:
    """A square of each weight matrix [out, in] as a picture, all on the scale of the first; the error of each below it.

    The error is the norm of the difference from the first, over the norm of the first.
    """
    first = next(iter(weights.values())).float()
    limit = 3 * first.std().item()
    figure, axes = plt.subplots(1, len(weights), figsize=(2.05 * len(weights), 2.75), squeeze=False)
    for ax, (name, weight) in zip(axes[0], weights.items(), strict=True):
        ax.imshow(weight.float().numpy(), cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(name, fontsize=9, loc="center", fontweight="normal")
        error = ((weight.float() - first).norm() / first.norm()).item()
        ax.set_xlabel(
            "as sent" if weight is next(iter(weights.values())) else f"error {error:.2g}", fontsize=9
        )
        ax.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def plot_sent(title: str, parts: dict[str, dict[str, float]], counted: dict[str, float]) -> Figure:
    """Bytes that a rank sends in a step: a stacked bar of what the formula adds up for each method, counted as a line.

    parts: {"QLoRA": {part: bytes}} with the keys of PARTS. counted: {"QLoRA": bytes}.
    """
    figure, ax = plt.subplots(figsize=(7.6, 1.1 + 0.45 * len(parts)))
    places, left = np.arange(len(parts)), np.zeros(len(parts))
    for part, color in PARTS.items():
        sizes = np.array([row[part] / 1e6 for row in parts.values()])
        ax.barh(places, sizes, left=left, color=color, label=part, height=0.62)
        left += sizes
    longest = max(left.max(), max(counted.values()) / 1e6)
    for place, name in zip(places, parts, strict=True):
        size = counted[name] / 1e6
        ax.plot([size] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=2)
        ax.text(max(size, left[place]) + 0.012 * longest, place, _megabytes(size), va="center", fontsize=9)
    ax.set(yticks=places, yticklabels=list(parts), xlabel="MB sent by one rank in a step", title=title)
    ax.set_xlim(0, 1.16 * longest)
    ax.invert_yaxis()
    ax.tick_params(left=False)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        [*handles, Line2D([], [], color=INK, linewidth=2)], [*labels, "counted"],
        ncols=4, loc="outside lower center",
    )  # fmt: skip
    return figure


def plot_settings(title: str, rows: list[dict]) -> Figure:
    """One setting changed at a time: bytes that stay, bytes that are whole or saved for a while, bytes sent, seconds.

    rows: of recorded_fsdp_qlora.json, the first is what nothing was changed in; its values are the dashed lines.
    """
    panels = {
        "MB that stay": lambda row: sum(row["held_bytes"].values()) / 1e6,
        "MB of activations": lambda row: row["activations_bytes"] / 1e6,
        "MB whole at most": lambda row: row["peak_whole_bytes"] / 1e6,
        "MB sent in a step": lambda row: row["sent_bytes"] / 1e6,
        "seconds of a step": lambda row: row["step_s"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9.6, 0.9 + 0.36 * len(rows)), sharey=True)
    places = np.arange(len(rows))
    for ax, (label, value) in zip(axes, panels.items(), strict=True):
        values = [value(row) for row in rows]
        near = [abs(v - values[0]) < 0.02 * values[0] for v in values]
        ax.barh(places, values, color=["#c9d1da" if same else _BAR for same in near], height=0.62)
        ax.axvline(values[0], color=INK, linewidth=1, linestyle="--")
        for place, v in zip(places, values, strict=True):
            shown = f"{v:.1f}" if v < 20 else f"{v:,.0f}"
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            ax.text(v + 0.03 * max(values), place, shown, va="center", fontsize=8, bbox=white)
        ax.set_xlim(0, 1.4 * max(values))
        ax.set_xlabel(label, fontsize=9)
        ax.set_xticks([])
        ax.tick_params(left=False)
    axes[0].set_yticks(places, [row["changed"] for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def plot_stability(title: str, rows: list[dict], groups: dict[str, list[str]]) -> Figure:
    """Losses step by step, logarithmic: a panel for each group of `changed` names, a line for each seed.

    rows: {"changed": name, "losses": [a curve for each seed]} of recorded_fsdp_qlora.json.
    """
    by_name = {row["changed"]: row for row in rows}
    figure, axes = plt.subplots(1, len(groups), figsize=(3.3 * len(groups), 3.3), sharey=True, squeeze=False)
    for ax, (group, names) in zip(axes[0], groups.items(), strict=True):
        shown = [name for name in names if name in by_name]
        colors = plt.get_cmap("viridis_r")(np.linspace(0.18, 1, max(len(shown), 2)))
        for name, color, style in zip(shown, colors, _LINES):
            for number, losses in enumerate(by_name[name]["losses"]):
                label = name if number == 0 else None
                ax.plot(range(1, len(losses) + 1), losses, style, color=color, linewidth=1.4, label=label)
        ax.set(yscale="log", xlabel="step", title=group)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(True)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8)
    axes[0, 0].set_ylabel("loss of the global batch")
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def stability_table(rows: list[dict], last: int = 3) -> list[tuple[str, float, float, float, float, float]]:
    """(changed, MB of states, mean of the last losses over seeds, best seed's, worst seed's, highest loss after step 1)."""
    table = []
    for row in rows:
        ends = [statistics.mean(losses[-last:]) for losses in row["losses"]]
        spike = max(max(losses[1:]) for losses in row["losses"])
        table.append(
            (row["changed"], row["held_bytes"] / 1e6, statistics.mean(ends), min(ends), max(ends), spike)
        )
    return table


def plot_shares(title: str, lines: dict[str, tuple[list[int], list[float]]], marks: dict[str, int]) -> Figure:
    """Share of a step that communication takes, in %, against tokens on each GPU; `marks` are tokens with a name."""
    figure, ax = plt.subplots(figsize=(7.6, 3.6))
    colors = plt.get_cmap("viridis_r")(np.linspace(0.18, 1, max(len(lines), 2)))
    for (label, (tokens, shares)), color in zip(lines.items(), colors):
        ax.plot(tokens, 100 * np.asarray(shares), color=color, label=label)
    for name, tokens in marks.items():
        ax.axvline(tokens, color=MUTED, linewidth=1, linestyle="--")
        ax.text(tokens * 1.06, 101, name, fontsize=8, va="top", color=INK)
    ax.set(
        xscale="log", ylim=(0, 104), xlabel="tokens on each GPU in a step", ylabel="% of a step", title=title
    )
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.minorticks_off()
    ax.grid(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _megabytes(size: float) -> str:
    return f"{size:,.0f} MB" if size >= 10 else f"{size:.2g} MB"
