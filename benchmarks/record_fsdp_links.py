"""Record what communication costs our two data-parallel classes on emulated links. About a minute on two cores.

    python benchmarks/record_fsdp_links.py

writes workshop_utils/recorded_fsdp.json, which notebook 04 shows. Keys beside `command`, `machine`, `recorded`:

    model             what was trained, in words        parameters_bytes   S, of one replica
    latency_s         alpha of all links
    shares            rows [strategy, world_size, gigabits_per_s, step_s, compute_s, predicted_s]
    mitigations       rows [what was changed, step_s, compute_s, predicted_s, samples_per_rank]
    mitigations_on    {"world_size": n, "gigabits_per_s": rate}; the first row is FullyShardedDataParallel unchanged

step_s: median seconds of a step, of the slowest rank. compute_s: of the same step of a plain module, with as many
ranks at work and no communication. So the communication share is 1 - compute_s / step_s. predicted_s: seconds of
communication by the alpha-beta model (network.py), without overlap; the share to expect is
predicted_s / (predicted_s + compute_s). DataParallel has overlap=False, so that both send while nothing computes.
"""

import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from workshop_utils import start_ranks, sub_world
from workshop_utils.data_parallel import DataParallel
from workshop_utils.fully_sharded import FullyShardedDataParallel
from workshop_utils.network import Link, all_gather_s, reduce_scatter_s, ring_all_reduce_s
from workshop_utils.point_to_point import emulate_link

TARGET = Path(__file__).resolve().parents[1] / "workshop_utils/recorded_fsdp.json"
WORLD_SIZES, RATES_GBITS = (2, 4, 8), (0.1, 0.5, 1.0, 2.0)
MITIGATED_WORLD_SIZE, MITIGATED_GBITS = 4, 0.5
LATENCY_S = 0.5e-3
NUM_BLOCKS, LAYERS_PER_BLOCK, WIDTH, SAMPLES = 4, 4, 256, 64
STEPS = 5


def network() -> nn.Sequential:
    """16 linear layers, as 4 blocks of 4."""
    return nn.Sequential(
        *(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS_PER_BLOCK)))
            for _ in range(NUM_BLOCKS)
        )
    )


def step_s(model: nn.Module, micro_batches: int = 1, samples: int = SAMPLES) -> list[float]:
    """On a rank: seconds of each step. DataParallel communicates in the last of the micro-batches only."""
    optimizer, inputs = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(samples, WIDTH)
    times_s = []
    for _ in range(STEPS + 1):
        dist.barrier()
        began_s = time.perf_counter()
        optimizer.zero_grad()
        for i in range(micro_batches):
            quiet = isinstance(model, DataParallel) and i < micro_batches - 1
            with model.no_sync() if quiet else nullcontext():
                model(inputs).square().mean().backward()
        if hasattr(model, "finish_gradient_sync"):
            model.finish_gradient_sync()
        optimizer.step()
        times_s.append(time.perf_counter() - began_s)
    return times_s[1:]


def predict_s(model: nn.Module, link: Link, micro_batches: int = 1) -> float:
    """Seconds of communication in a step."""
    n = dist.get_world_size()
    if isinstance(model, DataParallel):
        return ring_all_reduce_s(sum(p.nbytes for p in model.parameters()), n, link)
    gathers = 2 if model.reshard_after_forward else 1
    return micro_batches * sum(
        gathers * all_gather_s(n * shard.nbytes, n, link) + reduce_scatter_s(n * shard.nbytes, n, link)
        for shard in model.parameters()
    )


def measure_shares(n: int) -> list[tuple]:
    """On a rank: (strategy, gigabits_per_s, step times, compute times, predicted_s)."""
    rows = []
    with sub_world(n) as inside:
        compute_s = step_s(network()) if inside else []
        for rate in RATES_GBITS if inside else ():
            link = Link(LATENCY_S, rate * 125e6)
            for make in (
                lambda: DataParallel(network(), overlap=False),
                lambda: FullyShardedDataParallel(network()),
            ):
                model = make()
                with emulate_link(link):
                    rows.append(
                        (type(model).__name__, rate, step_s(model), compute_s, predict_s(model, link))
                    )
    return rows


# what was changed -> (model, micro-batches, samples in each)
MITIGATIONS = {
    "nothing": (lambda: FullyShardedDataParallel(network()), 1, SAMPLES),
    "reshard_after_forward=False": (
        lambda: FullyShardedDataParallel(network(), reshard_after_forward=False),
        1,
        SAMPLES,
    ),
    "units of 4 layers": (
        lambda: FullyShardedDataParallel(network_of_blocks(), unit_types=(Block,)),
        1,
        SAMPLES,
    ),
    "one unit": (lambda: FullyShardedDataParallel(network(), unit_types=(nn.Sequential,)), 1, SAMPLES),
    "4 times the batch": (lambda: FullyShardedDataParallel(network()), 1, 4 * SAMPLES),
    "accumulation over 4 backward passes": (lambda: FullyShardedDataParallel(network()), 4, SAMPLES),
    "DataParallel": (lambda: DataParallel(network(), overlap=False), 1, SAMPLES),
    "DataParallel, accumulation over 4": (lambda: DataParallel(network(), overlap=False), 4, SAMPLES),
}


class Block(nn.Sequential):
    """A type of its own, so that a block can be a unit."""


def network_of_blocks() -> nn.Sequential:
    """The same network, with blocks of that type."""
    return nn.Sequential(*(Block(*block) for block in network()))


def measure_mitigations(n: int, rate: float) -> list[tuple]:
    """On a rank: (what was changed, step times, compute times, predicted_s, samples)."""
    rows, link = [], Link(LATENCY_S, rate * 125e6)
    with sub_world(n) as inside:
        for name, (make, micro_batches, samples) in MITIGATIONS.items() if inside else ():
            model, compute_s = make(), step_s(network(), micro_batches, samples)
            with emulate_link(link):
                times_s = step_s(model, micro_batches, samples)
            rows.append(
                (name, times_s, compute_s, predict_s(model, link, micro_batches), micro_batches * samples)
            )
    return rows


def slowest_median_s(by_rank: list[list[float]]) -> float:
    """The median over the steps of the slowest rank's seconds."""
    return rounded(statistics.median(max(times) for times in zip(*by_rank)))


def rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def main() -> None:
    shares = []
    with start_ranks(max(WORLD_SIZES)) as ranks:
        for n in WORLD_SIZES:
            for rows in zip(*ranks.run(measure_shares, n)[:n]):
                (name, rate, *_, predicted_s), steps, computes = (
                    rows[0],
                    *([r[i] for r in rows] for i in (2, 3)),
                )
                medians_s = slowest_median_s(steps), slowest_median_s(computes)
                shares.append([name, n, rate, *medians_s, rounded(predicted_s)])
                print(shares[-1], flush=True)
        mitigations = []
        results = ranks.run(measure_mitigations, MITIGATED_WORLD_SIZE, MITIGATED_GBITS)[:MITIGATED_WORLD_SIZE]
        for rows in zip(*results):
            (name, *_, predicted_s, samples), steps, computes = (
                rows[0],
                *([r[i] for r in rows] for i in (1, 2)),
            )
            medians_s = slowest_median_s(steps), slowest_median_s(computes)
            mitigations.append([name, *medians_s, rounded(predicted_s), samples])
            print(mitigations[-1], flush=True)
    write(shares, mitigations)


def write(shares: list, mitigations: list) -> None:
    layers = NUM_BLOCKS * LAYERS_PER_BLOCK
    record = {
        "command": "python benchmarks/record_fsdp_links.py",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "model": f"{layers} x Linear({WIDTH}), float32, SGD, {SAMPLES} samples per rank and backward",
        "parameters_bytes": sum(p.nbytes for p in network().parameters()),
        "latency_s": LATENCY_S,
        "shares": shares,
        "mitigations_on": {"world_size": MITIGATED_WORLD_SIZE, "gigabits_per_s": MITIGATED_GBITS},
        "mitigations": mitigations,
    }
    text = json.dumps(record, indent=1)
    for row in shares + mitigations:  # one row a line
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n  "), json.dumps(row))
    TARGET.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
