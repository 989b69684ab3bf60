"""One training step of our FullyShardedDataParallel beside torch's fully_shard: 8 x Linear(1024), 4 ranks."""

import torch
import torch.distributed as dist
from cells import milliseconds, number, ratio, section, table
from torch import nn
from turns import slowest, take_turns

from workshop_utils import start_ranks
from workshop_utils.fully_sharded import FullyShardedDataParallel

TITLE = "Fully sharded: ours beside torch's fully_shard"
WORLD_SIZE = 4
NUM_LAYERS, WIDTH, BATCH = 8, 1024, 8  # BATCH: samples per rank, few: most of the step is communication
ROUNDS = 21
ABOUT = (
    f"{WORLD_SIZE} ranks with one thread each, {NUM_LAYERS} x Linear({WIDTH}), float32, {BATCH} samples per rank, "
    "SGD; forward, backward and step."
)


def run() -> dict:
    """A row for each way to reshard."""
    with start_ranks(WORLD_SIZE) as ranks:
        rows = [row(reshard, slowest(ranks.run(measure, reshard))) for reshard in (True, False)]
    return section(
        TITLE,
        f"{ABOUT} Both take turns within a round; a barrier before each; the time is the slowest rank's. Ours: its "
        "time divided by torch's in the same round.",
        table(["reshard_after_forward", "rounds", "fully_shard", "ours / fully_shard"], rows),
    )


def row(reshard: bool, times_s: list[list[float]]) -> list:
    """A line of the table, from the seconds of both."""
    ours, torchs = times_s
    what = "our FullyShardedDataParallel, " + ("resharding" if reshard else "no resharding")
    return [str(reshard), number(ROUNDS), milliseconds(torchs, 1), ratio(ours, torchs, what, "fully_shard")]


def measure(reshard: bool) -> list[list[float]]:
    """On a rank: seconds of each round, ours and torch's."""
    return take_turns([our_step(reshard), torchs_step(reshard)], ROUNDS, before=dist.barrier)


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
