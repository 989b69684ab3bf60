"""What a message and a collective cost: the alpha-beta model. Notebook 02 teaches it.

Sending one message of S bytes over a link takes alpha + S * beta seconds (Hockney 1994):

    alpha   seconds before the first byte arrives, however small the message (latency)
    beta    seconds per byte after that, which is 1 / bandwidth
    n       ranks (world_size)
    S       bytes of the tensor that every rank holds (size_bytes)

Every rank has a link of its own that sends and receives at the same time (full duplex), and carries one message
at a time each way. Time to add numbers up is left out: it is small beside a network.
The formulas are those of Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
MPICH" (2005), unless a docstring names another source.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Link:
    """A full-duplex link: seconds before the first byte arrives, and bytes per second in each direction."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self):
        if not (self.latency_s >= 0 and math.isfinite(self.latency_s)):
            raise ValueError(f"latency_s must be 0 or more seconds, got {self.latency_s}")
        if not self.bandwidth_bytes_per_s > 0:
            raise ValueError(f"bandwidth_bytes_per_s must be above 0, got {self.bandwidth_bytes_per_s}")

    def message_s(self, size_bytes: float) -> float:
        """Seconds for one message: alpha + S * beta."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


# Bandwidth of Ethernet by definition of its name (1 Gb/s = 125 MB/s); 50 us is a round figure for TCP through one
# switch: measure yours. The other bandwidths: stas00/ml-engineering, network chapter (2026), one direction; EFA is
# what is reached in practice of 50 GB/s. The other latencies: what NCCL's own cost model takes for one step of a
# ring (NVIDIA/nccl, src/graph/tuning.cc, hwLat, Ring / Simple): NVLink 3.4 us, PCIe 5.7 us, network 9.6 us.
LINKS: dict[str, Link] = {
    "100 Mb/s Ethernet": Link(50e-6, 12.5e6),
    "1 Gb/s Ethernet": Link(50e-6, 125e6),
    "10 Gb/s Ethernet": Link(50e-6, 1.25e9),
    "25 Gb/s Ethernet": Link(50e-6, 3.125e9),
    "400 Gb/s EFA": Link(9.6e-6, 42e9),
    "PCIe 4 x16": Link(5.7e-6, 31e9),
    "PCIe 5 x16": Link(5.7e-6, 63e9),
    "NVLink 3": Link(3.4e-6, 300e9),
    "NVLink 4": Link(3.4e-6, 450e9),
    "NVLink 5": Link(3.4e-6, 900e9),
}


# ----------------------------------------------------------------------------- one collective, each rank its own link


def broadcast_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Binomial tree: ceil(lg n) (alpha + S beta). Every rank ends with S bytes of one rank."""
    return _tree_depth(world_size) * link.message_s(size_bytes)


def reduce_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Binomial tree, the broadcast backwards: ceil(lg n) (alpha + S beta)."""
    return broadcast_s(size_bytes, world_size, link)


def reduce_scatter_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Ring: (n-1) alpha + (n-1)/n S beta. S is the whole input of one rank; its share of the sum has S/n bytes."""
    return (world_size - 1) * link.message_s(size_bytes / world_size)


def all_gather_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Ring: (n-1) alpha + (n-1)/n S beta. S is the whole output; each rank brings S/n bytes."""
    return reduce_scatter_s(size_bytes, world_size, link)


def naive_all_reduce_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Everybody sends to rank 0, which adds up and sends to everybody: 2(n-1) (alpha + S beta).

    Rank 0's link carries 2(n-1) whole tensors, one after the other.
    """
    return 2 * (world_size - 1) * link.message_s(size_bytes)


def tree_all_reduce_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Reduce by a tree, then broadcast by a tree: 2 ceil(lg n) (alpha + S beta)."""
    return 2 * _tree_depth(world_size) * link.message_s(size_bytes)


def ring_all_reduce_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Reduce-scatter, then all-gather, both by a ring: 2(n-1) alpha + 2(n-1)/n S beta.

    The second term is the least that any all-reduce can do (Patarasuk and Yuan 2009).
    """
    return 2 * (world_size - 1) * link.message_s(size_bytes / world_size)


def halving_doubling_all_reduce_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Rabenseifner's: 2 lg n alpha + 2(n-1)/n S beta, for a power of two.

    Otherwise, with p the largest power of two below n, the n - p ranks beyond it first give their tensor away and
    get the sum at the end: 2(alpha + S beta) more, and p in place of n.
    """
    p = 1 << (world_size.bit_length() - 1)
    time_s = 2 * _tree_depth(p) * link.latency_s + 2 * (p - 1) / p * size_bytes / link.bandwidth_bytes_per_s
    return time_s + (2 * link.message_s(size_bytes) if p < world_size else 0.0)


ALL_REDUCE_S: dict[str, Callable[[float, int, Link], float]] = {
    "naive": naive_all_reduce_s,
    "tree": tree_all_reduce_s,
    "ring": ring_all_reduce_s,
    "halving-doubling": halving_doubling_all_reduce_s,
}


def _tree_depth(world_size: int) -> int:
    """ceil(lg n), exactly."""
    return (world_size - 1).bit_length()


# ----------------------------------------------------------------------------- one machine: all ranks share one "link"


def all_reduce_steps(algorithm: str, world_size: int) -> int:
    """Messages that follow one another in an all-reduce: the factor of alpha in its formula."""
    return round(_cost(algorithm)(0.0, world_size, Link(1.0, 1.0)))


def all_reduce_total_bytes(algorithm: str, size_bytes: float, world_size: int) -> float:
    """Bytes that all ranks together send. 2(n-1) S for all four, as each rank's numbers must meet all others'.

    Only halving-doubling without a power of two is not a case apart: folding in and handing out n - p ranks costs
    2(n-p) S, the p ranks 2(p-1) S, which is 2(n-1) S again.
    """
    _cost(algorithm)
    return 2 * (world_size - 1) * size_bytes


def shared_all_reduce_s(algorithm: str, size_bytes: float, world_size: int, link: Link) -> float:
    """Seconds where all ranks share one medium, as on a machine's loopback: steps * alpha + total bytes * beta.

    `link` is what `fit_link` returns: its bandwidth is that of the whole loopback, not of one rank.
    """
    total_bytes = all_reduce_total_bytes(algorithm, size_bytes, world_size)
    return all_reduce_steps(algorithm, world_size) * link.latency_s + total_bytes / link.bandwidth_bytes_per_s


def fit_link(
    sizes_bytes: Sequence[float],
    times_s: Sequence[float],
    world_size: int | Sequence[int],
    algorithm: str = "ring",
) -> Link:
    """Fit alpha and beta to all-reduces measured on one machine; `sizes_bytes` and `times_s` belong together.

    Where ranks share cores and memory, beta per rank would depend on n; beta per byte that all ranks together send,
    2(n-1) S, does so less. Least squares on the relative error, so that 1 KB counts as much as 64 MB. `world_size`
    is one number, or one for each measurement. Raises ValueError for fewer than two different sizes.
    """
    sizes, times = np.asarray(sizes_bytes, float), np.asarray(times_s, float)
    worlds = np.broadcast_to(np.asarray(world_size), sizes.shape)
    if sizes.shape != times.shape or len(np.unique(sizes)) < 2:
        raise ValueError(
            f"fit_link needs one time for each size and two different sizes, got {len(sizes)} sizes and {len(times)} times"
        )
    if (times <= 0).any() or (worlds < 2).any():
        raise ValueError("fit_link needs times above 0 and world sizes of at least 2")
    steps = np.array([all_reduce_steps(algorithm, int(n)) for n in worlds], float)
    total = np.array([all_reduce_total_bytes(algorithm, s, int(n)) for s, n in zip(sizes, worlds)])
    columns = np.stack([steps, total], axis=1) / times[:, None]
    return _link_of(columns)


def _link_of(columns: np.ndarray) -> Link:
    """The alpha >= 0 and beta > 0 for which columns @ (alpha, beta) is closest to 1."""
    (alpha, beta), *_ = np.linalg.lstsq(columns, np.ones(len(columns)), rcond=None)
    if alpha < 0:  # noise on large messages only: then all of the time is beta's
        alpha, beta = 0.0, columns[:, 1].sum() / (columns[:, 1] ** 2).sum()
    if beta <= 0:
        raise ValueError("the times do not grow with the sizes: measure larger messages, or more repeats")
    return Link(float(alpha), float(1 / beta))


def _cost(algorithm: str) -> Callable[[float, int, Link], float]:
    if algorithm not in ALL_REDUCE_S:
        raise ValueError(f"unknown algorithm {algorithm!r}: choose one of {', '.join(ALL_REDUCE_S)}")
    return ALL_REDUCE_S[algorithm]
