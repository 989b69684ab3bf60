"""The schedules are right by themselves, cost what network.py says, and are what collectives.py really sends."""

from fractions import Fraction
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from workshop_utils import collectives, sub_world
from workshop_utils.network import ALL_REDUCE_S, Link
from workshop_utils.schedules import ALGORITHMS, num_chunks, schedule, simulate, so_far

WORLD_SIZES = range(1, 17)
ALL_REDUCE = {
    "naive": collectives.naive_all_reduce_,
    "tree": collectives.tree_all_reduce_,
    "ring": collectives.ring_all_reduce_,
    "halving-doubling": collectives.halving_doubling_all_reduce_,
}
NUM_ELEMENTS = 61  # a prime: no chunk has the size of its neighbour's by luck


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_chunk_ends_with_every_contribution_once(algorithm, world_size):
    last = simulate(algorithm, world_size)[-1]
    assert {times for rank in last.held for chunk in rank for times in chunk} == {1}
    assert sum(last.sent) == sum(last.received) == 2 * (world_size - 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_link_carries_one_message_at_a_time_each_way(algorithm, world_size):
    for step in schedule(algorithm, world_size):
        assert (
            len({t.src for t in step.transfers})
            == len({t.dst for t in step.transfers})
            == len(step.transfers)
        )
        assert all(t.src != t.dst for t in step.transfers)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_cost_can_be_read_off_the_schedule(algorithm, world_size):
    link, size_bytes = Link(1e-3, 1e6), 5e4
    chunk_bytes = size_bytes / num_chunks(algorithm, world_size)
    largest = [max(len(t.chunks) for t in step.transfers) for step in schedule(algorithm, world_size)]
    read_off = sum(link.message_s(chunks * chunk_bytes) for chunks in largest)
    assert read_off == pytest.approx(ALL_REDUCE_S[algorithm](size_bytes, world_size, link))
    half = sum(link.message_s(chunks * chunk_bytes) for chunks in largest[: len(largest) // 2])
    messages, share = so_far(algorithm, world_size, len(largest) // 2)
    assert messages * 1e-3 + float(share) * size_bytes / 1e6 == pytest.approx(half)


def test_no_rank_of_the_ring_sends_more_than_another():
    assert set(simulate("ring", 5)[-1].sent) == {Fraction(8, 5)}


def test_unknown_names_and_sizes_are_told():
    with pytest.raises(ValueError, match="choose one of naive, tree, ring, halving-doubling"):
        schedule("rings", 4)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        schedule("ring", 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_collectives_send_what_the_schedule_says(ranks5, algorithm):
    for n in range(1, 6):
        sent = ranks5.run(messages_of, n, ALL_REDUCE[algorithm])[:n]
        assert sent == expected_messages(algorithm, n), f"world size {n}"


def messages_of(n: int, all_reduce_) -> list:
    """Runs on a rank: what it sends, as (receiver, first element, past the last, who is in the sum).

    Element i of rank r holds 10**r + i * 10**6: a sum of k ranks' numbers tells which ranks, and which element.
    """
    messages = []
    original = dist.ProcessGroup.send

    def noting(group, tensors, dst, *args):
        values = tensors[0].flatten().tolist()
        ranks_in = {tuple(int(digit) for digit in reversed(f"{v % 10**6:05d}")) for v in values}
        assert len(ranks_in) == 1, f"one message, several states: {ranks_in}"
        sources = ranks_in.pop()
        elements = [v // 10**6 // sum(sources) for v in values]
        assert elements == list(range(elements[0], elements[0] + len(elements)))
        messages.append((dst, elements[0], elements[-1] + 1, sources[:n]))
        return original(group, tensors, dst, *args)

    with sub_world(n) as inside:
        if inside:
            tensor = 10 ** dist.get_rank() + 10**6 * torch.arange(NUM_ELEMENTS)
            with patch.object(dist.ProcessGroup, "send", noting):
                all_reduce_(tensor)
    return messages


def expected_messages(algorithm: str, n: int) -> list[list]:
    chunks = num_chunks(algorithm, n)
    edges = [NUM_ELEMENTS * i // chunks for i in range(chunks + 1)]
    snapshots = simulate(algorithm, n)
    sent = [[] for _ in range(n)]
    for before, after in pairwise(snapshots):
        for t in after.step.transfers:
            (sources,) = {before.held[t.src][chunk] for chunk in t.chunks}
            sent[t.src].append((t.dst, edges[t.chunks[0]], edges[t.chunks[-1] + 1], sources))
    return sent
