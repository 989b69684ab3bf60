"""Record LoRA beside random subspaces of the same size, from random initialisation and from a pre-trained base.

    python benchmarks/record_lora_as_subspace.py

writes workshop_utils/recorded_lora_as_subspace.json, which notebook 06 shows. About 15 minutes on two idle cores. A run that
was interrupted goes on after its last finished row. The task is all ten digits of MNIST; the pre-trained base has seen
the digits 0 to 7 only.

Methods, at the budgets that LoRA can have on 784-200-200-10 (trained numbers, r and layers in BUDGETS):

    LoRA                   A and B of the budget's layers, lora_alpha = r
    random subspace        theta_0 + P theta_d over all 199,210 parameters, one-hot P, d = budget
    subspace with scales   the same, with one of the d numbers per parameter tensor as its scale (SAID)
    subspace of factors    theta_0 + P theta_d over the A and B of rank FACTOR_R on all layers, d = budget
    full                   all parameters trained, for comparison

The learning rate of each start, method and budget is chosen on 5,000 held-out training images: of three, the one
whose worse of two runs is best, after half the steps. Then SEEDS runs on all 60,000 images with Adam and a linear decay,
scored on the 10,000 test images. A seed decides theta_0 or the base, A, P and the order of the batches. The file:

    command, machine, recorded, steps, batch_size, seeds, factor_r, scored_after (steps)
    rows: start, method, budget, learning_rate, curve [n_seeds][len(scored_after)], flops_per_step, step_s
"""

import copy
import functools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workshop_utils.data import load_mnist
from workshop_utils.fine_tuning import pretrain_base
from workshop_utils.lora import apply_lora
from workshop_utils.models import MLP
from workshop_utils.subspace import RandomSubspace
from workshop_utils.training import draw_batches, evaluate, train_step

TARGET = Path(__file__).resolve().parents[1] / "workshop_utils" / "recorded_lora_as_subspace.json"
UNFINISHED = Path(tempfile.gettempdir()) / "recorded_lora_as_subspace.unfinished.json"
BUDGETS = {
    210: (["fc3"], 1),
    610: (["fc2", "fc3"], 1),
    1_594: (["fc1", "fc2", "fc3"], 1),
    3_188: (["fc1", "fc2", "fc3"], 2),
    4_782: (["fc1", "fc2", "fc3"], 3),
}
FACTOR_R = 8
LEARNING_RATES = {
    "LoRA": (3e-3, 1e-2, 3e-2),  # at 0.1 one run in three diverges, and two tuning runs do not always show it
    "random subspace": (0.03, 0.1, 0.3),
    "subspace with scales": (0.03, 0.1, 0.3),
    "subspace of factors": (0.03, 0.1, 0.3),
    "full": (3e-4, 1e-3, 3e-3),
}
STARTS = ("pre-trained", "random initialisation")
SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101)
BATCH_SIZE = 128
SCORED_AFTER = (0, 25, 50, 100, 200, 400, 700, 1_000)
HELD_OUT_SHARE = 12  # one twelfth of the training images
_starts: dict[tuple[str, int], nn.Module] = {}


def start_model(start: str, seed: int, data) -> nn.Module:
    """The MLP as initialised, or after a training on digits 0 to 7, which is done once for each seed."""
    if (start, seed) not in _starts:
        torch.manual_seed(seed)
        _starts[start, seed] = pretrain_base(data, seed=seed) if start == "pre-trained" else MLP()
    return copy.deepcopy(_starts[start, seed])


def with_method(model: nn.Module, method: str, budget: int, seed: int) -> nn.Module:
    """`model`, changed so that its trainable parameters are the method's; asserts that they are `budget` many."""
    torch.manual_seed(1000 + seed)
    if method == "full":
        return model
    if method == "LoRA":
        layers, r = BUDGETS[budget]
        model = apply_lora(model, layers, r, r)
    else:
        if method == "subspace of factors":
            model = apply_lora(model, ["fc1", "fc2", "fc3"], FACTOR_R, FACTOR_R)
        scales = method == "subspace with scales"
        model = RandomSubspace(model, budget, projection="one_hot", seed=1000 + seed, layer_scales=scales)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == budget, f"{method} trains {trained} numbers, the budget is {budget}"
    return model


def train_scored(model, learning_rate, train, test, steps, scored_after, seed) -> list[float]:
    """Accuracy after each of `scored_after` steps. train, test: (images, labels)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, fused=True)
    curve = [evaluate(model, *test)] if 0 in scored_after else []
    for done, batch in enumerate(draw_batches(len(train[0]), BATCH_SIZE, steps, seed)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - done / steps)
        train_step(model, optimizer, train[0].index_select(0, batch), train[1][batch])
        if done + 1 in scored_after:
            curve.append(evaluate(model, *test))
    return curve


def best_learning_rate(start, method, budget, data, steps) -> float:
    """The rate whose worse of two runs scores best on the held-out images: one that sometimes diverges is no choice."""
    cut = len(data.train_labels) - len(data.train_labels) // HELD_OUT_SHARE
    train = data.train_images[:cut], data.train_labels[:cut]
    held_out = data.train_images[cut:], data.train_labels[cut:]
    scores = {rate: 1.0 for rate in LEARNING_RATES[method]}
    for rate in LEARNING_RATES[method]:
        for seed in TUNING_SEEDS:
            model = with_method(start_model(start, seed, data), method, budget, seed)
            curve = train_scored(model, rate, train, held_out, steps, (steps,), seed)
            scores[rate] = min(scores[rate], curve[-1])
    return max(scores, key=scores.get)


def flops_of_step(model, data) -> int:
    """FLOPs of one forward and backward on a batch, by torch's counter (matrix products only)."""
    with FlopCounterMode(display=False) as counted:
        F.cross_entropy(model(data.train_images[:BATCH_SIZE]), data.train_labels[:BATCH_SIZE]).backward()
    return counted.get_total_flops()


def measure(combination: tuple[str, str, int]) -> dict:
    torch.set_num_threads(1)
    (start, method, budget), data = combination, all_of_mnist()
    rate = best_learning_rate(start, method, budget, data, SCORED_AFTER[-1] // 2)
    curves = []
    for seed in SEEDS:
        model = with_method(start_model(start, seed, data), method, budget, seed)
        flops = flops_of_step(model, data)
        train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
        curves.append(train_scored(model, rate, train, test, SCORED_AFTER[-1], SCORED_AFTER, seed))
    return {
        "start": start,
        "method": method,
        "budget": budget,
        "learning_rate": rate,
        "flops_per_step": flops,
        "curve": curves,
    }


def time_steps(rows: list[dict], rounds: int = 40) -> None:
    """Put into each row the median seconds of one step: all rows take turns, so that they share the machine's moods."""
    torch.set_num_threads(1)
    data, times_s = all_of_mnist(), [[] for _ in rows]
    images, labels = data.train_images[:BATCH_SIZE], data.train_labels[:BATCH_SIZE]
    models = [with_method(MLP(), row["method"], row["budget"], 0) for row in rows]
    optimizers = [
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        for model in models
    ]
    for _ in range(rounds):
        for model, optimizer, seen in zip(models, optimizers, times_s, strict=True):
            began_s = time.perf_counter()
            train_step(model, optimizer, images, labels)
            seen.append(time.perf_counter() - began_s)
    for row, seen in zip(rows, times_s, strict=True):
        row["step_s"] = statistics.median(seen)


def write(record: dict, path: Path) -> None:
    record = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.4g}"))
    text = json.dumps(record, indent=1)
    for row in record["rows"]:  # one row a line
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n  "), json.dumps(row))
    path.write_text(text + "\n", encoding="utf-8")


@functools.cache
def all_of_mnist():
    data = load_mnist()
    if len(data.train_labels) != 60_000:
        raise SystemExit(
            "the recording needs MNIST's 60,000 images: set WORKSHOP_DATA or let it download them"
        )
    return data


def main() -> None:
    all_of_mnist()
    record = {
        "command": "python benchmarks/record_lora_as_subspace.py",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "task": "all ten digits of MNIST, 60,000 images; the pre-trained base has seen digits 0 to 7",
        "steps": SCORED_AFTER[-1],
        "batch_size": BATCH_SIZE,
        "seeds": list(SEEDS),
        "scored_after": list(SCORED_AFTER),
        "factor_r": FACTOR_R,
        "rows": [],
    }
    if UNFINISHED.exists():  # interrupted: go on there
        record["rows"] = json.loads(UNFINISHED.read_text(encoding="utf-8"))["rows"]
    done = {(row["start"], row["method"], row["budget"]) for row in record["rows"]}
    missing = [
        (start, method, budget)
        for start in STARTS
        for method in LEARNING_RATES
        for budget in ([199_210] if method == "full" else BUDGETS)
        if (start, method, budget) not in done
    ]
    # one process for each core, one thread each
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for combination, row in zip(missing, pool.map(measure, missing), strict=True):
            record["rows"].append(row)
            print(*combination, row["learning_rate"], [curve[-1] for curve in row["curve"]], flush=True)
            write(record, UNFINISHED)
    time_steps(record["rows"])
    write(record, TARGET)
    UNFINISHED.unlink()


if __name__ == "__main__":
    main()
