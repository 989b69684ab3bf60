"""What notebook 04 measures with: bytes on the wire, parameters that are whole, collectives, contestants in turns.

Everything here runs inside a rank, on all ranks at once. Nothing of it is taught there; each was introduced earlier.
"""

import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from workshop_utils.point_to_point import count_traffic, wire_bytes


def sent_bytes(step: Callable[[], object]) -> int:
    """Bytes that this rank's connections carry away while `step()` runs on all ranks; a first call is not counted.

    Elsewhere than on Linux only our own sends are seen: 0 for gloo's collectives.
    """
    step()  # one-time messages: connections, agreements on an order
    dist.barrier()
    with (wire_bytes if sys.platform == "linux" else count_traffic)() as counted:
        step()
        dist.barrier()
    return counted.bytes_sent


@dataclass(frozen=True)
class Collectives:
    """Of one step of torch's fully_shard: calls, and the most bytes of parameters that were whole at a time."""

    peak_bytes: int
    all_gathers: int
    reduce_scatters: int
    others: int


def count_collectives(model: nn.Module, step: Callable[[], object]) -> Collectives:
    """Run `step()` and count. A parameter is whole while it is no DTensor; asked at every matrix product.

    torch's CommDebugMode counts the same, but that of torch 2.11 fails in a step that has a forward after a backward.
    """
    with _Watch(model) as seen:
        step()
    return Collectives(
        seen.peak_bytes, seen.calls["gather"], seen.calls["reduce_scatter"], seen.calls["other"]
    )


class _Watch(TorchDispatchMode):
    """Sees every operator of torch: those of namespace c10d are the collectives, and sends, receives and waits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.peak_bytes, self.calls = model, 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if function.namespace == "c10d" and not re.match("send|recv|barrier|monitored_barrier", name):
            kinds = {"allgather": "gather", "reduce_scatter": "reduce_scatter"}
            self.calls[next((kinds[kind] for kind in kinds if kind in name), "other")] += 1
        if "mm" in name:  # addmm, mm, bmm
            whole = {p.untyped_storage() for p in self.model.parameters() if not isinstance(p, DTensor)}
            self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in whole))
        return function(*args, **(kwargs or {}))


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """{name: median seconds} on this rank. They take turns, so that a disturbance hits all; a first round warms up."""
    times_s: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            if dist.is_initialized():
                dist.barrier()
            began_s = time.perf_counter()
            run()
            times_s[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(times[1:]) for name, times in times_s.items()}
