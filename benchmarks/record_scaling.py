"""Record how data-parallel training scales: 1 to 8 ranks on one machine, and 4 ranks on emulated links.

    python benchmarks/record_scaling.py

writes workshop_utils/recorded_scaling.json, which notebook 03 shows beside what it measures itself. About two
minutes on two idle cores. The file:

    command, machine, recorded   how it was made, where, when
    model, gradient_bytes        what was trained, and S
    loopback                     {latency_s, bandwidth_bytes_per_s}: network.fit_link of recorded_ring.json
    scaling                      one row for each "fixed" ("batch per rank" or "global batch") and world size
    links                        one row for each emulated link, on LINK_WORLD_SIZE ranks

A row of `scaling`:

    fixed, world_size, batch_per_rank
    step_s                       median over the steps of the slowest rank's time, our DataParallel with overlap;
                                 for one rank compute_s, as there is nothing to communicate
    steps_per_s                  1 / step_s
    compute_s                    the same step inside no_sync: as many ranks compute, none communicates
    communication_share          1 - compute_s / step_s: what communication adds, 0 to 1 (below 0 is noise)
    predicted_step_s             compute_s + the ring's alpha and beta on the loopback: no overlap assumed

A row of `links`:

    gigabits_per_s, latency_s, world_size, batch_per_rank
    overlap_s, no_overlap_s      step times with overlap on and off
    compute_s                    as above
    all_reduce_s                 predicted: 2(n-1) alpha + 2(n-1)/n S beta on this link
    predicted_no_overlap_s       compute_s + all_reduce_s
    predicted_overlap_s          max(compute_s, all_reduce_s): the least that overlap can reach
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
from workshop_utils.network import Link, fit_link, ring_all_reduce_s, shared_all_reduce_s
from workshop_utils.point_to_point import emulate_link

FOLDER = Path(__file__).resolve().parents[1] / "workshop_utils"
WORLD_SIZES = (1, 2, 4, 8)
LAYERS, WIDTH = 8, 512
BATCH_PER_RANK, GLOBAL_BATCH = 64, 256
LINK_WORLD_SIZE, LINK_BATCH = 4, 256
GIGABITS_PER_S = (0.1, 0.5, 1.0, 2.0)
LATENCY_S = 50e-6
BUCKET_BYTES = 2**20
STEPS = 15


def net() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def train(n: int, batch: int, gigabits_per_s: float | None, ways: tuple[str, ...]) -> dict[str, list[float]]:
    """Runs on a rank: seconds of each step, in turns of the `ways` "overlap", "no overlap" and "compute"."""
    times_s = {way: [] for way in ways}
    with sub_world(n) as inside:
        if not inside:
            return times_s
        wrapped = {w: DataParallel(net(), bucket_bytes=BUCKET_BYTES, overlap=w != "no overlap") for w in ways}
        inputs_BW = torch.rand(batch, WIDTH)
        link = nullcontext()
        if gigabits_per_s is not None:
            link = emulate_link(Link(LATENCY_S, gigabits_per_s * 125e6))
        with link:
            for _ in range(2 + STEPS):
                for way, model in wrapped.items():
                    times_s[way].append(_step_s(model, inputs_BW, sync=way != "compute"))
    return {way: times[2:] for way, times in times_s.items()}


def _step_s(model: DataParallel, inputs_BW, sync: bool) -> float:
    dist.barrier()
    began_s = time.perf_counter()
    with nullcontext() if sync else model.no_sync():
        model(inputs_BW).square().mean().backward()
        model.finish_gradient_sync()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.01)
            parameter.grad = None
    return time.perf_counter() - began_s


def medians_s(by_rank: list[dict[str, list[float]]]) -> dict[str, float]:
    """Of each way, the median over the steps of the slowest rank's time."""
    return {
        way: statistics.median(max(times) for times in zip(*(of_rank[way] for of_rank in by_rank)))
        for way in by_rank[0]
    }


def scaling_row(ranks, fixed: str, n: int, gradient_bytes: int, loopback: Link) -> dict:
    batch = BATCH_PER_RANK if fixed == "batch per rank" else GLOBAL_BATCH // n
    took = medians_s(ranks.run(train, n, batch, None, ("compute", "overlap")[: min(n, 2)])[:n])
    step_s, compute_s = took.get("overlap", took["compute"]), took["compute"]
    extra_s = shared_all_reduce_s("ring", gradient_bytes, n, loopback) if n > 1 else 0.0
    return {
        "fixed": fixed,
        "world_size": n,
        "batch_per_rank": batch,
        "step_s": step_s,
        "steps_per_s": 1 / step_s,
        "compute_s": compute_s,
        "communication_share": 1 - compute_s / step_s,
        "predicted_step_s": compute_s + extra_s,
    }


def link_row(ranks, gigabits_per_s: float, gradient_bytes: int) -> dict:
    n = LINK_WORLD_SIZE
    ways = ("overlap", "no overlap", "compute")
    took = medians_s(ranks.run(train, n, LINK_BATCH, gigabits_per_s, ways)[:n])
    all_reduce_s = ring_all_reduce_s(gradient_bytes, n, Link(LATENCY_S, gigabits_per_s * 125e6))
    return {
        "gigabits_per_s": gigabits_per_s,
        "latency_s": LATENCY_S,
        "world_size": n,
        "batch_per_rank": LINK_BATCH,
        "overlap_s": took["overlap"],
        "no_overlap_s": took["no overlap"],
        "compute_s": took["compute"],
        "all_reduce_s": all_reduce_s,
        "predicted_no_overlap_s": took["compute"] + all_reduce_s,
        "predicted_overlap_s": max(took["compute"], all_reduce_s),
    }


def loopback_link() -> Link:
    """Fitted to the recorded ring all-reduces, of all world sizes from 2."""
    rows = json.loads((FOLDER / "recorded_ring.json").read_text(encoding="utf-8"))["rows"]
    world_sizes, sizes_bytes, times_s = zip(*rows)
    return fit_link(sizes_bytes, times_s, world_sizes)


def main() -> None:
    gradient_bytes = sum(p.nbytes for p in net().parameters())
    loopback = loopback_link()
    with start_ranks(max(WORLD_SIZES)) as ranks:
        scaling = [
            scaling_row(ranks, fixed, n, gradient_bytes, loopback)
            for fixed in ("batch per rank", "global batch")
            for n in WORLD_SIZES
        ]
    with start_ranks(LINK_WORLD_SIZE) as ranks:
        links = [link_row(ranks, gigabits_per_s, gradient_bytes) for gigabits_per_s in GIGABITS_PER_S]
    record = {
        "command": "python benchmarks/record_scaling.py",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "model": f"{LAYERS} x Linear({WIDTH})",
        "gradient_bytes": gradient_bytes,
        "loopback": vars(loopback),
        "scaling": scaling,
        "links": links,
    }
    record = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.4g}"))
    text = json.dumps(record, indent=1)
    for row in record["scaling"] + record["links"]:  # one row a line
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n  "), json.dumps(row))
    target = FOLDER / "recorded_scaling.json"
    target.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {target.name}: {len(scaling)} + {len(links)} rows")


if __name__ == "__main__":
    main()
