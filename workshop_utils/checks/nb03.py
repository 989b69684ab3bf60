"""Checks of notebook 03, distributed data parallel. Answers run on real ranks, in worlds of several sizes.

n is the world size. Ranks hold different numbers before the answer runs, and the check computes what it expects
from all of them.
"""

import torch
import torch.distributed as dist

from workshop_utils.checks import (
    Wrong,
    exercise,
    expect_close,
    expect_equal,
    expect_number,
    expect_unchanged,
    tensors_for_ranks,
)
from workshop_utils.checks.replicas import Branches, Twelve, counted, expect_steps, in_worlds, on_rank_train

# 3.1 broadcast_parameters


@exercise("3.1", needs_ranks=True)
def check_broadcast_parameters(answer, ranks):
    """`answer(module)` makes every rank's parameters and buffers equal to rank 0's, in place."""
    for n, seen in in_worlds(ranks, _on_rank_broadcast, answer):
        wanted = seen[0]["before"]
        for rank, rank_seen in enumerate(seen):
            if rank_seen["replaced"]:
                raise Wrong(
                    f"With world size {n}: rank {rank}: {rank_seen['replaced']} is a new tensor; an optimizer that "
                    "holds the old one would train nothing. Write into the one that is there"
                )
            for name, got in rank_seen["after"].items():
                expect_close(got, wanted[name], rank=rank, name=f"{name} (world size {n})", rtol=0, atol=0)
        _expect_total(seen, n, sum(t.nbytes for t in wanted.values()), 1, "each tensor once")
    return f"every rank has rank 0's parameters and buffers, in worlds of 1 to {len(ranks)} ranks"


def _on_rank_broadcast(answer):
    rank = dist.get_rank()
    torch.manual_seed(50 + rank)
    module = Twelve()
    module.norm.running_mean += rank
    module.norm.num_batches_tracked += 3 * rank + 1
    tensors = _named_tensors(module)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with counted() as sent:
        answer(module)
    dist.barrier()
    now = _named_tensors(module)
    replaced = next((name for name, tensor in tensors.items() if now.get(name) is not tensor), None)
    after = {name: tensor.detach().clone() for name, tensor in now.items()}
    return {"before": before, "after": after, "replaced": replaced, "sent": sent.num_bytes}


def _named_tensors(module) -> dict[str, torch.Tensor]:
    parameters = {f"parameter {name}": p for name, p in module.named_parameters()}
    return parameters | {f"buffer {name}": b for name, b in module.named_buffers()}


def _expect_total(seen, n: int, size_bytes: int, factor: int, formula: str) -> None:
    """All ranks together sent no more than factor (n-1) S: any good algorithm's total."""
    total, budget = sum(rank_seen["sent"] for rank_seen in seen), factor * (n - 1) * size_bytes
    if total > budget + 0.5:
        raise Wrong(
            f"With world size {n}: all ranks together sent {total:,.0f} bytes, the budget is {budget:,} ({formula}). "
            "Is a tied parameter sent twice, or one that has no gradient?"
        )


# 3.2 average_gradients


@exercise("3.2", needs_ranks=True)
def check_average_gradients(answer, ranks):
    """`answer(module)` leaves in each .grad the mean over the ranks, None counting as zeros."""
    trainable = [name for name, p in Twelve().named_parameters() if p.requires_grad]
    for n, seen in in_worlds(ranks, _on_rank_average, answer):
        for rank, rank_seen in enumerate(seen):
            for name, after in rank_seen["parameters"].items():
                expect_unchanged(
                    after, rank_seen["before"][name], rank=rank, name=f"the parameter {name} itself"
                )
            if rank_seen["gradients"]["frozen.weight"] is not None:
                raise Wrong(
                    f"rank {rank}: frozen.weight has a gradient now; a frozen parameter takes no part"
                )
            for name in trainable:
                got, wanted = rank_seen["gradients"][name], sum(s["local"][name] for s in seen) / n
                if got is None and not wanted.any():
                    continue  # no rank had one: nothing or zeros, both are right
                expect_close(got, wanted, rank=rank, name=f"{name}.grad (world size {n})")
        size_bytes = sum(seen[0]["local"][name].nbytes for name in trainable)
        _expect_total(seen, n, size_bytes, 2, "each gradient once, 2(n-1)/n S")
    return f"the mean is right on every rank, in worlds of 1 to {len(ranks)} ranks"


def _on_rank_average(answer):
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(50 + rank)
    module = Twelve()
    without = {"frozen.weight", "unused.weight"} | ({"even_ranks.weight"} if rank % 2 else set())
    for seed, (name, p) in enumerate(module.named_parameters()):
        if name not in without:
            p.grad = tensors_for_ranks(n, p.shape, seed=seed)[rank]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    local = {name: _gradient(p, torch.zeros_like(p)) for name, p in module.named_parameters()}
    with counted() as sent:
        answer(module)
    dist.barrier()
    return {
        "before": before,
        "local": local,
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "gradients": {name: _gradient(p, None) for name, p in module.named_parameters()},
        "sent": sent.num_bytes,
    }


def _gradient(parameter, otherwise):
    return otherwise if parameter.grad is None else parameter.grad.detach().clone()


# 3.3 hooks, 3.4 buckets


@exercise("3.3", needs_ranks=True)
def check_start_when_ready(answer, ranks):
    """`answer(module, start)` starts each gradient's all-reduce in the backward; finish() leaves the means."""
    sizes = [p.nbytes for p in Branches().parameters() if p.requires_grad]
    for n, seen in in_worlds(ranks, on_rank_train, answer, _always):
        expect_steps(seen, n, lambda got: sorted(got) == sorted(sizes), f"{len(sizes)} gradients, each once")
    return f"all {len(sizes)} all-reduces start in the backward, and the means are right in three steps"


@exercise("3.4", needs_ranks=True)
def check_start_in_buckets(answer, ranks):
    """`answer(module, bucket_bytes, start)`: the same in buckets, also if a parameter gets no gradient."""
    for bucket_bytes, smallest in ((250, 1), (1, len(ranks)), (10**6, len(ranks))):
        sizes = _bucket_sizes(bucket_bytes)
        install = _WithBuckets(answer, bucket_bytes)
        what = f"with bucket_bytes={bucket_bytes:,} the buckets have {sizes} bytes"
        for n, seen in in_worlds(ranks, on_rank_train, install, _some_ranks, smallest=smallest):
            expect_steps(seen, n, lambda got, sizes=sizes: got == sizes, what, may_be_late=(1,))
    return f"few messages, each as early as it can be, none forgotten, in worlds of 1 to {len(ranks)} ranks"


def _always(step: int, rank: int) -> bool:
    return True


def _some_ranks(step: int, rank: int) -> bool:
    """In the second step, ranks 1, 3, ... have no gradient for the branch."""
    return not (step == 1 and rank % 2)


class _WithBuckets:
    def __init__(self, answer, bucket_bytes: int):
        self.answer, self.bucket_bytes = answer, bucket_bytes

    def __call__(self, module, start):
        return self.answer(module, self.bucket_bytes, start)


def _bucket_sizes(bucket_bytes: int) -> list[int]:
    sizes: list[int] = []
    for p in reversed([p for p in Branches().parameters() if p.requires_grad]):
        if sizes and sizes[-1] < bucket_bytes:
            sizes[-1] += p.nbytes
        else:
            sizes.append(p.nbytes)
    return sizes


# 3.5 shard_indices


@exercise("3.5")
def check_shard_indices(answer):
    """`answer(num_samples, rank, world_size, epoch=0, seed=0)`: this rank's share of a common permutation."""
    for num_samples, n in ((12, 4), (10, 4), (9, 4), (7, 2), (3, 5), (1, 4), (8, 1), (22, 8)):
        shards = _shards(answer, num_samples, n)
        case = f"{num_samples} samples on {n} {'rank' if n == 1 else 'ranks'}: "
        for rank, shard in enumerate(shards):
            expect_equal(len(shard), -(-num_samples // n), rank=rank, name=f"{case}the number of indices")
            bad = [index for index in shard if not 0 <= index < num_samples]
            if bad:
                raise Wrong(
                    f"{case}rank {rank}: index {bad[0]} is not a sample, expected 0 to {num_samples - 1}"
                )
        count = [sum(shard.count(index) for shard in shards) for index in range(num_samples)]
        most = -(-n * len(shards[0]) // num_samples)
        if 0 in count:
            raise Wrong(
                f"{case}sample {count.index(0)} is on no rank, and {sum(c > 1 for c in count)} are there more than once. "
                "All ranks must cut the same permutation"
            )
        if max(count) > most:
            raise Wrong(
                f"{case}sample {count.index(max(count))} is there {max(count)} times, {most} at most are needed"
            )
    _expect_shuffling(answer)
    return "every sample is on some rank, all ranks have equally many, and each epoch has its own order"


def _expect_shuffling(answer) -> None:
    first = _shards(answer, 60, 4)
    if any(shard == sorted(shard) for shard in first):
        raise Wrong("rank 0's indices are in ascending order, expected a permutation")
    if _shards(answer, 60, 4, global_seed=1) != first:
        raise Wrong("called again, it gives other indices: the permutation may depend on seed and epoch only")
    if _shards(answer, 60, 4, epoch=1) == first:
        raise Wrong("epoch 1 has the same order as epoch 0")
    if _shards(answer, 60, 4, seed=5) == first:
        raise Wrong("seed 5 gives the same order as seed 0")


def _shards(answer, num_samples: int, n: int, *, epoch: int = 0, seed: int = 0, global_seed: int = 0):
    """Every rank's indices; as on real ranks, each call has other global random numbers."""
    shards = []
    for rank in range(n):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * global_seed + rank)
            state = torch.get_rng_state()
            shard = answer(num_samples, rank, n, epoch=epoch, seed=seed)
            touched = not torch.equal(torch.get_rng_state(), state)
        if shard is None:
            raise Wrong(f"rank {rank}: you returned None, expected indices. Is a `return` missing?")
        if isinstance(shard, torch.Tensor):
            raise Wrong("you returned a tensor, expected a list of numbers: .tolist()")
        shards.append([int(index) for index in shard])
        if touched:
            raise Wrong(
                "your function draws from torch's global random numbers, or sets their seed. They differ between ranks, "
                "and dropout needs them to. Use a generator of its own: torch.Generator().manual_seed(...)"
            )
    return shards


# 3.6 exact_accuracy


@exercise("3.6", needs_ranks=True)
def check_exact_accuracy(answer, ranks):
    """`answer(right, num_samples)`: the accuracy over the samples, each counted once, on every rank."""
    for n, seen in in_worlds(ranks, _on_rank_accuracy, answer):
        for rank, cases in enumerate(seen):
            for (num_samples, got, sent), all_right in zip(cases["cases"], cases["all_right"], strict=True):
                name = f"With world size {n}: rank {rank}: accuracy over {num_samples} samples"
                expect_number(got, sum(all_right) / num_samples, name=name)
                if sent > 32 * max(1, n - 1):
                    raise Wrong(
                        f"{name}: you sent {sent:,.0f} bytes, the budget is one all-reduce of two numbers"
                    )
    return f"exact for every number of samples, in worlds of 1 to {len(ranks)} ranks"


def _on_rank_accuracy(answer):
    rank, n = dist.get_rank(), dist.get_world_size()
    cases, everything = [], []
    for num_samples in (3 * n + 1, 2 * n, 40 * n - 1, max(1, n - 1)):
        generator = torch.Generator().manual_seed(num_samples)
        all_right = torch.rand(num_samples, generator=generator) < 0.6
        all_right[: num_samples // 3] = True  # the samples that are there twice are not like the others
        mine = torch.arange(-(-num_samples // n)) * n + rank
        with counted() as sent:
            got = answer(all_right[mine % num_samples].clone(), num_samples)
        dist.barrier()
        cases.append((num_samples, got, sent.num_bytes))
        everything.append(all_right.tolist())
    return {"cases": cases, "all_right": everything}
