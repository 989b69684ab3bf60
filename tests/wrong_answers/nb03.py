"""Notebook 03: wrong answers and the complaint each must provoke; right ones written differently."""

import random
from concurrent.futures import wait
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler

from workshop_utils.collectives import broadcast_, naive_all_reduce_, ring_all_reduce_


def me():
    return dist.get_rank(), dist.get_world_size()


# 3.1 broadcast_parameters


def forgets_buffers(module):
    for p in module.parameters():
        broadcast_(p)


def only_rank_0_calls(module):
    if dist.get_rank() == 0:
        for tensor in [*module.parameters(), *module.buffers()]:
            broadcast_(tensor)


def into_copies(module):
    for tensor in [*module.parameters(), *module.buffers()]:
        broadcast_(tensor.clone())


def everybody_is_the_source(module):
    for tensor in [*module.parameters(), *module.buffers()]:
        broadcast_(tensor, src=dist.get_rank())


def from_the_last_rank(module):
    for tensor in [*module.parameters(), *module.buffers()]:
        broadcast_(tensor, src=dist.get_world_size() - 1)


def averages_the_parameters(module):
    for p in module.parameters():
        dist.all_reduce(p.data)
        p.data /= dist.get_world_size()
    for buffer in module.buffers():
        broadcast_(buffer)


def skips_integers(module):
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            broadcast_(tensor)


def skips_frozen(module):
    for tensor in [*(p for p in module.parameters() if p.requires_grad), *module.buffers()]:
        broadcast_(tensor)


def module_by_module(module):
    for part in module.modules():
        for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            broadcast_(tensor)


def with_new_parameters(module):
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            new = p.detach().clone()
            broadcast_(new)
            setattr(part, name, nn.Parameter(new))
    for buffer in module.buffers():
        broadcast_(buffer)


def with_torch(module):
    with torch.no_grad():
        for tensor in [*module.buffers(), *module.parameters()]:
            dist.broadcast(tensor, src=0)


def by_the_names_of_the_state(module):
    state, done = module.state_dict(), set()
    for name in sorted(state):
        if state[name].data_ptr() not in done:
            broadcast_(state[name])
            done.add(state[name].data_ptr())


# 3.2 average_gradients


def _trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def _with_zeros(module):
    for p in _trainable(module):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in _trainable(module)]


def sums(module):
    for gradient in _with_zeros(module):
        ring_all_reduce_(gradient)


def divides_on_rank_0(module):
    for gradient in _with_zeros(module):
        ring_all_reduce_(gradient)
        if dist.get_rank() == 0:
            gradient /= dist.get_world_size()


def divides_by_four(module):
    for gradient in _with_zeros(module):
        ring_all_reduce_(gradient)
        gradient /= 4


def averages_the_weights(module):
    for p in _trainable(module):
        ring_all_reduce_(p.data)
        p.data /= dist.get_world_size()


def skips_missing_gradients(module):
    for p in module.parameters():
        if p.grad is not None:
            ring_all_reduce_(p.grad)
            p.grad /= dist.get_world_size()


def fills_frozen_ones(module):
    for p in module.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        ring_all_reduce_(p.grad)
        p.grad /= dist.get_world_size()


def reduces_tied_twice(module):
    _with_zeros(module)
    for part in module.modules():
        for p in part.parameters(recurse=False):
            if p.requires_grad:
                ring_all_reduce_(p.grad)
                p.grad /= dist.get_world_size()


def among_those_who_have_one(module):
    for p in _trainable(module):
        count = torch.tensor([0.0 if p.grad is None else 1.0])
        dist.all_reduce(count)
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        ring_all_reduce_(p.grad)
        p.grad /= count.clamp(min=1)


def swaps_with_a_partner(module):
    rank, n = me()
    for gradient in _with_zeros(module):
        distance = 1
        while distance < n:  # hangs, or forgets ranks, where n is not a power of two
            received = torch.empty_like(gradient)
            sending = dist.isend(gradient.clone(), rank ^ distance)
            dist.recv(received, rank ^ distance)
            sending.wait()
            gradient += received
            distance *= 2
        gradient /= n


def gathers_everything(module):
    for gradient in _with_zeros(module):
        parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, gradient)
        gradient.copy_(torch.stack(parts).mean(0))


def as_one_tensor(module):
    gradients = _with_zeros(module)
    flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
    naive_all_reduce_(flat)
    torch.nn.utils.vector_to_parameters(flat, gradients)


def with_torchs_all_reduce(module):
    for p in reversed(_trainable(module)):
        total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(total)
        p.grad = total / dist.get_world_size()


# 3.3 start_when_ready


def _hooks(module, hook):
    for p in module.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(hook)


def hands_over_the_parameter(module, start):
    jobs = []
    _hooks(module, lambda p: jobs.append((p.data, start(p.data))))

    def finish():
        for tensor, job in jobs:
            job.result()
            tensor /= dist.get_world_size()
        jobs.clear()

    return finish


def waits_in_the_hook(module, start):
    def hook(p):
        start(p.grad).result()
        p.grad /= dist.get_world_size()

    _hooks(module, hook)
    return lambda: None


def reduces_in_the_hook(module, start):
    def hook(p):
        ring_all_reduce_(p.grad)
        p.grad /= dist.get_world_size()

    _hooks(module, hook)
    return lambda: None


def starts_in_finish(module, start):
    def finish():
        jobs = [(p.grad, start(p.grad)) for p in module.parameters() if p.requires_grad]
        for gradient, job in jobs:
            job.result()
            gradient /= dist.get_world_size()

    return finish


def does_not_wait(module, start):
    jobs = []
    _hooks(module, lambda p: jobs.append((p.grad, start(p.grad))))

    def finish():
        for gradient, _ in jobs:
            gradient /= dist.get_world_size()
        jobs.clear()

    return finish


def does_not_divide(module, start):
    jobs = []
    _hooks(module, lambda p: jobs.append(start(p.grad)))

    def finish():
        wait(jobs)
        jobs.clear()

    return finish


def keeps_old_jobs(module, start):
    jobs = []
    _hooks(module, lambda p: jobs.append((p, start(p.grad))))

    def finish():
        for p, job in jobs:
            job.result()
            p.grad /= dist.get_world_size()

    return finish


def divides_on_the_first_rank(module, start):
    jobs = []
    _hooks(module, lambda p: jobs.append((p.grad, start(p.grad))))

    def finish():
        for gradient, job in jobs:
            job.result()
            if dist.get_rank() == 0:
                gradient /= dist.get_world_size()
        jobs.clear()

    return finish


def sends_a_copy(module, start):
    jobs = []
    _hooks(module, lambda p: jobs.append((p.grad, start(p.grad.clone()))))

    def finish():
        for gradient, job in jobs:
            job.result()
            gradient /= dist.get_world_size()
        jobs.clear()

    return finish


def returns_no_function(module, start):
    _hooks(module, lambda p: start(p.grad))


def divides_while_it_is_added_up(module, start):
    jobs = []

    def hook(p):
        jobs.append(start(p.grad))
        p.grad /= dist.get_world_size()

    _hooks(module, hook)

    def finish():
        while jobs:
            jobs.pop().result()

    return finish


def divides_first(module, start):
    jobs = []

    def hook(p):
        p.grad.div_(dist.get_world_size())
        jobs.append(start(p.grad))

    _hooks(module, hook)

    def finish():
        while jobs:
            jobs.pop().result()

    return finish


def by_name(module, start):
    jobs = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: jobs.update({name: start(p.grad)}))

    def finish():
        for name, p in module.named_parameters():
            if name in jobs:
                jobs.pop(name).result()
                p.grad = p.grad / dist.get_world_size()

    return finish


# 3.4 start_in_buckets


def buckets(
    forwards=False,
    flush=True,
    in_order=True,
    divide=True,
    reset=True,
    frozen=False,
    closes_early=False,
    put_back=True,
    wait_for_jobs=True,
    fill=True,
):
    """A way to write 3.4 with one mistake, or none."""

    def start_in_buckets(module, bucket_bytes, start):
        todo = [p for p in module.parameters() if p.requires_grad or frozen]
        assigned = [[]]
        for p in todo if forwards else reversed(todo):
            used = sum(q.nbytes for q in assigned[-1])
            if assigned[-1] and (used + p.nbytes > bucket_bytes if closes_early else used >= bucket_bytes):
                assigned.append([])
            assigned[-1].append(p)
        state = SimpleNamespace(ready=set(), running={})

        def start_complete():
            for i, bucket in enumerate(assigned):
                if i not in state.running and state.ready.issuperset(bucket):
                    flat = torch.cat([_gradient_or_zeros(p).flatten() for p in bucket])
                    state.running[i] = (flat, start(flat))
                elif i not in state.running and in_order:
                    break

        def hook(p):
            state.ready.add(p)
            start_complete()

        for p in todo:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(hook)

        def finish():
            if flush:
                state.ready.update(p for p in todo if fill or p.grad is not None)
                start_complete()
            for i, (flat, job) in state.running.items():
                if wait_for_jobs:
                    job.result()
                if divide:
                    flat /= dist.get_world_size()
                if put_back:
                    _write(assigned[i], flat)
            if reset:
                state.ready.clear()
                state.running.clear()

        return finish

    return start_in_buckets


def _gradient_or_zeros(p):
    return torch.zeros_like(p) if p.grad is None else p.grad


def _write(bucket, flat):
    at = 0
    for p in bucket:
        p.grad = flat[at : at + p.numel()].view(p.shape).clone()
        at += p.numel()


def named(name, function):
    function.__name__ = name
    return function


forward_order = named("forward_order", buckets(forwards=True))
never_flushed = named("never_flushed", buckets(flush=False))
whatever_is_complete = named("whatever_is_complete", buckets(in_order=False))
sums_of_buckets = named("sums_of_buckets", buckets(divide=False))
not_ready_again = named("not_ready_again", buckets(reset=False))
waits_for_frozen = named("waits_for_frozen", buckets(frozen=True))
never_more_than_allowed = named("never_more_than_allowed", buckets(closes_early=True))
forgets_to_put_back = named("forgets_to_put_back", buckets(put_back=False))
puts_back_too_early = named("puts_back_too_early", buckets(wait_for_jobs=False))


def drops_the_last_one(module, bucket_bytes, start):
    """Starts a bucket when it is full, and forgets that the last one never is."""
    filling, running = [], []

    def begin():
        flat = torch.cat([_gradient_or_zeros(p).flatten() for p in filling])
        running.append((list(filling), flat, start(flat)))
        filling.clear()

    def hook(p):
        filling.append(p)
        if sum(q.nbytes for q in filling) >= bucket_bytes:
            begin()

    _hooks(module, hook)

    def finish():
        for bucket, flat, job in running:
            job.result()
            _write(bucket, flat / dist.get_world_size())
        running.clear()

    return finish


def all_in_one_at_the_end(module, bucket_bytes, start):
    def finish():
        todo = [p for p in module.parameters() if p.requires_grad]
        flat = torch.cat([_gradient_or_zeros(p).flatten() for p in reversed(todo)])
        start(flat).result()
        _write(reversed(todo), flat / dist.get_world_size())

    return finish


another_way = named("another_way", buckets())


def with_counters(module, bucket_bytes, start):
    todo, groups = [p for p in module.parameters() if p.requires_grad][::-1], []
    for p in todo:
        if not groups or groups[-1].room <= 0:
            groups.append(SimpleNamespace(room=bucket_bytes, members=[], fired=set(), job=None, flat=None))
        groups[-1].room -= p.nbytes
        groups[-1].members.append(p)
    of = {p: group for group in groups for p in group.members}

    def launch(force=False):
        for group in groups:
            if group.job is None:
                if len(group.fired) < len(group.members) and not force:
                    return
                group.flat = torch.cat([_gradient_or_zeros(p).reshape(-1) for p in group.members])
                group.flat.div_(dist.get_world_size())
                group.job = start(group.flat)

    def hook(p):
        of[p].fired.add(id(p))
        launch()

    _hooks(module, hook)

    def finish():
        launch(force=True)
        for group in groups:
            group.job.result()
            _write(group.members, group.flat)
            group.job, group.fired = None, set()

    return finish


# 3.5 shard_indices


def _cut(order, rank, world_size):
    order = list(order)
    order += order[: -len(order) % world_size]
    while len(order) % world_size:
        order.append(order[0])
    return order[rank::world_size]


def _permutation(num_samples, seed):
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).tolist()


def no_permutation(num_samples, rank, world_size, epoch=0, seed=0):
    return _cut(range(num_samples), rank, world_size)


def a_permutation_for_each_rank(num_samples, rank, world_size, epoch=0, seed=0):
    return _cut(_permutation(num_samples, seed + epoch + 17 * rank), rank, world_size)


def from_the_global_generator(num_samples, rank, world_size, epoch=0, seed=0):
    return _cut(torch.randperm(num_samples).tolist(), rank, world_size)


def sets_the_global_seed(num_samples, rank, world_size, epoch=0, seed=0):
    torch.manual_seed(seed + epoch)
    return _cut(torch.randperm(num_samples).tolist(), rank, world_size)


def ignores_the_epoch(num_samples, rank, world_size, epoch=0, seed=0):
    return _cut(_permutation(num_samples, seed), rank, world_size)


def ignores_the_seed(num_samples, rank, world_size, epoch=0, seed=0):
    return _cut(_permutation(num_samples, epoch), rank, world_size)


def pads_with_zeros(num_samples, rank, world_size, epoch=0, seed=0):
    order = _permutation(num_samples, seed + epoch)
    order += [0] * (-num_samples % world_size)
    return order[rank::world_size]


def does_not_pad(num_samples, rank, world_size, epoch=0, seed=0):
    return _permutation(num_samples, seed + epoch)[rank::world_size]


def drops_the_rest(num_samples, rank, world_size, epoch=0, seed=0):
    size = max(1, num_samples // world_size)
    return _permutation(num_samples, seed + epoch)[rank * size : (rank + 1) * size]


def pads_once_only(num_samples, rank, world_size, epoch=0, seed=0):
    order = _permutation(num_samples, seed + epoch)
    order += order[: -num_samples % world_size]
    return order[rank::world_size]


def counts_from_one(num_samples, rank, world_size, epoch=0, seed=0):
    return [index + 1 for index in _cut(_permutation(num_samples, seed + epoch), rank, world_size)]


def returns_nothing(num_samples, rank, world_size, epoch=0, seed=0):
    _cut(_permutation(num_samples, seed + epoch), rank, world_size)


def in_blocks(num_samples, rank, world_size, *, epoch=0, seed=0):
    order = list(range(num_samples))
    random.Random(f"{seed} {epoch}").shuffle(order)
    size = -(-num_samples // world_size)
    return [order[i % num_samples] for i in range(rank * size, (rank + 1) * size)]


def returns_a_tensor(num_samples, rank, world_size, *, epoch=0, seed=0):
    return torch.tensor(in_blocks(num_samples, rank, world_size, epoch=epoch, seed=seed))


def like_torchs_sampler(num_samples, rank, world_size, *, epoch=0, seed=0):
    sampler = DistributedSampler(range(num_samples), num_replicas=world_size, rank=rank, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


# 3.6 exact_accuracy


def _all_sum(*numbers):
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total


def counts_padding_too(right, num_samples):
    good, count = _all_sum(right.sum(), len(right))
    return (good / count).item()


def divides_by_the_true_number_only(right, num_samples):
    (good,) = _all_sum(right.sum())
    return good.item() / num_samples


def _is_real(right, num_samples):
    rank, n = me()
    return rank + torch.arange(len(right)) * n < num_samples


def mean_of_accuracies(right, num_samples):
    (total,) = _all_sum(right[_is_real(right, num_samples)].double().mean().nan_to_num())
    return total.item() / dist.get_world_size()


def drops_on_the_last_rank_only(right, num_samples):
    rank, n = me()
    if rank == n - 1 and num_samples % n:
        right = right[:-1]
    good, count = _all_sum(right.sum(), len(right))
    return (good / count).item()


def thinks_in_blocks(right, num_samples):
    rank, _ = me()
    real = rank * len(right) + torch.arange(len(right)) < num_samples
    return _all_sum(right[real].sum())[0].item() / num_samples


def own_shard_only(right, num_samples):
    real = _is_real(right, num_samples)
    return (right[real].sum() / real.sum()).item()


def returns_on_rank_0(right, num_samples):
    (good,) = _all_sum(right[_is_real(right, num_samples)].sum())
    return good.item() / num_samples if dist.get_rank() == 0 else None


def returns_the_count(right, num_samples):
    (good,) = _all_sum(right[_is_real(right, num_samples)].sum())
    return good.item()


def only_ranks_with_padding_talk(right, num_samples):
    real, good = _is_real(right, num_samples), right.sum()
    if not real.all() or num_samples % dist.get_world_size() == 0:
        (good,) = _all_sum(right[real].sum())
    return float(good) / num_samples


def gathers_all_answers(right, num_samples):
    n = dist.get_world_size()
    parts = [torch.empty(len(right), dtype=torch.float64) for _ in range(n)]
    dist.all_gather(parts, right.double())
    return torch.stack(parts, dim=1).flatten()[:num_samples].mean().item()


def with_two_sums(right, num_samples):
    real = _is_real(right, num_samples)
    good, count = _all_sum((right & real).sum(), real.sum())
    return good / count


def by_length(right, num_samples):
    rank, n = me()
    mine = len(range(rank, num_samples, n))
    good = right[:mine].sum()
    ring_all_reduce_(good)
    return int(good) / num_samples


WRONG = {
    "3.1": [
        (forgets_buffers, r"rank 1: buffer norm.running_mean .*is .*, expected"),
        (only_rank_0_calls, r"rank 0: waiting[\s\S]*broadcast_\(tensor\)[\s\S]*world had 2 ranks"),
        (into_copies, r"rank 1: parameter first.weight .*is .*, expected"),
        (everybody_is_the_source, r"waiting[\s\S]*world had 2 ranks"),
        (from_the_last_rank, r"rank 0: parameter first.weight .*is .*, expected"),
        (averages_the_parameters, r"rank 0: parameter first.weight .*is .*, expected"),
        (skips_integers, r"rank 1: buffer norm.num_batches_tracked .*is 4, expected 1"),
        (skips_frozen, r"rank 1: parameter frozen.weight .*is .*, expected"),
        (module_by_module, r"With world size 2: all ranks together sent .* tied parameter sent twice"),
        (with_new_parameters, r"rank 0: parameter first.weight is a new tensor"),
    ],
    "3.2": [
        (sums, r"rank 0: first.weight.grad \(world size 2\).* is .*, expected"),
        (divides_on_rank_0, r"rank 1: first.weight.grad \(world size 2\).* is .*, expected"),
        (divides_by_four, r"rank 0: first.weight.grad \(world size [12]\).* is .*, expected"),
        (averages_the_weights, r"rank 0: the parameter first.weight itself was changed"),
        (skips_missing_gradients, r"rank 0: waiting[\s\S]*world had 2 ranks"),
        (fills_frozen_ones, r"frozen.weight has a gradient now"),
        (reduces_tied_twice, r"With world size 2: all ranks together sent .* tied parameter sent twice"),
        (among_those_who_have_one, r"even_ranks.weight.grad \(world size 2\).* is .*, expected"),
        (swaps_with_a_partner, r"world had 3 ranks"),
        (gathers_everything, r"With world size 3: all ranks together sent .* the budget is"),
    ],
    "3.3": [
        (hands_over_the_parameter, r"you started the all-reduce of the parameter \S+ itself"),
        (waits_in_the_hook, r"you wait for a job inside the backward"),
        (reduces_in_the_hook, r"you started all-reduces of \[\] bytes; expected"),
        (
            starts_in_finish,
            r"world size 1, step 1: rank 0: \d+ of \d+ all-reduces were started only after the backward",
        ),
        (does_not_wait, r"finish\(\) returned before \d+ of the all-reduces were done"),
        (does_not_divide, r"With world size 2, step 1: rank 0: a.weight.grad\[0, 0\] is .*, expected"),
        (keeps_old_jobs, r"With world size 2, step 2: rank \d: (.*forget the jobs of earlier|a.weight.grad)"),
        (
            divides_on_the_first_rank,
            r"With world size 2, step 1: rank 1: a.weight.grad\[0, 0\] is .*, expected",
        ),
        (sends_a_copy, r"With world size 2, step 1: rank 0: a.weight.grad\[0, 0\] is .*, expected"),
        (returns_no_function, r"you returned None, expected the function finish"),
        (divides_while_it_is_added_up, r"rank 0: you change a tensor after start"),
    ],
    "3.4": [
        (forward_order, r"you started all-reduces of \[.*\] bytes; expected with bucket_bytes=250"),
        (never_flushed, r"With world size 2, step 2: rank 1: you started all-reduces of \[.*\]|deadline"),
        (
            whatever_is_complete,
            r"all-reduce \d has \[.*\] bytes on the ranks: every rank must start them in one order",
        ),
        (sums_of_buckets, r"With world size 2, step 1: rank 0: a.weight.grad\[0, 0\] is .*, expected"),
        (not_ready_again, r"world size 1, step 2: rank 0: you started all-reduces of \[\] bytes"),
        (waits_for_frozen, r"you started all-reduces of \[.*\] bytes; expected"),
        (never_more_than_allowed, r"you started all-reduces of \[.*\] bytes; expected with bucket_bytes=250"),
        (forgets_to_put_back, r"With world size 2, step 1: rank 0: a.weight.grad\[0, 0\] is .*, expected"),
        (puts_back_too_early, r"finish\(\) returned before \d+ of the all-reduces were done"),
        (
            drops_the_last_one,
            r"world size 1, step 1: rank 0: you started all-reduces of \[.*\] bytes; expected",
        ),
        (all_in_one_at_the_end, r"you started all-reduces of \[\d+\] bytes; expected"),
    ],
    "3.5": [
        (no_permutation, r"ascending order, expected a permutation"),
        (a_permutation_for_each_rank, r"sample \d+ is on no rank.*same permutation"),
        (from_the_global_generator, r"sample \d+ is on no rank|global random numbers"),
        (sets_the_global_seed, r"global random numbers, or sets their seed"),
        (ignores_the_epoch, r"epoch 1 has the same order as epoch 0"),
        (ignores_the_seed, r"seed 5 gives the same order as seed 0"),
        (
            pads_with_zeros,
            r"9 samples on 4 ranks: sample 0 is there 4 times, 2 at most|sample 0 is there 3 times",
        ),
        (does_not_pad, r"10 samples on 4 ranks: the number of indices is 2, expected 3"),
        (drops_the_rest, r"10 samples on 4 ranks: the number of indices is 2, expected 3"),
        (pads_once_only, r"1 samples on 4 ranks: the number of indices is 0, expected 1"),
        (counts_from_one, r"index 12 is not a sample, expected 0 to 11"),
        (returns_nothing, r"you returned None, expected indices"),
        (returns_a_tensor, r"you returned a tensor, expected a list"),
    ],
    "3.6": [
        (counts_padding_too, r"With world size 2: rank 0: accuracy over 7 samples is .*, expected"),
        (
            divides_by_the_true_number_only,
            r"With world size 2: rank 0: accuracy over 7 samples is .*, expected",
        ),
        (mean_of_accuracies, r"With world size [23]: rank 0: accuracy over \d+ samples is .*, expected"),
        (drops_on_the_last_rank_only, r"With world size 3: rank 0: accuracy over 10 samples is .*, expected"),
        (thinks_in_blocks, r"accuracy over \d+ samples is .*, expected"),
        (own_shard_only, r"With world size 2: rank 0: accuracy over 7 samples is .*, expected"),
        (returns_on_rank_0, r"With world size 2: rank 1: accuracy over 7 samples is None, expected"),
        (returns_the_count, r"accuracy over 4 samples is .*, expected"),
        (only_ranks_with_padding_talk, r"rank 1: waiting.* in all_reduce[\s\S]*world had 2 ranks"),
        (gathers_all_answers, r"you sent .* bytes, the budget is one all-reduce of two numbers"),
    ],
}
RIGHT = {
    "3.1": [with_torch, by_the_names_of_the_state],
    "3.2": [as_one_tensor, with_torchs_all_reduce],
    "3.3": [divides_first, by_name],
    "3.4": [another_way, with_counters],
    "3.5": [in_blocks, like_torchs_sampler],
    "3.6": [with_two_sums, by_length],
}
