"""The widget of notebook 07: what one outlier does to the values that a block can hold."""

import ipywidgets

from workshop_utils.plotting.quantization import FORMATS, quantization_figure
from workshop_utils.widgets.common import choice, follow, stops, whole_numbers

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
    controls = {
        "name": choice("format", list(FORMATS), name),
        "block_size": stops("block size", BLOCK_SIZES, block_size),
        "outlier": whole_numbers("outlier", 0, 100, outlier, step=5),
    }
    return follow(controls, quantization_figure)
