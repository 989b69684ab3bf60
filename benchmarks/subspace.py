"""A step in a random subspace beside a step of ordinary training and beside a dense projection."""

import statistics
import time

import torch

from workshop_utils.memory import held_bytes
from workshop_utils.models import MLP
from workshop_utils.projections import KINDS
from workshop_utils.subspace import RandomSubspace
from workshop_utils.training import train_step

TITLE = "Random subspaces: each projection beside a dense one and beside ordinary training"
D_SUBSPACE, BATCH = 750, 128
ROUNDS, WARM_UP = 30, 4
THREADS = (1, 2)


def run() -> str:
    models = {"ordinary training": MLP()}
    models |= {kind: RandomSubspace(MLP(), D_SUBSPACE, projection=kind) for kind in KINDS}
    threads = torch.get_num_threads()
    try:
        tables = [table(models, n) for n in THREADS]
    finally:
        torch.set_num_threads(threads)
    return (
        f"MLP 784-200-200-10, D = 199,210, d = {D_SUBSPACE:,}, batch of {BATCH}, float32, Adam. A step is zero_grad, "
        "forward, backward, optimizer step. All take turns within a round; ratios are medians over "
        f"{ROUNDS} rounds of the times of one round, and between which two values the middle half lies. Memory: the "
        "buffers of P alone.\n\n" + "\n\n".join(tables)
    )


def table(models: dict, threads: int) -> str:
    torch.set_num_threads(threads)
    times_s = take_turns(models)
    rows = [
        f"| {name} | {memory(model)} | {statistics.median(times_s[name]) * 1e3:.1f} ms | "
        f"{ratio(times_s[name], times_s['ordinary training'])} | {ratio(times_s['dense'], times_s[name])} |"
        for name, model in models.items()
    ]
    return (
        f"{threads} thread{'s' if threads > 1 else ''}:\n\n"
        "| projection | memory of P | step | times ordinary training's | times as fast as dense |\n"
        "|---|---:|---:|---:|---:|\n" + "\n".join(rows)
    )


def memory(model) -> str:
    return f"{held_bytes(model.P.buffers()) / 1e6:.1f} MB" if isinstance(model, RandomSubspace) else ""


def take_turns(models: dict) -> dict[str, list[float]]:
    images, labels = torch.rand(BATCH, 784), torch.randint(10, (BATCH,))
    optimizers = {name: torch.optim.Adam(model.parameters()) for name, model in models.items()}
    times_s = {name: [] for name in models}
    for _ in range(WARM_UP + ROUNDS):
        for name, model in models.items():
            began_s = time.perf_counter()
            train_step(model, optimizers[name], images, labels)
            times_s[name].append(time.perf_counter() - began_s)
    return {name: times[WARM_UP:] for name, times in times_s.items()}


def ratio(ones: list[float], others: list[float]) -> str:
    low, median, high = statistics.quantiles([a / b for a, b in zip(ones, others, strict=True)], n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
