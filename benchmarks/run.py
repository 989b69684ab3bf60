"""`make bench`: run every comparison and write benchmarks/RESULTS.md.

A comparison is a module beside this one with `TITLE` and `run() -> str`, its text and table in Markdown. Add it to
COMPARISONS. `python benchmarks/run.py NAME ...` runs some of them and prints their tables without writing the file.
"""

import os
import platform
import sys
from pathlib import Path

import all_reduce
import data_parallel
import fully_sharded
import lora
import qlora
import quantization
import ring_in_fsdp
import subspace
import torch

COMPARISONS = {
    "all_reduce": all_reduce,
    "data_parallel": data_parallel,
    "fully_sharded": fully_sharded,
    "ring_in_fsdp": ring_in_fsdp,
    "lora": lora,
    "subspace": subspace,
    "quantization": quantization,
    "qlora": qlora,
}
RESULTS = Path(__file__).parent / "RESULTS.md"


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        sys.exit(f"unknown comparison {', '.join(unknown)}: choose from {', '.join(COMPARISONS)}")
    sections = [machine()]
    for name in names or COMPARISONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        sections.append(f"## {COMPARISONS[name].TITLE}\n\n{COMPARISONS[name].run()}")
    text = "\n\n".join(["# Benchmarks", *sections]) + "\n"
    print(text)
    if not names:
        RESULTS.write_text(text, encoding="utf-8")
        print(f"written to {RESULTS}", file=sys.stderr)


def machine() -> str:
    load = f"{os.getloadavg()[0]:.1f}"
    return (
        "`make bench` writes this file; the machine should be idle.\n\n"
        f"{os.cpu_count()} cores ({cpu_model()}), {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}. Load average before the run: {load}."
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
