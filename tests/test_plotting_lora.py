"""The figures of notebook 05 show what they are given, and no label lies on another."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex, to_rgb

from test_plotting_all_reduce import overlapping_texts
from workshop_utils.plotting import RANK_COLORS, lora, use_style

METHODS = ("full", "last layer", 1, 2, 4, 8, 16)


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def test_methods_have_a_look_of_their_own_and_none_of_a_rank():
    styles = [lora.method_style(method) for method in METHODS]
    colors = {to_hex(style["color"]) for style in styles}
    assert len(colors) == len(METHODS) and not colors & set(RANK_COLORS)
    luminance = [sum(w * c for w, c in zip((0.21, 0.72, 0.07), to_rgb(s["color"]))) for s in styles[2:]]
    assert luminance == sorted(luminance, reverse=True)  # r can be read in grey too
    assert len({style["marker"] for style in styles}) == 3


@pytest.mark.parametrize("r", [1, 8, 64])
def test_thin_matrices_are_drawn_to_scale(r):
    figure = lora.plot_low_rank(784, 200, r)
    assert overlapping_texts(figure) == []
    sizes = [(box.get_width(), box.get_height()) for box in figure.axes[0].patches]
    assert sizes == [(784, 200), (r, 200), (784, r)]
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "156,800" in words and f"{r * 984:,}" in words


def test_accuracy_shows_mean_worst_and_best():
    methods = {method: (1000 * (i + 1), [0.9, 0.92, 0.94]) for i, method in enumerate(METHODS)}
    figure = lora.plot_accuracy(
        "Mean of three seeds",
        {"8 or 9": methods, "even or odd": methods},
        {"8 or 9": 0.5, "even or odd": 0.56},
    )
    assert overlapping_texts(figure) == []
    left, right = figure.axes
    assert right.get_title(loc="left") == "even or odd (base: 56%)"
    bars = left.containers[0]
    assert bars.lines[0].get_xydata().tolist() == [[1000, pytest.approx(92)]]
    (segment,) = bars.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == [pytest.approx(90), pytest.approx(94)]
    assert len(left.containers) == len(METHODS) == len(figure.legends[0].get_texts())


def test_curves_show_the_mean_and_the_band():
    curves = {"full": ([10, 20], [[0.8, 0.9], [0.9, 0.96]]), 4: ([10, 20], [[0.7, 0.8], [0.7, 0.9]])}
    figure = lora.plot_curves("Even or odd", curves, target=0.9)
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert list(ax.lines[0].get_ydata()) == [pytest.approx(85), pytest.approx(93)]
    assert list(ax.lines[2].get_ydata()) == [90, 90]
    assert len(ax.collections) == 2


def test_singular_values_of_a_low_rank_end_where_it_ends():
    values = {"full": [2.0 / k for k in range(1, 200)], 2: [3.0, 1.0] + [1e-9] * 198}
    figure = lora.plot_singular_values("The update", values)
    assert overlapping_texts(figure) == []
    full, low = figure.axes[0].lines
    assert len(full.get_xdata()) == 40 and list(low.get_xdata()) == [1, 2]


@pytest.mark.parametrize("panels", [1, 2])
def test_overlaps_write_each_number(panels):
    table = [[0.9, 0.91, 0.92], [0.9, 0.4, 0.05]]
    figure = lora.plot_overlaps("phi", {f"panel {i}": table for i in range(panels)})
    assert overlapping_texts(figure) == []
    assert len(figure.axes) == panels
    assert [t.get_text() for t in figure.axes[0].texts] == ["0.90", "0.91", "0.92", "0.90", "0.40", "0.05"]


def test_a_grid_is_readable_on_light_and_dark():
    figure = lora.plot_grid(
        "Accuracy", [1, 16], [0.001, 0.01, 0.1], [[0.5, 0.6, 0.9], [0.7, 0.9, 0.5]], xlabel="rate", ylabel="a"
    )
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.texts] == ["50", "60", "90", "70", "90", "50"]
    assert {t.get_text(): to_hex(t.get_color()) for t in ax.texts}["90"] == "#ffffff"
    assert ax.get_ylim()[0] < ax.get_ylim()[1]  # the first row is at the bottom
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.001", "0.01", "0.1"]


def test_forgetting_has_a_mark_per_seed():
    figure = lora.plot_forgetting(
        "Forgetting", {method: ([0.9, 0.91], [0.8, 0.85]) for method in METHODS}, 0.94
    )
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert len(ax.lines) == len(METHODS) + 1
    assert list(ax.lines[0].get_xdata()) == [90, 91] and list(ax.lines[0].get_ydata()) == [80, 85]
    assert list(ax.lines[-1].get_ydata()) == [94, 94]


def test_drift_keeps_a_line_at_zero_visible():
    figure = lora.plot_drift(
        "Drift", {"one": [1e-8] * 5, "two": [k * 1e-8 for k in range(5)], "kept": [0.0] * 5}
    )
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert ax.get_ylim()[0] < 0
    assert list(ax.lines[2].get_ydata()) == [0] * 5


def test_nothing_drifts():
    assert overlapping_texts(lora.plot_drift("Drift", {"kept": [0.0] * 5})) == []


def test_directions_are_turned_alike():
    pattern = [(-1) ** k * k / 784 for k in range(784)]
    figure = lora.plot_directions("Directions", {"r = 2": [-value for value in pattern], "r = 8": pattern})
    assert overlapping_texts(figure) == []
    first, second = (ax.images[0].get_array() for ax in figure.axes)
    assert first.shape == (28, 28) and (first == second).all()


@pytest.mark.parametrize("r", [1, 8, 64, 200])
def test_a_rank_shows_what_it_keeps_and_what_it_costs(r):
    full = [8 / k for k in range(1, 201)]
    values = {"full": full, 8: [7.0, 2.0, *[0.0] * 198]}
    figure = lora.plot_rank(values, 784, 200, r)
    assert overlapping_texts(figure) == []
    left, right = figure.axes
    kept = next(line for line in left.lines if str(line.get_label()).startswith("full"))
    assert kept.get_ydata().tolist() == full[:r]
    trained = [line for line in left.lines if str(line.get_label()).startswith("LoRA")]
    assert [line.get_ydata().tolist() for line in trained] == (
        [[7.0, 2.0]] if r == 8 else []
    )  # zeros have no place
    assert [bar.get_height() for bar in right.patches] == [156_800, r * 984]
    share = sum(size**2 for size in full[:r]) / sum(size**2 for size in full)
    assert left.get_title(loc="left") == f"r = {r}: {share:.0%} of the full update, in squares"
    words = lora.describe_rank(values, 784, 200, r)
    assert f"= {r * 984:,} numbers" in words and f"more than {share:.0%}" in words
    assert ("strongest 2 directions hold 100%" in words) == (r == 8)
