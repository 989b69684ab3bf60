"""The ring: reduce-scatter, all-gather, and the all-reduce they make together. Notebooks 02 and 04 teach it.

Every rank sends to its right neighbour only, (n-1)/n of the bytes in each of the two halves.

    n       ranks in the group           chunk    n-th part of the elements, equal to within one element
    me      this rank's place in it      segment  what travels as one message: a chunk, or a part of a large one

Three things make it fast. A receive is started long before its message comes, so that the message goes straight to
its place; without that, sender and receiver first exchange two notices. Messages are few and large: each wakes a
thread on both sides, which costs as much as copying some 100 KB. And the memory that sums arrive in is kept: new
memory costs a page fault for every 4 KiB.
"""

import threading

import torch
import torch.distributed as dist

from workshop_utils.pieces import chunks_of, flat_view, members, segments_of, wait_all
from workshop_utils.point_to_point import Transfer, start_recv, start_send

SEGMENT_BYTES = 4 * 2**20
BOXES_BYTES = (
    8 * 2**20
)  # where sums arrive: room for two of the largest segments, or for all of a smaller tensor's
_SUMS, _GATHER = 0, 1  # tags: receives of the second half are started while the first is still under way
_TAGS = 2  # per channel: what one channel sends, another never receives
_kept = threading.local()  # .memory


@torch.no_grad()
def ring_all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Reduce-scatter around the ring, then all-gather around the ring.

    A rank sends 2(n-1)/n S, the least that is possible, to one neighbour. If n does not divide the number of
    elements, chunks differ by one element; nothing is padded.
    """
    ring = _Ring(group)
    if ring.n == 1:
        return
    with flat_view(tensor) as flat:
        chunks = ring.cut(flat)
        receives = ring.start_gather(chunks)
        sends = ring.pass_sums_on(chunks, chunks)
        wait_all(sends + ring.pass_chunks_on(chunks, receives))


@torch.no_grad()
def ring_reduce_scatter(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup | None = None, channel: int = 0
) -> None:
    """The i-th rank gets the sum of all ranks' i-th part of `input` in `output`; `input` stays as it was.

    input: n times as many elements as output, cut into n equal parts in memory order; any shapes. A rank sends
    (n-1)/n of the input's bytes. Ranks that call with different `channel`s wait for each other, and mix up nothing.
    """
    ring = _Ring(group, channel)
    _check_sizes("input", input, "output", output, ring.n)
    if ring.n == 1:
        output.copy_(input.reshape(output.shape))
        return
    with flat_view(output) as total:
        chunks = ring.cut(input.contiguous().view(-1))
        sums = [[torch.empty_like(segment) for segment in chunk] for chunk in chunks]
        sums[ring.me] = segments_of(total, SEGMENT_BYTES)
        wait_all(ring.pass_sums_on(chunks, sums))


@torch.no_grad()
def ring_all_gather(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup | None = None, channel: int = 0
) -> None:
    """Every rank gets the inputs of all ranks, one after another, in `output`.

    output: n times as many elements as input; any shapes. A rank sends (n-1)/n of the output's bytes. Ranks that
    call with different `channel`s wait for each other, and mix up nothing.
    """
    ring = _Ring(group, channel)
    _check_sizes("output", output, "input", input, ring.n)
    with flat_view(output) as flat:
        chunks = ring.cut(flat)
        receives = ring.start_gather(chunks)
        flat.view(ring.n, input.numel())[ring.me].copy_(input.reshape(-1))
        wait_all(ring.pass_chunks_on(chunks, receives))


Segments = list[torch.Tensor]  # of one chunk


class _Ring:
    """This rank, its neighbours, and the two halves of a ring all-reduce."""

    def __init__(self, group: dist.ProcessGroup | None, channel: int = 0):
        ranks, self.me = members(group)
        self.sum_tag, self.gather_tag = _TAGS * channel + _SUMS, _TAGS * channel + _GATHER
        self.n, self.group = len(ranks), group or dist.group.WORLD
        self.left, self.right = (self.me - 1) % self.n, (self.me + 1) % self.n

    def cut(self, flat: torch.Tensor) -> list[Segments]:
        """n chunks, each of them a list of its segments."""
        return [segments_of(chunk, SEGMENT_BYTES) for chunk in chunks_of(flat, self.n)]

    def pass_sums_on(self, chunks: list[Segments], sums: list[Segments]) -> list[Transfer]:
        """Reduce-scatter: sums[me] becomes the sum of all ranks' chunks[me]. Returns the sends, to wait for.

        In step k a rank sends chunk me-1-k to the right, with all that was added to it on the way, and gets chunk
        me-2-k from the left. So its own chunk comes last, with all other ranks' numbers in it. sums[i] is where
        the sum so far of chunk i stays until it has left: chunks[i] itself, or scratch memory.
        """
        arriving = self._backwards(chunks, first=self.me - 2)
        totals = self._backwards(sums, first=self.me - 2)
        num_boxes, boxes = _boxes_for(arriving)
        num_passed_on = len(arriving) - len(chunks[self.me])
        receives = [start_recv(box, self.left, self.group, self.sum_tag) for box in boxes[:num_boxes]]
        sends = [start_send(segment, self.right, self.group, self.sum_tag) for segment in chunks[self.me - 1]]
        for i, (segment, total, box) in enumerate(zip(arriving, totals, boxes)):
            receives[i].wait()
            torch.add(box, segment, out=total)
            if i + num_boxes < len(boxes):
                receives.append(start_recv(boxes[i + num_boxes], self.left, self.group, self.sum_tag))
            if i < num_passed_on:
                sends.append(start_send(total, self.right, self.group, self.sum_tag))
        return sends

    def start_gather(self, chunks: list[Segments]) -> list[Transfer]:
        """Start all receives of the all-gather.

        They may point at numbers that are still needed: nothing arrives in chunk i before rank i has all of its
        sum, hence this rank's numbers too.
        """
        return [
            start_recv(s, self.left, self.group, self.gather_tag)
            for s in self._backwards(chunks, first=self.me - 1)
        ]

    def pass_chunks_on(self, chunks: list[Segments], receives: list[Transfer]) -> list[Transfer]:
        """All-gather: chunks[i] of rank i reaches all others. Returns the sends, to wait for.

        In step k a rank sends chunk me-k to the right and gets chunk me-1-k from the left, to send it on, except
        in the last step.
        """
        leaving = self._backwards(chunks, first=self.me)
        num_mine = len(chunks[self.me])
        sends = [
            start_send(segment, self.right, self.group, self.gather_tag) for segment in leaving[:num_mine]
        ]
        for i, receive in enumerate(receives, start=num_mine):
            receive.wait()
            if i < len(leaving):
                sends.append(start_send(leaving[i], self.right, self.group, self.gather_tag))
        return sends

    def _backwards(self, chunks: list[Segments], first: int) -> list[torch.Tensor]:
        """The segments of n-1 chunks: of chunk `first`, of the one before it, and so on."""
        return [segment for k in range(self.n - 1) for segment in chunks[(first - k) % self.n]]


def _boxes_for(arriving: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
    """How many boxes there are, and in which of them each segment arrives, to be added. They are used in turn."""
    if not arriving:
        return 0, []
    size = (max(segment.nbytes for segment in arriving) + 63) // 64 * 64  # each box begins a cache line
    count = max(2, BOXES_BYTES // size)
    if getattr(_kept, "memory", None) is None or _kept.memory.nbytes < count * size:
        _kept.memory = torch.empty(max(BOXES_BYTES, count * size), dtype=torch.uint8)
    starts = [i % count * size for i in range(len(arriving))]
    boxes = [_kept.memory[start : start + s.nbytes].view(s.dtype) for start, s in zip(starts, arriving)]
    return count, boxes


def _check_sizes(long_name: str, long: torch.Tensor, short_name: str, short: torch.Tensor, n: int) -> None:
    if long.numel() != n * short.numel() or long.dtype != short.dtype:
        raise ValueError(
            f"{long_name} must have {n} times as many elements as {short_name}, one part for each rank, and the "
            f"same dtype: got {long.numel()} ({long.dtype}) and {short.numel()} ({short.dtype})"
        )
