"""What notebook 04 measures with: bytes on the wire, parameters that are whole, collectives, contestants in turns.

Everything here runs inside a rank, on all ranks at once. Nothing of it is taught there; each was introduced earlier.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
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
    """Run `step()` and count. A parameter is whole while it is no DTensor; asked at every matrix product."""
    with CommDebugMode() as calls, _WholeParameters(model) as whole:
        step()
    counts = {"gather": 0, "reduce_scatter": 0, "other": 0}
    for operation, count in calls.get_comm_counts().items():
        counts[next((kind for kind in ("reduce_scatter", "gather") if kind in str(operation)), "other")] += (
            count
        )
    return Collectives(whole.peak_bytes, counts["gather"], counts["reduce_scatter"], counts["other"])


class _WholeParameters(TorchDispatchMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.peak_bytes = model, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:  # addmm, mm, bmm
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
