"""The figures of notebook 06 show what they are given, and no label lies on another."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from test_plotting_all_reduce import overlapping_texts
from workshop_utils.intrinsic_dimension import IntrinsicDimension
from workshop_utils.plotting import RANK_COLORS, use_style
from workshop_utils.plotting import subspace as figures

STARTS = ("pre-trained", "random initialisation")
BUDGETS = (210, 610, 1_594, 3_188, 4_782)
SCORED_AFTER = [0, 25, 50, 100, 200, 400, 700, 1_000, 1_500, 2_000]
AUTHORS = {10: 0.175, 100: 0.593, 300: 0.818, 750: 0.894, 1_500: 0.925}


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def compared_rows():
    """Accuracies that depend on start, method, budget, seed and step, so that a mix-up shows."""
    rows = []
    for s, start in enumerate(STARTS):
        for m, method in enumerate([*figures.METHODS, "full"]):
            for b, budget in enumerate(BUDGETS if method != "full" else (199_210,)):
                final = 0.9 - 0.3 * s - 0.03 * m + 0.015 * b
                curve = [[final * (i + 5) / 14 + 0.004 * seed for i in range(10)] for seed in range(3)]
                rows.append({"start": start, "method": method, "budget": budget, "curve": curve})
    return rows


def line_of(ax, label):
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return line.get_xdata().tolist(), torch.as_tensor(line.get_ydata())


def test_the_toy_shows_every_loss():
    losses = {1_000: [5.0, 1e-25, 0.0], 10_000: [7.0, 1e-26, 1e-25]}
    figure = figures.plot_toy([9, 10, 11], losses)
    assert overlapping_texts(figure) == []
    x, y = line_of(figure.axes[0], "1,000 parameters")
    assert x == [9, 10, 11] and y.tolist() == [5.0, 1e-25, 1e-30]  # a logarithm has no place for 0


@pytest.mark.parametrize("comparable", [True, False])
def test_a_curve_has_mean_range_lines_and_the_authors(comparable):
    dims, accuracy = [100, 300, 750, 1_000], torch.tensor([[0.6, 0.8, 0.90, 0.91], [0.7, 0.84, 0.92, 0.91]])
    lines = {"global": (0.9, 750), "local": (0.95, None)}
    figure = figures.plot_dimension_curve(
        "60,000 images", dims, accuracy, lines, AUTHORS, comparable=comparable
    )
    assert overlapping_texts(figure) == []
    ax = figure.axes[0]
    x, y = line_of(ax, "ours, mean and range of 2 seeds")
    assert x == dims and torch.allclose(y, accuracy.mean(0))
    labels = ax.get_legend_handles_labels()[1]
    assert "global line 0.900: d_int90 = 750" in labels and "local line 0.950: not reached" in labels
    theirs = next(line for line in ax.get_lines() if str(line.get_label()).startswith("Li et al."))
    assert theirs.get_xdata().tolist() == [100, 300, 750, 1_500]  # d = 10 lies outside of what we measured
    assert ("not comparable" in theirs.get_label()) == (not comparable) == (theirs.get_alpha() < 1)


@pytest.mark.parametrize(("percent", "definition"), [(90, "global"), (50, "local"), (99, "global")])
def test_a_crossing_is_where_the_mean_exceeds_the_line(percent, definition):
    accuracy = torch.tensor([[0.6, 0.8, 0.90, 0.91], [0.7, 0.84, 0.92, 0.91]], dtype=torch.float64)
    baselines = torch.tensor([0.97, 0.99], dtype=torch.float64)
    curve = IntrinsicDimension(
        [100, 300, 750, 1_000], [0, 1], accuracy, baselines, 199_210, {"projection": "sparse"}, 1.0
    )
    figure = figures.crossing_figure(curve, AUTHORS, percent=percent, definition=definition)
    FigureCanvasAgg(figure)
    assert overlapping_texts(figure) == []
    threshold = percent / 100 * (1.0 if definition == "global" else 0.98)
    above = [d for d, mean in zip(curve.dims, accuracy.mean(0)) if mean > threshold]
    crossing = f"d_int{percent} = {above[0]:,}" if above else "not reached"
    assert f"{definition} line {threshold:.3f}: {crossing}" in figure.axes[0].get_legend_handles_labels()[1]
    words = figures.describe_crossing(curve, percent=percent, definition=definition)
    assert f"an accuracy of {threshold:.3f}" in words
    assert (f"above it: {above[0]:,} of 199,210" if above else "does not reach it with 1,000") in words


def test_every_network_has_its_point_and_its_name():
    points = [
        ("FC 1x50", 39_760, 725),
        ("LeNet", 44_426, 290),
        ("FC 5x50", 49_960, 750),
        ("FC 2x200", 199_210, 800),
    ]
    points += [("FC 2x400", 478_410, None), ("FC 5x400", 959_610, 725)]
    figure = figures.plot_width_depth(points, authors=(575, 775))
    assert overlapping_texts(figure) == []
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {"FC 1x50", "LeNet", "FC 5x50", "FC 2x200", "FC 5x400"}  # None: not found, so not drawn
    drawn = [xy for line in figure.axes[0].get_lines() for xy in zip(line.get_xdata(), line.get_ydata())]
    assert set(drawn) == {(D, d) for _, D, d in points if d is not None}


def test_budgets_show_the_final_errors_of_each_method_and_start():
    rows = compared_rows()
    figure = figures.plot_budgets(rows)
    assert overlapping_texts(figure) == []
    for ax, start in zip(figure.axes, STARTS, strict=True):
        assert start in ax.get_title(loc="left")
        for method in figures.METHODS:
            chosen = [r for r in rows if r["start"] == start and r["method"] == method]
            wanted = [100 - 100 * sum(curve[-1] for curve in r["curve"]) / 3 for r in chosen]
            x, y = line_of(ax, method)
            assert x == list(BUDGETS) and y.tolist() == pytest.approx(wanted, rel=1e-5)


def test_convergence_shows_one_budget_against_steps():
    rows = compared_rows()
    figure = figures.plot_convergence(rows, SCORED_AFTER, budget=1_594)
    assert overlapping_texts(figure) == []
    (row,) = [r for r in rows if (r["start"], r["method"], r["budget"]) == (STARTS[1], "LoRA", 1_594)]
    x, y = line_of(figure.axes[1], "LoRA")
    assert x == SCORED_AFTER[1:]  # step 0 has no place on a logarithmic axis
    wanted = 100 - 100 * torch.tensor(row["curve"]).mean(0)[1:]
    assert y.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)


def test_methods_have_colors_and_markers_of_their_own():
    colors, markers = zip(*figures.METHODS.values())
    assert len(set(colors)) == len(set(markers)) == len(figures.METHODS)
    assert not {to_hex(color) for color in colors} & {to_hex(color) for color in RANK_COLORS}
