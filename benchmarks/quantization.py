"""NF4: quantising and dequantising, ours beside bitsandbytes. About 40 s idle."""

from collections.abc import Callable

import torch
from cells import milliseconds, ratio, section, table
from turns import seconds_of, take_turns

from workshop_utils.quantization import dequantize_nf4, quantize_nf4

TITLE = "NF4: ours beside bitsandbytes"
ROUNDS = 31
ROUND_S = 0.004  # at least so long is one side of a round

# SmolLM2-135M's attention and feed-forward weights, and one of a model of 1B parameters
SHAPES = [(576, 576), (1536, 576), (2048, 2048)]
THREADS = (1, 2)
DTYPES = [torch.float32, torch.bfloat16]


def run() -> dict:
    """A table for each number of threads."""
    threads = torch.get_num_threads()
    tables = []
    try:
        for count in THREADS:
            torch.set_num_threads(count)
            rows = [row(shape, dtype, count) for dtype in DTYPES for shape in SHAPES]
            columns = ["weight", "quantise: bitsandbytes", "ours", "dequantise: bitsandbytes", "ours"]
            tables.append(table(columns, rows, f"{count} thread{'s' * (count > 1)}:"))
    finally:
        torch.set_num_threads(threads)
    return section(
        TITLE,
        "Blocks of 64, double quantisation, from and to the dtype of the weight. The two take turns within a round, and "
        f"who begins changes. {ROUNDS} rounds; bitsandbytes: the median. Ours: its time divided by bitsandbytes' in the "
        "same round.",
        *tables,
    )


def row(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> list:
    import bitsandbytes.functional as bnb  # takes seconds to import, and the other comparisons need none of it

    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    settings = {"quant_type": "nf4", "compress_statistics": True}
    ours, theirs = quantize_nf4(weight), bnb.quantize_4bit(weight, **settings)
    name = f"{shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}"
    where = f"{name}, {threads} thread{'s' * (threads > 1)}"
    return [
        name,
        *cells_of(
            lambda: quantize_nf4(weight),
            lambda: bnb.quantize_4bit(weight, **settings),
            f"our NF4 quantise, {where}",
        ),
        *cells_of(
            lambda: dequantize_nf4(ours), lambda: bnb.dequantize_4bit(*theirs), f"our NF4 dequantise, {where}"
        ),
    ]


def cells_of(ours: Callable, theirs: Callable, what: str) -> tuple[dict, dict]:
    """bitsandbytes' median time, and our ratio to it."""
    repeats = max(1, round(ROUND_S / seconds_of(theirs, 3)))
    ours_s, theirs_s = take_turns([ours, theirs], ROUNDS, repeats=repeats)
    return milliseconds(theirs_s, 3), ratio(ours_s, theirs_s, what, "bitsandbytes")
