"""Collectives from sends and receives, and all-reduce four ways. Notebook 02 teaches it; 03 and 04 use it.

Everything here runs inside a rank, and takes `group=None`, the default group. `src` and `dst` are ranks of the
default group, as in torch. Tensors may have any shape (none, empty, not contiguous) and any dtype that can be
added; the world may have any size from 1. Every rank of the group must call, with the same shape and dtype.
The operation is the sum: `torch.add` is named in three places, which is where another one would go.

    n       ranks in the group             S       bytes of one rank's tensor
    me      this rank's place in it        chunk   the tensor's elements cut into n parts, equal to within one element

All ranks end with the same bits. Docstrings say how many bytes a rank sends, tests assert it; network.py has the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist

from workshop_utils.point_to_point import irecv, isend, recv, send

# A chunk travels in messages of at most this size. A message wakes threads on both sides, which costs as much as
# copying some 100 KB: so few and large ones, yet several per chunk where chunks are large, to add one while the
# next arrives.
SEGMENT_BYTES = 4 * 2**20


# ----------------------------------------------------------------------------- the primitives


@torch.no_grad()
def broadcast_(tensor: torch.Tensor, src: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite `tensor` on every rank with that of rank `src`, along a binomial tree of depth ceil(lg n).

    A rank sends S to each of its children in the tree, (n-1) S in all.
    """
    ranks, me = _members(group)
    for parent, child in _tree(len(ranks), root=_place(ranks, src)):
        if me == parent:
            send(tensor, ranks[child], group)
        elif me == child:
            recv(tensor, ranks[parent], group)


@torch.no_grad()
def reduce_(tensor: torch.Tensor, dst: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """Add all ranks' tensors up into that of rank `dst`; the other ranks' tensors stay as they were.

    The tree of the broadcast, backwards: every rank but `dst` sends S once.
    """
    ranks, me = _members(group)
    root = _place(ranks, dst)
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
    ranks, me = _members(group)
    root = _place(ranks, src)
    if me != root:
        return recv(tensor, src, group)
    _check_list("scatter_list", scatter_list, ranks)
    _wait_all(isend(part, ranks[i], group) for i, part in enumerate(scatter_list) if i != me)
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
    ranks, me = _members(group)
    root = _place(ranks, dst)
    if me != root:
        return send(tensor, dst, group)
    _check_list("gather_list", gather_list, ranks)
    _wait_all(irecv(slot, ranks[i], group) for i, slot in enumerate(gather_list) if i != me)
    gather_list[me].copy_(tensor)


@torch.no_grad()
def all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup | None = None
) -> None:
    """Every rank collects the tensors of all ranks: tensor_list[i] is overwritten with that of the i-th rank.

    Everybody sends to everybody: (n-1) S per rank. `ring_all_gather` sends as much, to one neighbour only.
    """
    ranks, me = _members(group)
    _check_list("tensor_list", tensor_list, ranks)
    others = [i for i in range(len(ranks)) if i != me]
    receives = [irecv(tensor_list[i], ranks[i], group) for i in others]
    _wait_all(receives + [isend(tensor, ranks[i], group) for i in others])
    tensor_list[me].copy_(tensor)


@torch.no_grad()
def reduce_scatter(
    output: torch.Tensor, input_list: list[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Rank i gets the sum of all ranks' input_list[i] in `output`; the inputs stay as they were.

    Everybody sends to everybody: n-1 of its n tensors per rank, as the ring does.
    """
    ranks, me = _members(group)
    _check_list("input_list", input_list, ranks)
    others = [i for i in range(len(ranks)) if i != me]
    parts = [torch.empty_like(output) for _ in others]
    receives = [irecv(part, ranks[i], group) for part, i in zip(parts, others)]
    _wait_all(receives + [isend(input_list[i], ranks[i], group) for i in others])
    output.copy_(input_list[me])
    for part in parts:
        output.add_(part)


# ----------------------------------------------------------------------------- all-reduce, four ways


@torch.no_grad()
def naive_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """The first rank of the group receives all tensors, adds them up, and sends the sum to all.

    It sends (n-1) S and receives as much; every other rank sends and receives S.
    """
    ranks, me = _members(group)
    if me != 0:
        send(tensor, ranks[0], group)
        recv(tensor, ranks[0], group)
        return
    received = torch.empty_like(tensor)
    for other in ranks[1:]:
        recv(received, other, group)
        tensor.add_(received)
    _wait_all(isend(tensor, other, group) for other in ranks[1:])


@torch.no_grad()
def tree_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Reduce to the first rank along a tree, then broadcast along the same tree.

    All ranks together send 2(n-1) S, the first of them ceil(lg n) S.
    """
    ranks, _ = _members(group)
    reduce_(tensor, ranks[0], group)
    broadcast_(tensor, ranks[0], group)


@torch.no_grad()
def ring_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Reduce-scatter around the ring, then all-gather around the ring.

    A rank sends 2(n-1)/n S, the least that is possible, to one neighbour. If n does not divide the number of
    elements, chunks differ by one element; nothing is padded.
    """
    ranks, me = _members(group)
    if len(ranks) == 1:
        return
    with _flat(tensor) as flat:
        chunks = _chunks(flat, len(ranks))
        _pass_sums_on(chunks, chunks[me], ranks, me, group)
        _pass_chunks_on(chunks, ranks, me, group)


@torch.no_grad()
def halving_doubling_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Rabenseifner's: reduce-scatter by halving the range at each step, all-gather by doubling it again.

    With p the largest power of two up to n, each of the first p ranks sends 2(p-1)/p S in 2 lg p messages. The
    n-p others send their tensor (S) to one of these first, and it sends them the sum (S) at the end.
    """
    ranks, me = _members(group)
    p = 1 << (len(ranks).bit_length() - 1)
    if me >= p:
        send(tensor, ranks[me - p], group)
        recv(tensor, ranks[me - p], group)
        return
    if me + p < len(ranks):
        received = torch.empty_like(tensor)
        recv(received, ranks[me + p], group)
        tensor.add_(received)
    with _flat(tensor) as flat:
        _halve_and_double(flat, ranks[:p], me, group)
    if me + p < len(ranks):
        send(tensor, ranks[me + p], group)


def _halve_and_double(flat: torch.Tensor, ranks: list[int], me: int, group) -> None:
    """At distance d, a rank holds the block of d chunks around its own and trades it with the rank d away."""
    edges = _edges(len(flat), len(ranks))

    def block(place: int, size: int) -> torch.Tensor:
        first = place // size * size
        return flat[edges[first] : edges[first + size]]

    distances = [1 << i for i in range((len(ranks) - 1).bit_length())]
    for d in reversed(distances):
        mine, theirs, peer = block(me, d), block(me ^ d, d), ranks[me ^ d]
        received = torch.empty_like(mine)
        _wait_all([irecv(received, peer, group), isend(theirs, peer, group)])
        mine.add_(received)
    for d in distances:
        mine, theirs, peer = block(me, d), block(me ^ d, d), ranks[me ^ d]
        _wait_all([irecv(theirs, peer, group), isend(mine, peer, group)])


# ----------------------------------------------------------------------------- around the ring


@torch.no_grad()
def ring_reduce_scatter(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup | None = None
) -> None:
    """The i-th rank gets the sum of all ranks' i-th n-th of `input`, flattened, in `output`. `input` stays as it was.

    output: n times fewer elements than input, any shape. A rank sends (n-1)/n of the input's bytes.
    """
    ranks, me = _members(group)
    _check_ratio("input", input, "output", output, len(ranks))
    with _flat(output) as total:
        chunks = _chunks(input.contiguous().view(-1), len(ranks))
        if len(ranks) == 1:
            total.copy_(chunks[0])
        else:
            _pass_sums_on(chunks, total, ranks, me, group)


@torch.no_grad()
def ring_all_gather(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup | None = None
) -> None:
    """Every rank gets the inputs of all ranks, one after another, in `output`.

    output: n times as many elements as input, any shape. A rank sends (n-1)/n of the output's bytes.
    """
    ranks, me = _members(group)
    _check_ratio("output", output, "input", input, len(ranks))
    with _flat(output) as flat:
        chunks = _chunks(flat, len(ranks))
        chunks[me].copy_(input.reshape(-1))
        _pass_chunks_on(chunks, ranks, me, group)


def _pass_sums_on(chunks: list[torch.Tensor], total: torch.Tensor, ranks: list[int], me: int, group) -> None:
    """Ring reduce-scatter: `total` becomes the sum of all ranks' chunks[me]; `total` may be chunks[me] itself.

    In step k, a rank sends the chunk me-1-k to its right, with all that was added to it on the way, and gets the
    chunk me-2-k from its left. After n-1 steps its own chunk arrives, with the numbers of all others in it.

    A chunk travels in segments. What arrives lands in a box, is added to there, and leaves from there. There are
    two boxes more than segments in a chunk: with fewer, all ranks could wait for each other to empty one.
    """
    n = len(ranks)
    left, right = ranks[(me - 1) % n], ranks[(me + 1) % n]
    first = [isend(part, right, group) for part in _segments(chunks[(me - 1) % n])]
    parts = [part for k in range(n - 2) for part in _segments(chunks[(me - 2 - k) % n])]
    num_passed_on = len(parts)
    sums = _segments(total)
    parts += _segments(chunks[me])
    num_boxes = 2 + max(len(_segments(chunk)) for chunk in chunks)
    boxes = torch.empty(num_boxes, max(map(len, parts), default=0), dtype=total.dtype, device=total.device)

    def receive(i: int):
        return irecv(boxes[i % num_boxes, : len(parts[i])], left, group) if i < len(parts) else None

    incoming, passed_on = receive(0), []
    for i, part in enumerate(parts):
        incoming.wait()
        if i + 1 >= num_boxes:
            passed_on[i + 1 - num_boxes].wait()
        incoming = receive(i + 1)
        box = boxes[i % num_boxes, : len(part)]
        if i < num_passed_on:
            passed_on.append(isend(box.add_(part), right, group))
        else:
            torch.add(box, part, out=sums[i - num_passed_on])
    _wait_all(first + passed_on)


def _pass_chunks_on(chunks: list[torch.Tensor], ranks: list[int], me: int, group) -> None:
    """Ring all-gather: chunks[me] of every rank reaches all others.

    In step k, a rank sends the chunk me-k to its right and gets the chunk me-1-k from its left.
    """
    n = len(ranks)
    left, right = ranks[(me - 1) % n], ranks[(me + 1) % n]
    parts = [part for k in range(n - 1) for part in _segments(chunks[(me - 1 - k) % n])]
    num_passed_on = len(parts) - len(_segments(chunks[(me + 1) % n]))
    receives = [irecv(part, left, group) for part in parts]
    sends = [isend(part, right, group) for part in _segments(chunks[me])] if n > 1 else []
    for i, receive in enumerate(receives):
        receive.wait()
        if i < num_passed_on:
            sends.append(isend(parts[i], right, group))
    _wait_all(sends)


# ----------------------------------------------------------------------------- helpers


def _members(group: dist.ProcessGroup | None) -> tuple[list[int], int]:
    """The group's ranks, as ranks of the default group, and this rank's place among them."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    me = dist.get_rank(group)
    if me < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in this group of ranks {ranks}")
    return ranks, me


def _place(ranks: list[int], rank: int) -> int:
    if rank not in ranks:
        raise ValueError(f"rank {rank} is not in this group of ranks {ranks}")
    return ranks.index(rank)


def _tree(n: int, root: int) -> list[tuple[int, int]]:
    """(parent, child) of a binomial tree, from the root down. Places are counted from the root, around the group.

    The root first reaches half way round, then each of the two reaches half of its half, and so on.
    """
    distances = [1 << i for i in reversed(range((n - 1).bit_length()))]
    pairs = [(low, low + d) for d in distances for low in range(0, n - d, 2 * d)]
    return [((parent + root) % n, (child + root) % n) for parent, child in pairs]


@contextmanager
def _flat(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in one dimension, contiguous; what is written there is in the tensor afterwards."""
    tensor = tensor.detach()
    flat = tensor.contiguous().view(-1)
    yield flat
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def _chunks(flat: torch.Tensor, n: int) -> list[torch.Tensor]:
    """n parts, in order, equal to within one element; some are empty if there are fewer elements than n."""
    return [flat[low:high] for low, high in pairwise(_edges(len(flat), n))]


def _edges(num_elements: int, n: int) -> list[int]:
    """Where n chunks begin, and where the last one ends."""
    return [num_elements * i // n for i in range(n + 1)]


def _segments(chunk: torch.Tensor) -> list[torch.Tensor]:
    """Parts of at most SEGMENT_BYTES; none if the chunk is empty."""
    return list(chunk.split(max(1, SEGMENT_BYTES // chunk.element_size()))) if len(chunk) else []


def _wait_all(transfers) -> None:
    for transfer in list(transfers):
        transfer.wait()


def _check_list(name: str, tensors: list[torch.Tensor] | None, ranks: list[int]) -> None:
    if tensors is None or len(tensors) != len(ranks):
        got = "none" if tensors is None else len(tensors)
        raise ValueError(f"{name} needs one tensor for each of the {len(ranks)} ranks, got {got}")


def _check_ratio(long_name: str, long: torch.Tensor, short_name: str, short: torch.Tensor, n: int) -> None:
    if long.numel() != n * short.numel() or long.dtype != short.dtype:
        raise ValueError(
            f"{long_name} must have {n} times as many elements as {short_name}, one part for each rank, and its "
            f"dtype: got {long.numel()} ({long.dtype}) and {short.numel()} ({short.dtype})"
        )
