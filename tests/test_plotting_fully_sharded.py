"""The figures of notebook 04 show the numbers they are given, and no label lies on another."""

import json
from importlib import resources

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from test_plotting_all_reduce import overlapping_texts
from workshop_utils.memory import zero_bytes
from workshop_utils.plotting import rank_color, use_style
from workshop_utils.plotting.costs import bytes_label
from workshop_utils.plotting.fully_sharded import (
    describe_memory_bill,
    memory_bill_figure,
    plot_communication_share,
    plot_live_bytes,
    plot_memory_bill,
    plot_recorded_shares,
)


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


@pytest.mark.parametrize("num_parameters", [199_210, 7_500_000_000, 70_000_000_000, 175_000_000_000])
@pytest.mark.parametrize("world_size", [1, 2, 64])
def test_the_bill_is_the_formulas(num_parameters, world_size):
    figure = plot_memory_bill(num_parameters, world_size)
    bars = [bar.get_width() for container in figure.axes[0].containers for bar in container]
    kinds = ("parameters", "gradients", "optimizer")
    assert bars == [
        zero_bytes(stage, num_parameters, world_size)[kind] for kind in kinds for stage in range(4)
    ]
    assert overlapping_texts(figure) == []
    figure = memory_bill_figure(num_parameters, world_size)
    FigureCanvasAgg(figure)  # so that it can be drawn outside pyplot
    assert overlapping_texts(figure) == []
    shown = [text.get_text() for ax in figure.axes for text in (*ax.texts, *ax.get_xticklabels())]
    assert not any("e+" in text for text in shown), shown  # 1.12 TB, not 1.12e+03 GB


def test_the_bill_of_the_paper():
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 ranks."""
    totals = [sum(zero_bytes(stage, 7_500_000_000, 64).values()) / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    with pytest.raises(ValueError, match="stage must be 0"):
        zero_bytes(4, 1, 1)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16-mixed")])
def test_the_chosen_stage_has_its_parts_in_the_legend(stage, precision):
    figure = memory_bill_figure(7_500_000_000, 64, stage, precision)
    FigureCanvasAgg(figure)
    assert overlapping_texts(figure) == []
    bill = zero_bytes(stage, 7_500_000_000, 64, precision)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [f"{kind} {bytes_label(size)}" for kind, size in bill.items()]
    (frame,) = [p for p in figure.axes[0].patches if not p.get_fill()]
    assert frame.get_width() == pytest.approx(sum(bill.values()))


def test_precisions_divide_their_bytes_differently():
    assert list(zero_bytes(1, 100, 4, "fp32").values()) == [400, 400, 200]
    assert list(zero_bytes(2, 100, 4, "bf16").values()) == [200, 50, 100]
    with pytest.raises(ValueError, match="unknown precision 'fp8': choose one of bf16-mixed, fp32, bf16"):
        zero_bytes(1, 1, 1, "fp8")


def test_the_words_say_from_how_many_ranks_on_it_fits():
    for stage in (1, 2, 3):  # exercise 4.1's 15 billion
        words = describe_memory_bill(15_000_000_000, 2, stage, "bf16-mixed")
        fits = [n for n in range(1, 99) if sum(zero_bytes(stage, 15 * 10**9, n).values()) <= 80e9]
        assert f"enough from {fits[0]} on" in words
    assert "No number of 80 GB devices" in describe_memory_bill(70_000_000_000, 64, 2, "bf16-mixed")
    assert "enough from 1 on" in describe_memory_bill(199_210, 64, 0, "fp32")
    assert "No number" in describe_memory_bill(7_500_000_000, 64, 0, "bf16-mixed")


def test_live_bytes_have_a_row_for_each_rank_in_its_colour():
    curves = {f"rank {rank}": [628_000, 0, 160_800, 0] for rank in range(4)}
    labels = ["gather fc1", "fc1 forward done", "gather fc2", "fc2 forward done"]
    figure = plot_live_bytes("Live", curves, labels, {"two largest units": 788_800})
    assert overlapping_texts(figure) == []
    for rank, ax in enumerate(figure.axes):
        assert [bar.get_height() for bar in ax.patches] == [628, 0, 160.8, 0]
        assert matplotlib.colors.to_hex(ax.patches[0].get_facecolor()) == rank_color(rank)


def test_communication_share():
    lines = {"200 Mb/s": ([2, 4, 8], [0.5, 0.6, 0.7]), "2,000 Mb/s": ([2, 4, 8], [0.1, 0.2, 0.3])}
    figure = plot_communication_share("Share", lines, {"200 Mb/s": ([2], [0.55])}, xlabel="ranks", log=True)
    assert overlapping_texts(figure) == []
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [
        [50, 60, 70],
        [pytest.approx(55)],
        [10, 20, 30],
    ]
    figure = plot_communication_share("Share", lines, xlabel="ranks")
    assert overlapping_texts(figure) == []


def test_recorded_shares():
    recorded = json.loads(resources.files("workshop_utils").joinpath("recorded_fsdp.json").read_text())
    figure = plot_recorded_shares(recorded)
    assert overlapping_texts(figure) == []
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["DataParallel", "FullyShardedDataParallel"]
    shares = [y for ax in figure.axes for line in ax.lines for y in line.get_ydata()]
    assert all(0 < share < 100 for share in shares)
