"""The widget of notebook 05: what a larger r costs and what it can hold."""

from collections.abc import Mapping, Sequence

import ipywidgets

from workshop_utils.plotting.lora import describe_rank, rank_figure
from workshop_utils.widgets.common import follow, stops

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 200)


def lora_rank(
    values: Mapping[str | int, Sequence[float]], n_in: int, n_out: int, r: int = 8
) -> ipywidgets.VBox:
    """r against parameters and singular values, for one layer of n_in inputs and n_out outputs.

    values: the singular values of the update, largest first, for "full" and for each r that was trained: {"full": [...],
    8: [...]}. Raises ValueError without "full", or for an r that is not on the slider.
    """
    offered = [rank for rank in RANKS if rank <= min(n_in, n_out)]
    if "full" not in values or r not in offered:
        raise ValueError(
            f'values must hold the singular values of "full", and r be one of {", ".join(map(str, offered))}; '
            f"got {', '.join(map(str, values)) or 'nothing'}, and r = {r}"
        )
    lists = {method: [float(size) for size in sizes] for method, sizes in values.items()}
    fixed = {"values": lists, "n_in": n_in, "n_out": n_out}
    return follow(
        {"r": stops("r", offered, r)},
        lambda r: rank_figure(**fixed, r=r),
        lambda r: describe_rank(**fixed, r=r),
    )
