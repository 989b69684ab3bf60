"""Figures of notebook 08's planner: bytes on a GPU by kind beside the cards one can buy, and predicted against published.

GiB = 2**30 bytes: a card sold with 24 GB has about 24 GiB.
"""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workshop_utils.memory_plan import CARDS_GIB, KINDS, RESERVE_BYTES, MemoryPlan
from workshop_utils.plotting import INK, MUTED
from workshop_utils.plotting.single_device import KIND_COLORS
from workshop_utils.published_memory import PublishedRow

PLAN_COLORS = {
    **{kind: KIND_COLORS[kind] for kind in ("parameters", "gradients", "optimizer", "activations")},
    "logits": "#b4552d",
    "temporary": "#8a6f9c",
    "CUDA": "#e9e9ee",
}
GIB = 2**30


def plot_plans(title: str, plans: dict[str, MemoryPlan]) -> Figure:
    """A stacked bar for each plan, by label, with the cards as lines: a figure of pyplot's, for the notebook."""
    figure = plt.figure(figsize=_size(plans), layout="none")
    draw_plans(figure, title, plans)
    return figure


def plans_figure(title: str, plans: dict[str, MemoryPlan]) -> Figure:
    """The same on a figure of its own, outside pyplot: what the widget shows."""
    figure = Figure(figsize=_size(plans), facecolor="white", layout="none")
    draw_plans(figure, title, plans)
    return figure


def draw_plans(figure: Figure, title: str, plans: dict[str, MemoryPlan]) -> None:
    """Draw the bars into `figure`. The pale end of a bar is what CUDA's context and kernels take."""
    width, height = figure.get_size_inches()
    margin = 0.2 + 0.085 * max(
        9, *map(len, plans)
    )  # inches; a layout engine would double the time of a redraw
    ax = figure.add_axes((margin / width, 1.05 / height, (width - margin - 0.1) / width, 1 - 1.55 / height))
    left = [0.0] * len(plans)
    sizes = {kind: [plan.by_kind()[kind] for plan in plans.values()] for kind in KINDS}
    sizes["CUDA"] = [RESERVE_BYTES] * len(plans)
    for kind, in_bytes in sizes.items():
        gib = [size / GIB for size in in_bytes]
        ax.barh(range(len(plans)), gib, left=left, color=PLAN_COLORS[kind], label=kind, height=0.66)
        left = [start + size for start, size in zip(left, gib, strict=True)]
    reach = max(left)
    enough = next((card for card in CARDS_GIB if card >= reach), CARDS_GIB[-1])
    cards = [card for card in CARDS_GIB if card <= enough]
    limit = 1.17 * max(reach, enough)
    for card in cards:
        ax.axvline(card, color=INK, linewidth=0.9, linestyle="--", zorder=0)
    above = {"va": "bottom", "fontsize": 8, "transform": ax.get_xaxis_transform()}
    for card in _apart(cards, 0.032 * limit):
        ax.text(card, 1.01, card, ha="center", **above)
    ax.text(-0.012 * limit, 1.01, "cards, GB", ha="right", **above)
    for row, end in enumerate(left):
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        ax.text(end + 0.012 * limit, row, f"{end:.1f}", va="center", fontsize=9, bbox=white)
    ax.set(yticks=range(len(plans)), yticklabels=list(plans), xlim=(0, limit), ylim=(-0.6, len(plans) - 0.4))
    ax.set_xlabel("GiB on each GPU at the fullest moment of a step")
    ax.set_title(title, pad=20)
    ax.invert_yaxis()
    ax.tick_params(left=False)
    figure.legend(ncols=4, loc="lower center")


def plot_published(rows: list[PublishedRow]) -> Figure:
    """Predicted over published, a row each, with the band of 15%: hollow points are reported, not read by us."""
    figure, ax = plt.subplots(figsize=(7.6, 1.3 + 0.3 * len(rows)))
    ax.axvspan(0.85, 1.15, color="#eef1f5", zorder=0)
    ax.axvline(1, color=MUTED, linewidth=1)
    for place, row in enumerate(rows):
        ratio = 1 + row.error
        face = INK if row.reliability == "primary" else "white"
        ax.plot(ratio, place, "o", color=INK, markerfacecolor=face, markersize=6)
        numbers = f"{row.predicted:.3g} against {row.published:.4g} {row.unit}"
        ax.text(1.02, place, numbers, va="center", fontsize=8, transform=ax.get_yaxis_transform())
    ax.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows], xlim=(0.2, 1.3))
    ax.set(xlabel="predicted / published", title="The formulas beside published figures")
    ax.invert_yaxis()
    ax.tick_params(left=False, axis="y", labelsize=8)
    ax.grid(True, axis="x")
    marks = [
        Line2D([], [], marker="o", linestyle="none", color=INK, markerfacecolor=face)
        for face in (INK, "white")
    ]
    figure.legend(marks, ["source read", "reported"], ncols=2, loc="outside lower center")
    return figure


def _size(plans: dict[str, MemoryPlan]) -> tuple[float, float]:
    """Inches."""
    return 7.6, 1.7 + 0.34 * len(plans)


def _apart(values: list[int], distance: float) -> list[int]:
    """The values whose labels have room: from the largest down, none nearer to the one before than `distance`."""
    kept: list[int] = []
    for value in reversed(values):
        if not kept or kept[-1] - value >= distance:
            kept.append(value)
    return kept
