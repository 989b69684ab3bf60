"""The figures of notebook 02 show true states, and no label lies on another."""

from itertools import combinations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch

from workshop_utils.network import ALL_REDUCE_S, LINKS, Link
from workshop_utils.plotting import PAPER, rank_color, use_style
from workshop_utils.plotting.all_reduce import (
    all_reduce_step_figure,
    describe_step,
    plot_all_reduce_steps,
    plot_collective,
)
from workshop_utils.plotting.costs import (
    ALGORITHM_STYLES,
    fastest_figure,
    plot_fastest,
    plot_multihost,
    plot_predicted_measured,
    plot_seconds,
)
from workshop_utils.schedules import ALGORITHMS, simulate


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def overlapping_texts(figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other, and texts that stick out of the figure."""
    figure.canvas.draw()
    texts = [t for t in figure.findobj(plt.Text) if t.get_visible() and t.get_text().strip()]
    texts = [t for t in texts if t.get_figure() is figure]
    ticks = {
        t for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.get_ticklabels(which="both")
    }
    texts = [t for t in texts if t not in ticks]  # ticks beyond the limits exist, and are not drawn
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    found = [
        (a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.padded(-1).overlaps(other.padded(-1))
    ]
    page = figure.bbox.padded(1)
    out = [
        (text, "outside")
        for text, box in boxes
        if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1
    ]
    return found + out


def shown_slots(figure) -> list[str]:
    """The colours of all slots, rank by rank, chunk by chunk, source by source."""
    ax = figure.axes[0]
    return [to_hex(color) for color in ax.collections[0].get_facecolors()]


@pytest.mark.parametrize("world_size", [2, 4, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_shows_what_every_rank_holds(algorithm, world_size):
    for step, snapshot in enumerate(simulate(algorithm, world_size)):
        expected = [
            rank_color(source) if times else PAPER
            for rank in snapshot.held
            for chunk in rank
            for source, times in enumerate(chunk)
        ]
        assert shown_slots(all_reduce_step_figure(algorithm, world_size, step)) == expected


@pytest.mark.parametrize("world_size", [2, 5, 8])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_label_of_a_step_lies_on_another(algorithm, world_size):
    assert overlapping_texts(all_reduce_step_figure(algorithm, world_size, 1)) == []


@pytest.mark.parametrize("world_size", [2, 4, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_message_is_an_arrow_per_chunk(algorithm, world_size):
    for step, snapshot in enumerate(simulate(algorithm, world_size)):
        figure = all_reduce_step_figure(algorithm, world_size, step)
        arrows = [a for a in figure.axes[0].patches if isinstance(a, FancyArrowPatch)]
        transfers = snapshot.step.transfers if snapshot.step else ()
        closes_ring = algorithm == "ring" and world_size > 2 and step > 0  # out on the right, in on the left
        assert len(arrows) == sum(len(t.chunks) for t in transfers) + closes_ring


def test_bytes_so_far_stand_under_each_rank():
    figure = all_reduce_step_figure("ring", 4, 2)
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts.count("sent 0.50 S\ngot 0.50 S") == 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_clock_ends_with_the_formulas_time(algorithm):
    link = Link(1e-3, 1e6)
    figure = all_reduce_step_figure(algorithm, 6, 2, 5e5, link)
    clock = figure.axes[1]
    boxes = [(box.get_x(), box.get_width()) for box in clock.patches]
    assert len(boxes) == len(simulate(algorithm, 6)) - 1
    total_s = ALL_REDUCE_S[algorithm](5e5, 6, link)
    assert sum(boxes[-1]) == pytest.approx(total_s)
    assert clock.get_xlim()[1] == pytest.approx(ALL_REDUCE_S["naive"](5e5, 6, link))  # one scale for all four
    spent_ms = 1e3 * sum(boxes[1])
    assert f"= {spent_ms:.0f} of {1e3 * total_s:.0f} ms" in clock.texts[0].get_text()
    sent_MB = 0.5 * float(sum(simulate(algorithm, 6)[2].sent))
    assert f"have sent {sent_MB:.0f} MB" in clock.texts[2].get_text()


@pytest.mark.parametrize(
    ("algorithm", "world_size"), [("ring", 4), ("tree", 4), ("halving-doubling", 4), ("tree", 5)]
)
def test_all_steps_are_one_figure_without_the_start(algorithm, world_size):
    figure = plot_all_reduce_steps(algorithm, world_size)
    assert len(figure.axes) == len(simulate(algorithm, world_size)) - 1
    assert overlapping_texts(figure) == []


def test_a_step_is_told_in_words():
    assert describe_step("ring", 4, 0) == "Start: each of the 4 ranks holds only its own numbers."
    words = describe_step("ring", 4, 1)
    assert words.startswith(
        "Step 1 of 6: reduce-scatter. Rank 0 sends chunk 3 to rank 1, which adds it. Rank 1"
    )
    assert "Complete chunks: rank 0 has 1 of 4" in describe_step("ring", 4, 3)
    assert "Rank 2 sends everything it holds to rank 0, which adds it." in describe_step("tree", 4, 2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_collective_on_pictures(world_size):
    pictures = list(torch.rand(world_size, 28, 28))
    strips = [picture.chunk(world_size)[rank] for rank, picture in enumerate(pictures)]
    gathered = [torch.cat(strips)] + [None] * (world_size - 1)
    figure = plot_collective("gather to rank 0", strips, gathered, gathered)
    assert len(figure.axes) == 3 * world_size
    assert overlapping_texts(figure) == []
    shown = figure.axes[world_size - 1].images[0].get_array()  # the last rank's strip, and nothing above it
    rows = 28 // world_size
    np.testing.assert_allclose(shown[-rows:], strips[-1])
    assert np.ma.getmaskarray(np.ma.masked_invalid(shown))[:-rows].all()


def test_seconds_against_bytes():
    sizes = [1e3, 1e5, 6.4e7]
    figure = plot_seconds(
        "The ring", {"2 ranks": (sizes, [1e-4, 2e-4, 0.1]), "4 ranks": (sizes, [2e-4, 4e-4, 0.2])}, {"4 ranks": (sizes, [3e-4, 5e-4, 0.3])}
    )  # fmt: skip
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "2 ranks",
        "4 ranks",
        "measured (lines: predicted)",
    ]
    line, points = ax.lines[1], ax.lines[2]
    assert line.get_color() is points.get_color() or np.allclose(line.get_color(), points.get_color())


@pytest.mark.parametrize("link", ["100 Mb/s Ethernet", "10 Gb/s Ethernet", "NVLink 5"])
@pytest.mark.parametrize("world_size", [2, 3, 48, 64, 1024])
def test_the_bands_name_the_fastest_of_each_size(world_size, link):
    figure = fastest_figure(world_size, link, 100_000)
    FigureCanvasAgg(figure)
    assert overlapping_texts(figure) == []
    bands = figure.axes[1]
    for size in (1.5e3, 4e4, 7e6, 8e8):
        for row, names in enumerate((list(ALL_REDUCE_S), ["naive", "tree", "ring"])):
            times_s = {name: ALL_REDUCE_S[name](size, world_size, LINKS[link]) for name in names}
            (color,) = {
                to_hex(band.get_facecolor())
                for band in bands.patches
                if band.get_y() == row and band.get_x() <= size < band.get_x() + band.get_width()
            }
            best = [name for name, time_s in times_s.items() if time_s <= 1.06 * min(times_s.values())]
            assert color in [ALGORITHM_STYLES[name][0] for name in best], (size, names)


def test_the_legend_ranks_the_algorithms_at_the_chosen_size():
    figure = plot_fastest(64, "10 Gb/s Ethernet", 100_000_000)
    assert overlapping_texts(figure) == []
    names = [text.get_text().split("  ")[1] for text in figure.axes[0].get_legend().get_texts()]
    times_s = {name: cost(1e8, 64, LINKS["10 Gb/s Ethernet"]) for name, cost in ALL_REDUCE_S.items()}
    assert names == sorted(times_s, key=times_s.get)


def test_predicted_beside_measured():
    predicted = {"naive": 1.92, "tree": 1.28, "ring": 0.48}
    figure = plot_predicted_measured(
        "8 MB", predicted, {name: 1.1 * time_s for name, time_s in predicted.items()}
    )
    assert overlapping_texts(figure) == []
    assert "1.10 of predicted" in figure.axes[0].texts[0].get_text()


def test_throttled_hosts_beside_the_emulated_link():
    kinds = ("step_s", "predicted_s", "emulated_s", "emulated_predicted_s")
    rows = [
        {"strategy": strategy, "link_mbit": rate}
        | {kind: scale * (0.01 + 6 / max(rate, 1)) for kind in kinds}
        for strategy, scale in (("ddp", 1), ("fsdp", 2))
        for rate in (0, 100, 200, 500, 1000)
    ]
    figure = plot_multihost(rows)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == ["ddp", "fsdp"]
    assert overlapping_texts(figure) == []
    measured = figure.axes[0].lines[1]
    assert list(measured.get_xdata()) == [100, 200, 500, 1000]  # "no limit" has no place on the axis
    assert measured.get_ydata()[0] == rows[1]["step_s"]
