# %% [markdown]
# # 03 · Distributed data parallel
#
# **What must be communicated so that N replicas equal one big batch?**
#
# After this notebook you can
#
# - write data parallelism in four steps, and prove each of them against one process;
# - read a timeline of compute and communication, and say what overlaps and what does not;
# - cut a data set into shards, and evaluate exactly although the last shard is padded;
# - predict the share of a step that goes to communication, from the link;
# - read the three reports that a broken data-parallel run gives, and repair it.
#
# 45 minutes, of which 27 are exercises. It builds on [notebook 01](01_single_device_mlp.ipynb) (the gradient of a
# batch is the mean of its parts' gradients) and on [notebook 02](02_all_reduce.ipynb) (the ring).

# %% [markdown] tags=["instructor"]
# **For the instructor.** Code steps 1 and 2 live; let the room write 3.3, and run `waits in the hook` when somebody does
# it: the numbers are right and nothing overlaps. Ask before the timeline what its longest bar will be. Of the three
# failures, show the first report without its card and let the room find the rank. If time is short, skip 3.4 and 3.6
# (`mine` supplies them), the learning-rate section, and Accelerate.

# %% tags=["parameters"]
PROFILE = (
    "quick"  # "full": four ranks under torchrun, a worker that is killed, more repeats; 3 minutes longer
)

# %%
import contextlib

import torch
import torch.distributed as dist
from torch import nn
import matplotlib.pyplot as plt

from workshop_utils import check, compare_guess, guess, hint, mine, solution, start_ranks, use_style

use_style()

# %% tags=["nbval-ignore-output"]
ranks = start_ranks(4)

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: one sentence is the test for all that follows: after every step, each replica equals one process on the
#   whole batch.
# - *Ask*: why is each rank seeded with its own number? Alike seeds would hide a missing broadcast.
# - *Say*: `compare` prints two numbers, between replicas and to one process. Right now both are large.

# %% [markdown]
# ## What has to be equal, and when?
#
# *Data parallelism*: every rank has a whole copy of the model, a *replica*, and works on its own part of each batch.
# If all replicas start equal and all take the same update, they stay equal. One process on the whole batch would
# take the update that follows from the mean of the parts' gradients. So that is the test for everything below:
# **after every step, every replica has the weights of one process that saw the whole batch.**
#
# The function below trains one replica. Each rank is seeded with its own number, as processes on different machines
# would be, so the replicas start different. What we do about it goes into `prepare`: it gets the model before the
# training and returns what is to be done after each backward.

# %% tags=["nbval-ignore-output"]
from torch.nn import functional as F

from workshop_utils.data import load_mnist
from workshop_utils.models import MLP

data, B = load_mnist(), 96
batches = list(zip(data.train_images[: 3 * B].clone().split(B), data.train_labels[: 3 * B].clone().split(B)))


def train_replica(prepare, batches, dtype=torch.float64):
    """The weights after each step [steps, D]. Without a process group: one process, the whole batch."""
    rank, n = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(rank)
    model, after_steps = MLP().to(dtype), []
    after_backward = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images.chunk(n)[rank].to(dtype)), labels.chunk(n)[rank]).backward()
        after_backward()
        optimizer.step()
        after_steps.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return torch.stack(after_steps)


# %%
def step_0(model):
    return lambda: None  # nobody talks to anybody


def compare(prepare, dtype=torch.float64):
    """Largest difference of any weight after any step: between replicas, and to one process."""
    expected = train_replica(step_0, batches, dtype)
    replicas = torch.stack(ranks.run(train_replica, prepare, batches, dtype))
    apart, off = (replicas - replicas[0]).abs().max().item(), (replicas - expected).abs().max().item()
    print(f"{prepare.__name__}, {dtype}: replicas differ by {apart:.0e}; from one process by {off:.0e}")
    return apart, off


_ = compare(step_0)

# %% [markdown] tags=["instructor"]
# **3 min.**
#
# - *Type*: 3.1 live. Begin with `if rank == 0: broadcast`. `rank 0: waiting`: a collective is called by all.
# - *Break it*: parameters without buffers: `rank 1: buffer norm.running_mean is ..., expected ...`.

# %% [markdown]
# Four models that have nothing to do with each other. Had all ranks been seeded alike, the first line of the cure would
# seem unnecessary. That is how a missing broadcast survives its tests.
#
# ## Step 1: start equal
#
# Rank 0's weights go to all. Its *buffers* too: tensors that belong to the model and are not trained, like the running
# mean of a batch normalisation.
#
# ### Exercise 3.1 · Broadcast the module  (★, 3 min)
#
# Overwrite every parameter and every buffer, on every rank, by that of rank 0. Buffers may be integers. The tensors
# themselves must stay: an optimizer may hold them already. Budget: each tensor is broadcast once, a tied weight too.

# %% [markdown] tags=["hints-3.1"]
# 1. `broadcast_(tensor, src=0)` of notebook 02 works in place, on any shape and dtype. Which tensors does a module have?
# 2. `module.parameters()` and `module.buffers()` give them, each one once. All ranks must take them in the same order,
#    and they do.
# 3. `for tensor in [*module.parameters(), *module.buffers()]:` and in the loop `broadcast_(tensor)`.

# %% tags=["exercise-3.1", "nbval-check-output"]
from workshop_utils.collectives import broadcast_, ring_all_reduce_


def broadcast_parameters(module):
    """Every rank's parameters and buffers become those of rank 0, in place."""
    ### BEGIN SOLUTION
    # ~ # TODO: broadcast_(tensor) for each tensor of the module
    # ~ raise NotImplementedError("exercise 3.1")
    for tensor in [*module.parameters(), *module.buffers()]:
        broadcast_(tensor)
    ### END SOLUTION


check("3.1", broadcast_parameters)

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Ask*: with equal starts and nothing more, how far apart are the replicas after three steps?
# - *Type*: 3.2 live, and forget the division: `first.weight.grad is ..., expected ...`, n times too large.
# - *Break it*: `if parameter.grad is not None` as the condition. On the model with an unused layer ranks wait for
#   ever.
# - *Stuck*: the choice may depend on `requires_grad`, which all ranks share, never on `.grad`.

# %% [markdown]
# ## Step 2: take the same update
#
# Equal at the start, and then? Each rank follows the gradient of its own images. Step 2 is one line more than step 1: it
# averages the gradients after the backward.
#
# **Predict.** With step 1 alone, how far apart will the replicas be after three updates: as far as above, or less?
#
# ### Exercise 3.2 · Average the gradients  (★★, 4 min)
#
# After `average_gradients(module)`, each `.grad` holds the mean over the ranks. Three things happen in real models. A
# *frozen* parameter (`requires_grad` is false) has no gradient and takes no part. A *tied* one is used in two places
# and is still one tensor. And a parameter may have had nothing to do in this step, on this rank: its `.grad` is `None`,
# which counts as zeros. Budget: each gradient through one `ring_all_reduce_`, 2(n-1)/n S.

# %% [markdown] tags=["hints-3.2"]
# 1. `ring_all_reduce_(tensor)` leaves the sum. Every rank has to call it for the same parameters, or some wait for ever.
# 2. So the choice must not depend on `.grad`, which differs between ranks. It may depend on `requires_grad`. Where
#    `.grad` is `None`, make it `torch.zeros_like(parameter)`.
# 3. For each `parameter` in `module.parameters()` that requires a gradient: zeros if there is none,
#    `ring_all_reduce_(parameter.grad)`, `parameter.grad /= dist.get_world_size()`.


# %% tags=["exercise-3.2", "nbval-check-output"]
def average_gradients(module):
    """Each parameter's .grad becomes its mean over the ranks; no gradient counts as zeros."""
    ### BEGIN SOLUTION
    # ~ # TODO: for each trainable parameter: its gradient (or zeros), the sum over the ranks, the mean
    # ~ raise NotImplementedError("exercise 3.2")
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            ring_all_reduce_(parameter.grad)
            parameter.grad /= dist.get_world_size()
    ### END SOLUTION


check("3.2", average_gradients)

# %% tags=["nbval-ignore-output"]
broadcast_parameters, average_gradients = mine("broadcast_parameters"), mine("average_gradients")


def step_1(model):
    broadcast_parameters(model)
    return lambda: None


def step_2(model):
    broadcast_parameters(model)
    return lambda: average_gradients(model)


compare(step_1)
apart, off = compare(step_2)
assert apart == 0 and off < 1e-10
assert compare(step_2, torch.float32)[1] < 1e-5

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: how many of the entries differ from one process? Tens of percent, and nothing is wrong: another order of
#   adding.
# - *Say*: two parts have one order, four have several. Parity here means 1e-10 in float64.

# %% [markdown]
# With step 1 alone three updates have taken the replicas nearly as far apart as strangers are. Step 2 is data
# parallelism, complete. The replicas are equal in every bit, as the ring gives all ranks the same bits. And
# from one process they differ by a rounding, in the sixteenth digit of float64 and in the eighth of float32.
#
# ## Why not exactly?
#
# **Predict.** The first gradient, in float32: how many of its entries differ from those of one process in some bit?
# (`sub_world(n)` is a world of the first n ranks, as in notebook 02.)

# %% tags=["nbval-ignore-output"]
from workshop_utils import sub_world


def part_gradient(part, n):
    """The gradient [D] of one of n parts of the first batch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as on the ranks: more threads, another order
    model, (images, labels) = MLP(), batches[0]
    F.cross_entropy(model(images.chunk(n)[part]), labels.chunk(n)[part]).backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


def summed_gradient(n):
    with sub_world(n) as inside:
        if inside:
            flat = part_gradient(dist.get_rank(), n)
            ring_all_reduce_(flat)
            return flat


for n in sorted({2, len(ranks)}):
    averaged, whole = ranks.run(summed_gradient, n)[0] / n, part_gradient(0, 1)
    accumulated = sum(part_gradient(part, n) for part in range(n)) / n
    share, same = (averaged != whole).float().mean(), torch.equal(averaged, accumulated)
    print(f"{n} ranks: {share:.0%} of the entries differ; equal to {n} parts added up in one process: {same}")

# %% [markdown] tags=["instructor"]
# **6 min.**
#
# - *Say*: the last layer's gradient is complete first. It could be on its way while fc1 still computes.
# - *Room*: 3.3, 5 minutes. Mind what the hook is given: `you started the all-reduce of the parameter itself`.
# - *Break it*: when somebody waits in the hook, run it for all: the numbers are right, nothing overlaps, the check
#   says `you wait for a job inside the backward`.
# - *Ask*: why one thread? All ranks must do the all-reduces in one order.

# %% [markdown]
# A sum of rounded numbers depends on the order of the additions, and a matrix product over 96 images adds in another
# order than four over 24. So nothing is wrong. Add up the same halves in one process, and the bits are the same: two
# numbers have only one order. Four have several, and the ring uses another one in each chunk. In this series parity
# means 1e-10 in float64, and in float32 1e-5 with SGD. Not with Adam: it divides by the gradient's size, and enlarges
# the rounding of small gradients.
#
# ## Step 3: start when ready
#
# Step 2 first computes, then sends. But notebook 01 found the order in which gradients are complete: the last layer's
# first. It could be on its way while the layers before it still compute.
#
# Two parts are needed. A *hook*, which autograd calls as soon as a gradient is complete. And somebody who sends while
# the main thread goes on: a second thread, which does one all-reduce after another. (One thread, because all ranks must
# do them in the same order. autograd and sockets release Python's lock while they work or wait, so both make progress.)
# Below, `start(tensor)` hands an all-reduce to that thread and returns a *job* at once; `job.result()` waits for it.
#
# ### Exercise 3.3 · Hooks  (★★, 5 min)
#
# `parameter.register_post_accumulate_grad_hook(hook)` calls `hook(parameter)` when `parameter.grad` is complete. Register
# one on each trainable parameter that starts the all-reduce of its gradient. Return a function `finish()` that waits for
# all of them and leaves the means. It is called after every backward, and has to leave things ready for the next.

# %% [markdown] tags=["hints-3.3"]
# 1. Mind what the hook is given: the parameter. A public repository averages the weights instead of the gradients
#    because of that.
# 2. Keep a list of pairs (gradient, job). The hook appends one, without waiting. `finish` goes through the list.
# 3. In the hook: `jobs.append((parameter.grad, start(parameter.grad)))`. In `finish`, for each pair: `job.result()`,
#    then `gradient /= dist.get_world_size()`; at the end `jobs.clear()`.


# %% tags=["exercise-3.3", "nbval-check-output"]
def start_when_ready(module, start):
    """Hooks that start(gradient) as soon as it is complete. Returns finish(): wait for all, leave the means."""
    jobs = []
    ### BEGIN SOLUTION
    # ~ # TODO: hook(parameter) starts; register it on each trainable parameter; finish() waits and divides
    # ~ raise NotImplementedError("exercise 3.3")

    def hook(parameter):
        jobs.append((parameter.grad, start(parameter.grad)))

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(hook)

    def finish():
        for gradient, job in jobs:
            job.result()
            gradient /= dist.get_world_size()
        jobs.clear()

    return finish
    ### END SOLUTION


check("3.3", start_when_ready)

# %% tags=["nbval-ignore-output"]
from concurrent.futures import ThreadPoolExecutor

start_when_ready = mine("start_when_ready")


def in_background():
    thread = ThreadPoolExecutor(max_workers=1)
    return lambda tensor: thread.submit(ring_all_reduce_, tensor)


def step_3(model):
    broadcast_parameters(model)
    return start_when_ready(model, in_background())


apart, off = compare(step_3)
assert apart == 0 and off < 1e-10

# %% [markdown] tags=["instructor"]
# **8 min.**
#
# - *Say*: three places to fill in. Assign, start, finish; do assign together on the board.
# - *Room*: 3.4, 8 minutes, or skip it: `mine` has it.
# - *Break it*: start whatever is complete. `every rank must start them in one order`: here it shows, on a cluster it
#   hangs.
# - *Type*: `SmallDataParallel` live afterwards: it is six lines, and it is torch's class.

# %% [markdown]
# The same numbers, sent earlier. But also more messages than necessary: a ring has 2(n-1) of them for every gradient, and
# each costs its latency, also for a bias of 200 numbers. And one thing is fragile: a gradient that never gets ready on one
# rank is never started there.
#
# ## Step 4: buckets
#
# Collect gradients in *buckets* of some megabytes, in the order in which they get ready, about the reverse of
# `module.parameters()`. A bucket is sent when all of its gradients are there: few messages, and still early. Three
# helpers do what is not new:


# %%
def listen(parameters, ready, start_complete_ones):
    """Whenever a gradient is complete: add its parameter to the set `ready`, call start_complete_ones()."""

    def hook(parameter):
        ready.add(parameter)
        start_complete_ones()

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(hook)


def flatten(bucket):
    """The gradients of the bucket's parameters in one new tensor; zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])


def put_back(running):
    """Wait for each (bucket, flat, job); the means become the gradients of the bucket's parameters."""
    for bucket, flat, job in running:
        job.result()
        pieces = (flat / dist.get_world_size()).split([p.numel() for p in bucket])
        for parameter, piece in zip(bucket, pieces):
            parameter.grad = piece.view_as(parameter)


# %% [markdown]
# ### Exercise 3.4 · Buckets  (★★★, 8 min)
#
# Fill in three places. **Assign**: the last parameter comes first; a bucket takes parameters until it holds
# `bucket_bytes` or more. **Start**: a bucket whose gradients are all ready is started at once, but never before the one
# in front of it: all ranks must start them in the same order. **Finish**: start the rest, whatever is missing; put the
# means back; be ready for the next step.

# %% [markdown] tags=["hints-3.4"]
# 1. Assign: if `buckets[-1]` holds enough, append a new list to `buckets`; then append the parameter to the last one.
#    Start: `len(running)` buckets are under way, so the next one is `buckets[len(running)]`.
# 2. A bucket is complete if `ready.issuperset(bucket)`. A parameter without a gradient never gets ready, so `finish`
#    calls all of them ready: `ready.update(trainable)`. Then `start_complete_ones()` starts the rest, in order.
# 3. Start: `while len(running) < len(buckets) and ready.issuperset(buckets[len(running)])`: `flat = flatten(bucket)`,
#    `running.append((bucket, flat, start(flat)))`. Finish: the two lines of hint 2, `put_back(running)`, then clear
#    `ready` and `running`.


# %% tags=["exercise-3.4", "nbval-check-output"]
def start_in_buckets(module, bucket_bytes, start):
    """Buckets, each all-reduced by start(flat) when it is complete. Returns finish()."""
    buckets, ready, running = [[]], set(), []  # running: (bucket, flat, job) of those started
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in reversed(trainable):
        ### BEGIN SOLUTION
        # ~ raise NotImplementedError("exercise 3.4")  # TODO: assign the parameter to a bucket
        if sum(p.nbytes for p in buckets[-1]) >= bucket_bytes:
            buckets.append([])
        buckets[-1].append(parameter)
        ### END SOLUTION

    def start_complete_ones():
        ### BEGIN SOLUTION
        # ~ pass  # TODO: the next bucket in turn, as long as it is complete: start(flatten(bucket)), note it in running
        while len(running) < len(buckets) and ready.issuperset(buckets[len(running)]):
            flat = flatten(buckets[len(running)])
            running.append((buckets[len(running)], flat, start(flat)))
        ### END SOLUTION

    def finish():
        ### BEGIN SOLUTION
        # ~ pass  # TODO: start the rest; put_back(running); clear
        ready.update(trainable)
        start_complete_ones()
        put_back(running)
        ready.clear(), running.clear()
        ### END SOLUTION

    listen(trainable, ready, start_complete_ones)
    return finish


check("3.4", start_in_buckets)

# %% tags=["live", "nbval-ignore-output"]
start_in_buckets = mine("start_in_buckets")


class SmallDataParallel(nn.Module):
    """The four steps in one class. After each backward, call finish_gradient_sync()."""

    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module = module
        broadcast_parameters(module)
        self.finish_gradient_sync = start_in_buckets(module, bucket_bytes, in_background())

    def forward(self, *inputs):
        return self.module(*inputs)


def step_4(model):
    return SmallDataParallel(model, bucket_bytes=200_000).finish_gradient_sync


apart, off = compare(step_4)
assert apart == 0 and off < 1e-10

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: before the timeline, which bar is the longest? Then look for the gap between backward and the last bucket.
# - *Say*: overlap hides at most the backward. With more ranks than cores the thread that sends waits for a core.

# %% [markdown]
# This is what torch's `DistributedDataParallel` does: hooks, buckets of 25 MiB (the first of 1 MiB, so that something
# starts early), and a module around a model that does not know that it is parallel.
#
# ## Does it overlap?
#
# From here on we use the `DataParallel` of `workshop_utils.data_parallel`, which is the same idea with the details that
# come next. It notes when its forward, its backward and each bucket began and ended. `overlap=False` sends everything
# after the backward.
#
# Eight layers, 8.4 MB of gradients in buckets of 1 MiB, and a link of 1 Gb/s for each rank. Both versions take turns.
#
# **Predict.** The step without overlap, divided by the step with it?

# %%
import copy
import os
import statistics
import sys
import time

from workshop_utils.data_parallel import DataParallel
from workshop_utils.network import LINKS, Link, ring_all_reduce_s
from workshop_utils.plotting import data_parallel as figures
from workshop_utils.point_to_point import count_traffic, emulate_link, wire_bytes


def eight_layers():
    return nn.Sequential(*[part for _ in range(8) for part in (nn.Linear(512, 512), nn.ReLU())])


def timed_step(model, x, sync):
    """Seconds of forward, backward and, if asked for, the gradients' way to the other ranks."""
    model.zero_grad()
    dist.barrier()
    began_s = time.perf_counter()
    with contextlib.nullcontext() if sync else model.no_sync():
        model(x).square().mean().backward()
        model.finish_gradient_sync()
    return time.perf_counter() - began_s


# %% tags=["nbval-ignore-output"]
def measure(n, link, rounds):
    """{way: (median seconds of a step, timeline of the last)}: compute "alone", overlap "off" and "on"."""
    torch.manual_seed(dist.get_rank())
    x, times_s = torch.randn(256, 512), {"alone": [], "off": [], "on": []}
    with sub_world(n) as inside:
        if inside:
            models = {w: DataParallel(eight_layers(), bucket_bytes=2**20, overlap=w == "on") for w in times_s}
            with emulate_link(link):
                for way in list(times_s) * (rounds + 1):  # the first round warms up
                    times_s[way].append(timed_step(models[way], x, sync=way != "alone"))
            last = -max(rounds, 1)
            return {way: (statistics.median(times_s[way][last:]), models[way].timeline) for way in models}


def slowest(n, link, rounds):
    """({way: seconds of the slowest rank}, {way: [timeline of each rank]})"""
    seen = ranks.run(measure, n, link, rounds)[:n]
    return tuple(
        {way: combine([s[way][i] for s in seen]) for way in seen[0]} for i, combine in ((0, max), (1, list))
    )


rounds, link = 4 if PROFILE == "quick" else 21, LINKS["1 Gb/s Ethernet"]
step_s, timelines = slowest(len(ranks), link, rounds)

# %% tags=["measures", "nbval-ignore-output"]
from workshop_utils.widgets import bucket_timeline

### BEGIN SOLUTION
# ~ my_guess_ratio = None
my_guess_ratio = 1.5
### END SOLUTION
guess("overlap off / on, 1 Gb/s", my_guess_ratio)
panels = {f"overlap {o}: {1e3 * step_s[o]:.0f} ms (median)": timelines[o] for o in ("off", "on")}
figure = figures.plot_timelines("One step, as each rank's clock saw it", panels)
plt.show()
for rank, timeline in enumerate(timelines["on"]):
    began_s, ended_s = ({label: span[i] for label, *span in timeline} for i in (0, 1))
    early = [
        label for label in began_s if label.startswith("bucket") and began_s[label] < ended_s["backward"]
    ]
    print(f"rank {rank}: {len(early)} of 8 buckets started before its backward had ended")
    assert early
overlap_ratio = step_s["off"] / step_s["on"]
compare_guess("overlap off / on, 1 Gb/s", overlap_ratio)
figure = figures.plot_bucket_timeline(step_s["alone"], "1 Gb/s Ethernet", measured_s=step_s)
plt.show()
bucket_timeline(step_s["alone"], "1 Gb/s Ethernet")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: which of the four rows is not equal to one process? Batch norm: rows meet in its forward.
# - *Say*: `no_sync` sends as much for two backwards as the others for one.

# %% [markdown]
# Without overlap the link is idle while the ranks compute, and the ranks are idle while the link works. With it, the
# first bucket leaves while most of the backward is still to come. The step takes about as long as the longer of the
# two, plus what cannot overlap: the forward, and the last bucket, which is the first layer's. Overlap hides
# communication behind the backward, and it cannot hide more than the backward is long. On this link eight buckets take
# longer than that, so most of them still come after it. (A bar ends when all ranks have sent their part. So the first
# bucket looks long on a rank that was early.)
#
# The second figure is the same step by formula: the compute that was measured, and the ring's α and β for each bucket. Move
# the bucket size: one large bucket cannot leave early, many small ones pay α each. What is measured takes longer: where
# ranks share cores, threads that send wait for a core as well. Reported for torch's own: 27% of a step saved with gloo
# and 38% with NCCL, for a ResNet ([Li and others 2020](https://arxiv.org/abs/2006.15704)).
#
# ## What else does a real model do?
#
# - **Uneven batches.** 9 images on four ranks are 3, 2, 2, 2. Each rank's loss is a mean over its own, and a mean of
#   means is not the mean (exercise 1.4). Weighted by `local_n * world_size / global_n` it is.
# - **Tied, frozen, unused.** The model below has one weight in two places, a frozen layer, and a layer that works only
#   for bright images, so that on some ranks it gets no gradient.
# - **Accumulation.** Two small backwards, then one update. Only the last needs the other ranks: inside `model.no_sync()`
#   gradients add up on their own rank.
# - **Buffers.** A batch normalisation updates its running mean from its own rank's images. `DataParallel` replaces it
#   by rank 0's in `finish_gradient_sync`; torch's does so at the start of the next forward.
#
# **Predict.** Which of them will not be equal to one process?


# %%
class Awkward(nn.Module):
    def __init__(self, batch_norm):
        super().__init__()
        self.fc1, self.fc2, self.tied = nn.Linear(784, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.frozen, self.bright = nn.Linear(20, 20).requires_grad_(False), nn.Linear(20, 20)
        self.norm = nn.BatchNorm1d(20) if batch_norm else nn.Identity()
        self.tied.weight = self.fc2.weight

    def forward(self, images):
        h, bright = self.frozen(self.norm(self.fc2(self.fc1(images)))), images.mean(dim=1) > 0.18
        return self.tied(h + bright[:, None] * self.bright(h) if bright.any() else h)


def train_awkward(wrap, make_optimizer, batch_norm, parts, rank=0, n=1):
    """The weights [D] after each step; this rank's share goes through the model in `parts`."""
    torch.manual_seed(rank)
    model = wrap(Awkward(batch_norm).double())
    optimizer = make_optimizer(model.parameters())
    for size, batch in zip((24, 18, 9), batches):
        shares = [tensor[:size].tensor_split(n)[rank].tensor_split(parts) for tensor in batch]
        optimizer.zero_grad()
        for i, (x, y) in enumerate(zip(*shares)):
            with model.no_sync() if i < parts - 1 else contextlib.nullcontext():
                (F.cross_entropy(model(x.double()), y, reduction="sum") * n / size).backward()
                model.finish_gradient_sync()
        optimizer.step()
        yield nn.utils.parameters_to_vector(model.parameters()).detach()


# %% tags=["measures", "nbval-check-output"]
def alone(model):
    model.no_sync, model.finish_gradient_sync = contextlib.nullcontext, lambda: None
    return model


def on_ranks(n, *settings):
    with sub_world(n) as inside, count_traffic() as traffic:
        weights = list(train_awkward(DataParallel, *settings, dist.get_rank(), n)) if inside else []
    return weights, traffic.bytes_sent


sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
rows = {"momentum": (sgd, False, 1), "Adam": (adam, False, 1), "two parts, no_sync": (sgd, False, 2)}
for name, settings in (rows | {"batch norm": (sgd, True, 1)}).items():
    expected, equal, sent = list(train_awkward(alone, *settings)), [], []
    for n in range(1, len(ranks) + 1):
        weights, bytes_sent = zip(*ranks.run(on_ranks, n, *settings)[:n])
        equal.append(all((w - e).abs().max() < 1e-10 for steps in weights for w, e in zip(steps, expected)))
        sent.append(f"{sum(bytes_sent) / 1e3:.0f}")
    print(f"{name:19} equal to one process on 1, 2, ... ranks: {equal}; KB sent: {', '.join(sent)}")
    assert all(equal) or name == "batch norm"

# %% [markdown] tags=["instructor"]
# **7 min.**
#
# - *Room*: 3.5, 4 minutes. `seed + epoch` in a generator of its own; `torch.manual_seed` is caught as `global random
#   numbers`.
# - *Say*: the figure has one row per mistake. Nothing raised in any of them.
# - *Room*: 3.6, 3 minutes. A mean of accuracies is not the accuracy: `accuracy over 7 samples is ..., expected ...`.
# - *Cut*: 3.6, `mine` has it.

# %% [markdown]
# `no_sync` sends as much for two backwards as the others for one. One detail is hidden in the first rows. A parameter
# that *no* rank used must keep `.grad = None`, as in one process: zeros would let momentum and weight decay move it. So
# each bucket carries one more number per parameter, 1 where a rank has a gradient; the sum tells everybody.
#
# Batch norm is the one that fails, as notebook 01 warned: rows meet in the forward, and each rank normalises
# with the mean of its own images. No averaging of gradients repairs that. `nn.SyncBatchNorm` (GPUs only) sends the means in
# the forward; layer normalisation, which works within a row, has no such trouble.
#
# ## Which images does a rank get?
#
# ### Exercise 3.5 · A share of a permutation  (★★, 4 min)
#
# `shard_indices` says which samples a rank takes in an epoch. All ranks cut *the same* random permutation, which depends
# on `seed` and `epoch` only, not on torch's global random numbers. All get equally many, ⌈N/n⌉: rank r takes entries r,
# r + n, r + 2n, … of it. If it has not so many, it is continued with itself, from its beginning.

# %% [markdown] tags=["hints-3.5"]
# 1. torch's global random numbers differ between ranks, and should: dropout needs it. Make a generator for the purpose.
# 2. `torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch))`. Then rank r takes every n-th
#    entry, beginning at r.
# 3. For i = rank, rank + n, ... below n ⌈N/n⌉, take `order[i % num_samples]`. `-(-N // n)` rounds up.


# %% tags=["exercise-3.5", "nbval-check-output"]
def shard_indices(num_samples, rank, world_size, epoch=0, seed=0):
    """The samples of this rank in this epoch: a list of ceil(num_samples / world_size) indices."""
    ### BEGIN SOLUTION
    # ~ # TODO: the common permutation; this rank's entries of it, padded from its beginning
    # ~ raise NotImplementedError("exercise 3.5")
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch))
    per_rank = -(-num_samples // world_size)
    return [int(order[i % num_samples]) for i in range(rank, per_rank * world_size, world_size)]
    ### END SOLUTION


check("3.5", shard_indices)

# %% [markdown]
# What if one of these rules is broken? A row is an epoch, a column is one of 22 samples, and a colour is a rank.

# %% tags=["nbval-ignore-output"]
shard_indices, n, N = mine("shard_indices"), len(ranks), 22
rows = {
    "epoch 0": [shard_indices(N, r, n) for r in range(n)],
    "epoch 1": [shard_indices(N, r, n, epoch=1) for r in range(n)],
    "epoch 1, set_epoch forgotten": [shard_indices(N, r, n) for r in range(n)],
    "a permutation for each rank": [shard_indices(N, r, n, seed=r) for r in range(n)],
    "no permutation": [[i % N for i in range(r, N + 2, n)] for r in range(n)],
    "no padding": [shard_indices(N, r, n, epoch=2)[: 6 if r < 2 else 5] for r in range(n)],
}
figure = figures.plot_shards("Who sees which sample", rows, N)
seen = {i for r in range(n) for i in shard_indices(1200, r, n, seed=r)}
print(f"a permutation for each rank: {len(seen) / 1200:.0%} of the samples are seen, 1 - (3/4)^4")


# %% tags=["nbval-ignore-output"]
from workshop_utils.training import evaluate, train_step


def train_in_order(order, batch_size, learning_rate, warm_up=0):
    """(model, loss of each step): one pass over images in this order, in one process, which is as good as n."""
    torch.manual_seed(1)
    model, losses = MLP(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for step, batch in enumerate(order.split(batch_size)):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / (warm_up + 1))
        loss = train_step(model, optimizer, data.train_images[batch], data.train_labels[batch])
        losses.append(loss.item())
    return model, losses


order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
for name, order_ in {"permuted": order, "sorted by label": order[data.train_labels[order].argsort()]}.items():
    accuracy = evaluate(train_in_order(order_, 64, 0.2)[0], data.test_images, data.test_labels)
    print(f"one epoch, {name}: accuracy {accuracy:.0%}")

# %% [markdown]
# - **No `set_epoch`**: every epoch is the same, batch by batch. torch's `DistributedSampler` shuffles with seed + epoch
#   and needs to be told: `sampler.set_epoch(epoch)`. Nothing fails if you forget.
# - **A permutation for each rank**: a third of the data is not seen in an epoch, other samples up to four times.
# - **No permutation**: whoever sorted the data decides what a batch holds. Sorted by label, the model knows the last
#   digits that it saw.
# - **No padding**: ranks 0 and 1 have one batch more, and wait in it for ranks that have left. We break that below.
#
# The padding has a price in the evaluation: two samples count twice.
#
# ### Exercise 3.6 · Exact, although padded  (★★, 3 min)
#
# Each rank has scored its shard of the test set, samples rank, rank + n, rank + 2n, ... of N, not permuted. Padding
# begins again at sample 0. `right` [⌈N/n⌉] says which of them were right. Return the accuracy over the N samples, each
# counted once, on every rank. Budget: one all-reduce of two numbers.

# %% [markdown] tags=["hints-3.6"]
# 1. A mean of the ranks' accuracies is not the accuracy, as the ranks' numbers of real samples differ. Add up counts.
# 2. Entry i of `right` is the sample rank + i n. It is real if that is below `num_samples`.
# 3. `real = rank + n * torch.arange(len(right)) < num_samples`, `good = (right & real).sum()`, `ring_all_reduce_(good)`,
#    `return good.item() / num_samples`.


# %% tags=["exercise-3.6", "nbval-check-output"]
def exact_accuracy(right, num_samples):
    """Accuracy over `num_samples`; right: bool [ceil(num_samples / n)], padded, of this rank's shard."""
    rank, n = dist.get_rank(), dist.get_world_size()
    ### BEGIN SOLUTION
    # ~ # TODO: count what is right and real, add up over the ranks, divide
    # ~ raise NotImplementedError("exercise 3.6")
    real = rank + n * torch.arange(len(right)) < num_samples
    good = (right & real).sum()
    ring_all_reduce_(good)
    return good.item() / num_samples
    ### END SOLUTION


check("3.6", exact_accuracy)

# %% tags=["nbval-ignore-output"]
exact_accuracy = mine("exact_accuracy")


def evaluate_shard(images, labels):
    """(naive, exact): mean of the ranks' own accuracies over padded shards; the true one."""
    torch.manual_seed(0)
    rank, n, model = dist.get_rank(), dist.get_world_size(), MLP()
    mine_padded = (torch.arange(-(-len(images) // n)) * n + rank) % len(images)
    right = model(images[mine_padded]).argmax(1) == labels[mine_padded]
    total = right.double().mean()
    ring_all_reduce_(total)
    return total.item() / n, exact_accuracy(right, len(images))


torch.manual_seed(0)
test_images, test_labels = data.test_images[:401].clone(), data.test_labels[:401].clone()
one = (MLP()(test_images).argmax(1) == test_labels).double().mean().item()
naive, exact = ranks.run(evaluate_shard, test_images, test_labels)[0]
print(f"one process {one:.6f}, exact on {len(ranks)} ranks {exact:.6f}, mean over padded shards {naive:.6f}")
assert abs(exact - one) < 1e-6

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: does four times the rate repair four times the batch? And eight times? Yes; no longer.
# - *Cut*: this section, if you are late.

# %% [markdown]
# ## What becomes of batch and learning rate?
#
# Four ranks with 32 images each are one batch of 128: a quarter of the updates for the same images. Is the model as good
# after the same number of images? Parity means that we can try it in one process. The *linear scaling rule* ([Goyal and
# others 2017](https://arxiv.org/abs/1706.02677)): a batch k times as large, a learning rate k times as large, after a
# *warm-up* in which it grows to that.
#
# **Predict.** Does the rule hold for four ranks? For eight?


# %% tags=["measures", "nbval-ignore-output"]
runs = {
    "1 rank: 32, rate 0.1": (32, 0.1),
    "4 ranks: 128, rate 0.1": (128, 0.1),
    "4 ranks: 128, 0.4, warm-up": (128, 0.4, 10),
    "8 ranks: 256, 0.8, warm-up": (256, 0.8, 10),
}
torch.manual_seed(0)
curves, three_epochs = {}, torch.cat([order[torch.randperm(4000)] for _ in range(3)])
for name, settings in runs.items():
    model, losses = train_in_order(three_epochs, *settings)
    width = 1024 // settings[0]
    smooth = [statistics.mean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]
    curves[name] = ([settings[0] * (i + 1) for i in range(len(losses))], smooth)
    print(f"{name:28} test accuracy {evaluate(model, data.test_images, data.test_labels):.1%}")
figure = figures.plot_losses("The same images, another batch", curves)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: same curve, same bytes, 1.50 S each. You wrote torch's class.
# - *Ask*: where is `finish_gradient_sync` in torch's? At the end of backward, in its hooks.

# %% [markdown]
# With the same rate the large batch takes a quarter of the updates and has learned less. With four times the rate it
# catches up. With eight it does not: the rule holds up to some batch, which depends on data and model, and is better
# early than late. More ranks give you more images in a second. They do not make an image worth more.
#
# ## torch's own
#
# `DistributedDataParallel` on the same ranks: same start, same images. Its hooks do what ours do, and it waits by
# itself at the end of the backward, so there is no `finish_gradient_sync()`.

# %% tags=["nbval-ignore-output"]
from torch.nn.parallel import DistributedDataParallel


def against_torch(rounds):
    """{name: [(loss, seconds, bytes sent) of each step]}; the two take turns."""
    torch.manual_seed(0)
    start, rank, n = MLP(), dist.get_rank(), dist.get_world_size()
    models = {name: wrap(copy.deepcopy(start)) for name, wrap in wrappers.items()}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.2) for name, model in models.items()}
    seen = {name: [] for name in models}
    for step in range(rounds):
        x, y = (part.chunk(n)[rank] for part in batches[step % len(batches)])
        for name, model in models.items():
            dist.barrier()
            began_s = time.perf_counter()
            with wire_bytes() if sys.platform == "linux" else count_traffic() as wire:
                optimizers[name].zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if name == "ours":
                    model.finish_gradient_sync()
                optimizers[name].step()
            seen[name].append((loss.item(), time.perf_counter() - began_s, wire.bytes_sent))
    return seen


# %% tags=["nbval-ignore-output"]
wrappers = {"ours": DataParallel, "torch": DistributedDataParallel}
by_rank = ranks.run(against_torch, 24 if PROFILE == "quick" else 60)
S, losses, ddp_s, sent_S = sum(p.nbytes for p in MLP().parameters()), {}, {}, {}
for name in wrappers:
    rows = torch.tensor([seen[name] for seen in by_rank], dtype=torch.float64)  # [ranks, steps, 3]
    losses[name] = rows[:, :, 0].mean(dim=0)
    ddp_s[name] = rows[:, 3:, 1].median(dim=1)[0].max()
    sent_S[name] = rows[:, :, 2].median(dim=1)[0].mean() / S
    print(
        f"{name:6} {1e3 * ddp_s[name]:.1f} ms a step, {sent_S[name]:.2f} S sent per rank, loss {losses[name][-1]:.4f}"
    )
print(f"step time, ours / torch's: {ddp_s['ours'] / ddp_s['torch']:.2f}")
assert torch.allclose(losses["ours"], losses["torch"], rtol=1e-4)
figure = figures.plot_losses(
    "The same curve", {n: (range(len(v)), v) for n, v in losses.items()}, xlabel="step"
)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: read the table from right to left: each name of Accelerate is something you wrote.
# - *Cut*: this section, if you are late.

# %% [markdown]
# The curves lie on each other, and both send 2(n-1)/n S, which is 1.5 S here, plus some headers. That is the ring of
# notebook 02, twice. `make bench` compares the times for longer.
#
# ## The same under Accelerate
#
# [Accelerate](https://github.com/huggingface/accelerate) wraps what this notebook does by hand. Its launcher sets the
# environment variables below; our ranks have a group already, so we set them ourselves.


# %% tags=["measures", "nbval-ignore-output"]
def train_with_accelerate(images, labels):
    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "ACCELERATE_USE_CPU": "true"}  # no port is opened
    os.environ.update({key: str(value) for key, value in place.items()})
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    model, losses = MLP(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    dataset = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=B // dist.get_world_size())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.gather_for_metrics(loss.detach()[None]).double().mean())
    return torch.stack(losses)


by_accelerate = ranks.run(train_with_accelerate, *(torch.cat(part) for part in zip(*batches)))[0]
print("losses", [round(loss, 4) for loss in by_accelerate.tolist()])
assert torch.allclose(by_accelerate, losses["ours"][:3], rtol=1e-4)

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: communication's share at 4 ranks and 1 Gb/s? About two thirds without overlap; the formula says so too.
# - *Say*: left of the knee the link decides. A GPU moves the knee to the right: that is what NVLink is for.

# %% [markdown]
# | Accelerate | what we wrote |
# |---|---|
# | `accelerate launch` | `start_ranks`, or `torchrun` below |
# | `Accelerator()` | `dist.init_process_group`; `rank`, `world_size` |
# | `prepare(model)` | `DataParallel(model)`: broadcast, hooks, buckets (it calls torch's) |
# | `prepare(loader)` | the shard of each batch, padded from the beginning (3.5) |
# | `accelerator.backward(loss)` | `loss.backward()`, `finish_gradient_sync()` |
# | `accelerator.accumulate(model)` | `no_sync()` and the division by the number of parts |
# | `gather_for_metrics(x)` | all-gather, and padding dropped again (3.6) |
#
# ## How does it scale?
#
# Each rank keeps its batch, so n ranks do n times the work in a step. `no_sync` measured the compute alone, and the
# formula of notebook 02 predicts the all-reduce: live for up to four ranks, with overlap off, and a link of 1 Gb/s each.
# The figure is recorded: up to eight ranks, overlap on, on one machine's loopback, for an MLP with 7.2 MB of gradients.

# %% tags=["nbval-ignore-output"]
import json
from importlib import resources

S, live_s = sum(p.nbytes for p in eight_layers().parameters()), {len(ranks): step_s}
for n in (1, 2):
    live_s[n], _ = slowest(n, link, rounds)
for n, seen in sorted(live_s.items()):
    share, sending_s = max(0.0, 1 - seen["alone"] / seen["off"]), ring_all_reduce_s(S, n, link)
    predicted = sending_s / (sending_s + seen["alone"])
    print(f"{n} ranks: {1 / seen['off']:.1f} steps/s, communication {share:.0%}, predicted {predicted:.0%}")

recorded = json.loads(resources.files("workshop_utils").joinpath("recorded_scaling.json").read_text())
print("recorded with", recorded["command"], "on", recorded["machine"])
rows = [row for row in recorded["scaling"] if row["fixed"] == "batch per rank"]
columns = [[row[key] for row in rows] for key in ("world_size", "steps_per_s", "communication_share")]
predicted = [1 - row["compute_s"] / row["predicted_step_s"] for row in rows]
figure = figures.plot_scaling(
    "Recorded: steps", *columns, predicted, cores=int(recorded["machine"].split()[0])
)

# %% [markdown]
# Where ranks exceed cores, they share them, and the compute of a step takes longer: that is this machine, not data
# parallelism. On one rank nothing is sent; what is left there is copying into buckets. On the emulated link communication
# takes a little more than the formula says. In the recorded runs its share is two to three times as large as predicted:
# loopback is fast, and most of the time goes into waiting for a core, which the thread that sends and the one that
# computes both want. With cores of their own and many ranks, 2(n-1)/n S hardly grows any more:
# that is why data parallelism scales.
#
# Now the link. The same ranks on other links, then the formulas beyond: compute + all-reduce without overlap; with it
# the longer of compute, and forward + all-reduce. (The forward is a third of the compute: notebook 01.)

# %% tags=["measures", "nbval-ignore-output"]
rates = [0.1, 0.5, 2] if PROFILE == "quick" else [0.1, 0.2, 0.5, 1, 2]  # Gb/s
by_link = {
    rate * 125e6: slowest(len(ranks), Link(50e-6, rate * 125e6), 0 if PROFILE == "quick" else 9)[0]
    for rate in rates
}
compute_s = statistics.median(seen["alone"] for seen in by_link.values())
bandwidths = [12.5e6 * 10 ** (k / 8) for k in range(38)]
sending_s = [ring_all_reduce_s(S, len(ranks), Link(50e-6 if b < 2e9 else 5e-6, b)) for b in bandwidths]
figure = figures.plot_links(
    f"8.4 MB of gradients, {len(ranks)} ranks",
    bandwidths,
    compute_s,
    predicted_s={
        "overlap off": [compute_s + time_s for time_s in sending_s],
        "overlap on": [max(compute_s, compute_s / 3 + time_s) for time_s in sending_s],
    },
    measured_s={
        f"overlap {o}": (list(by_link), [seen[o] for seen in by_link.values()]) for o in ("off", "on")
    },
    marks={k: LINKS[k].bandwidth_bytes_per_s for k in ("10 Gb/s Ethernet", "PCIe 4 x16", "NVLink 4")},
)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: what is on every rank n times? Weights, gradients, moments. Which of them does the update of one weight
#   need?
# - *Type*: `SmallShardedOptimizer` live. Then the printed shares: 0.797 on one rank: whole parameters are a poor
#   unit.

# %% [markdown]
# Left of the knee the link decides, right of it the compute. Overlap saves most near the knee, and never more than half.
# For a few cores, more than 10 Gb/s hardly matters. A GPU computes hundreds of times faster, so its dotted line
# lies that much lower and its knee that much further right. That is what NVLink is for.
#
# ## What does every rank hold n times?
#
# Everything: weights, gradients, and Adam's two moments. The moments are needed by the update only, and the update of a
# weight needs nothing but its own gradient and moments (notebook 01). So let each rank update a part and send it
# to the others: *ZeRO stage 1* ([Rajbhandari and others 2020](https://arxiv.org/abs/1910.02054)).

# %% tags=["live", "nbval-ignore-output"]
from workshop_utils.data_parallel import ShardedOptimizer


class SmallShardedOptimizer:
    """Rank r keeps the state of parameters r, r + n, ..., updates these, and broadcasts them."""

    def __init__(self, parameters, optimizer_cls, **options):
        self.parameters, self.n = list(parameters), dist.get_world_size()
        self.inner = optimizer_cls(self.parameters[dist.get_rank() :: self.n], **options)
        self.state = self.inner.state

    def step(self):
        self.inner.step()
        for i, parameter in enumerate(self.parameters):
            broadcast_(parameter, src=i % self.n)


# %% tags=["measures", "nbval-check-output"]
def train_adam(make_optimizer):
    """(weights after three steps, bytes of moments on this rank)."""
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = DataParallel(MLP().double())
    optimizer = make_optimizer(model.parameters())
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x.chunk(n)[rank].double()), y.chunk(n)[rank]).backward()
        model.finish_gradient_sync()
        optimizer.step()
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim())
    return nn.utils.parameters_to_vector(model.parameters()).detach(), held


makers = {
    "torch.optim.Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "SmallShardedOptimizer": lambda parameters: SmallShardedOptimizer(parameters, torch.optim.Adam, lr=1e-3),
    "ShardedOptimizer": lambda parameters: ShardedOptimizer(parameters, torch.optim.Adam, lr=1e-3),
}
trained = {name: list(zip(*ranks.run(train_adam, make))) for name, make in makers.items()}
plain_weights, plain_held = (column[0] for column in trained["torch.optim.Adam"])
for name, (weights, held) in trained.items():
    assert all((w - plain_weights).abs().max() < 1e-6 for w in weights)
    print(f"{name:22} moments held, of the whole: {', '.join(f'{h / plain_held:.3f}' for h in held)}")

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Say*: show each report without its card. The room finds the rank first, then you read the card.
# - *Ask*: in the first, who is missing from the list? Rank 1, which ended long ago.
# - *Break it*: these three cells are the mistakes; all end by their deadline or by an error, none needs a restart.
# - *Say*: the third names parameters by number: `indices which did not receive grad: 2 3`.

# %% [markdown]
# The same weights. Whole parameters are a poor unit: one matrix of this MLP has four fifths of all weights, and its
# owner saves little. The module lays all weights in a row and cuts the row, so a share may begin inside a parameter, and
# each rank holds 1/n. A step sends (n-1)/n S more, unless the gradients come by a reduce-scatter: that is ZeRO-2, and if
# the weights are cut as well it is ZeRO-3, which is notebook 04.
#
# ## Breaking it
#
# Three mistakes, each really made. Read each report before the card under it: what does it say, which rank would you
# look at, what would you change?
#
# **First.** Rank 1 finds that a batch looks strange, and skips it.

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 2
import copy
from torch import nn
from workshop_utils.data_parallel import DataParallel

model = DataParallel(nn.Linear(8, 4))
for step in range(4):
    images = torch.randn(16, 8)
    if rank == 1 and step == 1:
        continue  # this batch looks strange
    model(images).square().mean().backward()
    model.finish_gradient_sync()

# %% [markdown]
# > **Read this error: ranks wait in `finish_gradient_sync`, one is missing from the list.**
# >
# > - *It says* that ranks 0, 2 and 3 wait, and nothing of rank 1. It has ended: it made three all-reduces, the others
# >   are in their fourth.
# > - *Look at* the rank that does not wait, and long before the line where the others hang. From step 1 on, its
# >   gradients of one step were averaged with the others' of another. Had each rank skipped one batch somewhere, the
# >   counts would match: wrong weights, and no error at all.
# > - *Cure*: take part in every step. Leave out the backward, and call `finish_gradient_sync()` all the same: it counts as
# >   zeros. Or let all ranks skip together, by an all-reduce of the flag.
#
# **Second.** Rank 0 has one batch more than the others. This time with torch's class.

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 2
from torch.nn.parallel import DistributedDataParallel

model = DistributedDataParallel(nn.Linear(8, 4))
num_batches = 4 if rank == 0 else 3
for images in torch.randn(num_batches, 16, 8):
    model(images).square().mean().backward()

# %% [markdown]
# > **Read this error: one rank waits in `backward`, all others are gone.**
# >
# > - *It says* that rank 0 waits in `backward`, where DDP's hooks wait for the other ranks. Those have ended.
# > - *Look at* the length of each rank's loader. On a cluster this is the error after 10 or 30 minutes at the end of the
# >   first epoch.
# > - *Cure*: pad or drop, so that all have equally many (exercise 3.5). Or let the ranks that are through go on answering
# >   with zeros: torch's `Join`, shown below.
#
# **Third.** A layer is used by one rank only: images of one kind, an expert, a branch.


# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 5
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.rare = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, images):
        h = self.always(images)
        return self.rare(h) if rank == 1 else h


model = DistributedDataParallel(Net())
for images in torch.randn(3, 16, 8):
    model(images).square().mean().backward()

# %% [markdown]
# > **Read this error: "Expected to have finished reduction in the prior iteration".**
# >
# > - *It says* that a rank begins a forward while a bucket of its last backward has not been sent. The last lines name
# >   the parameters: "indices which did not receive grad: 2 3", in the order of `model.parameters()`. Rank 1 waits in
# >   `backward` meanwhile: it has the gradients, and is the one that does it right.
# > - *Look at* the ranks that the message names, and in their forward at the branch not taken.
# > - *Cure*: `DistributedDataParallel(net, find_unused_parameters=True)`, which marks unused parameters as ready; it costs
# >   a walk through the graph in each step. Ours fills up in `finish_gradient_sync`, as in exercise 3.4.
#
# The two repairs:

# %% tags=["measures", "nbval-ignore-output"]
# %%ranks --deadline 20
from torch.distributed.algorithms.join import Join

model, seen = DistributedDataParallel(nn.Linear(8, 4)), 0
with Join([model]):
    for images in torch.randn(4 if rank == 0 else 3, 16, 8):
        model(images).square().mean().backward()
        seen += 1

net = Net()
models = DataParallel(net), DistributedDataParallel(copy.deepcopy(net), find_unused_parameters=True)
for model in models:
    model(images).square().mean().backward()
models[0].finish_gradient_sync()
same = all(torch.allclose(p.grad, q.grad) for p, q in zip(*(model.parameters() for model in models)))
print(f"{seen} batches and no error; gradients equal to find_unused_parameters: {same}")

# %% [markdown] tags=["instructor"]
# **0 min.**
#
# - *Say*: the same as a script under torchrun; run it in the break. The killed worker needs the full profile.

# %% [markdown]
# ## Without a notebook
#
# The same training as a script: `workshop_utils/train.py`. `torchrun` starts the processes and gives each its rank in
# environment variables. While it runs, its store, where the ranks meet, listens on all interfaces of this machine, also
# with `--standalone`.
#
# **If a worker dies** (extra, 3 min, with `PROFILE = "full"`), torchrun starts all workers again, up to `--max-restarts`
# times. The script saves a checkpoint every K steps and goes on from the newest, so what is lost are the steps since.
# The second cell kills a worker with SIGKILL after the first checkpoint. Then it compares the final weights, by their
# SHA-256, with those of an undisturbed run. (torch's DDP orders its buckets
# anew after its first backward, and another order adds up to other last bits: the script lets that happen on zeros,
# before its first step.)

# %% tags=["measures", "nbval-ignore-output"]
import subprocess
import tempfile
from pathlib import Path


def torchrun(folder, num_processes, *options, restarts=0):
    """The command line of a training under torchrun; its report goes to folder/report.json."""
    run = f"-m torch.distributed.run --standalone --nproc-per-node={num_processes} --max-restarts={restarts}"
    script = "-m workshop_utils.train --strategy ddp --model mlp --report"
    return [sys.executable, *run.split(), *script.split(), f"{folder}/report.json", *options]


with tempfile.TemporaryDirectory() as folder:
    command = torchrun(folder, 2 if PROFILE == "quick" else 4, "--steps", "40")
    print("torchrun", *command[3:])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    print(done.stdout if done.returncode == 0 else done.stderr[-3000:])
    report = json.loads(Path(folder, "report.json").read_text())
print(f"loss {report['losses'][0]:.2f} to {report['losses'][-1]:.2f} in {len(report['losses'])} steps")

# %% tags=["extra", "nbval-ignore-output"]
import psutil


def kill_a_worker(command, checkpoints):
    """Run the command, kill one of its workers once there is a checkpoint, and wait for the end."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(checkpoints.glob("*")) and process.poll() is None:
            time.sleep(0.02)
        psutil.Process(process.pid).children()[-1].kill()


if PROFILE == "full":
    options = ["--steps", "600", "--checkpoint-every", "50", "--checkpoint-dir"]
    with tempfile.TemporaryDirectory() as folder:
        report, reports = Path(folder, "report.json"), []
        subprocess.run(torchrun(folder, 4, *options, f"{folder}/a"), capture_output=True, check=True)
        reports.append(json.loads(report.read_text()))
        kill_a_worker(torchrun(folder, 4, *options, f"{folder}/b", restarts=1), Path(folder, "b"))
        reports.append(json.loads(report.read_text()))
    for name, seen in zip(("undisturbed", "a worker killed"), reports):
        print(f"{name}: resumed at step {seen['resumed_at']}, weights {seen['weights_sha256'][:16]}")
    assert reports[0]["weights_sha256"] == reports[1]["weights_sha256"]

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: every hang today was what? A rank that did not make the call that the others made.
# - *Say*: each rank still holds everything. Next: a model that fits on none of them.

# %% [markdown]
# ## Recap
#
# - Start equal (one broadcast), update equally (average the gradients): N replicas are one big batch, to rounding.
# - Hooks start communication when a gradient is ready, buckets make it few messages, and a second thread lets both go
#   on at once. Overlap hides at most a backward.
# - 2(n-1)/n S per rank and step, whoever sends it. The link decides what share of the step that is.
# - All ranks must make the same calls in the same order. Every hang above is a rank that did not.
# - Same permutation, padded, another one each epoch; count padded samples once.
#
# **What breaks next.** Every rank still holds all weights and all gradients. How do N devices hold a model that fits on
# none of them? That is [notebook 04](04_fully_sharded_data_parallel.ipynb).
#
# **References.** Li and others, *PyTorch distributed: experiences on accelerating data parallel training*, 2020,
# [arXiv:2006.15704](https://arxiv.org/abs/2006.15704) · Goyal and others, *Accurate, large minibatch SGD*, 2017,
# [arXiv:1706.02677](https://arxiv.org/abs/1706.02677) · Rajbhandari and others, *ZeRO*, 2020,
# [arXiv:1910.02054](https://arxiv.org/abs/1910.02054) ·
# [torchrun](https://docs.pytorch.org/docs/stable/elastic/run.html) ·
# [Accelerate](https://huggingface.co/docs/accelerate)

# %% tags=["key-figures", "nbval-ignore-output"]
ranks.stop()
print(f"overlap off / on, 4 ranks, 1 Gb/s each: {overlap_ratio:.2f}")
print(f"step time, our DataParallel / torch's: {ddp_s['ours'] / ddp_s['torch']:.2f}")
print(f"sent per rank and step: ours {sent_S['ours']:.2f} S, torch's {sent_S['torch']:.2f} S")
print(f"communication at 4 ranks, 1 Gb/s, no overlap: {1 - step_s['alone'] / step_s['off']:.0%} of a step")
