"""Collectives from sends and receives, and all-reduce four ways. Notebook 02 teaches it; 03 and 04 use it.

Everything here runs inside a rank, and takes `group=None`, the default group. `src` and `dst` are ranks of the
default group, as in torch. Tensors may have any shape (none, empty, not contiguous) and any dtype that can be
added; the world may have any size from 1. Every rank of the group must call, with the same shape and dtype.
The operation is the sum. All ranks end with the same bits.

    n   ranks in the group      me   this rank's place in it      S   bytes of one rank's tensor

Docstrings say how many bytes a rank sends, tests assert it; network.py has the seconds. The ring is in ring.py.
"""

import torch
import torch.distributed as dist

from workshop_utils.pieces import edges_of, flat_view, members, place_of, wait_all
from workshop_utils.point_to_point import irecv, isend, recv, send
from workshop_utils.ring import ring_all_gather, ring_all_reduce_, ring_reduce_scatter

__all__ = [
    "all_gather",
    "broadcast_",
    "gather",
    "halving_doubling_all_reduce_",
    "naive_all_reduce_",
    "reduce_",
    "reduce_scatter",
    "ring_all_gather",
    "ring_all_reduce_",
    "ring_reduce_scatter",
    "scatter",
    "tree_all_reduce_",
]


# ----------------------------------------------------------------------------- the primitives


@torch.no_grad()
def broadcast_(tensor: torch.Tensor, src: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite `tensor` on every rank with that of rank `src`, along a binomial tree of depth ceil(lg n).

    A rank sends S to each of its children in the tree, (n-1) S in all.
    """
    ranks, me = members(group)
    for parent, child in _tree(len(ranks), root=place_of(src, ranks)):
        if me == parent:
            send(tensor, ranks[child], group)
        elif me == child:
            recv(tensor, ranks[parent], group)


@torch.no_grad()
def reduce_(tensor: torch.Tensor, dst: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """Add all ranks' tensors up into that of rank `dst`; the other ranks' tensors stay as they were.

    The tree of the broadcast, backwards: every rank but `dst` sends S once.
    """
    ranks, me = members(group)
    root = place_of(dst, ranks)
    total = tensor
    for parent, child in reversed(_tree(len(ranks), root)):
        if me == child:
            send(total, ranks[parent], group)
        elif me == parent:
            received = torch.empty_like(tensor)
            recv(received, ranks[child], group)
            total = total.add_(received) if me == root else torch.add(total, received)


@torch.no_grad()
def scatter(
    tensor: torch.Tensor,
    scatter_list: list[torch.Tensor] | None = None,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Rank `src` hands out scatter_list[i] to the i-th rank of the group, where it overwrites `tensor`.

    `scatter_list` counts on `src` only, which sends n-1 of its n tensors.
    """
    ranks, me = members(group)
    root = place_of(src, ranks)
    if me != root:
        return recv(tensor, src, group)
    _check_list("scatter_list", scatter_list, ranks)
    wait_all(isend(part, ranks[i], group) for i, part in enumerate(scatter_list) if i != me)
    tensor.copy_(scatter_list[me])


@torch.no_grad()
def gather(
    tensor: torch.Tensor,
    gather_list: list[torch.Tensor] | None = None,
    dst: int = 0,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Rank `dst` collects the tensors of all ranks: gather_list[i] is overwritten with that of the i-th rank.

    `gather_list` counts on `dst` only. Every other rank sends S.
    """
    ranks, me = members(group)
    root = place_of(dst, ranks)
    if me != root:
        return send(tensor, dst, group)
    _check_list("gather_list", gather_list, ranks)
    wait_all(irecv(slot, ranks[i], group) for i, slot in enumerate(gather_list) if i != me)
    gather_list[me].copy_(tensor)


@torch.no_grad()
def all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup | None = None
) -> None:
    """Every rank collects the tensors of all ranks: tensor_list[i] is overwritten with that of the i-th rank.

    Everybody sends to everybody: (n-1) S per rank. `ring_all_gather` sends as much, to one neighbour only.
    """
    ranks, me = members(group)
    _check_list("tensor_list", tensor_list, ranks)
    others = [i for i in range(len(ranks)) if i != me]
    receives = [irecv(tensor_list[i], ranks[i], group) for i in others]
    wait_all(receives + [isend(tensor, ranks[i], group) for i in others])
    tensor_list[me].copy_(tensor)


@torch.no_grad()
def reduce_scatter(
    output: torch.Tensor, input_list: list[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Rank i gets the sum of all ranks' input_list[i] in `output`; the inputs stay as they were.

    Everybody sends to everybody: n-1 of its n tensors per rank, as the ring does.
    """
    ranks, me = members(group)
    _check_list("input_list", input_list, ranks)
    others = [i for i in range(len(ranks)) if i != me]
    parts = [torch.empty_like(output) for _ in others]
    receives = [irecv(part, ranks[i], group) for part, i in zip(parts, others)]
    wait_all(receives + [isend(input_list[i], ranks[i], group) for i in others])
    output.copy_(input_list[me])
    for part in parts:
        output.add_(part)


# ----------------------------------------------------------------------------- all-reduce, four ways


@torch.no_grad()
def naive_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """The first rank of the group receives all tensors, adds them up, and sends the sum to all.

    It sends (n-1) S and receives as much; every other rank sends and receives S.
    """
    ranks, me = members(group)
    if me != 0:
        send(tensor, ranks[0], group)
        recv(tensor, ranks[0], group)
        return
    received = torch.empty_like(tensor)
    for other in ranks[1:]:
        recv(received, other, group)
        tensor.add_(received)
    wait_all(isend(tensor, other, group) for other in ranks[1:])


@torch.no_grad()
def tree_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Reduce to the first rank along a tree, then broadcast along the same tree.

    All ranks together send 2(n-1) S, the first of them ceil(lg n) S.
    """
    ranks, _ = members(group)
    reduce_(tensor, ranks[0], group)
    broadcast_(tensor, ranks[0], group)


@torch.no_grad()
def halving_doubling_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Rabenseifner's: reduce-scatter by halving the range at each step, all-gather by doubling it again.

    With p the largest power of two up to n, each of the first p ranks sends 2(p-1)/p S in 2 lg p messages. The
    n-p others send their tensor (S) to one of these first, and it sends them the sum (S) at the end.
    """
    ranks, me = members(group)
    p = 1 << (len(ranks).bit_length() - 1)
    if me >= p:
        send(tensor, ranks[me - p], group)
        recv(tensor, ranks[me - p], group)
        return
    if me + p < len(ranks):
        received = torch.empty_like(tensor)
        recv(received, ranks[me + p], group)
        tensor.add_(received)
    with flat_view(tensor) as flat:
        _halve_and_double(flat, ranks[:p], me, group)
    if me + p < len(ranks):
        send(tensor, ranks[me + p], group)


def _halve_and_double(flat: torch.Tensor, ranks: list[int], me: int, group) -> None:
    """At distance d, a rank holds the block of d chunks around its own and trades it with the rank d away."""
    edges = edges_of(len(flat), len(ranks))

    def block(place: int, size: int) -> torch.Tensor:
        first = place // size * size
        return flat[edges[first] : edges[first + size]]

    distances = [1 << i for i in range((len(ranks) - 1).bit_length())]
    for d in reversed(distances):
        mine, theirs, peer = block(me, d), block(me ^ d, d), ranks[me ^ d]
        received = torch.empty_like(mine)
        wait_all([irecv(received, peer, group), isend(theirs, peer, group)])
        mine.add_(received)
    for d in distances:
        mine, theirs, peer = block(me, d), block(me ^ d, d), ranks[me ^ d]
        wait_all([irecv(theirs, peer, group), isend(mine, peer, group)])


# ----------------------------------------------------------------------------- helpers


def _tree(n: int, root: int) -> list[tuple[int, int]]:
    """(parent, child) of a binomial tree, from the root down; places are counted on from the root.

    The root first reaches the place 2^i away, with 2^i the largest power of two below n. Then both reach half as
    far, and so on; pairs that would end beyond the last place are left out, so n need not be a power of two.
    """
    distances = [1 << i for i in reversed(range((n - 1).bit_length()))]
    pairs = [(low, low + d) for d in distances for low in range(0, n - d, 2 * d)]
    return [((parent + root) % n, (child + root) % n) for parent, child in pairs]


def _check_list(name: str, tensors: list[torch.Tensor] | None, ranks: list[int]) -> None:
    if tensors is None or len(tensors) != len(ranks):
        got = "none" if tensors is None else len(tensors)
        raise ValueError(f"{name} needs one tensor for each of the {len(ranks)} ranks, got {got}")
