"""The widget of notebook 04: the memory bill."""

import ipywidgets

from workshop_utils.memory import BYTES_PER_PARAMETER
from workshop_utils.plotting.fully_sharded import STAGES, describe_memory_bill, memory_bill_figure
from workshop_utils.widgets.common import choice, follow, stops

MODEL_SIZES = {
    "the MLP, 199,210": 199_210,
    "135 M": 135_000_000,
    "1.5 B": 1_500_000_000,
    "7.5 B": 7_500_000_000,
    "70 B": 70_000_000_000,
    "175 B": 175_000_000_000,
}
WORLD_SIZES = [2**k for k in range(11)]


def memory_bill(num_parameters: int = 7_500_000_000, world_size: int = 64) -> ipywidgets.VBox:
    """Bytes per rank by kind for one device and ZeRO-1, 2, 3: choose the model's size, the ranks, stage and precision.

    1 to 1,024 ranks, in powers of two. Raises ValueError for a model size that is not in MODEL_SIZES, or a world size
    that is not on the slider.
    """
    if num_parameters not in MODEL_SIZES.values() or world_size not in WORLD_SIZES:
        raise ValueError(
            f"num_parameters must be one of {', '.join(f'{n:,}' for n in MODEL_SIZES.values())} and world_size a power "
            f"of two up to 1,024, got {num_parameters:,} and {world_size}"
        )
    controls = {
        "num_parameters": choice("parameters", list(MODEL_SIZES.items()), num_parameters),
        "world_size": stops("ranks", WORLD_SIZES, world_size),
        "stage": choice("stage", [(name, stage) for stage, name in enumerate(STAGES)], 3),
        "precision": choice("precision", list(BYTES_PER_PARAMETER), "bf16-mixed"),
    }
    return follow(controls, memory_bill_figure, describe_memory_bill)
