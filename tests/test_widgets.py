"""The stepper and the memory bill: sliders redraw through the plot functions, fast enough to drag."""

import io
import time

import ipywidgets
import matplotlib.image
import numpy as np
import pytest

from workshop_utils.plotting.all_reduce import all_reduce_step_figure, describe_step
from workshop_utils.plotting.fully_sharded import memory_bill_figure
from workshop_utils.schedules import ALGORITHMS, schedule
from workshop_utils.widgets import MODEL_SIZES, all_reduce_stepper, memory_bill


def parts(stepper):
    slider, picture, words = stepper.children
    assert isinstance(slider, ipywidgets.IntSlider)
    return slider, picture, words


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_step_has_its_picture_and_its_words(algorithm, world_size):
    slider, picture, words = parts(all_reduce_stepper(algorithm, world_size))
    assert (slider.min, slider.value, slider.max) == (0, 0, len(schedule(algorithm, world_size)))
    seen = []
    for step in range(slider.max + 1):
        slider.value = step
        assert words.value == describe_step(algorithm, world_size, step)
        seen.append(picture.value)
    assert len(set(seen)) == slider.max + 1
    slider.value = 0
    assert picture.value == seen[0]


def test_the_picture_is_that_of_the_plot_function():
    slider, picture, _ = parts(all_reduce_stepper("ring", 3))
    slider.value = 2
    buffer = io.BytesIO()
    all_reduce_step_figure("ring", 3, 2).savefig(buffer, format="png", dpi=90)
    np.testing.assert_array_equal(pixels(picture.value), pixels(buffer.getvalue()))


def test_a_step_is_drawn_while_the_reader_waits():
    """About 0.1 s on an idle machine; the limit is there to catch a redraw that became something else."""
    slider, _, _ = parts(all_reduce_stepper("ring", 4))
    times_s = []
    for step in range(1, slider.max + 1):
        began_s = time.perf_counter()
        slider.value = step
        times_s.append(time.perf_counter() - began_s)
    assert sorted(times_s)[len(times_s) // 2] < 1.0, times_s


def test_the_ground_is_white_in_every_theme():
    _, picture, _ = parts(all_reduce_stepper("ring", 4))
    assert pixels(picture.value)[0, 0].tolist() == [1, 1, 1, 1]


def test_what_cannot_be_shown_is_told():
    with pytest.raises(ValueError, match="world_size must be at least 2, got 1"):
        all_reduce_stepper("ring", 1)
    with pytest.raises(ValueError, match="unknown algorithm 'star': choose one of naive"):
        all_reduce_stepper("star", 4)


def test_the_bill_follows_slider_and_model():
    model, slider, picture = memory_bill(7_500_000_000, 64).children
    assert isinstance(model, ipywidgets.Dropdown)
    assert isinstance(slider, ipywidgets.SelectionSlider)
    seen = [picture.value]
    slider.value = 2
    seen.append(picture.value)
    model.value = MODEL_SIZES["70 B"]
    seen.append(picture.value)
    assert len(set(seen)) == 3
    buffer = io.BytesIO()
    memory_bill_figure(70_000_000_000, 2).savefig(buffer, format="png", dpi=90)
    np.testing.assert_array_equal(pixels(picture.value), pixels(buffer.getvalue()))


def test_the_bill_says_which_sizes_it_has():
    with pytest.raises(
        ValueError, match="must be one of 199,210.* power of two up to 1,024, got 7,500,000,000 and 3"
    ):
        memory_bill(7_500_000_000, 3)
