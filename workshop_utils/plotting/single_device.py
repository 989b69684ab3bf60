"""The pictures of notebook 01: bytes by kind, a profile, the autograd graph, strides, and what depends on what.

Each function draws one figure that says one thing and returns it. No rank appears here except in
`plot_dependencies`, so the other figures use colours of their own: one per kind of bytes.

Shape letters: N images, D = 784 pixels.
"""

import os
import statistics

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from workshop_utils.plotting import INK, MUTED, PAPER, draw_box, rank_color

KIND_COLORS = {
    "parameters": "#44546a",
    "buffers": "#8a6f9c",
    "activations": "#d9b84a",
    "gradients": "#86aea6",
    "optimizer": "#c9d1da",
}
os.environ.setdefault(
    "KINETO_LOG_LEVEL", "6"
)  # the profiler's library logs into the notebook's cells otherwise

MATMUL_COLOR, OTHER_COLOR = "#44546a", "#d9b84a"
MATMULS = ("aten::addmm", "aten::mm")
WRAPPERS = ("aten::linear", "aten::cross_entropy_loss", "aten::nll_loss_nd")


def plot_digits(images_ND: Tensor, captions) -> Figure:
    """One row of images [N, D], each under its caption."""
    figure, axes = plt.subplots(1, len(images_ND), figsize=(0.85 * len(images_ND), 1.15), squeeze=False)
    for ax, image, caption in zip(axes[0], images_ND, captions, strict=True):
        ax.imshow(image.view(28, 28).numpy(), cmap="gray_r")
        ax.set_title(str(caption), fontsize=10, loc="center", fontweight="normal")
        ax.axis("off")
    return figure


def plot_bytes_by_kind(rows: dict[str, dict[str, int]], title: str) -> Figure:
    """One stacked bar per row: {"batch 128": {"parameters": bytes, ...}}, in MB (10**6 bytes)."""
    figure, ax = plt.subplots(figsize=(7.2, 0.9 + 0.5 * len(rows)))
    kinds = [kind for kind in KIND_COLORS if any(row.get(kind) for row in rows.values())]
    left = dict.fromkeys(rows, 0.0)
    for kind in kinds:
        sizes = [row.get(kind, 0) / 1e6 for row in rows.values()]
        ax.barh(list(rows), sizes, left=list(left.values()), color=KIND_COLORS[kind], label=kind, height=0.62)
        left = {name: left[name] + size for name, size in zip(rows, sizes, strict=True)}
    for name, total in left.items():
        ax.text(total, name, f"  {total:,.1f} MB", va="center")
    ax.set(xlabel="MB held in one training step (1 MB = 10⁶ bytes)", title=title)
    ax.margins(x=0.14)
    ax.invert_yaxis()
    ax.tick_params(left=False)
    figure.legend(ncols=len(kinds), loc="outside lower center")
    return figure


# The profile


def step_timeline(profile, phases=("forward", "backward", "update")):
    """The step of median length in a torch profile whose phases are marked with `record_function`.

    Returns ({phase: (start_us, end_us)}, [(name, start_us, end_us)]), microseconds from the step's start;
    the list holds the topmost torch operations inside the phases.
    """
    events = profile.events()
    steps = list(zip(*([e.time_range for e in events if e.name == name] for name in phases), strict=True))
    steps.sort(key=lambda step: step[-1].end - step[0].start)
    median = steps[len(steps) // 2]
    first, last = median[0].start, median[-1].end
    spans = {name: (t.start - first, t.end - first) for name, t in zip(phases, median, strict=True)}
    operations = [
        (e.name, e.time_range.start - first, e.time_range.end - first)
        for e in events
        if first <= e.time_range.start <= last and _is_topmost_operation(e)
    ]
    return spans, operations


def busy_shares(spans, operations) -> dict[str, float]:
    """Shares of the step's time: in matrix products, in other torch operations, between operations."""
    total = max(end for _, end in spans.values())
    matmul = sum(end - start for name, start, end in operations if name in MATMULS)
    other = sum(end - start for name, start, end in operations if name not in MATMULS)
    return {
        "matrix products": matmul / total,
        "other operations": other / total,
        "between operations": 1 - (matmul + other) / total,
    }


def plot_profile(spans, operations) -> Figure:
    """A step as a timeline: its phases above, its operations below; a gap is Python and bookkeeping."""
    figure, ax = plt.subplots(figsize=(8.4, 2.3))
    for phase, (start, end) in spans.items():
        ax.barh(1, end - start, left=start, height=0.5, color=PAPER, edgecolor=MUTED)
        share = (end - start) / max(last for _, last in spans.values())
        label = f"{phase}\n{(end - start) / 1000:.2f} ms" if share > 0.1 else ""
        ax.text((start + end) / 2, 1, label, ha="center", va="center")
    for is_matmul, color in ((True, MATMUL_COLOR), (False, OTHER_COLOR)):
        chosen = [(start, end - start) for name, start, end in operations if (name in MATMULS) == is_matmul]
        ax.broken_barh(chosen, (0.08, 0.5), facecolor=color)
    shares = busy_shares(spans, operations)
    for (label, share), color in zip(shares.items(), (MATMUL_COLOR, OTHER_COLOR, "white"), strict=True):
        ax.barh(-9, 0, color=color, edgecolor=MUTED, label=f"{label} {share:.0%}")
    ax.set(ylim=(0, 1.32), yticks=[0.33, 1], yticklabels=["operations", "phases"])
    ax.set(xlabel="microseconds since the step began", title="One training step, as the profiler saw it")
    ax.tick_params(left=False)
    figure.legend(ncols=3, loc="outside lower center")
    return figure


def _is_topmost_operation(event) -> bool:
    """A torch operation that no other operation called, those that only wrap others left out."""
    if not event.name.startswith("aten::") or event.name in WRAPPERS:
        return False
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::") and parent.name not in WRAPPERS:
            return False
        parent = parent.cpu_parent
    return True


# The autograd graph


def plot_autograd_graph(loss: Tensor, parameters: dict[str, Tensor]) -> Figure:
    """The graph behind `loss`, from its grad_fn: the order of the backward runs left to right.

    `parameters` is `dict(model.named_parameters())`; a leaf is drawn with its name and shape. Meant for a
    chain of layers: what leads to one parameter alone is drawn above or below the chain.
    """
    names = {id(tensor): f"{name}\n{list(tensor.shape)}" for name, tensor in parameters.items()}
    chain = _main_chain(loss.grad_fn)
    figure, ax = plt.subplots(figsize=(1.3 * len(chain) + 1.2, 4.4))
    for column, node in enumerate(chain):
        _draw_node(ax, column, 0, node, names)
        if column:
            _draw_arrow(ax, (column - 0.57, 0), (column - 0.43, 0))
        branches = [child for child, _ in node.next_functions if child and child not in chain]
        for side, branch in zip((1, -1), sorted(branches, key=_depth), strict=False):
            row = 0
            while branch is not None:
                row += side
                _draw_arrow(ax, (column, row - 0.68 * side), (column, row - 0.32 * side))
                _draw_node(ax, column, row, branch, names)
                branch = next((child for child, _ in branch.next_functions if child), None)
    if any(child is None for child, _ in chain[-1].next_functions):
        draw_box(
            ax,
            len(chain),
            0,
            0.84,
            0.62,
            "images\nneed no\ngradient",
            color="white",
            fontsize=8,
            linestyle="--",
        )
    ax.text(-0.45, 1.32, "backward runs from left to right  →", color=INK, va="center")
    ax.set(xlim=(-0.5, len(chain) + 0.5), ylim=(-2.4, 1.6), title="What autograd remembers of one forward")
    ax.axis("off")
    return figure


def _draw_node(ax, column, row, node, names):
    parameter = getattr(node, "variable", None)
    if parameter is not None:
        color = KIND_COLORS["gradients"]
        draw_box(ax, column, row, 0.9, 0.62, names[id(parameter)], color=color, fontsize=8)
    else:
        label = node.name().replace("Backward", "\nBackward")
        draw_box(ax, column, row, 0.86, 0.62, label, fontsize=8)


def _draw_arrow(ax, start, end, color=MUTED, **style):
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0} | style
    )


def _main_chain(node) -> list:
    """From the loss on, always into the branch that holds more than one parameter."""
    chain = [node]
    while wider := [child for child, _ in chain[-1].next_functions if child and _leaves(child) > 1]:
        chain.append(wider[0])
    return chain


def _leaves(node) -> int:
    if hasattr(node, "variable"):
        return 1
    return sum(_leaves(child) for child, _ in node.next_functions if child)


def _depth(node) -> int:
    return 1 + max((_depth(child) for child, _ in node.next_functions if child), default=0)


# Memory layout and its cost


def plot_strides(views: dict[str, Tensor]) -> Figure:
    """Small 2-d tensors over one storage: each cell shows the place in the storage that it reads."""
    figure, axes = plt.subplots(1, len(views), figsize=(2.75 * len(views), 2.6), squeeze=False)
    last = max(view.untyped_storage().nbytes() // view.element_size() for view in views.values()) - 1
    for ax, (name, view) in zip(axes[0], views.items(), strict=True):
        rows, columns = view.shape
        for i in range(rows):
            for j in range(columns):
                place = view.storage_offset() + i * view.stride(0) + j * view.stride(1)
                shade = plt.get_cmap("Blues")(0.08 + 0.5 * place / last)
                ax.add_patch(plt.Rectangle((j, i), 1, 1, facecolor=shade, edgecolor="white", linewidth=2))
                ax.text(j + 0.5, i + 0.5, str(place), ha="center", va="center")
        yes = "contiguous" if view.is_contiguous() else "not contiguous"
        ax.set_title(f"{name}\nshape {list(view.shape)}", fontsize=10)
        ax.text(0, rows + 0.45, f"strides {list(view.stride())}\n{yes}", va="top", fontsize=9)
        ax.set(xlim=(0, 4.02), ylim=(5.2, 0), aspect="equal")
        ax.axis("off")
    return figure


def plot_times(times_s: dict[str, list[float]], title: str) -> Figure:
    """Repeated measurements, a row each: every run as a dot, the median as a line with its number (µs)."""
    figure, ax = plt.subplots(figsize=(7.2, 0.9 + 0.42 * len(times_s)))
    for row, samples in enumerate(times_s.values()):
        micros = [1e6 * sample for sample in samples]
        median = statistics.median(micros)
        ax.plot(micros, [row] * len(micros), "o", color=MUTED, alpha=0.25, markersize=4, markeredgewidth=0)
        ax.plot([median, median], [row - 0.22, row + 0.22], color=INK, linewidth=2.5)
        ax.annotate(
            f"{median:,.0f}",
            (median, row - 0.22),
            (0, 1),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
    every = sorted(1e6 * sample for samples in times_s.values() for sample in samples)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlim(every[0] / 1.5, every[int(0.98 * (len(every) - 1))] * 1.5)
    ax.set(yticks=range(len(times_s)), yticklabels=list(times_s), ylim=(len(times_s) - 0.5, -0.75))
    ax.set(xlabel="microseconds, log scale (line: median)", title=title)
    ax.tick_params(left=False)
    return figure


# What depends on what


def plot_dependencies() -> Figure:
    """One step on a batch cut in two: what runs alone, and the three places where the halves must meet."""
    figure, ax = plt.subplots(figsize=(9.4, 3.7))
    steps = ["forward\nfc1", "forward\nfc2", "forward\nfc3", "loss"]
    steps += ["backward\nfc3", "backward\nfc2", "backward\nfc1"]
    for half, y in ((0, 2.1), (1, -0.1)):
        color = rank_color(half)
        draw_box(ax, 0, y, 0.86, 0.62, f"images\nhalf {'AB'[half]}", color="white", edge=color, fontsize=8)
        for x, label in enumerate(steps, start=1):
            draw_box(ax, x, y, 0.86, 0.62, label, color="white", edge=color, fontsize=8)
            _draw_arrow(ax, (x - 0.57, y), (x - 0.43, y), color)
        for x in (5, 6, 7):
            _draw_arrow(ax, (x, y - 0.33 if half == 0 else y + 0.33), (x, 1.26 if half == 0 else 0.74), color)
    for x, name in ((5, "fc3"), (6, "fc2"), (7, "fc1")):
        draw_box(ax, x, 1, 0.8, 0.46, f"Σ grad {name}", color=KIND_COLORS["gradients"], fontsize=8)
    for x, bend in ((5.2, -0.16), (6.2, -0.13), (7.42, 0)):
        style = {"connectionstyle": f"arc3,rad={bend}"}
        _draw_arrow(ax, (x, 1.24 if bend else 1), (8.05, 1.1 if bend else 1), MUTED, **style)
    draw_box(ax, 8.55, 1, 0.96, 0.62, "update\nentry by entry", color=KIND_COLORS["optimizer"], fontsize=8)
    ax.set(xlim=(-0.5, 9.1), ylim=(-0.55, 2.55))
    ax.set_title("A batch in two halves: only the gradients' sums need both")
    ax.axis("off")
    return figure
