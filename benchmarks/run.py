"""`make bench`: run every comparison; results.json, RESULTS.md, results.png and README's table say what came out.

A comparison is a module beside this one with `run() -> dict`, its section (cells.py). Name it in COMPARISONS.
`python benchmarks/run.py NAME ...` runs some of them; the sections of the others stay. All is written after each
comparison, so an interrupted run keeps what it has measured.
"""

import importlib
import os
import platform
import sys
import time
from pathlib import Path

import report
import torch

COMPARISONS = [
    "all_reduce",
    "data_parallel",
    "fully_sharded",
    "ring_in_fsdp",
    "lora",
    "subspace",
    "quantization",
    "qlora",
    "live_ranks",
    "series",
]


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        sys.exit(f"unknown comparison {', '.join(unknown)}: choose from {', '.join(COMPARISONS)}")
    results = report.load()
    for name in names or COMPARISONS:
        print(f"{name} ...", flush=True)
        results[name] = measured(name)
        results = {known: results[known] for known in COMPARISONS if known in results}
        report.save(results)
        print(report.section_text(results[name]), end="\n\n", flush=True)
        report.write(results)


def measured(name: str) -> dict:
    """The section of a comparison, with when, where and under which load it was measured."""
    when, load, began_s = time.strftime("%Y-%m-%d %H:%M"), os.getloadavg()[0], time.monotonic()
    section = importlib.import_module(name).run()
    section["measured"] = (
        f"Measured {when} in {time.monotonic() - began_s:.0f} s on {machine()}. Load average before: {load:.1f}."
    )
    return section


def machine() -> str:
    return (
        f"{os.cpu_count()} cores ({cpu_model()}), {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def cpu_model() -> str:
    """As the system calls it, for instance "Intel(R) Xeon(R) Processor"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main(sys.argv[1:])
