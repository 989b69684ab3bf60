"""Every widget follows its controls through the plot function of the static figure, and says what it cannot show."""

import io

import matplotlib

matplotlib.use("Agg")
import ipywidgets
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from workshop_utils import widgets
from workshop_utils.network import LINKS
from workshop_utils.plotting.all_reduce import all_reduce_step_figure, describe_step
from workshop_utils.plotting.costs import describe_fastest, fastest_figure
from workshop_utils.plotting.data_parallel import bucket_timeline_figure
from workshop_utils.plotting.fully_sharded import memory_bill_figure
from workshop_utils.plotting.lora import rank_figure
from workshop_utils.plotting.quantization import quantization_figure
from workshop_utils.schedules import ALGORITHMS, schedule
from workshop_utils.widgets.common import DPI

UPDATES = {"full": [8 / k for k in range(1, 201)], 2: [9.0, 1.0, *[0.0] * 198], 8: [7.0, 2.0, *[0.0] * 198]}

# The widget, its arguments, and a value for each control, in an order in which each change shows another picture.
MOVES = {
    "all_reduce_stepper": ((), {"step": 3, "algorithm": "tree", "ranks": 6}),
    "alpha_beta": ((), {"message": 10**8, "ranks": 48, "link": "NVLink 4"}),
    "bucket_timeline": (
        (0.075,),
        {"bucket size": 25 * 2**20, "overlap": ("on",), "link": "10 Gb/s Ethernet"},
    ),
    "memory_bill": ((), {"parameters": 70 * 10**9, "ranks": 2, "stage": 1, "precision": "fp32"}),
    "lora_rank": ((UPDATES, 784, 200), {"r": 64}),
    "intrinsic_dimension": ((), {"threshold, %": 80, "of": "local", "projection": "sparse"}),
    "quantization_explorer": ((), {"format": "int4", "block size": 4096, "outlier": 0}),
    "planner": ((), {"model": "vit-l", "method": "full", "GPUs": 8, "batch": 4, "checkpointing": True}),
}
# The same pictures from the plot functions, with those values.
DRAWN = {
    "all_reduce_stepper": lambda: all_reduce_step_figure("tree", 6, 3),
    "alpha_beta": lambda: fastest_figure(48, "NVLink 4", 10**8),
    "bucket_timeline": lambda: bucket_timeline_figure(0.075, "10 Gb/s Ethernet", 4, 25 * 2**20, ("on",)),
    "memory_bill": lambda: memory_bill_figure(70 * 10**9, 2, 1, "fp32"),
    "lora_rank": lambda: rank_figure(UPDATES, 784, 200, 64),
    "quantization_explorer": lambda: quantization_figure("int4", 4096, 0),
}


def parts(widget) -> tuple[dict[str, ipywidgets.Widget], ipywidgets.Image, str]:
    """(controls by description, the picture, the words or "")."""
    inside = [w for child in widget.children for w in getattr(child, "children", [child])]
    controls = {w.description: w for w in inside if not isinstance(w, (ipywidgets.Image, ipywidgets.HTML))}
    (picture,) = [w for w in inside if isinstance(w, ipywidgets.Image)]
    words = [w for w in inside if isinstance(w, ipywidgets.HTML)]
    return controls, picture, words[0] if words else None


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def as_png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


@pytest.mark.parametrize("name", MOVES)
def test_each_control_moves_the_picture_and_back(name):
    arguments, moves = MOVES[name]
    controls, picture, words = parts(getattr(widgets, name)(*arguments))
    assert "" not in controls  # a control without a name cannot be found by a screen reader
    assert moves.keys() <= controls.keys()
    before = {description: control.value for description, control in controls.items()}
    seen, told = [picture.value], [words and words.value]
    for description, value in moves.items():
        controls[description].value = value
        seen.append(picture.value)
        told.append(words and words.value)
    assert len(set(seen)) == len(seen), "two settings show the same picture"
    assert words is None or len(set(told)) > 1
    if name in DRAWN:
        np.testing.assert_array_equal(pixels(picture.value), pixels(as_png(DRAWN[name]())))
    for description, value in before.items():
        controls[description].value = value
    assert picture.value == seen[0]
    assert (pixels(picture.value)[0, 0] == 1).all()  # white, in the dark theme too
    assert plt.get_fignums() == []  # a widget leaves no figure behind in pyplot


def test_all_widgets_are_tried():
    assert set(MOVES) == set(widgets._HOME)
    with pytest.raises(AttributeError, match="no attribute 'stepper'"):
        widgets.stepper  # noqa: B018


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_step_has_its_picture_and_its_words(algorithm, world_size):
    controls, picture, words = parts(widgets.all_reduce_stepper(algorithm, world_size))
    slider = controls["step"]
    assert (slider.min, slider.value, slider.max) == (0, 0, len(schedule(algorithm, world_size)))
    seen = []
    for step in {0, 1, slider.max // 2, slider.max}:
        slider.value = step
        assert words.value == describe_step(algorithm, world_size, step)
        seen.append(picture.value)
    assert len(set(seen)) == len(seen)


def test_a_step_beyond_the_last_becomes_the_last():
    controls, picture, words = parts(widgets.all_reduce_stepper("naive", 8))
    controls["step"].value = 14
    controls["algorithm"].value = "tree"
    assert (controls["step"].value, controls["step"].max) == (6, 6)
    assert words.value == describe_step("tree", 8, 6)
    controls["ranks"].value = 2
    assert controls["step"].value == 2
    np.testing.assert_array_equal(pixels(picture.value), pixels(as_png(all_reduce_step_figure("tree", 2, 2))))
    controls["ranks"].value = 8
    assert (controls["step"].value, controls["step"].max) == (2, 6)


def test_images_have_their_own_length():
    controls, _, _ = parts(widgets.planner("vit-l"))
    assert controls["length"].disabled
    controls["model"].value = "llama-1b"
    assert not controls["length"].disabled


def test_the_words_name_the_fastest():
    words = describe_fastest(64, "10 Gb/s Ethernet", 1000)
    assert words.startswith("1 KB on 64 ranks, 10 Gb/s Ethernet: halving-doubling is fastest, 602 µs")
    assert "ring is fastest" in describe_fastest(48, "10 Gb/s Ethernet", 10**8)
    assert "ring and halving-doubling are fastest" in describe_fastest(2, "NVLink 4", 10**8)


WRONG = [
    ("all_reduce_stepper", ("ring", 1), "world_size must be at least 2, got 1"),
    ("all_reduce_stepper", ("ring", 9), "room for 8 ranks, got world_size 9"),
    ("all_reduce_stepper", ("star", 4), "unknown algorithm 'star': choose one of naive"),
    ("alpha_beta", (5,), "got 100000, 5 and '10 Gb/s Ethernet'"),
    ("alpha_beta", (64, "a string"), "one of the links 100 Mb/s Ethernet"),
    ("bucket_timeline", (0,), "compute_s must be above 0 seconds, got 0"),
    ("bucket_timeline", (1, "a string"), f"unknown link 'a string': choose one of {next(iter(LINKS))}"),
    ("memory_bill", (7_500_000_000, 3), "one of 199,210.* power of two up to 1,024, got 7,500,000,000 and 3"),
    ("lora_rank", ({8: [1.0]}, 784, 200), 'must hold the singular values of "full".*; got 8, and r = 8'),
    ("lora_rank", ({"full": [1.0]}, 10, 200, 16), "r be one of 1, 2, 4, 8; got full, and r = 16"),
    ("intrinsic_dimension", (40,), "between 50 and 99.*, got 40 and 'global'"),
    ("intrinsic_dimension", (90, "famous"), "got 90 and 'famous'"),
    ("quantization_explorer", ("NF5",), "choose one of int4, FP4, NF4, .* got 'NF5', 64 and 20"),
    ("planner", ("llama-9b",), "model must be one of smollm2, .* method one of full, lora, qlora"),
    ("planner", ("smollm2", "dora"), "got 'smollm2', 'dora' and 2"),
    ("planner", ("smollm2", "lora", 3), "world_size one of 2, 4, 8, 16, 32, 64, got 'smollm2', 'lora' and 3"),
]


@pytest.mark.parametrize(("name", "arguments", "complaint"), WRONG)
def test_what_cannot_be_shown_is_told(name, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        getattr(widgets, name)(*arguments)
