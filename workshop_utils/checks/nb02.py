"""Checks of notebook 02, all-reduce. They run the answer on real ranks and watch what it sends.

n is the world size, S the bytes of one rank's tensor. Every answer runs in worlds of several sizes, made of the
ranks at hand, with other numbers on each rank.
"""

import torch
import torch.distributed as dist

from workshop_utils.checks import (
    Wrong,
    exercise,
    expect_close,
    expect_number,
    expect_unchanged,
    tensors_for_ranks,
)
from workshop_utils.checks.watching import Seen, run_watched, world_named
from workshop_utils.network import ALL_REDUCE_S, Link


@exercise("2.1", needs_ranks=True)
def check_pass_right(answer, ranks):
    """`answer(tensor)` returns the left neighbour's tensor and leaves its own as it was."""

    def judge(n, rank, seen, inputs):
        expect_unchanged(seen.after, inputs[rank], rank=rank, name="your own tensor")
        left = (rank - 1) % n
        expect_close(seen.returned, inputs[left], rank=rank, name=f"what you return (from rank {left})")
        _expect_budget(seen, rank, inputs[rank].nbytes, inputs[rank].nbytes, "S")

    kinds = [((3,), torch.float32), ((2, 3), torch.int64), ((50_000,), torch.float32)]
    _in_worlds(ranks, answer, lambda n: kinds, judge, smallest=2)
    return f"every rank has its left neighbour's tensor, in worlds of 2 to {len(ranks)} ranks"


@exercise("2.2", needs_ranks=True)
def check_tree_broadcast(answer, ranks):
    """`answer(tensor)` puts rank 0's numbers into every rank's tensor, in ceil(lg n) rounds."""

    def judge(n, rank, seen, inputs):
        _expect_in_place(seen, rank, inputs[rank], inputs[0])
        _expect_budget(seen, rank, inputs[0].nbytes, _depth(n) * inputs[0].nbytes, "ceil(lg n) S")

    def judge_together(n, everyone, inputs):
        _expect_by_hand(everyone, (n - 1) * inputs[0].nbytes)
        _expect_rounds(everyone, _depth(n))

    kinds = [((4,), torch.float32), ((2, 3), torch.int64), ((), torch.bfloat16)]
    _in_worlds(ranks, answer, lambda n: kinds, judge, judge_together)
    n, depth = len(ranks), _depth(len(ranks))
    return f"rank 0's tensor reaches {n} ranks in {depth} rounds, and no rank sends more than {depth} S"


@exercise("2.3", needs_ranks=True)
def check_ring_reduce_scatter(answer, ranks):
    """`answer(chunks)` leaves the sum of all ranks' chunks[rank] in chunks[rank], in place."""

    def kinds(n):
        return [((3 * n,), torch.float32), ((2 * n + 1,), torch.int64), ((n - 1,), torch.bfloat16)]

    def judge(n, rank, seen, inputs):
        tensors = (seen.after, inputs[rank], sum(inputs))
        got, before, expected = (tensor.tensor_split(n)[rank] for tensor in tensors)
        _hint_at_new_tensor(seen.returned, rank, got, before, expected)
        _hint_at_other_chunk(tensors[0].tensor_split(n), tensors[2].tensor_split(n), rank)
        expect_close(got, expected, rank=rank, name=f"chunks[{rank}]", rtol=0, atol=0)
        _expect_budget(seen, rank, inputs[0].nbytes, inputs[0].nbytes - got.nbytes, "(n-1)/n S")
        _expect_one_neighbour(seen, rank, n)

    def judge_together(n, everyone, inputs):
        _expect_by_hand(everyone, (n - 1) * inputs[0].nbytes)

    _in_worlds(ranks, _Chunked(answer), kinds, judge, judge_together)
    share = (len(ranks) - 1) / len(ranks)
    return f"each rank owns its chunk of the sum and sent {share:.2f} S, exactly the budget"


@exercise("2.4", needs_ranks=True)
def check_ring_all_reduce(answer, ranks):
    """`answer(tensor)` puts the sum into every rank's tensor and sends 2(n-1)/n S, rounded up to whole elements."""

    def kinds(n):
        small = [
            ((7,), torch.float32),
            ((3, 5), torch.bfloat16),
            ((2, 2, 2), torch.int64),
            ((), torch.float32),
        ]
        return [((12 * n,), torch.float32), *small, ((100_003,), torch.float32)]

    def judge(n, rank, seen, inputs):
        _expect_in_place(seen, rank, inputs[rank], sum(inputs))

    def judge_together(n, everyone, inputs):
        tensor = inputs[0]
        _expect_by_hand(everyone, 2 * (n - 1) * tensor.nbytes)
        budget = 2 * (n - 1) * -(-tensor.numel() // n) * tensor.element_size()
        for rank, seen in enumerate(everyone):
            _expect_budget(seen, rank, tensor.nbytes, budget, "2(n-1)/n S")

    def judge_view(n, rank, seen, inputs):
        expect_close(seen.after, sum(inputs), rank=rank, name="a tensor that is not contiguous")

    _in_worlds(ranks, answer, kinds, judge, judge_together)
    _in_worlds(ranks, _Transposed(answer), lambda n: [((4, 3), torch.float32)], judge_view)
    share = 2 * (len(ranks) - 1) / len(ranks)
    return f"the sum is right on every rank; each sent {share:.2f} S, exactly the budget"


@exercise("2.5")
def check_predict_cost(answer):
    """`answer(algorithm, world_size, size_bytes, link)` is the alpha-beta model's time of naive, tree and ring."""
    links = {
        "a link with latency only": Link(1e-3, 1e30),
        "a link without latency": Link(0.0, 1e6),
        "a link with both": Link(5e-5, 1.25e9),
    }
    for algorithm in ("naive", "tree", "ring"):
        for n in (4, 2, 5, 8):
            for name, link in links.items():
                got = answer(algorithm, n, 8e6, link)
                call = f'all_reduce_s("{algorithm}", {n} ranks, 8 MB, {name})'
                expect_number(got, ALL_REDUCE_S[algorithm](8e6, n, link), name=call)
    return "naive, tree and ring cost what the formulas say, in latency and in bandwidth"


# Running an answer in worlds of several sizes


def _in_worlds(ranks, answer, kinds, judge, judge_together=None, smallest=1):
    """For every world size n and every (shape, dtype) in kinds(n): judge what each rank saw, then all of them.

    judge(n, rank, seen, inputs) and judge_together(n, everyone, inputs) raise Wrong.
    """
    for n in range(smallest, len(ranks) + 1):
        cases = [_inputs(n, shape, dtype, seed) for seed, (shape, dtype) in enumerate(kinds(n))]
        with world_named(n):
            for inputs, everyone in zip(cases, run_watched(ranks, n, answer, cases), strict=True):
                for rank, seen in enumerate(everyone):
                    judge(n, rank, seen, inputs)
                if judge_together is not None:
                    judge_together(n, everyone, inputs)


def _depth(n: int) -> int:
    """ceil(lg n)."""
    return (n - 1).bit_length()


def _inputs(n: int, shape, dtype, seed: int) -> list[torch.Tensor]:
    """One tensor per rank; the int64 ones are too large for float32 and float64."""
    tensors = tensors_for_ranks(n, shape, dtype=dtype, seed=seed)
    return [t + (1 << 56) for t in tensors] if dtype == torch.int64 else tensors


class _Chunked:
    """Calls the answer with the tensor cut into n chunks, which share its memory; returns the rank's own chunk."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, tensor):
        chunks = list(tensor.tensor_split(dist.get_world_size()))
        self.answer(chunks)
        return chunks[dist.get_rank()].clone()


class _Transposed:
    """Calls the answer with a view that holds the tensor's numbers but is not contiguous."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, tensor):
        view = tensor.t().contiguous().t()
        self.answer(view)
        tensor.copy_(view)


# What is expected


def _expect_in_place(seen: Seen, rank: int, before: torch.Tensor, expected: torch.Tensor) -> None:
    _hint_at_new_tensor(seen.returned, rank, seen.after, before, expected)
    expect_close(seen.after, expected, rank=rank, name="the tensor", rtol=0, atol=0)


def _hint_at_new_tensor(new, rank: int, after, before, expected) -> None:
    """The right numbers are in a new tensor, and the given one is as it was: say that this is all that is missing."""
    if new is None or torch.equal(after, expected) or not torch.equal(after, before):
        return
    if new.shape == expected.shape and torch.equal(new, expected):
        raise Wrong(
            f"rank {rank}: the right numbers are in a new tensor, but the one you were given still holds "
            f"{before.flatten()[:4].tolist()}, expected {expected.flatten()[:4].tolist()}. Write into it: += or copy_"
        )


def _hint_at_other_chunk(chunks, sums, rank: int) -> None:
    """The ring ended one place early or late: say which chunk is complete here."""
    complete = [i for i, (chunk, total) in enumerate(zip(chunks, sums)) if torch.equal(chunk, total)]
    if complete and rank not in complete and sums[rank].numel():
        raise Wrong(
            f"rank {rank}: chunks[{complete[0]}] holds the sum of all ranks here, expected chunks[{rank}]. The steps "
            "are right, and each of them is about another chunk"
        )


def _expect_budget(seen: Seen, rank: int, tensor_bytes: int, budget_bytes: int, formula: str) -> None:
    """`seen` sent no more than the budget; both are shown in units of S and in bytes."""
    if seen.bytes_sent <= budget_bytes:
        return
    got, budget = (f"{b / max(tensor_bytes, 1):.2f} S" for b in (seen.bytes_sent, budget_bytes))
    raise Wrong(
        f"rank {rank}: you sent {got}, the budget is {budget} ({formula}): {seen.bytes_sent:,} bytes where "
        f"{budget_bytes:,} are enough, for S = {tensor_bytes:,} bytes"
    )


def _expect_by_hand(everyone: list[Seen], least_bytes: int) -> None:
    """No algorithm is right with fewer bytes than that, so something else has carried the numbers."""
    total = sum(seen.bytes_sent for seen in everyone)
    if total < least_bytes:
        raise Wrong(
            f"all ranks together sent {total:,} bytes with send and isend, and {least_bytes:,} are the least that "
            "it takes, so something else carried the numbers. Build it from sends and receives"
        )


def _expect_one_neighbour(seen: Seen, rank: int, n: int) -> None:
    receivers = sorted({dst for dst, _ in seen.sent})
    if len(receivers) > 1:
        raise Wrong(
            f"rank {rank}: you sent to ranks {receivers}, expected one neighbour, rank {(rank + 1) % n}"
        )


def _expect_rounds(everyone: list[Seen], budget: int) -> None:
    """Follow the messages: a rank can send once it has received, one message per round."""
    reached, waiting = {0: 0}, [0]
    while waiting:
        src = waiting.pop(0)
        for position, (dst, _) in enumerate(everyone[src].sent, start=1):
            if dst not in reached:
                reached[dst] = reached[src] + position
                waiting.append(dst)
    last = max(reached, key=reached.get)
    if reached[last] > budget:
        raise Wrong(
            f"rank {last} has the tensor after {reached[last]} rounds, the budget is {budget}, ceil(lg n): "
            "let every rank that has it pass it on in every round"
        )
