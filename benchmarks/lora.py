"""LoRALinear beside PEFT's LoRA layer, and the multiply-adds of a step counted beside the formula."""

import copy

import torch
from cells import milliseconds, number, ratio, section, table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from turns import seconds_of, take_turns

from workshop_utils.lora import LoRALinear, apply_lora
from workshop_utils.models import MLP

TITLE = "LoRA: ours beside PEFT's"
ROUNDS = 61
ROUND_S = 0.004  # at least so long is one side of a round
R, LORA_ALPHA = 8, 16

# in, out, rows of the input
LAYERS = [(784, 200, 128), (200, 200, 128), (200, 10, 128), (1024, 1024, 128), (1024, 4096, 64)]
COUNTED = [(256, 4), (1024, 16), (1024, 64)]  # N, r


def run() -> dict:
    """A table of times, and one of multiply-adds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [*(layer_row(*sizes) for sizes in LAYERS), model_row()]
        counted = [counted_row(*sizes) for sizes in COUNTED]
    finally:
        torch.set_num_threads(threads)
    return section(
        TITLE,
        f"Forward and backward of one layer, r = {R}, no dropout, float32, one thread; the input asks for its gradient "
        f"too. The two take turns within a round, each several times, and who begins changes. {ROUNDS} rounds; PEFT's: "
        "the median. Ours: its time divided by PEFT's in the same round.",
        table(["layer", "PEFT", "LoRALinear"], rows),
        table(
            ["N", "r", "LoRA, counted", "2N^2 + 6Nr", "full, counted", "3N^2", "LoRA / full"],
            counted,
            "Multiply-adds per row of the input of one forward and backward, N x N, counted by torch's FlopCounterMode "
            "(which counts two operations for each), beside the formulas:",
        ),
    )


def layer_row(in_features: int, out_features: int, rows: int) -> list:
    from peft import LoraConfig  # takes seconds to import, and the other comparisons need none of it
    from peft.tuners.lora import Linear as PeftLinear

    base = nn.Linear(in_features, out_features)
    config = LoraConfig(r=R, lora_alpha=LORA_ALPHA)
    ours = LoRALinear(copy.deepcopy(base), R, LORA_ALPHA)
    theirs = PeftLinear(copy.deepcopy(base), "default", config, r=R, lora_alpha=LORA_ALPHA)
    theirs.base_layer.requires_grad_(False)
    x = torch.randn(rows, in_features, requires_grad=True)
    return row(f"Linear({in_features}, {out_features}), {rows} rows", ours, theirs, x)


def model_row() -> list:
    from peft import LoraConfig, get_peft_model

    base = MLP()
    ours = apply_lora(copy.deepcopy(base), "all-linear", R, LORA_ALPHA)
    theirs = get_peft_model(base, LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules="all-linear"))
    return row("MLP 784-200-200-10, 128 rows", ours, theirs, torch.rand(128, 784))


def row(name: str, ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> list:
    steps = [stepper(model, x) for model in (ours, theirs)]
    repeats = max(1, round(ROUND_S / seconds_of(steps[1], 3)))
    ours_s, theirs_s = take_turns(steps, ROUNDS, repeats=repeats)
    return [
        name,
        milliseconds(theirs_s, 3),
        ratio(ours_s, theirs_s, f"our LoRA, {name.rsplit(',', 1)[0]}", "PEFT"),
    ]


def stepper(model: nn.Module, x: torch.Tensor):
    """A function that does one forward and backward."""
    tensors = [p for p in model.parameters() if p.requires_grad] + [x]

    def step() -> None:
        for tensor in tensors:
            tensor.grad = None
        model(x).sum().backward()

    return step


def counted_row(n: int, r: int) -> list:
    rows = 8
    x = torch.randn(rows, n, requires_grad=True)
    lora = multiply_adds(LoRALinear(nn.Linear(n, n), r, r), x) / rows
    full = multiply_adds(nn.Linear(n, n), x) / rows
    predicted, predicted_full = 2 * n * n + 6 * n * r, 3 * n * n
    counts = [number(round(count)) for count in (lora, predicted, full, predicted_full)]
    return [str(n), number(r), *counts, number(predicted / predicted_full, 3)]


def multiply_adds(layer: nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops() / 2
