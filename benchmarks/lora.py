"""LoRALinear beside PEFT's LoRA layer, and the multiply-adds of a step counted beside the formula."""

import copy
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workshop_utils.lora import LoRALinear, apply_lora
from workshop_utils.models import MLP

TITLE = "LoRA: ours beside PEFT's"
ROUNDS = 61
ROUND_S = 0.004  # at least so long is one side of a round
R, LORA_ALPHA = 8, 16

# in, out, rows of the input
LAYERS = [(784, 200, 128), (200, 200, 128), (200, 10, 128), (1024, 1024, 128), (1024, 4096, 64)]
COUNTED = [(256, 4), (1024, 16), (1024, 64)]  # N, r


def run() -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layers = "\n".join(layer_row(*sizes) for sizes in LAYERS)
        model = model_row()
        counted = "\n".join(counted_row(*sizes) for sizes in COUNTED)
    finally:
        torch.set_num_threads(threads)
    return (
        f"Forward and backward of one layer, r = {R}, no dropout, float32, one thread; the input asks for its gradient "
        f"too. The two take turns within a round, each several times, and who begins changes. {ROUNDS} rounds; PEFT's: "
        "the median. Ours: the median of its time divided by PEFT's in the same round, and between which two values "
        "the middle half of the rounds lies.\n\n"
        f"| layer | PEFT | LoRALinear |\n|---|---:|---:|\n{layers}\n{model}\n\n"
        "Multiply-adds per row of the input of one forward and backward, N x N, counted by torch's FlopCounterMode "
        "(which counts two operations for each), beside the formulas.\n\n"
        "| N | r | LoRA, counted | 2N^2 + 6Nr | full, counted | 3N^2 | LoRA / full |\n"
        f"|---:|---:|---:|---:|---:|---:|---:|\n{counted}"
    )


def layer_row(in_features: int, out_features: int, rows: int) -> str:
    from peft import LoraConfig  # takes seconds to import, and the other comparisons need none of it
    from peft.tuners.lora import Linear as PeftLinear

    base = nn.Linear(in_features, out_features)
    config = LoraConfig(r=R, lora_alpha=LORA_ALPHA)
    ours = LoRALinear(copy.deepcopy(base), R, LORA_ALPHA)
    theirs = PeftLinear(copy.deepcopy(base), "default", config, r=R, lora_alpha=LORA_ALPHA)
    theirs.base_layer.requires_grad_(False)
    x = torch.randn(rows, in_features, requires_grad=True)
    return row(f"Linear({in_features}, {out_features}), {rows} rows", ours, theirs, x)


def model_row() -> str:
    from peft import LoraConfig, get_peft_model

    base = MLP()
    ours = apply_lora(copy.deepcopy(base), "all-linear", R, LORA_ALPHA)
    theirs = get_peft_model(base, LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules="all-linear"))
    return row("MLP 784-200-200-10, 128 rows", ours, theirs, torch.rand(128, 784))


def row(name: str, ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> str:
    times_s = take_turns([ours, theirs], x)
    low, median, high = statistics.quantiles([a / b for a, b in zip(*times_s)], n=4)
    return (
        f"| {name} | {statistics.median(times_s[1]) * 1e3:.3f} ms | {median:.2f} ({low:.2f} to {high:.2f}) |"
    )


def take_turns(contestants: list[nn.Module], x: torch.Tensor) -> list[list[float]]:
    """Seconds of one forward and backward, of each, in each round; the first three rounds warm up."""
    trained = [[p for p in model.parameters() if p.requires_grad] + [x] for model in contestants]
    repeats = max(1, round(ROUND_S / seconds_of(contestants[1], trained[1], x, 3)))
    times_s = [[] for _ in contestants]
    for i in range(ROUNDS + 3):
        for k in range(len(contestants)):
            who = (i + k) % len(contestants)
            times_s[who].append(seconds_of(contestants[who], trained[who], x, repeats))
    return [times[3:] for times in times_s]


def seconds_of(model: nn.Module, tensors: list[torch.Tensor], x: torch.Tensor, repeats: int) -> float:
    began_s = time.perf_counter()
    for _ in range(repeats):
        for tensor in tensors:
            tensor.grad = None
        model(x).sum().backward()
    return (time.perf_counter() - began_s) / repeats


def counted_row(n: int, r: int) -> str:
    rows = 8
    x = torch.randn(rows, n, requires_grad=True)
    lora = multiply_adds(LoRALinear(nn.Linear(n, n), r, r), x) / rows
    full = multiply_adds(nn.Linear(n, n), x) / rows
    predicted, predicted_full = 2 * n * n + 6 * n * r, 3 * n * n
    return f"| {n} | {r} | {lora:,.0f} | {predicted:,} | {full:,.0f} | {predicted_full:,} | {predicted / predicted_full:.3f} |"


def multiply_adds(layer: nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops() / 2
