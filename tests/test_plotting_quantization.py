"""The figures of notebook 07 show what they are given, and no label lies on another; the explorer redraws them."""

import itertools

import matplotlib

matplotlib.use("Agg")
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from test_plotting_all_reduce import overlapping_texts
from workshop_utils.plotting import RANK_COLORS, quantization, use_style


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def luminance(color):
    return sum(w * c for w, c in zip((0.21, 0.72, 0.07), to_rgb(color)))


def test_formats_can_be_told_apart_in_grey_and_none_has_a_rank_s_colour():
    colors = [look["color"] for look in quantization.FORMATS.values()]
    assert not set(colors) & set(RANK_COLORS)
    assert len({look["marker"] for look in quantization.FORMATS.values()}) == 3
    apart = [abs(luminance(a) - luminance(b)) for a, b in itertools.combinations(colors, 2)]
    assert min(apart) > 0.15


@pytest.mark.parametrize(("name", "count"), [("int4", 15), ("FP4", 15), ("NF4", 16)])
def test_levels_of_a_format(name, count):
    levels = quantization.format_levels(name)
    assert levels.shape == (count,) and levels[0] == -1 and levels[-1] == 1
    assert (levels[1:] > levels[:-1]).all() and (levels == 0).sum() == 1


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="unknown format 'int5': choose one of int4, FP4, NF4"):
        quantization.plot_quantization("int5")


def test_each_level_has_its_line():
    formats = {name: quantization.format_levels(name) for name in quantization.FORMATS}
    figure = quantization.plot_levels(formats)
    assert overlapping_texts(figure) == []
    for ax, levels in zip(figure.axes, formats.values(), strict=True):
        (lines,) = [c for c in ax.collections if hasattr(c, "get_segments")]
        assert [segment[0][0] for segment in lines.get_segments()] == pytest.approx(levels.tolist())


@pytest.mark.parametrize("name", quantization.FORMATS)
@pytest.mark.parametrize(("block_size", "outlier"), [(16, 0), (64, 20), (4096, 100)])
def test_the_values_that_a_block_can_hold(name, block_size, outlier):
    figure = quantization.plot_quantization(name, block_size, outlier)
    assert overlapping_texts(figure) == []
    first, second = figure.axes
    drawn = np.array([line.get_xdata()[0] for line in first.lines])
    scale = drawn.max()
    np.testing.assert_allclose(drawn / scale, quantization.format_levels(name).numpy(), atol=1e-6)
    assert scale == pytest.approx(outlier) if outlier else 1 < scale < 4
    in_sight = int((np.abs(drawn) < 4.2).sum())
    assert first.get_title(loc="left").split(": ")[1].startswith(f"{in_sight} of {len(drawn)}")
    words = [text.get_text() for text in second.texts]
    assert words == (["one block holds everything: there is no other"] if block_size == 4096 else [])


def test_the_error_in_the_title_is_that_of_rounding():
    figure = quantization.plot_quantization("NF4", 64, 0)
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0)).view(-1, 64)
    absmax, levels = weights.abs().amax(dim=1, keepdim=True), quantization.format_levels("NF4")
    held = absmax[..., None] * levels
    nearest = (weights[..., None] - held).abs().min(dim=-1).values
    assert figure.get_suptitle().endswith(f"no outlier: mean squared error {nearest.square().mean():.4f}")


def test_error_by_block_has_a_panel_per_kind_of_weight():
    errors = {name: {16: 0.007, 64: 0.01, 1024: 0.02, 2**18: 0.9} for name in quantization.FORMATS}
    figure = quantization.plot_error_by_block({"normal weights": errors, "one outlier of 50": errors})
    assert overlapping_texts(figure) == []
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == list(quantization.FORMATS)
    assert list(right.lines[0].get_xydata()[-1]) == [2**18, 0.9]
    assert left.xaxis.get_major_formatter()(2**18, 0) == "256k"


def test_each_layer_has_its_mark():
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    formats = {name: {kind: [0.01, 0.011, 0.012] for kind in kinds} for name in quantization.FORMATS}
    expected = dict.fromkeys(quantization.FORMATS, 0.01)
    figure = quantization.plot_errors_by_layer("Layer by layer", formats, expected)
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == list(kinds)
    marks = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert len(marks) == 3 * 7 and all(list(line.get_ydata()) == [0.01, 0.011, 0.012] for line in marks)
    assert ax.get_ylim()[0] == 0


def test_one_depth_is_enough():
    formats = {"NF4": {"q": [0.01]}}
    assert overlapping_texts(quantization.plot_errors_by_layer("One", formats, {"NF4": 0.01})) == []


def test_a_library_is_dashed_over_ours():
    runs = {"ours": [2.0, 1.0, 0.5], "peft + bitsandbytes": [2.0, 1.0, 0.51]}
    figure = quantization.plot_losses("Loss", {"LoRA, base in float32": runs, "QLoRA, base in NF4": runs})
    assert overlapping_texts(figure) == []
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["LoRA, base in float32", "QLoRA, base in NF4"]
    for ax in figure.axes:
        ours, theirs = ax.lines
        assert list(ours.get_xdata()) == [1, 2, 3] and list(theirs.get_ydata()) == [2.0, 1.0, 0.51]
        assert ours.get_linestyle() == "-" and theirs.get_linestyle() == "--"
        assert ours.get_linewidth() > 2 * theirs.get_linewidth()


def test_bills_are_stacked_and_summed():
    bills = {
        "full": {"parameters": 538e6, "gradients": 538e6, "optimizer": 1076e6},
        "QLoRA": {"parameters": 166e6, "gradients": 10e6, "optimizer": 20e6, "activations": 100e6},
    }
    figure = quantization.plot_bills("Bytes", bills)
    assert overlapping_texts(figure) == []
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["2,152 MB", "296 MB"]
    ends = [patch.get_x() + patch.get_width() for patch in ax.patches]
    assert max(ends) == pytest.approx(2152)
