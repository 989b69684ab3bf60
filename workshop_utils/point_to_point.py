"""Send and receive between ranks: counted, and slowed down to a given link if asked. Notebook 02 teaches it.

`send`, `recv`, `isend` and `irecv` are torch.distributed's, with the same arguments: `dst` and `src` are ranks of
the default group, also where `group` names a subgroup. Tensors may have any shape, and need not be contiguous.
Messages between two ranks with the same group and tag arrive in the order in which they were sent.

A send is finished when its receiver has posted the matching receive and the bytes have left, as in gloo: two
ranks that both call `send` first wait for each other for ever.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from workshop_utils.connections import connection_bytes
from workshop_utils.network import Link
from workshop_utils.network_card import NetworkCard, open_mailboxes

FASTEST_EMULATED_BYTES_PER_S = (
    250e6  # 2 Gb/s. One rank's share of the loopback is about 1 GB/s, less when all send.
)


@dataclass
class Traffic:
    """What this rank has sent and received through this module, in payload bytes."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0


class Transfer:
    """A message under way. `wait()` returns when it is done; after a receive, the tensor then holds the message."""

    __slots__ = ("_after", "_work")

    def __init__(self, work: dist.Work, after: Callable[[], None] | None = None):
        self._work, self._after = work, after

    def wait(self) -> None:
        """Wait for the message. A second call returns at once."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()
            if self._after is not None:
                self._after()


def send(tensor: torch.Tensor, dst: int, group: dist.ProcessGroup | None = None, tag: int = 0) -> None:
    """Send `tensor` to rank `dst` and wait until it has left."""
    isend(tensor, dst, group, tag).wait()


def recv(tensor: torch.Tensor, src: int, group: dist.ProcessGroup | None = None, tag: int = 0) -> None:
    """Overwrite `tensor` with the next message from rank `src`. Both sides must agree on the number of bytes."""
    irecv(tensor, src, group, tag).wait()


def isend(tensor: torch.Tensor, dst: int, group: dist.ProcessGroup | None = None, tag: int = 0) -> Transfer:
    """Start to send. Leave `tensor` as it is until `wait()` has returned."""
    group = group or dist.group.WORLD
    return start_send(tensor, _place(dst, group), group, tag)


def irecv(tensor: torch.Tensor, src: int, group: dist.ProcessGroup | None = None, tag: int = 0) -> Transfer:
    """Start to receive. `tensor` holds the message once `wait()` has returned."""
    group = group or dist.group.WORLD
    return start_recv(tensor, _place(src, group), group, tag)


def _place(peer: int, group: dist.ProcessGroup) -> int:
    """Where rank `peer` stands in the group. gloo of torch 2.11 crashes on a rank that is not there."""
    if group is dist.group.WORLD and not 0 <= peer < dist.get_world_size():
        raise ValueError(f"there is no rank {peer}: the ranks are 0 to {dist.get_world_size() - 1}")
    return dist.get_group_rank(group, peer)


def start_send(tensor: torch.Tensor, place: int, group: dist.ProcessGroup, tag: int) -> Transfer:
    """`isend` to the rank at this place in the group. For ring.py: every Python call between messages costs it."""
    if _card is None and not _counting and tensor.is_contiguous():
        return Transfer(group.send([tensor], place, tag))
    tensor = tensor.contiguous()
    until_sent = _card.send(tensor.nbytes, *_line(group, place, tag)) if _card is not None else None
    work = group.send([tensor], place, tag)
    for traffic in _counting:
        traffic.bytes_sent += tensor.nbytes
        traffic.messages_sent += 1
    return Transfer(work, until_sent)


def start_recv(tensor: torch.Tensor, place: int, group: dist.ProcessGroup, tag: int) -> Transfer:
    """`irecv` from the rank at this place in the group."""
    if _card is None and not _counting and tensor.is_contiguous():
        return Transfer(group.recv([tensor], place, tag))
    buffer = (
        tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    )
    work = group.recv([buffer], place, tag)
    until_delivered = _card.receive(*_line(group, place, tag)) if _card is not None else None

    def after() -> None:
        if until_delivered is not None:
            until_delivered()
        for traffic in _counting:
            traffic.bytes_received += buffer.nbytes
        if buffer is not tensor:
            tensor.detach().copy_(buffer)

    return Transfer(work, after)


# ----------------------------------------------------------------------------- counting

_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends and receives inside the block, in payload bytes.

    A message counts as sent when its send starts, and as received when its receive has been waited for.
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting[:] = [t for t in _counting if t is not traffic]


@dataclass
class WireBytes:
    """Bytes that this rank's connections carried, gloo's own headers included. Set when the block ends."""

    bytes_sent: int | None = None
    bytes_received: int | None = None


@contextmanager
def wire_bytes() -> Iterator[WireBytes]:
    """Count what this rank's TCP connections carry inside the block, torch's own collectives included.

    The kernel counts, per connection, so other processes do not disturb it. Every message costs gloo some headers
    on top of the payload, 50 to 150 bytes. Linux only: elsewhere RuntimeError, `count_traffic()` works everywhere.
    """
    before = connection_bytes()
    if before is None:
        raise RuntimeError(
            "wire_bytes() cannot know: only Linux says what each connection carried. "
            "count_traffic() counts our own sends and receives on every system."
        )
    counted = WireBytes()
    yield counted
    after = connection_bytes()
    counted.bytes_sent, counted.bytes_received = (
        sum(total[i] - before.get(key, (0, 0))[i] for key, total in after.items()) for i in (0, 1)
    )


def gloo_bytes_sent() -> int | None:
    """Bytes sent so far by the TCP connections that this process holds now; None where the system does not tell."""
    connections = connection_bytes()
    return None if connections is None else sum(sent for sent, _ in connections.values())


# ----------------------------------------------------------------------------- a slower link

_card: NetworkCard | None = None


@contextmanager
def emulate_link(link: Link) -> Iterator[None]:
    """Inside: every rank has a network card of its own, and our sends and receives take as long as on `link`.

    The card is full duplex. Messages that leave queue for the sender's card, messages that arrive queue for the
    receiver's, first come first served, and each passes at the link's bandwidth: three senders to one receiver
    take three times one sender, both directions at once take one. A message costs a card time for its payload; its
    latency passes meanwhile. The network between the cards is never full. torch's own collectives are not slowed.

    Every rank of the default group enters together, and what is sent inside is received inside. All ranks must be
    on one machine: they share its clock. From 0.1 to 2 Gb/s; raises ValueError for a faster link.
    """
    global _card
    if link.bandwidth_bytes_per_s > FASTEST_EMULATED_BYTES_PER_S:
        raise ValueError(
            f"cannot emulate {link.bandwidth_bytes_per_s * 8e-9:g} Gb/s: this machine's loopback is hardly faster. "
            "Emulate 2 Gb/s (250e6 bytes/s) or less; for faster links predict with the formulas in network.py."
        )
    outer, _card = _card, NetworkCard(link, *open_mailboxes())
    try:
        yield
    finally:
        _card.close()
        _card = outer


def _line(group: dist.ProcessGroup, place: int, tag: int) -> tuple[int, int]:
    """The other rank, and a number that both sides give to what is matched in order: one group and tag."""
    return dist.get_global_rank(group, place), zlib.crc32(f"{group.group_name}/{tag}".encode())
