"""One network card per rank, emulated: what `emulate_link` in point_to_point.py stands on. Notebook 02 uses it.

A card is full duplex: it has a queue of messages that leave and a queue of messages that arrive, and each message
occupies the card for its bytes / bandwidth. The queues are lists of moments, not of data: the data goes through
gloo at once, and sends and receives sleep until the moment at which the link would have been done.

Ranks of one machine share a clock (CLOCK_MONOTONIC), so a sender can say when its message arrives.
"""

import os
import struct
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from workshop_utils.network import Link


class NetworkCard:
    """This rank's card. Each message is announced in the receiver's mailbox, a file, before it is sent.

    An announcement says when the first byte arrives. Once that moment has passed on the receiver, all earlier
    announcements are in the mailbox, so the queue at the receiver's card is known, in whatever order the
    receiver waits for the messages.
    """

    def __init__(self, link: Link, inbox: int, outboxes: list[int]):
        self.link, self.inbox, self.outboxes = link, inbox, outboxes
        self.egress_free_s = self.ingress_free_s = 0.0
        # A channel's messages are matched in order, so a receive's number says which announcement is its own.
        self.posted: Counter[tuple[int, int]] = Counter()  # (source, channel): receives started
        self.announced: dict[tuple[int, int], list[_Message]] = defaultdict(list)
        self.queue: list[_Message] = []  # announced, not yet through the card

    def send(self, num_bytes: int, dst: int, channel: int) -> Callable[[], None]:
        """Put a message into the outgoing queue; the function returned sleeps until it has left the card."""
        start_s = max(time.monotonic(), self.egress_free_s)
        end_s = self.egress_free_s = start_s + num_bytes / self.link.bandwidth_bytes_per_s
        fields = (dist.get_rank(), channel, start_s + self.link.latency_s, num_bytes)
        os.write(self.outboxes[dst], _ANNOUNCEMENT.pack(*fields))
        return lambda: _sleep_until(end_s)

    def receive(self, src: int, channel: int) -> Callable[[], None]:
        """Expect the next message of `src`; the function returned sleeps until all of it is through the card."""
        key = (src, channel)
        number = self.posted[key]
        self.posted[key] += 1
        return lambda: self._deliver(key, number)

    def _deliver(self, key: tuple[int, int], number: int) -> None:
        self._read_inbox()
        if number >= len(self.announced[key]):
            raise RuntimeError(
                f"rank {key[0]} sent this message outside emulate_link (enter it on both sides), or with "
                "torch.distributed's own send (use send or isend of workshop_utils.point_to_point)"
            )
        message = self.announced[key][number]
        _sleep_until(message.arrives_s)
        self._read_inbox()
        self.queue.sort(key=lambda m: m.arrives_s)
        while message.delivered_s is None:
            first = self.queue.pop(0)
            begin_s = max(first.arrives_s, self.ingress_free_s)
            first.delivered_s = begin_s + first.num_bytes / self.link.bandwidth_bytes_per_s
            self.ingress_free_s = first.delivered_s
        _sleep_until(message.delivered_s)

    def _read_inbox(self) -> None:
        while record := os.read(self.inbox, _ANNOUNCEMENT.size):
            src, channel, arrives_s, num_bytes = _ANNOUNCEMENT.unpack(record)
            message = _Message(arrives_s, num_bytes)
            self.announced[src, channel].append(message)
            self.queue.append(message)

    def close(self) -> None:
        for mailbox in (self.inbox, *self.outboxes):
            os.close(mailbox)


@dataclass
class _Message:
    arrives_s: float  # when the first byte is at the receiver's card
    num_bytes: int
    delivered_s: float | None = None  # when the last byte is through it


_ANNOUNCEMENT = struct.Struct("<qQdq")  # 32 bytes: never across two pages of a file, so never half written
_CONTROL = 2**31 - 1  # a tag of its own: what the reader has sent and not yet received stays where it is


def open_mailboxes() -> tuple[int, list[int]]:
    """This rank's mailbox to read, and all ranks' to write to: files in a private folder of rank 0.

    The folder is removed as soon as all ranks hold the files open, or if that fails.
    """
    rank, others = dist.get_rank(), range(1, dist.get_world_size())
    path, ready = torch.zeros(1024, dtype=torch.uint8), torch.zeros(1)
    if rank != 0:
        dist.recv(path, 0, tag=_CONTROL)
        mailboxes = _open_in(os.fsdecode(bytes(path.tolist()).rstrip(b"\0")))
        dist.send(ready, 0, tag=_CONTROL)
        return mailboxes
    with tempfile.TemporaryDirectory(prefix="mailboxes-") as folder:
        for r in (0, *others):
            Path(folder, str(r)).touch()
        path[: len(os.fsencode(folder))] = torch.tensor(list(os.fsencode(folder)), dtype=torch.uint8)
        for r in others:
            dist.send(path, r, tag=_CONTROL)
        mailboxes = _open_in(folder)
        for r in others:
            dist.recv(ready, r, tag=_CONTROL)
    return mailboxes


def _open_in(folder: str) -> tuple[int, list[int]]:
    inbox = os.open(Path(folder, str(dist.get_rank())), os.O_RDONLY)
    return inbox, [
        os.open(Path(folder, str(r)), os.O_WRONLY | os.O_APPEND) for r in range(dist.get_world_size())
    ]


def _sleep_until(moment_s: float) -> None:
    while (left_s := moment_s - time.monotonic()) > 0:
        time.sleep(left_s)
