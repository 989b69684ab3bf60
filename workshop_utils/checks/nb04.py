"""Checks of notebook 04, fully sharded data parallel. Answers that communicate run on real ranks, in several worlds.

n is the world size, S the bytes of one unit's padded parameters. Shape letters: B images in the batch of one rank,
I inputs and O outputs of a linear layer. A layer's flat parameters are its weight [O, I], then its bias [O].
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from workshop_utils.checks import (
    Wrong,
    exercise,
    expect_close,
    expect_number,
    expect_unchanged,
)
from workshop_utils.checks.one_layer import Layer, on_rank_backward, on_rank_forward
from workshop_utils.checks.replicas import in_worlds
from workshop_utils.collectives import ring_all_gather, ring_reduce_scatter
from workshop_utils.memory import zero_bytes
from workshop_utils.point_to_point import count_traffic

KINDS = ("parameters", "gradients", "optimizer")

# 4.1 The bill


@exercise("4.1")
def check_bytes_per_rank(answer):
    """`answer(stage, num_parameters, world_size)` is {"parameters": bytes, "gradients": ..., "optimizer": ...}."""
    for num_parameters, n in ((7_500_000_000, 64), (199_212, 4), (1_000, 1)):
        for stage in (0, 1, 2, 3):
            call = f"stage {stage}, {num_parameters:,} parameters, {n} rank{'s' if n > 1 else ''}"
            got = answer(stage, num_parameters, n)
            if not isinstance(got, dict) or set(got) != set(KINDS):
                raise Wrong(
                    f"{call}: you returned {got!r:.80}, expected a dict with the keys {', '.join(KINDS)}"
                )
            for kind, wanted in zero_bytes(stage, num_parameters, n).items():
                _expect_bytes(call, kind, got[kind], wanted, stage, num_parameters, n)
    return (
        "all four stages are right: at 7.5 billion parameters on 64 ranks 120, 31.4, 16.6 and 1.9 GB on each"
    )


def _expect_bytes(call, kind, got, wanted, stage, num_parameters, n):
    try:
        got = float(got)
    except (TypeError, ValueError):
        raise Wrong(f"{call}: {kind} is {got!r:.60}, expected {wanted:,.0f} bytes") from None
    if abs(got - wanted) <= 1e-6 * wanted:
        return
    text = f"{call}: {kind} is {got:,.0f}, expected {wanted:,.0f}"
    whole = {"parameters": 2, "gradients": 2, "optimizer": 12}[kind] * num_parameters
    if n > 1 and abs(got * n - wanted) <= 1e-6 * wanted:
        raise Wrong(f"{text}. You divided it by the number of ranks; stage {stage} leaves it whole")
    if n > 1 and abs(got - wanted * n) <= 1e-6 * got and abs(got - whole) <= 1e-6 * got:
        raise Wrong(f"{text}. It is whole; stage {stage} divides it by the number of ranks")
    if kind == "optimizer" and abs(got * 1.5 - wanted) <= 1e-6 * wanted:
        raise Wrong(f"{text}. Adam's two moments are 8 bytes; the float32 copy of the parameters is 4 more")
    if kind == "parameters" and stage < 3 and abs(got - wanted * 3) <= 1e-6 * got:
        raise Wrong(f"{text}. The table counts the float32 copy, 4 bytes, as the optimizer's")
    raise Wrong(text)


# 4.2 A shard


@exercise("4.2")
def check_shard_of(answer):
    """`answer(flat, rank, world_size)` is this rank's equal part of flat, zeros at the end, in memory of its own."""
    for numel, n in ((12, 4), (10, 4), (7, 2), (5, 3), (199_210, 8), (3, 5), (6, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            flat = torch.arange(1, numel + 1, dtype=torch.float32).remainder(251).add(1).to(dtype)
            before, size = flat.clone(), -(-numel // n)
            for rank in range(n):
                got = answer(flat, rank, n)
                where = f"{numel:,} elements on {n} ranks"
                wanted = F.pad(before, (0, n * size - numel))[rank * size : (rank + 1) * size].clone()
                _explain_shard(got, wanted, before, rank, size, where)
                expect_close(got, wanted, rank=rank, name=f"{where}: the shard", rtol=0, atol=0)
                _expect_own_memory(got, flat, rank, where)
                expect_unchanged(flat, before, rank=rank, name=f"{where}: the flat tensor")
    return "equal shards in every world, zeros only at the very end, each in memory of its own"


def _explain_shard(got, wanted, flat, rank, size, where):
    """Name the mistake behind a wrong shard."""
    if not isinstance(got, torch.Tensor) or got.dtype != wanted.dtype:
        return  # expect_close says it
    if got.dim() == 1 and got.numel() < size:
        raise Wrong(
            f"rank {rank}: {where}: the shard has {got.numel()} elements, expected {size}: all ranks' shards have "
            "the same size, the rest is padded with zeros"
        )
    if got.shape != wanted.shape or torch.equal(got, wanted):
        return
    real = wanted[: max(0, min(size, flat.numel() - rank * size))]
    starts = (flat == got[0]).nonzero().flatten().tolist() if got.numel() else []
    if len(real) < size and torch.equal(got[: len(real)], real) and got[len(real) :].any():
        raise Wrong(
            f"rank {rank}: {where}: the padding holds {got[len(real) :][:4].tolist()}, expected zeros: they would be "
            "taken for parameters"
        )
    if len(real) and any(torch.equal(flat[s : s + size], got) for s in starts):
        raise Wrong(
            f"rank {rank}: {where}: the shard holds elements of another rank's: it begins with {got[0].item():g}, "
            f"expected element {rank * size}, {wanted[0].item():g}. Shards must not overlap, and only the end is padded"
        )


def _expect_own_memory(got, flat, rank, where):
    if got.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
        raise Wrong(
            f"rank {rank}: {where}: the shard is a view of the flat tensor, whose {flat.nbytes:,} bytes it keeps "
            "alive. Give it memory of its own: clone()"
        )
    held = got.untyped_storage().nbytes()
    if held > got.nbytes:
        raise Wrong(
            f"rank {rank}: {where}: the shard keeps {held:,} bytes alive, the budget is {got.nbytes:,}: it is a view "
            "of a larger tensor. clone() it"
        )


# 4.3 and 4.4 One linear layer, forward and backward


@exercise("4.3", needs_ranks=True)
def check_gathered_forward(answer, ranks):
    """`answer(x_BI, shard, out_features, all_gather)` is the layer's output; nothing of the gathered layer is left."""
    for n, seen in in_worlds(ranks, on_rank_forward, answer, smallest=2):
        for case, everyone in enumerate(zip(*seen, strict=True)):
            for rank, s in enumerate(everyone):
                layer = Layer(case, n)
                name = f"the output (world size {n}, {layer})"
                _expect_gathers(s, rank, n, 1, "the forward")
                expect_close(s["y"], layer.outputs[rank], rank=rank, name=name)
                expect_unchanged(s["shard"], layer.shards[rank], rank=rank, name="the shard")
                _expect_freed(s, rank, n)
    return f"gathered, computed and freed, in worlds of 2 to {len(ranks)} ranks"


@exercise("4.4", needs_ranks=True)
def check_gathered_backward(answer, ranks):
    """`answer(grad_y_BO, x_BI, shard, all_gather, reduce_scatter)` is (grad_x_BI, the gradient of the shard)."""
    for n, seen in in_worlds(ranks, on_rank_backward, answer, smallest=2):
        for case, everyone in enumerate(zip(*seen, strict=True)):
            for rank, s in enumerate(everyone):
                layer = Layer(case, n)
                where = f"(world size {n}, {layer})"
                _expect_pair(s, rank)
                _explain_gradients(s, rank, n, layer, where)
                expect_close(s["grad_x"], layer.grad_xs[rank], rank=rank, name=f"grad_x {where}")
                expect_close(s["grad_shard"], layer.grad_shards[rank], rank=rank, name=f"grad_shard {where}")
                _expect_gathers(s, rank, n, 1, "the backward")
                _expect_sent(s, rank, n)
                _expect_freed(s, rank, n)
    return f"gathered again, averaged and freed; each rank sent {2 * (len(ranks) - 1) / len(ranks):.2f} S, the budget"


def _expect_gathers(s, rank, n, wanted, phase):
    if s["gathers"] != wanted:
        raise Wrong(
            f"rank {rank}: {phase} called all_gather {_times(s['gathers'])}, expected {_times(wanted)}, in a world of "
            f"{n}" + (": what is computed with is nobody's whole layer" if not s["gathers"] else "")
        )


def _expect_sent(s, rank, n):
    S = s["gathered_bytes"]
    budget = 2 * (n - 1) * S // n
    if s["sent_bytes"] != budget:
        word = "at most" if s["sent_bytes"] > budget else "no less than"
        raise Wrong(
            f"rank {rank}: with world size {n} you sent {s['sent_bytes'] / S:.2f} S, the budget is {word} "
            f"{budget / S:.2f} S: (n-1)/n to gather, (n-1)/n to reduce-scatter. An all-reduce sends twice as much "
            "as a reduce-scatter"
        )


def _expect_freed(s, rank, n):
    if s["whole_bytes"]:
        raise Wrong(
            f"rank {rank}: the gathered layer still holds {s['whole_bytes']} bytes when your function is over, in a "
            f"world of {n}; expected 0. Free it when it has been used: full.untyped_storage().resize_(0)"
        )
    if s["left_bytes"]:
        raise Wrong(
            f"rank {rank}: {s['left_bytes']} bytes more than your results are still held when your function is over, "
            f"in a world of {n}. The whole layer takes {s['gathered_bytes']} bytes, and so does its gradient. Keep no "
            "copy of either, and return no view of it"
        )


def _expect_pair(s, rank):
    if "grad_x" not in s:
        raise Wrong(f"rank {rank}: you returned {s['returned']!r:.60}, expected (grad_x_BI, grad_shard)")


def _explain_gradients(s, rank, n, layer, where):
    """Name the mistake behind wrong gradients."""
    got, wanted, grad_x = s["grad_shard"], layer.grad_shards[rank], s["grad_x"]
    if s["gathers"] == 0 and n > 1:
        raise Wrong(
            f"rank {rank}: {where[1:-1]}: you called all_gather no times, expected once: the forward has freed the "
            "layer, so the backward has to gather it again"
        )
    if not isinstance(got, torch.Tensor):
        return
    if got.shape != wanted.shape:
        whole = ", that of the whole layer" if got.numel() in (layer.numel, n * layer.size) and n > 1 else ""
        raise Wrong(
            f"rank {rank}: grad_shard has shape {list(got.shape)}{whole}; expected {list(wanted.shape)}, the "
            f"shard's {where}"
        )
    if isinstance(grad_x, torch.Tensor) and n > 1 and got.dtype == wanted.dtype and not _near(got, wanted):
        if _near(got, layer.sums[rank]):
            raise Wrong(
                f"rank {rank}: grad_shard is the sum of all ranks' gradients, {n} times too large: expected their "
                f"average {where}"
            )
        if _near(got, layer.own[rank][rank]) or _near(got, layer.own[rank][rank] / n):
            raise Wrong(
                f"rank {rank}: grad_shard comes from this rank's own images alone, expected the average over all "
                f"ranks {where}"
            )
        first = layer.own[rank][rank] / n
        if any(_near(got, first + layer.sums[r] / n) for r in range(n)):
            raise Wrong(f"rank {rank}: grad_shard counts something twice {where}")


def _near(a, b) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)


def _times(count: int) -> str:
    return {0: "no times", 1: "once", 2: "twice"}.get(count, f"{count} times")


# 4.5 What it sends


@exercise("4.5", needs_ranks=True)
def check_bytes_sent_per_step(answer, ranks):
    """`answer(unit_numels, world_size, reshard_after_forward)`: bytes that a rank sends in one float32 step."""
    models = ([157_000, 40_200, 2_010], [10, 7, 2], [64])
    worlds = list(in_worlds(ranks, _on_rank_step, None, models, smallest=2))
    for n, counted in reversed(worlds):  # on two ranks several mistakes give the same number
        for (numels, reshard), num_bytes in counted[0].items():
            got = answer(list(numels), n, reshard)
            call = f"units of {list(numels)}, world size {n}, reshard_after_forward={reshard}"
            _explain_sent(call, got, num_bytes, numels, n, reshard)
            expect_number(got, num_bytes, name=f"{call}: your number of bytes")
    expect_number(answer([64], 1, True), 0, name="units of [64], world size 1: your number of bytes")
    return f"your formula gives, to the byte, what each of 2 to {len(ranks)} ranks was counted to send"


def _on_rank_step(_answer, models) -> dict:
    """Count what the ring really sends in one step: gather, gather again, reduce-scatter."""
    n, counted = dist.get_world_size(), {}
    for numels in models:
        for reshard in (True, False):
            with count_traffic() as traffic:
                for numel in numels:
                    shard = torch.zeros(-(-numel // n))
                    whole = torch.zeros(n * shard.numel())
                    for _ in range(2 if reshard else 1):
                        ring_all_gather(whole, shard)
                    ring_reduce_scatter(shard, whole)
            dist.barrier()
            counted[tuple(numels), reshard] = traffic.bytes_sent
    return counted


def _explain_sent(call, got, counted, numels, n, reshard):
    """Name the mistake behind a wrong number of bytes."""
    try:
        got = float(got)
    except (TypeError, ValueError):
        return
    padded = 4 * sum(-(-numel // n) * n for numel in numels)
    times, text = 3 if reshard else 2, f"{call}: your number of bytes is {got:,.0f}, counted were {counted:,}"
    if abs(got - counted) < 0.5:
        return
    reasons = {
        times * padded * (n - 1): "That is what all ranks together send",
        2 * times * padded * (n - 1) / n: "That is what a rank sends and receives; count what it sends",
        times * padded: "A rank need not send its own part to itself: (n-1)/n",
        times * 4 * sum(numels) * (n - 1) / n: "Each unit is padded until n divides it",
        times * 4 * -(-sum(numels) // n) * (n - 1): "Each unit is padded by itself, not only their sum",
        2 * padded * (n - 1) / n: "That is what data parallel sends: here a unit is gathered twice",
        3 * padded * (n - 1) / n: "Without resharding the second gather is spared",
        times * padded / 4 * (n - 1) / n: "Those are elements: float32 has 4 bytes",
    }
    for value, reason in reasons.items():
        if abs(got - value) < 0.5:
            raise Wrong(f"{text}. {reason}")
