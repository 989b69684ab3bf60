"""The common look, and the figures of notebook 01: what they say, and that no label lies on another."""

import itertools
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from workshop_utils.models import MLP
from workshop_utils.plotting import RANK_COLORS, STYLE_FILE, rank_color, use_style
from workshop_utils.plotting import single_device as figures
from workshop_utils.plotting.costs import ALGORITHM_STYLES
from workshop_utils.plotting.lora import ADAPTER, FULL
from workshop_utils.plotting.planner import PLAN_COLORS
from workshop_utils.plotting.quantization import FORMATS
from workshop_utils.plotting.single_device import KIND_COLORS
from workshop_utils.plotting.subspace import LINE_COLORS, OURS, THEIRS


@pytest.fixture(autouse=True)
def workshop_style():
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    with plt.style.context("default"):
        use_style()
        yield
    plt.close("all")
    plt.switch_backend(backend)


def texts_of(figure):
    """{text: extent in pixels} of every visible text."""
    figure.canvas.draw()
    found = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent()) for t in found]


def assert_readable(figure):
    """No two texts overlap by more than a pixel, and none leaves the figure's height."""
    shown = texts_of(figure)
    for (first, a), (second, b) in itertools.combinations(shown, 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 1 or height <= 1, f"{first!r} and {second!r} overlap"
    return [text for text, _ in shown]


def luminance(color):
    channels = matplotlib.colors.to_rgb(color)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# The look


def test_style_cycles_through_the_rank_colors():
    style = matplotlib.rc_params_from_file(STYLE_FILE, use_default_template=False)
    assert tuple(style["axes.prop_cycle"].by_key()["color"]) == RANK_COLORS


def test_ranks_have_one_color_each_and_then_repeat():
    assert len(set(RANK_COLORS)) == len(RANK_COLORS) >= 8
    assert rank_color(3) == RANK_COLORS[3] and rank_color(8) == RANK_COLORS[0]


@pytest.mark.parametrize("background", ["#ffffff", "#1e1e1e"])
def test_rank_colors_stand_out_on_light_and_on_dark(background):
    for color in RANK_COLORS:
        low, high = sorted((luminance(color), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3.0, color


# Deficiencies simulated as in Machado, Oliveira, Fernandes 2009, severity 1
MACHADO = {
    "normal": torch.eye(3).tolist(),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


# What a widget tells apart by colour. Smaller distances are for colours that touch in no picture but for one border.
PALETTES = {
    "ranks": (RANK_COLORS, 0.09),
    "all-reduces": ([color for color, _ in ALGORITHM_STYLES.values()], 0.09),
    "memory bill": ([KIND_COLORS[kind] for kind in ("parameters", "gradients", "optimizer")], 0.09),
    "LoRA and full": ((FULL, ADAPTER), 0.09),
    "formats": ([style["color"] for style in FORMATS.values()], 0.09),
    "dimension curve": ((OURS, THEIRS, *LINE_COLORS.values()), 0.06),
    "planner": (list(PLAN_COLORS.values()), 0.07),
}


@pytest.mark.parametrize("palette", PALETTES)
@pytest.mark.parametrize("sight", MACHADO)
def test_colors_stay_apart_for_every_sight(sight, palette):
    colors, least = PALETTES[palette]
    srgb = torch.tensor([matplotlib.colors.to_rgb(color) for color in colors])
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ torch.tensor(MACHADO[sight]).T).clamp(0, 1)
    lab = (seen @ torch.tensor(TO_LMS).T).pow(1 / 3) @ torch.tensor(TO_LAB).T
    assert torch.pdist(lab).min() > least  # Oklab; a just noticeable difference is about 0.02


def test_importing_the_colors_does_not_import_matplotlib():
    code = "import sys, workshop_utils.plotting; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# The figures


def test_digits_are_captioned():
    images = torch.rand(10, 784)
    figure = figures.plot_digits(images, captions=range(10))
    assert_readable(figure)
    assert [ax.get_title() for ax in figure.axes] == [str(digit) for digit in range(10)]
    assert torch.equal(torch.as_tensor(figure.axes[3].images[0].get_array()), images[3].view(28, 28))


def test_bars_of_bytes_carry_their_totals():
    rows = {
        "batch 1": {"parameters": 10**6, "buffers": 0, "activations": 0},
        "batch 4,096": {"parameters": 10**6, "activations": 19_600_000},
    }
    figure = figures.plot_bytes_by_kind(rows, "Only the activations grow with the batch")
    texts = [text.strip() for text in assert_readable(figure)]
    assert "1.0 MB" in texts and "20.6 MB" in texts
    assert "activations" in texts and "buffers" not in texts  # nothing of it, so not in the legend


def test_graph_shows_every_parameter_and_the_backward_in_order():
    model = MLP()
    loss = F.cross_entropy(model(torch.rand(4, 784)), torch.zeros(4, dtype=torch.int64))
    texts = assert_readable(figures.plot_autograd_graph(loss, dict(model.named_parameters())))
    for name, parameter in model.named_parameters():
        assert f"{name}\n{list(parameter.shape)}" in texts
    assert texts.count("Addmm\nBackward0") == 3 and texts.count("Relu\nBackward0") == 2
    assert any("need no" in text for text in texts)


def test_graph_of_images_that_need_a_gradient_has_no_dashed_box():
    model, images = MLP(), torch.rand(4, 784, requires_grad=True)
    named = dict(model.named_parameters()) | {"images": images}
    loss = F.cross_entropy(model(images), torch.zeros(4, dtype=torch.int64))
    texts = assert_readable(figures.plot_autograd_graph(loss, named))
    assert not any("need no" in text for text in texts) and "images\n[4, 784]" in texts


def test_strides_show_the_place_that_each_cell_reads():
    A = torch.arange(12.0).view(3, 4)
    figure = figures.plot_strides({"A": A, "A.T": A.T, "A[1:, 2:]": A[1:, 2:]})
    assert_readable(figure)
    for ax, view in zip(figure.axes, (A, A.T, A[1:, 2:]), strict=True):
        places = [t.get_text() for t in ax.texts if t.get_text().isdigit()]
        assert places == [str(int(value)) for value in view.flatten()]
    captions = [ax.texts[-1].get_text() for ax in figure.axes]
    assert captions == [
        "strides [4, 1]\ncontiguous",
        "strides [1, 4]\nnot contiguous",
        "strides [4, 1]\nnot contiguous",
    ]


def test_times_show_the_median_and_survive_an_outlier():
    figure = figures.plot_times({"quick": [1e-5, 2e-5, 3e-5], "slow": [1e-3, 1e-3, 5.0]}, "Two things")
    texts = assert_readable(figure)
    assert "20" in texts and "1,000" in texts


def test_dependencies_are_readable():
    texts = assert_readable(figures.plot_dependencies())
    assert texts.count("backward\nfc2") == 2 and "Σ grad fc2" in texts


@pytest.fixture(scope="module")
def profiled():
    model = MLP()
    optimizer = torch.optim.Adam(model.parameters())
    images, labels = torch.rand(64, 784), torch.zeros(64, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(5):
            with record_function("forward"):
                loss = F.cross_entropy(model(images), labels)
            with record_function("backward"):
                loss.backward()
            with record_function("update"):
                optimizer.step()
    return watched


def test_profile_counts_each_operation_once(profiled):
    spans, operations = figures.step_timeline(profiled)
    assert list(spans) == ["forward", "backward", "update"] and spans["forward"][0] == 0
    ordered = sorted((start, end) for _, start, end in operations)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ordered))
    names = [name for name, _, _ in operations]
    assert names.count("aten::addmm") == 3 and names.count("aten::mm") == 5  # 3 forward, 2 + 2 + 1 backward
    assert not set(names) & set(figures.WRAPPERS)


def test_shares_of_the_profile_add_up(profiled):
    shares = figures.busy_shares(*figures.step_timeline(profiled))
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0


def test_profile_is_readable(profiled):
    assert_readable(figures.plot_profile(*figures.step_timeline(profiled)))


def test_a_short_phase_gets_no_label():
    spans = {"forward": (0.0, 10_000.0), "backward": (10_000.0, 11_000.0), "update": (11_000.0, 25_000.0)}
    texts = assert_readable(figures.plot_profile(spans, [("aten::mm", 0.0, 9_000.0)]))
    assert "forward\n10.00 ms" in texts and not any(text.startswith("backward") for text in texts)
