"""Draw the slides' figures into build/figures, with the notebooks' own plot functions: `make figures`.

What is measured comes from the recorded files that the package ships, or is computed here within seconds; everything
else is a formula, and its title says "predicted". A figure's file has the name of its function.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import fine_tuning_figures
import matplotlib.pyplot as plt
import torch
from fine_tuning_figures import recorded
from matplotlib.figure import Figure
from torch.nn import functional as F

from workshop_utils import use_style
from workshop_utils.data_parallel import shard_indices
from workshop_utils.memory import measure_memory, record_activations
from workshop_utils.models import MLP
from workshop_utils.network import (
    ALL_REDUCE_S,
    LINKS,
    Link,
    all_gather_s,
    reduce_scatter_s,
    ring_all_reduce_s,
)
from workshop_utils.plotting import all_reduce, costs, data_parallel, fully_sharded, single_device

FOLDER = Path(__file__).resolve().parents[1] / "build" / "figures"


# Notebook 01


def dependencies() -> Figure:
    return single_device.plot_dependencies()


def first_step_bytes() -> Figure:
    """What exists after each line of a first step: counted here."""
    model = MLP()
    adam, rows = torch.optim.Adam(model.parameters()), {}
    images, labels = torch.rand(256, 784), torch.zeros(256, dtype=torch.int64)
    rows["model created"] = measure_memory(model, adam).by_kind()
    with record_activations(model) as saved:
        loss = F.cross_entropy(model(images), labels)
    rows["after forward"] = measure_memory(model, adam, saved).by_kind()
    loss.backward()
    rows["after backward"] = measure_memory(model, adam).by_kind()
    adam.step()
    rows["after update"] = measure_memory(model, adam).by_kind()
    return single_device.plot_bytes_by_kind(rows, "A first step on 256 images, line by line")


# Notebook 02


def tree() -> Figure:
    return all_reduce.plot_all_reduce_steps("tree", 4)


def ring() -> Figure:
    return all_reduce.plot_all_reduce_steps("ring", 4)


def ring_step_1() -> Figure:
    return all_reduce.all_reduce_step_figure("ring", 4, 1)


def ring_step_3() -> Figure:
    return all_reduce.all_reduce_step_figure("ring", 4, 3)


def seconds_of_64_ranks() -> Figure:
    link, sizes = LINKS["10 Gb/s Ethernet"], [1e3 * 2**k for k in range(18)]
    lines = {name: (sizes, [cost(s, 64, link) for s in sizes]) for name, cost in ALL_REDUCE_S.items()}
    return costs.plot_seconds("Predicted: 64 ranks, 10 Gb/s Ethernet", lines)


# Notebook 03


def timelines() -> Figure:
    """With the compute time that was recorded for four ranks."""
    row = next(row for row in recorded("scaling")["links"] if row["gigabits_per_s"] == 1.0)
    return data_parallel.plot_bucket_timeline(row["compute_s"], "1 Gb/s Ethernet", row["world_size"])


def shards() -> Figure:
    n, N = 4, 22
    rows = {
        "epoch 0": [shard_indices(N, r, n) for r in range(n)],
        "epoch 1": [shard_indices(N, r, n, epoch=1) for r in range(n)],
        "set_epoch forgotten": [shard_indices(N, r, n) for r in range(n)],
        "a permutation for each rank": [shard_indices(N, r, n, seed=r) for r in range(n)],
        "no padding": [list(shard_indices(N, r, n, epoch=2))[: 6 if r < 2 else 5] for r in range(n)],
    }
    return data_parallel.plot_shards("Who sees which of 22 samples", rows, N)


def links() -> Figure:
    scaling = recorded("scaling")
    rows, S = scaling["links"], scaling["gradient_bytes"]
    compute_s = statistics.median(row["compute_s"] for row in rows)
    bandwidths = [12.5e6 * 10 ** (k / 8) for k in range(38)]
    sending_s = [ring_all_reduce_s(S, 4, Link(50e-6 if b < 2e9 else 5e-6, b)) for b in bandwidths]
    at = [125e6 * row["gigabits_per_s"] for row in rows]
    return data_parallel.plot_links(
        "8.4 MB of gradients, 4 ranks, recorded on 2 cores",
        bandwidths,
        compute_s,
        predicted_s={
            "overlap off": [compute_s + time_s for time_s in sending_s],
            "overlap on": [max(compute_s, compute_s / 3 + time_s) for time_s in sending_s],
        },
        measured_s={
            "overlap off": (at, [row["no_overlap_s"] for row in rows]),
            "overlap on": (at, [row["overlap_s"] for row in rows]),
        },
        marks={k: LINKS[k].bandwidth_bytes_per_s for k in ("10 Gb/s Ethernet", "PCIe 4 x16", "NVLink 4")},
    )


# Notebook 04


def memory_bill() -> Figure:
    return fully_sharded.plot_memory_bill(7_500_000_000, world_size=64)


def live_bytes() -> Figure:
    """Full parameters alive along a step, from the sizes of the MLP's units alone."""
    sizes = {"fc1": 4 * (784 * 200 + 200), "fc2": 4 * (200 * 200 + 200), "fc3": 4 * (200 * 10 + 10)}
    labels, freed, kept, whole = [], [], [], 0
    for name, size in sizes.items():
        whole += size
        labels += [f"gather {name}", f"{name} forward done"]
        freed += [size, 0]
        kept += [whole, whole]
    for name, size in reversed(sizes.items()):
        labels += [f"gather {name}", f"{name} backward done"]
        freed += [size, 0]
        kept += [whole, whole - size]
        whole -= size
    curves = {"resharded": freed, "reshard off": kept}
    limits = {"two largest units": sizes["fc1"] + sizes["fc2"]}
    return fully_sharded.plot_live_bytes("Predicted: what is whole along a step", curves, labels, limits)


def recorded_shares() -> Figure:
    return fully_sharded.plot_recorded_shares(recorded("fsdp"))


def share_by_ranks() -> Figure:
    """The formula beyond the ranks that were recorded, with the compute time of two ranks on two cores."""
    record, worlds, lines = recorded("fsdp"), [2, 4, 8, 16, 32, 64], {}
    compute_s = next(row[4] for row in record["shares"] if row[1] == 2)
    unit_bytes = record["parameters_bytes"] / 16
    for rate in (0.5, 2.0, 10.0, 100.0):
        link = Link(record["latency_s"] if rate < 10 else 50e-6, 125e6 * rate)
        seconds = [
            16 * (2 * all_gather_s(unit_bytes, n, link) + reduce_scatter_s(unit_bytes, n, link))
            for n in worlds
        ]
        lines[f"{rate:g} Gb/s"] = worlds, [s / (s + compute_s) for s in seconds]
    title = "Predicted: FSDP, 16 x Linear(256), 7 ms of compute"
    return fully_sharded.plot_communication_share(title, lines, xlabel="ranks", log=True)


def multihost() -> Figure:
    return costs.plot_multihost(recorded("multihost")["rows"])


def tokens_per_device() -> Figure:
    flops_per_s, tokens, lines = 175e12, [10 * 2**k for k in range(17)], {}
    for name in ("10 Gb/s Ethernet", "PCIe 4 x16", "400 Gb/s EFA", "NVLink 3"):
        bandwidth = LINKS[name].bandwidth_bytes_per_s
        lines[name] = tokens, [1 / (1 + bandwidth * T / flops_per_s) for T in tokens]
    title = "Predicted: A100, FSDP, any model size, nothing overlapped"
    return fully_sharded.plot_communication_share(title, lines, xlabel="tokens per device and step", log=True)


FIGURES = (
    dependencies, first_step_bytes, tree, ring, ring_step_1, ring_step_3, seconds_of_64_ranks, timelines, shards, links,
    memory_bill, live_bytes, recorded_shares, share_by_ranks, multihost, tokens_per_device,
    *fine_tuning_figures.FIGURES,
)  # fmt: skip


def main(names: list[str]) -> int:
    """Draw all figures, or those named. Fonts become outlines, so that a slide looks the same everywhere."""
    by_name = {draw.__name__: draw for draw in FIGURES}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        print(f"figures: no figure is called {', '.join(unknown)}; there are {', '.join(by_name)}")
        return 1
    use_style()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "workshop"})
    for name in names or by_name:
        torch.manual_seed(0)
        figure = by_name[name]()
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
    print(f"figures: {len(names or by_name)} in build/figures")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
