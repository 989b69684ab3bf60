"""The figures of notebook 03 show what they are given, and no label lies on another."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from test_plotting_all_reduce import overlapping_texts
from workshop_utils.plotting import rank_color, use_style
from workshop_utils.plotting.data_parallel import (
    bucket_timeline_figure,
    describe_bucket_timeline,
    plot_bucket_timeline,
    plot_links,
    plot_losses,
    plot_scaling,
    plot_shards,
    plot_timelines,
)


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def timeline(late_s=0.0, num_buckets=8):
    buckets = [
        (f"bucket {i}", 0.06 + late_s + 0.02 * i, 0.08 + late_s + 0.02 * i) for i in range(num_buckets)
    ]
    end_s = buckets[-1][2]
    return [("forward", 0.0, 0.04), ("backward", 0.041, 0.12), *buckets, ("wait", 0.12, end_s)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_timeline_has_every_span_of_every_rank(world_size):
    panels = {"overlap off": [timeline(0.06)] * world_size, "overlap on": [timeline()] * world_size}
    figure = plot_timelines("One step", panels)
    assert overlapping_texts(figure) == []
    off, on = figure.axes
    for ax in (off, on):
        bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        assert len(bars) == world_size * (2 + 8)  # waiting is not drawn
        assert {to_hex(bar.get_edgecolor()) for bar in bars if bar.get_hatch()} == {
            rank_color(rank) for rank in range(world_size)
        }
    first = next(patch for patch in on.patches if patch.get_hatch())
    assert first.get_x() == pytest.approx(60) and first.get_width() == pytest.approx(20)  # ms
    assert off.get_xlim() == on.get_xlim()


@pytest.mark.parametrize("shown", [("off",), ("on",), ("off", "on")])
@pytest.mark.parametrize("link", ["100 Mb/s Ethernet", "1 Gb/s Ethernet", "NVLink 5"])
def test_a_predicted_step_has_a_panel_for_each_way(link, shown):
    figure = bucket_timeline_figure(0.075, link, 4, 1, shown)
    FigureCanvasAgg(figure)
    assert overlapping_texts(figure) == []
    assert len(figure.axes) == len(shown)
    for ax, way in zip(figure.axes, shown):
        assert ax.get_title(loc="left").startswith(f"overlap {way}: ")
        bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        assert len(bars) == 2 + 16  # forward, backward, and each gradient alone
        assert max(bar.get_x() + bar.get_width() for bar in bars) < ax.get_xlim()[1]


def test_the_prediction_stands_beside_the_measurement():
    figure = plot_bucket_timeline(
        0.075, "1 Gb/s Ethernet", measured_s={"off": 0.207, "on": 0.194, "alone": 0.075}
    )
    assert overlapping_texts(figure) == []
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "overlap off: 178 ms (measured: 207 ms)",
        "overlap on: 136 ms (measured: 194 ms)",
    ]
    words = describe_bucket_timeline(0.075, "1 Gb/s Ethernet", 4, 2**20)
    assert words.startswith("8 buckets, 103 ms of sending beside 75 ms of computing.") and "= 1.31." in words


def test_a_bucket_too_short_for_its_number_has_none():
    short = [("forward", 0.0, 0.5), ("backward", 0.5, 1.0), ("bucket 0", 0.6, 0.6001), ("bucket 1", 0.7, 0.9)]
    figure = plot_timelines("One step", {"on": [short]})
    assert [text.get_text() for text in figure.axes[0].texts] == ["1"]


def test_shards_show_who_sees_a_sample():
    rows = {"padded": [[0, 2, 4], [1, 3, 0]], "each its own": [[0, 1, 2], [0, 1, 3]]}
    figure = plot_shards("Who sees which sample", rows, num_samples=5)
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["×"]  # sample 4 of the second row
    assert ax.texts[0].get_position() == (4, 1)
    colours = [to_hex(patch.get_facecolor()) for patch in ax.patches]
    assert colours.count(rank_color(0)) == 6 and colours.count(rank_color(1)) == 6


@pytest.mark.parametrize("world_size", [2, 8])
def test_shards_of_many_ranks(world_size):
    rows = {f"epoch {e}": [list(range(r, 24, world_size)) for r in range(world_size)] for e in range(6)}
    assert overlapping_texts(plot_shards("Who sees which sample", rows, 24)) == []


def test_a_diverged_loss_does_not_hide_the_others():
    steps = list(range(0, 6400, 64))
    falling = [2.3 * 0.99**i for i in range(100)]
    figure = plot_losses(
        "The same images", {"good": (steps, falling), "diverged": (steps, [2.3] + [1e6] * 99)}
    )
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert ax.get_ylim()[1] < 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["good", "diverged"]


def test_scaling_shows_measured_beside_predicted():
    figure = plot_scaling(
        "Steps", [1, 2, 4, 8], [20.0, 12.0, 6.0, 2.5], [0, 0.3, 0.4, 0.5], [0, 0.2, 0.3, 0.4], cores=2
    )
    assert overlapping_texts(figure) == []
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["20", "12", "6", "2.5"]
    assert [bar.get_alpha() for bar in left.patches] == [1.0, 1.0, 0.45, 0.45]
    assert [list(line.get_ydata()) for line in right.lines][1] == [20.0, 20.0]


def test_links_show_prediction_and_measurement_in_one_colour():
    bandwidths = [12.5e6 * 10**k for k in range(5)]
    figure = plot_links(
        "8.4 MB, 4 ranks",
        bandwidths,
        0.08,
        {"overlap off": [1.1, 0.2, 0.09, 0.081, 0.08], "overlap on": [1.0, 0.15, 0.08, 0.08, 0.08]},
        {"overlap off": (bandwidths[:2], [1.2, 0.22]), "overlap on": (bandwidths[:2], [1.1, 0.17])},
        {"10 Gb/s Ethernet": 1.25e9, "PCIe 4 x16": 31e9, "NVLink 4": 450e9},
    )
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    lines = {line.get_label(): line.get_color() for line in ax.lines}
    assert lines["overlap on, predicted"] == lines["overlap on, measured"] != lines["overlap off, measured"]
