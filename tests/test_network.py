"""The cost formulas against hand-counted cases and against the messages of `schedules`; the fit against known links."""

import random

import numpy as np
import pytest

from workshop_utils.network import (
    ALL_REDUCE_S,
    LINKS,
    Link,
    all_gather_s,
    all_reduce_steps,
    all_reduce_total_bytes,
    broadcast_s,
    fit_link,
    reduce_s,
    reduce_scatter_s,
    shared_all_reduce_s,
)
from workshop_utils.schedules import num_chunks, schedule

MB = 1_000_000
LINK = Link(latency_s=1.0, bandwidth_bytes_per_s=MB)  # 1 s, and 1 s per MB
SIZES = [1e3, 1e4, 1e5, 1e6, 8e6, 64e6]

algorithms = pytest.mark.parametrize("algorithm", ALL_REDUCE_S)


def test_a_message_costs_alpha_plus_s_beta():
    assert LINK.message_s(0) == 1.0
    assert LINK.message_s(3 * MB) == 4.0


@pytest.mark.parametrize(
    ("algorithm", "n", "seconds"),
    [
        ("naive", 4, 6 * (1 + 12)),
        ("tree", 4, 4 * (1 + 12)),
        ("tree", 5, 6 * (1 + 12)),
        ("ring", 4, 6 * (1 + 3)),
        ("ring", 3, 4 * (1 + 4)),
        ("halving-doubling", 4, 4 + 1.5 * 12),
        ("halving-doubling", 6, 4 + 1.5 * 12 + 2 * (1 + 12)),  # two ranks fold in, four do the rest
    ],
)
def test_all_reduces_of_12_mb_counted_by_hand(algorithm, n, seconds):
    assert ALL_REDUCE_S[algorithm](12 * MB, n, LINK) == pytest.approx(seconds)


def test_the_other_collectives_of_12_mb_counted_by_hand():
    assert broadcast_s(12 * MB, 4, LINK) == reduce_s(12 * MB, 4, LINK) == 2 * (1 + 12)
    assert broadcast_s(12 * MB, 5, LINK) == 3 * (1 + 12)
    assert reduce_scatter_s(12 * MB, 4, LINK) == all_gather_s(12 * MB, 4, LINK) == 3 * (1 + 3)


@algorithms
def test_one_rank_costs_nothing(algorithm):
    assert ALL_REDUCE_S[algorithm](MB, 1, LINK) == 0
    assert broadcast_s(MB, 1, LINK) == reduce_scatter_s(MB, 1, LINK) == 0


@algorithms
@pytest.mark.parametrize("n", range(1, 18))
def test_the_formulas_are_what_the_messages_of_the_schedule_cost(algorithm, n):
    """A step takes as long as its largest message; nobody sends or receives two at a time."""
    steps, chunks = schedule(algorithm, n), num_chunks(algorithm, n)
    seconds = total_bytes = 0.0
    for step in steps:
        message_bytes = [len(t.chunks) / chunks * 12 * MB for t in step.transfers]
        seconds += LINK.message_s(max(message_bytes))
        total_bytes += sum(message_bytes)
    assert ALL_REDUCE_S[algorithm](12 * MB, n, LINK) == pytest.approx(seconds)
    assert all_reduce_steps(algorithm, n) == len(steps)
    assert all_reduce_total_bytes(algorithm, 12 * MB, n) == pytest.approx(total_bytes)


def test_the_ring_wins_with_many_bytes_and_the_tree_with_few():
    link = LINKS["1 Gb/s Ethernet"]
    few = {name: cost(1e3, 16, link) for name, cost in ALL_REDUCE_S.items() if name != "halving-doubling"}
    many = {name: cost(1e8, 16, link) for name, cost in ALL_REDUCE_S.items() if name != "halving-doubling"}
    assert min(few, key=few.get) == "tree" and min(many, key=many.get) == "ring"
    assert many["naive"] / many["ring"] == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1e-6, 1e9), "latency_s"),
        ((float("inf"), 1e9), "latency_s"),
        ((0, 0), "bandwidth"),
        ((0, -5), "bandwidth"),
    ],
)
def test_an_impossible_link_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Link(*arguments)


def test_an_unknown_algorithm_is_named():
    with pytest.raises(ValueError, match=r"'rnig'.*naive, tree, ring, halving-doubling"):
        all_reduce_steps("rnig", 4)


# ----------------------------------------------------------------------------- the fit


@algorithms
def test_the_fit_finds_the_link_that_made_the_times(algorithm):
    worlds = [n for n in (2, 3, 4, 8) for _ in SIZES]
    sizes = SIZES * 4
    times = [shared_all_reduce_s(algorithm, s, n, Link(80e-6, 2e9)) for s, n in zip(sizes, worlds)]
    link = fit_link(sizes, times, worlds, algorithm)
    assert link.latency_s == pytest.approx(80e-6) and link.bandwidth_bytes_per_s == pytest.approx(2e9)


def test_the_fit_bears_noise_and_gives_small_messages_their_say():
    noise, true = random.Random(0), Link(80e-6, 2e9)
    times = [shared_all_reduce_s("ring", s, 4, true) * noise.uniform(0.9, 1.1) for s in SIZES * 5]
    link = fit_link(SIZES * 5, times, 4)
    assert link.latency_s == pytest.approx(true.latency_s, rel=0.1)
    assert link.bandwidth_bytes_per_s == pytest.approx(true.bandwidth_bytes_per_s, rel=0.1)
    times = [shared_all_reduce_s("ring", s, 4, true) for s in SIZES]
    times[-1] *= 1.3  # one large message late by far more than all small ones take
    assert fit_link(SIZES, times, 4).latency_s == pytest.approx(true.latency_s, rel=0.1)


def test_the_fit_gives_no_negative_latency():
    sizes = np.array([1e6, 2e6, 4e6])
    link = fit_link(sizes, 6 * sizes / 1e9 - 1e-4, 4)
    assert link.latency_s == 0 and link.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "times", "n", "words"),
    [
        ([1e6], [1.0], 4, "two different sizes"),
        ([1e6, 1e6], [1.0, 1.1], 4, "two different sizes"),
        ([1e6, 2e6], [1.0], 4, "2 sizes and 1 times"),
        ([1e6, 2e6], [1.0, 0.0], 4, "times above 0"),
        ([1e6, 2e6], [1.0, 2.0], 1, "world sizes of at least 2"),
        ([1e3, 1e8], [1.0, 0.1], 4, "do not grow"),
    ],
)
def test_the_fit_refuses_what_it_cannot_fit(sizes, times, n, words):
    with pytest.raises(ValueError, match=words):
        fit_link(sizes, times, n)
