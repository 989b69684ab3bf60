"""DataParallel beside torch's DistributedDataParallel, and overlap on beside overlap off, on 4 ranks."""

import copy
from functools import partial

import torch
import torch.distributed as dist
from cells import milliseconds, ratio, section, table
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from turns import slowest, take_turns

from workshop_utils import start_ranks
from workshop_utils.data_parallel import DataParallel
from workshop_utils.models import MLP
from workshop_utils.network import Link
from workshop_utils.point_to_point import emulate_link

TITLE = "Data parallelism: ours beside torch's"
WORLD_SIZE = 4
ROUNDS, LINK_ROUNDS = 41, 11
LINK = Link(50e-6, 125e6)  # 1 Gb/s Ethernet
OVERLAP_BUCKET_BYTES = 4 * 2**20


def mlp():
    return MLP(), torch.randn(64, 784), torch.randint(10, (64,))


def eight_linear():
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))), torch.randn(64, 1024), None


MODELS = {
    "MLP 784-200-200-10, 0.8 MB of gradients": mlp,
    "8 x Linear(1024), 33.6 MB of gradients": eight_linear,
}


def run() -> dict:
    """A table of models, and one of overlap."""
    with start_ranks(WORLD_SIZE) as ranks:
        rows = [row(name, slowest(ranks.run(beside_torch, name))) for name in MODELS]
        on, off = slowest(ranks.run(overlap_on_and_off))
    overlap = ratio(on, off, "our DataParallel with overlap, 8 x Linear(1024), 1 Gb/s", "without overlap")
    return section(
        TITLE,
        f"{WORLD_SIZE} ranks with one thread each, batch of 64 per rank, float32, SGD. A step is zero_grad, forward, "
        "backward, synchronisation, optimizer step. The two take turns within a round, a barrier before each; the "
        f"time is the slowest rank's. {ROUNDS} rounds; torch's: the median. Ours: its time divided by torch's in the "
        "same round.",
        table(["model", "DistributedDataParallel", "DataParallel"], rows),
        table(
            ["model", "without overlap", "with overlap", "with / without"],
            [["8 x Linear(1024)", milliseconds(off, 0), milliseconds(on, 0), overlap]],
            "DataParallel with overlap beside without, batch of 512 per rank, buckets of 4 MiB, every rank behind an "
            f"emulated link of 1 Gb/s, {LINK_ROUNDS} rounds:",
        ),
    )


def row(name: str, times_s: list[list[float]]) -> list:
    ours, theirs = times_s
    what = f"our DataParallel, {name.split(',')[0]}"
    return [name, milliseconds(theirs), ratio(ours, theirs, what, "DistributedDataParallel")]


def beside_torch(name: str) -> list[list[float]]:
    """On a rank: ours, torch's."""
    net, inputs, labels = MODELS[name]()
    contestants = [DataParallel(net), DistributedDataParallel(copy.deepcopy(net))]
    steps = [stepper(model, inputs, labels) for model in contestants]
    return take_turns(steps, ROUNDS, before=dist.barrier)


def overlap_on_and_off() -> list[list[float]]:
    """On a rank: with overlap, without."""
    net, _, _ = eight_linear()
    inputs = torch.randn(512, 1024)
    contestants = [
        DataParallel(copy.deepcopy(net), bucket_bytes=OVERLAP_BUCKET_BYTES, overlap=overlap)
        for overlap in (True, False)
    ]
    with emulate_link(LINK):
        steps = [stepper(model, inputs, None) for model in contestants]
        return take_turns(steps, LINK_ROUNDS, before=dist.barrier)


def stepper(model: nn.Module, inputs, labels):
    """A function that does one training step of `model`."""
    return partial(step, model, torch.optim.SGD(model.parameters(), lr=0.01), inputs, labels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs, labels) -> None:
    optimizer.zero_grad()
    output = model(inputs)
    loss = output.square().mean() if labels is None else F.cross_entropy(output, labels)
    loss.backward()
    if isinstance(model, DataParallel):
        model.finish_gradient_sync()
    optimizer.step()
