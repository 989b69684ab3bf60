"""Record the ring all-reduce on one machine: 1 KB to 64 MB, 2 to 8 ranks. About a minute on two cores.

    python benchmarks/ring_on_loopback.py

writes workshop_utils/recorded_ring.json, which notebook 02 shows beside what it measures itself.
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from workshop_utils import start_ranks, sub_world
from workshop_utils.collectives import ring_all_reduce_

TARGET = Path(__file__).resolve().parents[1] / "workshop_utils/recorded_ring.json"
WORLD_SIZES = (2, 3, 4, 6, 8)
SIZES_BYTES = tuple(1_000 * 4**k for k in range(8)) + (64_000_000,)


def measure(world_sizes, sizes_bytes) -> list[tuple[int, int, float]]:
    """Runs on a rank: (world size, bytes, median seconds)."""
    rows = []
    for n in world_sizes:
        with sub_world(n) as inside:
            for size in sizes_bytes if inside else ():
                rows.append((n, size, _median_s(torch.zeros(size // 4))))
    return rows


def _median_s(tensor) -> float:
    times_s = []
    for _ in range(31 if tensor.nbytes < 2e6 else 11):
        dist.barrier()
        began_s = time.perf_counter()
        ring_all_reduce_(tensor)
        times_s.append(time.perf_counter() - began_s)
    return float(f"{statistics.median(times_s[1:]):.4g}")


def main() -> None:
    with start_ranks(max(WORLD_SIZES)) as ranks:
        rows = ranks.run(measure, WORLD_SIZES, SIZES_BYTES)[0]
    record = {
        "command": "python benchmarks/ring_on_loopback.py",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    text = json.dumps(record, indent=1)
    for row in rows:  # one row a line
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n  "), json.dumps(row))
    TARGET.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {TARGET.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
