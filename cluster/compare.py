"""The multi-host lab's runs beside the formula and beside the emulated link. multihost_lab.sh calls it.

    python cluster/compare.py FOLDER [--record]

reads FOLDER/STRATEGY-RATE.json, the reports of workshop_utils.train (rate in Mb/s, 0: no limit), and writes
FOLDER/table.md and FOLDER/plot.png. --record also writes workshop_utils/recorded_multihost.json, which notebook 04
shows: {"command", "machine", "recorded", "rows"}, a row for each strategy and rate with

    strategy, nodes, link_mbit    ddp or fsdp; hosts with one rank each; 0 without a limit
    step_s                        median step of rank 0, the first steps left out
    compute_s                     the same without a limit: what is left when the link costs next to nothing
    bytes_sent_per_rank           in one step, on the wire
    predicted_s                   compute_s + the collectives' alpha-beta time on the link
    emulated_s                    our DataParallel or FullyShardedDataParallel on an emulated link of that rate
    emulated_predicted_s          its own time without a link + the formula: ours sends 3 S (n-1)/n where gloo sends 4
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
from torch import nn

from workshop_utils import start_ranks, use_style
from workshop_utils.models import MLP, SmallViT
from workshop_utils.network import Link, ring_all_reduce_s

TARGET = Path(__file__).resolve().parents[1] / "workshop_utils/recorded_multihost.json"
LATENCY_S = 50e-6  # of an emulated link: TCP through one switch; beside these sizes it hardly counts
WARM_UP_STEPS, EMULATED_STEPS = 5, 8
MODELS = {"mlp": (MLP, nn.Linear), "vit": (SmallViT, nn.TransformerEncoderLayer)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The lab's runs beside the formula and the emulated link.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true", help=f"write {TARGET.name} for notebook 04")
    chosen = parser.parse_args()
    reports = {
        tuple(file.stem.split("-")): json.loads(file.read_text(encoding="utf-8"))
        for file in chosen.folder.glob("*-*.json")
    }
    if not any(rate == "0" for _, rate in reports):
        sys.exit(f"compare: no reports in {chosen.folder}: run cluster/multihost_lab.sh first")
    rows = compare(reports)
    table = as_table(rows)
    (chosen.folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    plot(rows, chosen.folder / "plot.png")
    print(f"written: {chosen.folder}/table.md and plot.png")
    if chosen.record:
        record(rows)


def compare(reports: dict) -> list[dict]:
    nodes = next(iter(reports.values()))["world_size"]
    size_bytes = sum(p.nbytes for p in MODELS[next(iter(reports.values()))["model"]][0]().parameters())
    rates = sorted({int(rate) for _, rate in reports})
    rows = []
    for strategy in sorted({strategy for strategy, _ in reports}):
        emulated_s = emulate(strategy, nodes, reports[strategy, "0"]["model"], rates)
        for rate in rates:
            report = reports[strategy, str(rate)]
            compute_s = step_s(reports[strategy, "0"])
            rows.append(
                {
                    "strategy": strategy,
                    "nodes": nodes,
                    "link_mbit": rate,
                    "step_s": step_s(report),
                    "compute_s": compute_s,
                    "bytes_sent_per_rank": report["bytes_sent"][0] / len(report["step_s"]),
                    "predicted_s": compute_s
                    + sending_s({"ddp": 2, "fsdp": 4}[strategy], size_bytes, nodes, rate),
                    "emulated_s": emulated_s[rate],
                    "emulated_predicted_s": emulated_s[0]
                    + sending_s({"ddp": 2, "fsdp": 3}[strategy], size_bytes, nodes, rate),
                }
            )
    return rows


def step_s(report: dict) -> float:
    return statistics.median(report["step_s"][WARM_UP_STEPS:])


def sending_s(halves: int, size_bytes: int, nodes: int, rate: int) -> float:
    """`halves` times a reduce-scatter or all-gather of all parameters; an all-reduce is two of them."""
    if rate == 0:
        return 0.0
    return halves / 2 * ring_all_reduce_s(size_bytes, nodes, Link(LATENCY_S, rate * 1e6 / 8))


def emulate(strategy: str, nodes: int, model: str, rates: list[int]) -> dict[int, float]:
    """rate -> median step of our own classes on an emulated link, 0: without one."""
    with start_ranks(nodes) as ranks:
        return {rate: max(ranks.run(emulated_step_s, strategy, model, rate)) for rate in rates}


def emulated_step_s(strategy: str, model: str, rate: int) -> float:
    """On a rank."""
    from contextlib import nullcontext

    import torch.distributed as dist

    from workshop_utils.data_parallel import DataParallel
    from workshop_utils.fully_sharded import FullyShardedDataParallel
    from workshop_utils.point_to_point import emulate_link

    make_model, unit = MODELS[model]
    wrapped = (
        DataParallel(make_model())
        if strategy == "ddp"
        else FullyShardedDataParallel(make_model(), unit_types=(unit,))
    )
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-3)
    share = 256 // dist.get_world_size()
    images, labels = torch.rand(share, 784), torch.randint(10, (share,))
    times_s = []
    with emulate_link(Link(LATENCY_S, rate * 1e6 / 8)) if rate else nullcontext():
        for _ in range(3 + EMULATED_STEPS):
            dist.barrier()
            began_s = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(images), labels).backward()
            wrapped.finish_gradient_sync()
            optimizer.step()
            times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s[3:])


def as_table(rows: list[dict]) -> str:
    lines = [
        "| strategy | link | MB sent a step | step, throttled hosts | formula | ratio | ours, emulated link | formula | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        link = f"{row['link_mbit']} Mb/s" if row["link_mbit"] else "no limit"
        pairs = ("step_s", "predicted_s"), ("emulated_s", "emulated_predicted_s")
        cells = [
            f"{row[measured] * 1e3:.1f} ms | {row[formula] * 1e3:.1f} ms | {row[measured] / row[formula]:.2f}"
            for measured, formula in pairs
        ]
        lines.append(
            f"| {row['strategy']} | {link} | {row['bytes_sent_per_rank'] / 1e6:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], target: Path) -> None:
    """One panel per strategy: step time against the rate of the link."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from workshop_utils.plotting.costs import plot_multihost

    use_style()
    plot_multihost(rows).savefig(target, dpi=120)
    plt.close("all")


def record(rows: list[dict]) -> None:
    content = {
        "command": "cluster/multihost_lab.sh && python cluster/compare.py build/multihost --record",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "rows": [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows
        ],
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {TARGET.name}")


if __name__ == "__main__":
    main()
