"""DataParallel beside torch's DistributedDataParallel, and overlap on beside overlap off, on 4 ranks."""

import copy
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from workshop_utils import start_ranks
from workshop_utils.data_parallel import DataParallel
from workshop_utils.models import MLP
from workshop_utils.network import Link
from workshop_utils.point_to_point import emulate_link

TITLE = "Data parallelism: ours beside torch's"
WORLD_SIZE = 4
ROUNDS = 41
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


def run() -> str:
    with start_ranks(WORLD_SIZE) as ranks:
        rows = []
        for name in MODELS:
            ours, theirs = slowest(ranks.run(beside_torch, name, ROUNDS))
            ratio = spread([a / b for a, b in zip(ours, theirs)])
            rows.append(f"| {name} | {statistics.median(theirs) * 1e3:.2f} ms | {ratio} |")
        on, off = slowest(ranks.run(overlap_on_and_off, 11))
    ratio = spread([a / b for a, b in zip(on, off)])
    return (
        f"{WORLD_SIZE} ranks with one thread each, batch of 64 per rank, float32, SGD. A step is zero_grad, forward, "
        "backward, synchronisation, optimizer step. The two take turns within a round, a barrier before each; the "
        f"time is the slowest rank's. {ROUNDS} rounds; torch's: the median. Ours: the median of its time divided by "
        "torch's in the same round, and between which two values the middle half of the rounds lies.\n\n"
        "| model | DistributedDataParallel | DataParallel |\n|---|---:|---:|\n" + "\n".join(rows) + "\n\n"
        f"DataParallel with overlap beside without, 8 x Linear(1024), batch of 512 per rank, buckets of 4 MiB, every "
        f"rank behind an emulated link of 1 Gb/s: {statistics.median(on) * 1e3:.0f} ms and "
        f"{statistics.median(off) * 1e3:.0f} ms a step, ratio {ratio}."
    )


def slowest(by_rank) -> list[list[float]]:
    """Of each contestant, in each round, the time of the rank that took longest."""
    return [[max(times) for times in zip(*of_ranks)] for of_ranks in zip(*by_rank)]


def spread(ratios: list[float]) -> str:
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def beside_torch(name: str, rounds: int) -> list[list[float]]:
    net, inputs, labels = MODELS[name]()
    contestants = [DataParallel(net), DistributedDataParallel(copy.deepcopy(net))]
    return take_turns(contestants, inputs, labels, rounds)


def overlap_on_and_off(rounds: int) -> list[list[float]]:
    net, _, _ = eight_linear()
    inputs = torch.randn(512, 1024)
    contestants = [
        DataParallel(copy.deepcopy(net), bucket_bytes=OVERLAP_BUCKET_BYTES, overlap=overlap)
        for overlap in (True, False)
    ]
    with emulate_link(LINK):
        return take_turns(contestants, inputs, None, rounds)


def take_turns(contestants: list[nn.Module], inputs, labels, rounds: int) -> list[list[float]]:
    """On a rank. Who begins changes from round to round; the first three rounds warm up."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in contestants]
    times_s = [[] for _ in contestants]
    for i in range(rounds + 3):
        for k in range(len(contestants)):
            who = (i + k) % len(contestants)
            dist.barrier()
            began_s = time.perf_counter()
            step(contestants[who], optimizers[who], inputs, labels)
            times_s[who].append(time.perf_counter() - began_s)
    return [times[3:] for times in times_s]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs, labels) -> None:
    optimizer.zero_grad()
    output = model(inputs)
    loss = output.square().mean() if labels is None else F.cross_entropy(output, labels)
    loss.backward()
    if isinstance(model, DataParallel):
        model.finish_gradient_sync()
    optimizer.step()
