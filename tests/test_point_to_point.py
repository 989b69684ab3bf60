"""Sends and receives on real ranks: counted exactly, and as slow as the emulated link says.

Functions without `test_` in their name run inside the ranks. A busy machine can only make things slower, so an
upper bound on a time is tried up to five times, and a lower bound must hold each time.
"""

import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from workshop_utils import RankError, collectives, point_to_point, sub_world
from workshop_utils.network import ALL_REDUCE_S, Link
from workshop_utils.point_to_point import (
    Traffic,
    count_traffic,
    emulate_link,
    gloo_bytes_sent,
    irecv,
    isend,
    recv,
    send,
    wire_bytes,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts bytes per connection")

MB = 1_000_000
LINK = Link(2e-3, 10e6)  # 1 MB takes 102 ms


# ----------------------------------------------------------------------------- plain sends and receives


def all_kinds_of_tensors() -> None:
    me = dist.get_rank()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        for shape in [(), (0,), (1,), (3, 4)]:
            if me == 0:
                send(torch.ones(shape, dtype=dtype), 1)
            elif me == 1:
                tensor = torch.zeros(shape, dtype=dtype)
                recv(tensor, 0)
                assert torch.equal(tensor, torch.ones(shape, dtype=dtype))
    board = torch.arange(24.0).view(4, 6)
    if me == 0:
        for view in (board.t(), board[:, 2], board[1:3, ::2]):
            send(view, 1)
        send(torch.nn.Parameter(board), 1)
    elif me == 1:
        for view in (lambda x: x.t(), lambda x: x[:, 2], lambda x: x[1:3, ::2]):
            got, expected = torch.zeros(4, 6), torch.zeros(4, 6)
            recv(view(got), 0)
            view(expected).copy_(view(board))
            assert torch.equal(got, expected)
        parameter = torch.nn.Parameter(torch.zeros(4, 6))
        recv(parameter, 0)
        assert torch.equal(parameter.detach(), board) and parameter.requires_grad


def messages_in_order() -> None:
    """Same tag: in the order of the sends. Another tag: a line of its own. Waits in any order, twice is fine."""
    me = dist.get_rank()
    if me == 0:
        sends = [isend(torch.tensor([i]), 1, tag=i // 3) for i in range(6)]
        for transfer in sends[::-1]:
            transfer.wait()
    elif me == 1:
        slots = {i: torch.tensor([-1]) for i in (3, 0, 4, 1, 5, 2)}
        receives = [irecv(slot, 0, tag=i // 3) for i, slot in slots.items()]
        for transfer in receives[::-1] + receives:
            transfer.wait()
        assert all(slot.item() == i for i, slot in slots.items()), slots


def to_a_rank_of_a_subgroup() -> float:
    group = dist.new_group([1, 3, 4])
    tensor = torch.zeros(1)
    if dist.get_rank() == 4:
        send(torch.tensor([7.0]), 3, group)
    elif dist.get_rank() == 3:
        recv(tensor, 4, group)
    dist.barrier()
    return tensor.item()


def test_any_shape_dtype_and_view(ranks5):
    ranks5.run(all_kinds_of_tensors)


def test_messages_arrive_in_order(ranks5):
    ranks5.run(messages_in_order)


def test_destinations_are_ranks_of_the_default_group(ranks5):
    assert ranks5.run(to_a_rank_of_a_subgroup) == [0, 0, 0, 7, 0]


# ----------------------------------------------------------------------------- counting


def count_here_and_there() -> list[Traffic]:
    me, other = dist.get_rank(), 1 - dist.get_rank()
    if me > 1:
        return []
    uncounted, tensor = torch.ones(100), torch.zeros(7, dtype=torch.float64)
    with count_traffic() as whole:
        transfers = irecv(tensor, other), isend(tensor.clone(), other)
        with count_traffic() as part:
            for transfer in transfers:
                transfer.wait()
                transfer.wait()
            if me == 0:
                send(torch.ones(3, 4, dtype=torch.bfloat16)[:, 1:3], 1)
                send(torch.ones(0), 1)
            else:
                recv(torch.ones(3, 2, dtype=torch.bfloat16), 0)
                recv(torch.ones(0), 0)
    transfers = irecv(uncounted, other), isend(uncounted.clone(), other)
    for transfer in transfers:
        transfer.wait()
    return [whole, part]


def test_traffic_is_counted_to_the_byte_and_only_inside(ranks5):
    first, second = ranks5.run(count_here_and_there)[:2]
    assert first == [Traffic(56 + 12, 56, 3), Traffic(12, 56, 2)]
    assert second == [Traffic(56, 56 + 12, 1), Traffic(0, 56 + 12, 0)]


def counting_ends_with_an_exception() -> bool:
    try:
        with count_traffic():
            raise KeyError
    except KeyError:
        return not point_to_point._counting


def test_counting_ends_with_an_exception(ranks5):
    assert all(ranks5.run(counting_ends_with_an_exception))


def on_the_wire(size_bytes: int) -> dict[str, tuple[float, float]]:
    tensor, found = torch.zeros(size_bytes // 4), {}
    for name, reduce in {"ring": collectives.ring_all_reduce_, "gloo": dist.all_reduce}.items():
        dist.barrier()
        before = gloo_bytes_sent()
        with wire_bytes() as wire:
            reduce(tensor)
        assert wire.bytes_sent <= gloo_bytes_sent() - before
        found[name] = wire.bytes_sent / size_bytes, wire.bytes_received / size_bytes
    return found


@linux_only
def test_the_wire_carries_the_payload_and_little_more(ranks5):
    for found in ranks5.run(on_the_wire, 4 * MB):
        for name, (sent, received) in found.items():
            assert 1.6 <= sent < 1.61, name  # 2(n-1)/n for 5 ranks
            assert 1.6 - 0.01 < received < 1.61, name


@linux_only
def test_only_connections_of_this_process_over_loopback_count(ranks5):
    before = gloo_bytes_sent()
    ranks5.run(on_the_wire, 4 * MB)
    assert gloo_bytes_sent() - before < 1000  # what the ranks send is not this process's
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        accepted, _ = server.accept()
        with accepted, wire_bytes() as wire:
            sock.sendall(b"x" * 5000)
            assert accepted.recv(5000, socket.MSG_WAITALL) == b"x" * 5000
    assert (wire.bytes_sent, wire.bytes_received) == (5000, 5000)


def test_where_the_system_does_not_tell_it_is_said(monkeypatch):
    monkeypatch.delattr(socket, "TCP_INFO", raising=False)
    assert gloo_bytes_sent() is None
    with pytest.raises(RuntimeError, match="count_traffic"), wire_bytes():
        pass


# ----------------------------------------------------------------------------- an emulated link


def exchange(
    link: Link, pairs: list[tuple[int, int]], size_bytes: int, backwards=False
) -> tuple[float, float]:
    """When this rank began and when all of its messages were done; each (src, dst) is a message."""
    me, message = dist.get_rank(), torch.zeros(size_bytes, dtype=torch.uint8)
    with emulate_link(link):
        dist.barrier()
        began_s = time.monotonic()
        transfers = [irecv(torch.empty_like(message), src) for src, dst in pairs if dst == me]
        transfers += [isend(message, dst) for src, dst in pairs if src == me]
        for transfer in reversed(transfers) if backwards else transfers:
            transfer.wait()
        return began_s, time.monotonic()


def duration_s(moments: list[tuple[float, float]]) -> float:
    """From the first rank's beginning to the last one's end; the ranks of one machine share a clock."""
    return max(end for _, end in moments) - min(began for began, _ in moments)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("pairs", "messages_in_a_row"),
    [
        ([(1, 0)], 1),
        ([(1, 0), (0, 1)], 1),  # both directions at once
        ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)], 1),  # every card sends and receives
        ([(1, 0), (2, 3)], 1),  # strangers do not disturb each other
        ([(1, 0), (2, 0), (3, 0)], 3),  # queue at the receiver
        ([(0, 1), (0, 2), (0, 3)], 3),  # queue at the sender
        ([(1, 0), (1, 0), (1, 0)], 3),  # both
        ([(1, 0), (2, 0), (0, 3), (0, 4)], 2),  # two in and two out
    ],
)
def test_messages_queue_for_the_cards(ranks5, pairs, messages_in_a_row, backwards):
    expected_s = LINK.latency_s + messages_in_a_row * MB / LINK.bandwidth_bytes_per_s
    assert_within(expected_s, lambda: duration_s(ranks5.run(exchange, LINK, pairs, MB, backwards)))


def assert_within(expected_s: float, measure, share=0.15) -> None:
    for _ in range(5):
        time_s = measure()
        assert time_s >= 0.99 * expected_s
        if time_s <= (1 + share) * expected_s:
            return
    raise AssertionError(f"{time_s * 1e3:.1f} ms, expected {expected_s * 1e3:.1f} ms")


def finish_times(order: str) -> list[float]:
    """Rank 1 sends 2 MB at once, rank 2 sends 1 MB a little later; rank 0 waits for them in the given order."""
    me, done_s = dist.get_rank(), {}
    with emulate_link(LINK):
        dist.barrier()
        began_s = time.monotonic()
        if me == 1:
            send(torch.zeros(2 * MB, dtype=torch.uint8), 0)
        elif me == 2:
            time.sleep(0.05)
            send(torch.zeros(MB, dtype=torch.uint8), 0)
        elif me == 0:
            slots = {"1": torch.empty(2 * MB, dtype=torch.uint8), "2": torch.empty(MB, dtype=torch.uint8)}
            transfers = {name: irecv(slot, int(name)) for name, slot in slots.items()}
            for name in order:
                transfers[name].wait()
                done_s[name] = time.monotonic() - began_s
    return [done_s[name] for name in order] if me == 0 else []


def test_first_come_first_served_whatever_is_waited_for_first(ranks5):
    """The message that came first passes first: 200 ms, and the other one 100 ms later."""
    first_s, both_s = (LINK.latency_s + n * MB / LINK.bandwidth_bytes_per_s for n in (2, 3))
    in_order = min((ranks5.run(finish_times, "12")[0] for _ in range(2)), key=sum)
    assert in_order == pytest.approx([first_s, both_s], rel=0.15)
    reversed_order = min((ranks5.run(finish_times, "21")[0] for _ in range(2)), key=sum)
    assert reversed_order == pytest.approx([both_s, both_s], rel=0.15)


def late_and_blocking() -> tuple[float, float]:
    """A receiver that comes late finds the message there; a sender is free when it has left, not later."""
    me, message = dist.get_rank(), torch.zeros(MB, dtype=torch.uint8)
    with emulate_link(LINK):
        dist.barrier()
        began_s = time.monotonic()
        if me == 0:
            transfer = isend(message, 1)
            time.sleep(0.2)
            transfer.wait()
        elif me == 1:
            receive = irecv(message, 0)
            time.sleep(0.2)
            receive.wait()
        return time.monotonic() - began_s


def test_time_passes_while_ranks_compute(ranks5):
    assert min(max(ranks5.run(late_and_blocking)[:2]) for _ in range(3)) < 0.2 + 0.03


def time_all_reduce(link: Link, size_bytes: int, name: str) -> tuple[float, float] | None:
    reduce = getattr(collectives, f"{name.replace('-', '_')}_all_reduce_")
    with sub_world(4) as inside:
        if not inside:
            return None
        tensor = torch.ones(size_bytes // 4)
        with emulate_link(link):
            dist.barrier()
            began_s = time.monotonic()
            reduce(tensor)
            ended_s = time.monotonic()
        assert tensor.eq(4).all()
        return began_s, ended_s


@pytest.mark.parametrize(
    ("name", "size_bytes", "megabits_per_s"),
    [
        ("ring", 8 * MB, 100),
        ("ring", 8 * MB, 200),
        ("naive", 2 * MB, 200),
        ("tree", 2 * MB, 200),
        ("halving-doubling", 2 * MB, 200),
    ],
)
def test_all_reduces_take_what_their_formulas_say(ranks5, name, size_bytes, megabits_per_s):
    link = Link(100e-6, megabits_per_s * 1e6 / 8)
    expected_s = ALL_REDUCE_S[name](size_bytes, 4, link)
    assert_within(expected_s, lambda: duration_s(ranks5.run(time_all_reduce, link, size_bytes, name)[:4]))


def test_two_gigabits_are_the_limit():
    with pytest.raises(ValueError, match=r"cannot emulate 10 Gb/s.*predict"), emulate_link(Link(0, 1.25e9)):
        pass


def leave_by_an_exception() -> tuple[float, int]:
    files_before = len(os.listdir("/dev/fd"))
    try:
        with emulate_link(LINK):
            raise KeyError
    except KeyError:
        pass
    assert point_to_point._card is None
    dist.barrier()
    began_s = time.monotonic()
    tensor = torch.zeros(MB // 4)
    collectives.ring_all_reduce_(tensor)
    return time.monotonic() - began_s, len(os.listdir("/dev/fd")) - files_before


def test_the_link_is_gone_after_the_block(ranks5):
    results = [ranks5.run(leave_by_an_exception) for _ in range(3)]
    assert min(max(time_s for time_s, _ in by_rank) for by_rank in results) < 0.04
    assert all(new_files <= 0 for by_rank in results for _, new_files in by_rank)


def enter_alone() -> None:
    if dist.get_rank() == 0:
        with emulate_link(LINK):
            pass
    elif dist.get_rank() == 1:
        raise KeyError("never entered")


def test_a_failed_entry_leaves_no_files(ranks5):
    def folders():
        return set(Path(tempfile.gettempdir()).glob("mailboxes-*"))

    before = folders()
    with pytest.raises(RankError, match="never entered"):
        ranks5.run(enter_alone)
    assert folders() <= before
    assert_within(0.102, lambda: duration_s(ranks5.run(exchange, LINK, [(1, 0)], MB)))


def receive_inside_what_was_sent_outside() -> None:
    early = isend(torch.ones(1), 0) if dist.get_rank() == 1 else None
    with emulate_link(LINK):
        if dist.get_rank() == 0:
            recv(torch.ones(1), 1)
    if early is not None:
        early.wait()


def test_a_message_from_outside_the_block_is_named(ranks5):
    with pytest.raises(RankError, match="rank 1 sent this message outside emulate_link"):
        ranks5.run(receive_inside_what_was_sent_outside)


def test_slow_is_not_stuck(ranks5, monkeypatch):
    """Emulated seconds pass in this module's own code: the watchdog sees ranks at work, not a deadlock."""
    monkeypatch.setattr(ranks5, "timeout_s", 0.5)
    slow = Link(0.0, 0.5e6)  # 2 s
    assert duration_s(ranks5.run(exchange, slow, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)], MB)) > 1.9


def two_that_send_first() -> None:
    other = 1 - dist.get_rank()
    if other >= 0:
        send(torch.ones(4), other)
        recv(torch.ones(4), other)


def test_two_that_send_first_wait_for_ever_and_the_watchdog_says_so(ranks5, monkeypatch):
    monkeypatch.setattr(ranks5, "timeout_s", 1.0)
    with pytest.raises(RankError, match="send"):
        ranks5.run(two_that_send_first)
    assert ranks5.run(to_a_rank_of_a_subgroup) == [0, 0, 0, 7, 0]
