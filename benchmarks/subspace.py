"""A step in a random subspace beside a step of ordinary training and beside a dense projection."""

from functools import partial

import torch
from cells import milliseconds, number, ratio, section, table
from turns import take_turns

from workshop_utils.memory import held_bytes
from workshop_utils.models import MLP
from workshop_utils.projections import KINDS
from workshop_utils.subspace import RandomSubspace
from workshop_utils.training import train_step

TITLE = "Random subspaces: each projection beside a dense one and beside ordinary training"
D_SUBSPACE, BATCH = 750, 128
ROUNDS = 30
THREADS = (1, 2)


def run() -> dict:
    """A table for each number of threads."""
    models = {"ordinary training": MLP()}
    models |= {kind: RandomSubspace(MLP(), D_SUBSPACE, projection=kind) for kind in KINDS}
    threads = torch.get_num_threads()
    try:
        tables = [table_of(models, count) for count in THREADS]
    finally:
        torch.set_num_threads(threads)
    return section(
        TITLE,
        f"MLP 784-200-200-10, D = 199,210, d = {D_SUBSPACE:,}, batch of {BATCH}, float32, Adam. A step is zero_grad, "
        f"forward, backward, optimizer step. All take turns within a round, {ROUNDS} rounds; ratios are of the times of "
        "one round. Memory: the buffers of P alone.",
        *tables,
    )


def table_of(models: dict, threads: int) -> dict:
    torch.set_num_threads(threads)
    images, labels = torch.rand(BATCH, 784), torch.randint(10, (BATCH,))
    steps = [
        partial(train_step, model, torch.optim.Adam(model.parameters()), images, labels)
        for model in models.values()
    ]
    times_s = dict(zip(models, take_turns(steps, ROUNDS), strict=True))
    plural = "s" if threads > 1 else ""
    rows = []
    for name, model in models.items():
        what = f"a step in a {name.replace('_', '-')} subspace of {D_SUBSPACE}, {threads} thread{plural}"
        beside = {
            base: "" if base == name else ratio(times_s[name], times_s[base], what, title)
            for base, title in {"ordinary training": "ordinary training", "dense": "a dense one"}.items()
        }
        rows.append([name, memory(model), milliseconds(times_s[name], 1), *beside.values()])
    columns = ["projection", "memory of P", "step", "times ordinary training's", "times the dense one's"]
    return table(columns, rows, f"{threads} thread{plural}:")


def memory(model) -> str | dict:
    return number(held_bytes(model.P.buffers()) / 1e6, 1, " MB") if isinstance(model, RandomSubspace) else ""
