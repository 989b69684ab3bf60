"""The figures of notebook 08 show the numbers they are given, and no label lies on another."""

import json
from importlib import resources

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import torch

from test_plotting_all_reduce import overlapping_texts
from workshop_utils.plotting import fsdp_qlora as figures
from workshop_utils.plotting import use_style

GROUPS = {
    "precision": ["learning rate 4e-4, r = 8", "reduced in bf16", "adapter and Adam in bf16", "LoRA on bf16"],
    "learning rate": [
        "learning rate 4e-4, r = 8",
        "learning rate 1e-4",
        "learning rate 2e-3",
        "learning rate 1e-2",
    ],
    "r": ["learning rate 4e-4, r = 8", "r = 2", "r = 32"],
}
CHANGES = ["nothing", "bf16 arithmetic", "kept whole after forward", "2 parts, one reduction"]


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


@pytest.fixture
def recorded():
    return json.loads(resources.files("workshop_utils").joinpath("recorded_fsdp_qlora.json").read_text())


def widths(ax):
    return [bar.get_width() for container in ax.containers for bar in container]


def test_by_kind_stacks_the_kinds_and_marks_the_prediction():
    rows = {
        "full": {"parameters": 99e6, "gradients": 99e6, "optimizer": 198e6, "activations": 56e6},
        "qlora": {"parameters": 63e6, "gradients": 1e6, "optimizer": 2e6, "activations": 52e6},
    }
    figure = figures.plot_by_kind("Two ranks", rows, {"full": 450e6, "qlora": 117e6})
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert sorted(widths(ax)) == sorted(size / 1e6 for row in rows.values() for size in row.values())
    assert [line.get_xdata()[0] for line in ax.lines] == [450, 117]
    assert [text.get_text() for text in ax.texts] == ["452 MB", "118 MB"]


def test_arrivals_says_how_far_each_weight_is_from_the_first():
    torch.manual_seed(0)
    weight = torch.randn(40, 40)
    figure = figures.plot_arrivals(
        "Arrived", {"the weight": weight, "same": weight.clone(), "zero": 0 * weight}
    )
    assert overlapping_texts(figure) == []
    assert [ax.get_xlabel() for ax in figure.axes] == ["as sent", "error 0", "error 1"]


def test_sent_has_a_bar_of_parts_and_a_mark_for_what_was_counted():
    parts = {
        "full": dict.fromkeys(figures.PARTS, 0.0) | {"trained, gathered": 160e6, "gradients, reduced": 80e6},
        "qlora": dict.fromkeys(figures.PARTS, 0.0) | {"frozen, gathered": 70e6, "gradients, reduced": 1e6},
    }
    figure = figures.plot_sent("Sent", parts, {"full": 241e6, "qlora": 72e6})
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert [line.get_xdata()[0] for line in ax.lines] == [241, 72]
    assert sum(widths(ax)) == pytest.approx(311)


def settings_rows():
    return [
        {
            "changed": name,
            "held_bytes": {
                "parameters": 274_000_000 // (i + 1),
                "gradients": 4_900_000,
                "optimizer": 9_800_000,
            },
            "activations_bytes": 340_000_000 // (i + 1),
            "peak_whole_bytes": 128_000_000,
            "sent_bytes": 552_000_000,
            "step_s": 2.345 * (i + 1),
        }
        for i, name in enumerate(CHANGES)
    ]


def test_settings_have_a_panel_for_each_quantity():
    rows = settings_rows()
    figure = figures.plot_settings("One at a time", rows)
    assert overlapping_texts(figure) == []
    assert len(figure.axes) == 5
    assert widths(figure.axes[0]) == [sum(row["held_bytes"].values()) / 1e6 for row in rows]
    assert widths(figure.axes[4]) == [row["step_s"] for row in rows]


def stability_rows():
    names = dict.fromkeys(name for names in GROUPS.values() for name in names)
    return [
        {
            "changed": name,
            "held_bytes": 91e6,
            "losses": [[1.1, 0.5 + 0.1 * i + s, 0.1 + s] for s in (0, 0.05)],
        }
        for i, name in enumerate(names)
    ]


def test_stability_has_a_line_for_each_seed_of_each_change():
    rows = stability_rows()
    figure = figures.plot_stability("One change at a time", rows, GROUPS)
    assert overlapping_texts(figure) == []
    assert [len(ax.lines) for ax in figure.axes] == [2 * len(names) for names in GROUPS.values()]
    assert figure.axes[0].lines[0].get_ydata().tolist() == rows[0]["losses"][0]
    name, megabytes, mean, best, worst, highest = figures.stability_table(rows, last=1)[1]
    assert (name, megabytes) == ("reduced in bf16", 91)
    assert (mean, best, worst, highest) == pytest.approx((0.125, 0.1, 0.15, 0.65))


def test_shares():
    lines = {
        "QLoRA, FSDP": ([64, 512, 4096], [0.9, 0.5, 0.1]),
        "QLoRA, DDP": ([64, 512, 4096], [0.1, 0.0, 0.0]),
    }
    figure = figures.plot_shares("Shares", lines, {"half": 512})
    assert overlapping_texts(figure) == []
    assert figure.axes[0].lines[0].get_ydata().tolist() == [90, 50, 10]


def test_what_was_recorded_can_be_shown(recorded):
    figure = figures.plot_settings("Recorded", recorded["settings"])
    assert overlapping_texts(figure) == []
    figure = figures.plot_stability("Recorded", recorded["stability"], GROUPS)
    assert overlapping_texts(figure) == []
    assert {row["changed"] for row in recorded["stability"]} <= {
        n for names in GROUPS.values() for n in names
    }
    assert recorded["settings"][0]["changed"] == "nothing"
    for method in ("full", "lora", "qlora"):  # the same losses, whatever the strategy
        curves = [row["losses"] for row in recorded["strategies"] if row["method"] == method]
        assert all(abs(a - b) < 5e-3 for other in curves for a, b in zip(curves[0], other, strict=True))
