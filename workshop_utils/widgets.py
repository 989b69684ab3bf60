"""What can be moved with the mouse or the keyboard. Notebooks 02, 04, 07 and 08 have one each.

A widget draws nothing itself: it calls a plot function that is tested alone, and that also gives the static
figure for GitHub and paper. Works with ipywidgets 7.7 and 8.
"""

import io

import ipywidgets

from workshop_utils.memory_plan import MemoryPlan, plan_memory
from workshop_utils.model_specs import ModelSpec
from workshop_utils.plan_settings import METHODS
from workshop_utils.plotting.all_reduce import all_reduce_step_figure, describe_step
from workshop_utils.plotting.fully_sharded import memory_bill_figure
from workshop_utils.plotting.planner import plans_figure
from workshop_utils.plotting.quantization import FORMATS, quantization_figure
from workshop_utils.schedules import schedule

_DPI = 90


def all_reduce_stepper(algorithm: str = "ring", world_size: int = 4) -> ipywidgets.VBox:
    """Step through an all-reduce with a slider, message by message: "ring", "tree", "naive", "halving-doubling".

    The slider takes the arrow keys. Under the figure the step is told in words. Raises ValueError for an unknown
    algorithm or a world size below 2.
    """
    if world_size < 2:
        raise ValueError(
            f"one rank alone has nothing to send: world_size must be at least 2, got {world_size}"
        )
    last = len(schedule(algorithm, world_size))
    slider = ipywidgets.IntSlider(
        value=0, min=0, max=last, description="step", layout=ipywidgets.Layout(width="420px")
    )
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))
    words = ipywidgets.HTML()
    drawn: dict[int, bytes] = {}

    def show(change=None) -> None:
        step = slider.value
        if step not in drawn:
            drawn[step] = _png(all_reduce_step_figure(algorithm, world_size, step))
        picture.value = drawn[step]
        words.value = describe_step(algorithm, world_size, step)

    slider.observe(show, names="value")
    show()
    return ipywidgets.VBox([slider, picture, words])


MODEL_SIZES = {
    "the MLP, 199,210": 199_210,
    "135 M": 135_000_000,
    "1.5 B": 1_500_000_000,
    "7.5 B": 7_500_000_000,
    "70 B": 70_000_000_000,
    "175 B": 175_000_000_000,
}


def memory_bill(num_parameters: int = 7_500_000_000, world_size: int = 64) -> ipywidgets.VBox:
    """Bytes per rank by kind for one device and ZeRO-1, 2, 3: a slider for the ranks, a choice of model sizes.

    The slider takes the arrow keys and goes from 1 to 1,024 ranks in powers of two. Raises ValueError for a model
    size that is not in MODEL_SIZES, or a world size that is not on the slider.
    """
    worlds = [2**k for k in range(11)]
    if num_parameters not in MODEL_SIZES.values() or world_size not in worlds:
        raise ValueError(
            f"num_parameters must be one of {', '.join(f'{n:,}' for n in MODEL_SIZES.values())} and world_size a power "
            f"of two up to 1,024, got {num_parameters:,} and {world_size}"
        )
    model = ipywidgets.Dropdown(
        options=list(MODEL_SIZES.items()), value=num_parameters, description="parameters"
    )
    slider = ipywidgets.SelectionSlider(
        options=worlds, value=world_size, description="ranks", layout=ipywidgets.Layout(width="420px")
    )
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))

    def show(change=None) -> None:
        picture.value = _png(memory_bill_figure(model.value, slider.value))

    model.observe(show, names="value")
    slider.observe(show, names="value")
    show()
    return ipywidgets.VBox([model, slider, picture])


BLOCK_SIZES = [2**k for k in range(4, 13)]


def quantization_explorer(name: str = "NF4", block_size: int = 64, outlier: int = 20) -> ipywidgets.VBox:
    """What one outlier does to the values that a block can hold: a format, the block size, the outlier's size.

    Both sliders take the arrow keys: blocks of 16 to 4,096 weights, an outlier of 0 (none) to 100 standard deviations.
    Raises ValueError for a format, a block size or an outlier that cannot be chosen.
    """
    if name not in FORMATS or block_size not in BLOCK_SIZES or not 0 <= outlier <= 100:
        raise ValueError(
            f"choose one of {', '.join(FORMATS)}, a block size of 16 to 4,096 that is a power of two, and an outlier of 0 "
            f"to 100, got {name!r}, {block_size} and {outlier}"
        )
    wide = ipywidgets.Layout(width="420px")
    formats = ipywidgets.Dropdown(options=list(FORMATS), value=name, description="format")
    sizes = ipywidgets.SelectionSlider(
        options=BLOCK_SIZES, value=block_size, description="block size", layout=wide
    )
    outliers = ipywidgets.IntSlider(value=outlier, min=0, max=100, step=5, description="outlier", layout=wide)
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))

    def show(change=None) -> None:
        picture.value = _png(quantization_figure(formats.value, sizes.value, outliers.value))

    for control in (formats, sizes, outliers):
        control.observe(show, names="value")
    show()
    return ipywidgets.VBox([formats, sizes, outliers, picture])


PLANNER_MODELS = ("smollm2", "llama-1b", "llama-8b", "llama-70b", "vit-b", "vit-l", "vit-h")


def planner(model: str = "llama-8b", method: str = "qlora", world_size: int = 2) -> ipywidgets.VBox:
    """What training holds on each GPU, for every strategy: choose model, method, GPUs, batch, length, checkpointing.

    Below the bars, what FSDP sends and how long a step takes. Making the widget builds the models' shapes (about two
    seconds and transformers' import), so that a redraw need not. Raises ValueError for a model that is not in
    PLANNER_MODELS, a method that is not in METHODS, or a number of GPUs that is not on the slider.
    """
    worlds = [2, 4, 8, 16, 32, 64]
    if model not in PLANNER_MODELS or method not in METHODS or world_size not in worlds:
        raise ValueError(
            f"model must be one of {', '.join(PLANNER_MODELS)}, method one of {', '.join(METHODS)} and world_size one of "
            f"{', '.join(map(str, worlds))}, got {model!r}, {method!r} and {world_size}"
        )
    specs = {name: ModelSpec.from_name(name) for name in PLANNER_MODELS}
    controls = {
        "model": ipywidgets.Dropdown(options=PLANNER_MODELS, value=model, description="model"),
        "method": ipywidgets.Dropdown(options=METHODS, value=method, description="method"),
        "world_size": ipywidgets.SelectionSlider(options=worlds, value=world_size, description="GPUs"),
        "batch_size": ipywidgets.SelectionSlider(
            options=[2**k for k in range(8)], value=1, description="batch"
        ),
        "length": ipywidgets.SelectionSlider(
            options=[2**k for k in range(7, 15)], value=512, description="length"
        ),
        "checkpointing": ipywidgets.Checkbox(value=False, description="checkpointing"),
    }
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))
    words = ipywidgets.HTML()

    def show(change=None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        spec = specs[chosen.pop("model")]
        controls["length"].disabled = spec.fixed_length is not None
        plans = _plans_of_strategies(spec, **chosen)
        picture.value = _png(plans_figure(_planner_title(spec, chosen), plans))
        words.value = _planner_words(plans["FSDP"])

    for control in controls.values():
        control.observe(show, names="value")
    show()
    rows = [ipywidgets.HBox(list(controls.values())[start : start + 2]) for start in (0, 2, 4)]
    return ipywidgets.VBox([*rows, picture, words])


def _plans_of_strategies(spec: ModelSpec, world_size: int, length: int, **settings) -> dict[str, MemoryPlan]:
    """A plan for each bar of the planner."""
    settings["length"] = None if spec.fixed_length else length
    strategies = {"DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "FSDP": "fsdp"}
    return {
        "1 GPU": plan_memory(spec, **settings),
        **{
            name: plan_memory(spec, strategy, world_size, **settings) for name, strategy in strategies.items()
        },
        "FSDP + offload": plan_memory(spec, "fsdp", world_size, offload=True, **settings),
    }


def _planner_title(spec: ModelSpec, chosen: dict) -> str:
    tokens = f"{chosen['batch_size']} x {spec.fixed_length or chosen['length']} tokens"
    again = ", checkpointing" if chosen["checkpointing"] else ""
    return f"{spec.name}, {chosen['method']}, {chosen['world_size']} GPUs, {tokens}{again}"


def _planner_words(plan: MemoryPlan) -> str:
    card = plan.smallest_card_gib()
    fits = f"fits cards from {card} GB on" if card else "fits no card up to 80 GB"
    return (
        f"FSDP {fits}. In a step a GPU sends {plan.traffic_bytes / 1e9:.2f} GB over PCIe 4, "
        f"{plan.communication_s:.2g} s, and computes for {plan.compute_s:.2g} s, if it is an A100 at 40% of its peak. "
        "Batch and length are each GPU's own; bf16-mixed, r = 8. The pale end of a bar is for CUDA's context and kernels."
    )


def _png(figure) -> bytes:
    """The figure as a PNG. Its ground is white, so it reads the same in JupyterLab's dark theme."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()
