"""One training step of our FullyShardedDataParallel beside torch's fully_shard: 8 x Linear(1024), 4 ranks."""

import statistics
import time

import torch
import torch.distributed as dist
from torch import nn

from workshop_utils import start_ranks
from workshop_utils.fully_sharded import FullyShardedDataParallel

TITLE = "Fully sharded: ours beside torch's fully_shard"
WORLD_SIZE = 4
NUM_LAYERS, WIDTH, BATCH = 8, 1024, 8  # BATCH: samples per rank, few: most of the step is communication
ROUNDS = 21


def run() -> str:
    """The comparison as text and a table in Markdown."""
    with start_ranks(WORLD_SIZE) as ranks:
        rows = [row(reshard, ranks.run(measure, reshard)) for reshard in (True, False)]
    head = ["| reshard_after_forward | rounds | fully_shard | ours / fully_shard |", "|---|---:|---:|---:|"]
    return (
        f"{WORLD_SIZE} ranks with one thread each, {NUM_LAYERS} x Linear({WIDTH}), float32, {BATCH} samples per rank, "
        "SGD; forward, backward and step. Both take turns within a round; a barrier before each; the time is the "
        "slowest rank's. Ours: the median over the rounds of its time divided by torch's in the same round, and "
        "between which two values the middle half of the rounds lies. Below 1 is faster than torch.\n\n"
        + "\n".join(head + rows)
    )


def row(reshard: bool, by_rank: list[dict[str, list[float]]]) -> str:
    """A line of the table, from each rank's seconds."""
    torchs_s, ratio = spread(by_rank, "ours", "fully_shard")
    return f"| {reshard} | {ROUNDS} | {torchs_s * 1e3:.1f} ms | {ratio} |"


def spread(by_rank: list[dict[str, list[float]]], name: str, base: str) -> tuple[float, str]:
    """The base's median seconds; the ratio of the other to it, as median and middle half of the rounds."""
    times_s = {key: [max(times) for times in zip(*(t[key] for t in by_rank))] for key in (name, base)}
    ratios = [one / other for one, other in zip(times_s[name], times_s[base])]
    low, median, high = statistics.quantiles(ratios, n=4)
    return statistics.median(times_s[base]), f"{median:.2f} ({low:.2f} to {high:.2f})"


def measure(reshard: bool) -> dict[str, list[float]]:
    """On a rank: seconds of each round, for both."""
    return compare({"fully_shard": torchs_step(reshard), "ours": our_step(reshard)})


def compare(steps: dict) -> dict[str, list[float]]:
    """On a rank: seconds of each step in each round. Who begins changes from round to round."""
    times_s = {name: [] for name in steps}
    for i in range(ROUNDS + 2):
        for name in sorted(steps, reverse=i % 2 == 1):
            dist.barrier()
            began_s = time.perf_counter()
            steps[name]()
            times_s[name].append(time.perf_counter() - began_s)
    return {name: times[2:] for name, times in times_s.items()}  # the first two rounds warm up


def our_step(reshard: bool):
    """A function that does one training step with our class."""
    model = FullyShardedDataParallel(layers(), reshard_after_forward=reshard)
    return stepper(model, model.finish_gradient_sync)


def torchs_step(reshard: bool, change=lambda model: None):
    """A function that does one training step with fully_shard, one unit for each layer, after `change(model)`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = layers(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    change(model)
    return stepper(model)


def layers() -> nn.Sequential:
    """The network: linear layers, one after another."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))


def stepper(model: nn.Module, finish_gradient_sync=lambda: None):
    """A function that does one training step of `model`."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    inputs = torch.randn(BATCH, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        finish_gradient_sync()
        optimizer.step()

    return step
