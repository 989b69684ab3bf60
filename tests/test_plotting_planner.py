"""The planner's figures show the plans they are given, no label lies on another, and the widget follows its controls."""

import io
import time

import matplotlib

matplotlib.use("Agg")
import ipywidgets
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from test_plotting_all_reduce import overlapping_texts
from workshop_utils.memory_plan import CARDS_GIB, KINDS, RESERVE_BYTES, plan_memory
from workshop_utils.plotting import use_style
from workshop_utils.plotting.planner import plans_figure, plot_plans, plot_published
from workshop_utils.published_memory import predicted_against_published
from workshop_utils.widgets import planner

GIB = 2**30


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def side_by_side(model, world_size, **settings):
    strategies = ("single",) if world_size == 1 else ("ddp", "zero1", "zero2", "fsdp")
    return {
        f"{method}, {strategy}": plan_memory(model, strategy, world_size, method=method, **settings)
        for method in ("full", "lora", "qlora")
        for strategy in strategies
    }


@pytest.mark.parametrize("world_size", [1, 2, 64])
@pytest.mark.parametrize("model", ["smollm2", "llama-8b", "llama-70b", "vit-l"])
def test_the_bars_are_the_plans(model, world_size):
    plans = side_by_side(model, world_size, checkpointing=True)
    figure = plot_plans(f"{model} on {world_size}", plans)
    ax = figure.axes[0]
    bars = [bar.get_width() for container in ax.containers for bar in container]
    expected = [plan.by_kind()[kind] / GIB for kind in KINDS for plan in plans.values()]
    assert bars == pytest.approx([*expected, *[RESERVE_BYTES / GIB] * len(plans)])
    lines = [line.get_xdata()[0] for line in ax.lines]
    reach = max(plan.total_bytes + RESERVE_BYTES for plan in plans.values()) / GIB
    assert lines == [
        card for card in CARDS_GIB if all(smaller < reach for smaller in CARDS_GIB if smaller < card)
    ]
    assert overlapping_texts(figure) == []
    alone = plans_figure(f"{model} on {world_size}", plans)
    FigureCanvasAgg(alone)
    assert overlapping_texts(alone) == []


def test_long_labels_have_room():
    plan = plan_memory("vit-b", method="lora")
    figure = plot_plans("Long", {"QLoRA, r = 8, FSDP + offload on 2 GPUs": plan, "x": plan})
    assert overlapping_texts(figure) == []


def test_published():
    rows = predicted_against_published()
    figure = plot_published(rows)
    assert overlapping_texts(figure) == []
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [point.get_xdata()[0] for point in points] == pytest.approx([1 + row.error for row in rows])
    low, high = figure.axes[0].get_xlim()
    assert all(low < 1 + row.error < high for row in rows)


def controls_of(widget):
    rows = [row for row in widget.children if isinstance(row, ipywidgets.HBox)]
    named = {control.description: control for row in rows for control in row.children}
    return named, *widget.children[len(rows) :]


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def test_the_widget_follows_its_controls():
    controls, picture, words = controls_of(planner("llama-8b", "qlora", 2))
    seen, told, times_s = [picture.value], [words.value], []
    for name, value in (
        ("length", 2048),
        ("batch", 4),
        ("checkpointing", True),
        ("method", "full"),
        ("GPUs", 64),
        ("model", "smollm2"),
    ):
        began_s = time.perf_counter()
        controls[name].value = value
        times_s.append(time.perf_counter() - began_s)
        seen.append(picture.value)
        told.append(words.value)
    assert len(set(seen)) == len(seen)
    assert len(set(told)) >= len(told) - 1
    plan = plan_memory("smollm2", "fsdp", 64, batch_size=4, length=2048, checkpointing=True)
    assert f"a GPU sends {plan.traffic_bytes / 1e9:.2f} GB" in words.value
    assert f"from {plan.smallest_card_gib()} GB on" in words.value
    assert (pixels(picture.value)[0, 0] == 1).all()
    assert sorted(times_s)[len(times_s) // 2] < 1.0, (
        times_s
    )  # 0.15 s idle; a redraw must not become something else
