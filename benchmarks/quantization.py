"""NF4: quantising and dequantising, ours beside bitsandbytes. About 40 s idle."""

import os
import statistics
import time
from collections.abc import Callable

import torch

from workshop_utils.quantization import dequantize_nf4, quantize_nf4

TITLE = "NF4: ours beside bitsandbytes"
ROUNDS = 31
ROUND_S = 0.004  # at least so long is one side of a round

# SmolLM2-135M's attention and feed-forward weights, and one of a model of 1B parameters
SHAPES = [(576, 576), (1536, 576), (2048, 2048)]
DTYPES = [torch.float32, torch.bfloat16]


def run() -> str:
    threads = torch.get_num_threads()
    tables = []
    try:
        for count in sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1}):
            torch.set_num_threads(count)
            rows = "\n".join(row(shape, dtype) for dtype in DTYPES for shape in SHAPES)
            tables.append(
                f"{count} thread{'s' * (count > 1)}:\n\n"
                "| weight | quantise: bitsandbytes | ours | dequantise: bitsandbytes | ours |\n"
                f"|---|---:|---:|---:|---:|\n{rows}"
            )
    finally:
        torch.set_num_threads(threads)
    return (
        "Blocks of 64, double quantisation, from and to the dtype of the weight. The two take turns within a round, and "
        f"who begins changes. {ROUNDS} rounds; bitsandbytes: the median. Ours: the median of its time divided by "
        "bitsandbytes' in the same round, and between which two values the middle half of the rounds lies.\n\n"
        + "\n\n".join(tables)
    )


def row(shape: tuple[int, int], dtype: torch.dtype) -> str:
    import bitsandbytes.functional as bnb  # takes seconds to import, and the other comparisons need none of it

    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    settings = {"quant_type": "nf4", "compress_statistics": True}
    ours, theirs = quantize_nf4(weight), bnb.quantize_4bit(weight, **settings)
    cells = [
        *cells_of(lambda: quantize_nf4(weight), lambda: bnb.quantize_4bit(weight, **settings)),
        *cells_of(lambda: dequantize_nf4(ours), lambda: bnb.dequantize_4bit(*theirs)),
    ]
    return f"| {shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |"


def cells_of(ours: Callable, theirs: Callable) -> tuple[str, str]:
    """bitsandbytes' median time, and our ratio to it with its middle half."""
    repeats = max(1, round(ROUND_S / seconds_of(theirs, 3)))
    times_s = {ours: [], theirs: []}
    for i in range(ROUNDS + 3):
        for function in (ours, theirs) if i % 2 else (theirs, ours):
            times_s[function].append(seconds_of(function, repeats))
    kept = [times[3:] for times in times_s.values()]  # the first rounds warm up
    low, median, high = statistics.quantiles([a / b for a, b in zip(*kept, strict=True)], n=4)
    return f"{statistics.median(kept[1]) * 1e3:.3f} ms", f"{median:.2f} ({low:.2f} to {high:.2f})"


def seconds_of(function: Callable, repeats: int) -> float:
    began_s = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began_s) / repeats
