"""The widget of notebook 08: what training holds on each GPU."""

import ipywidgets

from workshop_utils.memory_plan import MemoryPlan, plan_memory
from workshop_utils.model_specs import ModelSpec
from workshop_utils.plan_settings import METHODS
from workshop_utils.plotting.planner import plans_figure
from workshop_utils.widgets.common import choice, shown_for

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
        "model": choice("model", PLANNER_MODELS, model),
        "method": choice("method", METHODS, method),
        "world_size": _short_stops("GPUs", worlds, world_size),
        "batch_size": _short_stops("batch", [2**k for k in range(8)], 1),
        "length": _short_stops("length", [2**k for k in range(7, 15)], 512),
        "checkpointing": ipywidgets.Checkbox(value=False, description="checkpointing"),
    }

    def draw(model, **chosen):
        return plans_figure(
            _planner_title(specs[model], chosen), _plans_of_strategies(specs[model], **chosen)
        )

    def tell(model, **chosen):
        return _planner_words(_plan(specs[model], "fsdp", **chosen))

    def fit_length(change=None) -> None:
        controls["length"].disabled = (
            specs[controls["model"].value].fixed_length is not None
        )  # an image's own

    controls["model"].observe(fit_length, names="value")
    fit_length()
    shown = shown_for(controls, draw, tell)
    rows = [ipywidgets.HBox(list(controls.values())[start : start + 2]) for start in (0, 2, 4)]
    return ipywidgets.VBox([*rows, *shown])


def _short_stops(description: str, options: list[int], value: int) -> ipywidgets.SelectionSlider:
    """Two stand side by side."""
    return ipywidgets.SelectionSlider(options=options, value=value, description=description)


def _plan(spec: ModelSpec, strategy: str, world_size: int, length: int, **settings) -> MemoryPlan:
    length = None if spec.fixed_length else length
    world_size = 1 if strategy == "single" else world_size
    return plan_memory(spec, strategy, world_size, length=length, **settings)


def _plans_of_strategies(spec: ModelSpec, **chosen) -> dict[str, MemoryPlan]:
    """A plan for each bar of the planner."""
    strategies = {"1 GPU": "single", "DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "FSDP": "fsdp"}
    plans = {name: _plan(spec, strategy, **chosen) for name, strategy in strategies.items()}
    return plans | {"FSDP + offload": _plan(spec, "fsdp", offload=True, **chosen)}


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
