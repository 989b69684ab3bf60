# %% [markdown]
# # 02 · All-reduce
#
# **How do processes that share nothing agree on a sum, and what does it cost?**
#
# After this notebook you can
#
# - read the report of a deadlock and repair the code behind it;
# - say what each of seven collectives leaves on each rank;
# - write an all-reduce in four ways, in place, for any number of ranks, and say what each rank has to send;
# - predict its seconds from latency and bandwidth, and say when which of the four is fastest.
#
# 50 minutes. It builds on [notebook 00](00_start_here.ipynb) (`%%ranks`, `check`) and on the end of [notebook
# 01](01_single_device_mlp.ipynb): the gradient of a big batch is the average of the gradients of its parts. If
# the parts are on different devices, somebody has to add them up.

# %% [markdown] tags=["instructor"]
# **For the instructor.** Play the ring with people before showing the figure: four volunteers, four cards each, the
# room counts the steps. Ask for the guess of "naive / ring on one machine" by a show of hands; nearly everybody says
# 2 to 4, and the tie is what they remember. If time is short, skip 2.4: `mine` supplies it.

# %% tags=["parameters"]
PROFILE = "quick"  # "full": 31 repeats of each measurement instead of 7, about half a minute longer

# %%
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
# - *Say*: two calls, one on each side. The receiver brings the memory and knows the shape; only numbers travel.
# - *Ask*: ranks 2 and 3 ran the same cell; what did they do? Nothing.
# - *Break it*: let rank 1 receive from rank 2, with `--deadline 2`. It raises nothing, it waits: `in recv (from rank
#   2)`.

# %% [markdown]
# ## What does one process know of another?
#
# A *process* is a running program with a memory of its own. The *rank* is its number, the *world size* is how many
# there are.
#
# In notebook 00 each rank had a variable of the same name and another value in it. They share nothing. What one is to
# know of another has to be sent, as bytes, by somebody who knows that it is wanted.
#
# ## How does a number get from one rank to another?
#
# With two calls, one on each side.

# %% tags=["nbval-ignore-output"]
# %%ranks
if rank == 0:
    dist.send(torch.tensor([3.0, 1.0, 4.0]), dst=1)
if rank == 1:
    box = torch.empty(3)
    dist.recv(box, src=0)
    print("rank 0 sent", box)

# %% [markdown] tags=["instructor"]
# **5 min.**
#
# - *Say*: play it first. Four people stand in a ring, each may give a card only after taking one.
# - *Ask*: in which line is rank 0? Then read the report aloud; all four are in the same line.
# - *Type*: 2.1 with `send` first, then `recv`: all wait `in send`. Swapping helps nobody. Then `isend`.
# - *Room*: odd worlds. Who lets even ranks send first and swaps with a partner fails at 3 ranks.

# %% [markdown]
# The receiver brings the memory, and has to know shape and dtype beforehand: only the numbers travel. Ranks 2 and 3
# ran the same cell and had nothing to do in it.
#
# Both calls *block*: they return when their part is done. With gloo, the library underneath, a send is done only
# after its receiver has asked for the message, however small it is.
#
# ## What if everybody waits?
#
# Let the ranks stand in a ring. Each passes its number to its right neighbour and gets one from its left.
#
# **Predict.** Will this cell end? If not, in which line will rank 0 be?

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 2
number = torch.tensor([float(rank)])
box = torch.empty(1)
dist.recv(box, src=(rank - 1) % world_size)
dist.send(number, dst=(rank + 1) % world_size)

# %% [markdown]
# Read the report. All four ranks are in `recv`, each waiting for its left neighbour, who cannot send before it has
# received. They wait in a circle: a *deadlock*. No rank has made a mistake that the others have not made, so there
# is no traceback to look at. What is wrong is the order. Swapping the two lines helps nobody: then all four wait in
# `send`.
#
# There are two ways out. Let some ranks send first while others receive first. Or start one of the two and wait for
# it later: `dist.isend` and `dist.irecv` return at once, with an object whose `wait()` blocks until it is done.

#
# ### Exercise 2.1 · Repair the deadlock  (★, 4 min)
#
# `pass_right` is called on every rank with a tensor of the same shape. It returns what the left neighbour passed,
# in a new tensor. It has to work for every world size from 2, also for an odd one. Budget: S bytes sent by each
# rank, where S is the size of its tensor.

# %% [markdown] tags=["hints-2.1"]
# 1. The deadlock needs everybody to wait. It is enough to take the waiting out of one of the two calls.
# 2. `sending = dist.isend(tensor, dst)` starts to send. Receive, then call `sending.wait()`.
# 3. `received = torch.empty_like(tensor)`, then `isend` to `(rank + 1) % n`, `recv` from `(rank - 1) % n`, `wait`,
#    and `return received`.


# %% tags=["exercise-2.1", "nbval-check-output"]
def pass_right(tensor):
    """The left neighbour's `tensor`, same shape and dtype; this rank's own is sent to the right."""
    rank, n = dist.get_rank(), dist.get_world_size()
    ### BEGIN SOLUTION
    # ~ # TODO: a new tensor to receive into; send to the right, receive from the left, without a deadlock
    # ~ raise NotImplementedError("exercise 2.1")
    received = torch.empty_like(tensor)
    sending = dist.isend(tensor, (rank + 1) % n)
    dist.recv(received, (rank - 1) % n)
    sending.wait()
    return received
    ### END SOLUTION


check("2.1", pass_right)

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Type*: `broadcast` live; it is the first SPMD code. One text, every rank runs it, `rank` decides.
# - *Say*: run the others, one sentence each. Ask before gather: what will rank 0 see? Four strips of four digits.
# - *Ask*: which two figures, one after the other, are an all-reduce? Reduce-scatter, then all-gather. Write that on
#   the board.

# %% [markdown]
# The check also runs your function on two and on three of the four ranks. A deadlock that shows only at three ranks
# is a classic.
#
# ## Which patterns come back again and again?
#
# A *collective* is an operation that all ranks of a group enter together. Seven of them cover nearly everything in
# this series. To see what they do, let the tensors be pictures: rank 0 holds a handwritten 0, rank 1 a 1, and so on.
#
# `send`, `recv` and `isend` below are torch's, with two additions that we need later: they can be counted, and
# slowed down. Write your own with them too from here on, not with `dist.isend`. `show_collective` runs a collective by
# hand and by torch, compares what each rank ends with, and draws it.

# %% tags=["nbval-ignore-output"]
from workshop_utils.data import load_mnist
from workshop_utils.plotting.all_reduce import plot_all_reduce_steps, plot_collective
from workshop_utils.point_to_point import count_traffic, emulate_link, isend, recv, send, wire_bytes

data = load_mnist()
firsts = [int((data.test_labels == digit).nonzero()[0]) for digit in range(len(ranks))]
pictures = data.test_images[firsts].view(-1, 28, 28)  # pictures[r] is rank r's


def me():
    return dist.get_rank(), dist.get_world_size()


def show_collective(title, by_hand, by_torch, start=lambda picture: picture):
    """Both take what the rank starts with and return what it ends with: a picture, a strip of one, or None."""

    def on_rank(collective):
        before = start(pictures[dist.get_rank()].clone())
        return before.clone(), collective(before)

    before, hand = zip(*ranks.run(on_rank, by_hand))
    _, by_library = zip(*ranks.run(on_rank, by_torch))
    for a, b in zip(hand, by_library):
        assert a is b is None or torch.allclose(a, b)
    return plot_collective(title, before, hand, by_library)


# %% [markdown]
# **Broadcast**: one rank has it, all get it. This is how all ranks come to start from the same weights.


# %% tags=["live"]
def broadcast(picture):
    rank, n = me()
    if rank == 0:
        for dst in range(1, n):
            send(picture, dst)
    else:
        recv(picture, 0)
    return picture


def broadcast_by_torch(picture):
    dist.broadcast(picture, src=0)
    return picture


figure = show_collective("broadcast from rank 0", broadcast, broadcast_by_torch)

# %% [markdown]
# The same code runs on every rank, and `rank` decides who does what. That style has a name: *SPMD*, single program,
# multiple data.
#
# **Scatter**: one rank cuts its tensor into n parts and each rank gets one. Grey is where a rank holds nothing.


# %%
def scatter(picture):
    rank, n = me()
    strips = picture.chunk(n)  # n strips of 28 / n rows
    if rank == 0:
        for dst in range(1, n):
            send(strips[dst], dst)
        return strips[0]
    strip = torch.empty_like(strips[rank])
    recv(strip, 0)
    return strip


def scatter_by_torch(picture):
    rank, n = me()
    strip = torch.empty(28 // n, 28)
    dist.scatter(strip, list(picture.chunk(n)) if rank == 0 else None, src=0)
    return strip


figure = show_collective("scatter from rank 0", scatter, scatter_by_torch)

# %% [markdown]
# **Gather** is the way back: each rank has a part, one rank gets all.
#
# **Predict.** This time rank r starts with the r-th strip of its own digit. What will rank 0 see?


# %%
def my_strip(picture):
    rank, n = me()
    return picture.chunk(n)[rank]


def gather(strip):
    rank, n = me()
    if rank != 0:
        return send(strip, 0)
    strips = [strip] + [torch.empty_like(strip) for _ in range(1, n)]
    for src in range(1, n):
        recv(strips[src], src)
    return torch.cat(strips)


def gather_by_torch(strip):
    rank, n = me()
    strips = [torch.empty_like(strip) for _ in range(n)] if rank == 0 else None
    dist.gather(strip, strips, dst=0)
    return torch.cat(strips) if rank == 0 else None


figure = show_collective("gather to rank 0", gather, gather_by_torch, start=my_strip)

# %% [markdown]
# **Reduce**: one rank gets the sum of all. "Reduce" means to combine many values into one; other operations than the
# sum are possible.


# %%
def reduce(picture):
    rank, n = me()
    if rank != 0:
        return send(picture, 0)
    received = torch.empty_like(picture)
    for src in range(1, n):
        recv(received, src)
        picture += received
    return picture


def reduce_by_torch(picture):
    dist.reduce(picture, dst=0)
    return picture if dist.get_rank() == 0 else None


figure = show_collective("reduce to rank 0", reduce, reduce_by_torch)

# %% [markdown]
# Four digits on top of each other, added pixel by pixel, on rank 0 only. (They look pale before, because black is now
# the largest sum.) After torch's `reduce` the tensors of the
# other ranks may hold anything, partial sums for instance, so we return nothing there.
#
# The three that are left end on *all* ranks. Written with those above, each is two lines.
#
# **All-gather**: each has a part, all get everything. It is a gather, then a broadcast.
#
# **All-reduce**: all have everything, and all end with the whole sum. It is a reduce, then a broadcast.


# %%
def all_gather(strip):
    whole = gather(strip)
    return broadcast(torch.empty(28, 28) if whole is None else whole)


def all_gather_by_torch(strip):
    strips = [torch.empty_like(strip) for _ in range(dist.get_world_size())]
    dist.all_gather(strips, strip)
    return torch.cat(strips)


def all_reduce(picture):
    total = reduce(picture)
    return broadcast(picture if total is None else total)


def all_reduce_by_torch(picture):
    dist.all_reduce(picture)
    return picture


figure = show_collective("all-gather", all_gather, all_gather_by_torch, start=my_strip)
figure = show_collective("all-reduce", all_reduce, all_reduce_by_torch)

# %% [markdown]
# **Reduce-scatter**: all have everything, and each ends with its part of the sum. It is a reduce, then a scatter.


# %%
def reduce_scatter(picture):
    total = reduce(picture)
    return scatter(picture if total is None else total)


def reduce_scatter_by_torch(picture):
    n = dist.get_world_size()
    strip = torch.empty(28 // n, 28)
    dist.reduce_scatter(strip, list(picture.chunk(n)))
    return strip


figure = show_collective("reduce-scatter", reduce_scatter, reduce_scatter_by_torch)

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: four ranks, 8 MB; how many MB does rank 0 send? 24, and it receives as much.
# - *Say*: with 64 ranks 63 S. All other links are idle meanwhile.

# %% [markdown]
# Look at the last three figures again: a reduce-scatter followed by an all-gather is an all-reduce as well. That sentence is the ring, and it returns in notebook 04.
#
# ## How many bytes does that all-reduce send?
#
# From here on we reduce one tensor of S bytes, in place. A name that ends in `_` says so, as torch's own do. The
# all-reduce above, a reduce and then a broadcast, is the *naive* one.
#
# **Predict.** Four ranks, S = 8 MB. How many MB does rank 0 send?

# %%
### BEGIN SOLUTION
# ~ my_guess_MB = None
my_guess_MB = 24
### END SOLUTION
guess("MB sent by rank 0", my_guess_MB)


def naive_all_reduce_(tensor):
    reduce(tensor)
    broadcast(tensor)


def bytes_sent(all_reduce_, size_bytes=8_000_000):
    """Run it on ones; what this rank sent."""
    tensor = torch.ones(size_bytes // 4)
    with count_traffic() as traffic:
        all_reduce_(tensor)
    assert (tensor == dist.get_world_size()).all()
    return traffic.bytes_sent


naive_sent = ranks.run(bytes_sent, naive_all_reduce_)
compare_guess("MB sent by rank 0", naive_sent[0] / 1e6, "MB")
for rank, num_bytes in enumerate(naive_sent):
    print(f"rank {rank} sent {num_bytes / 1e6:.0f} MB = {num_bytes / 8e6:.2f} S")

# %% [markdown] tags=["instructor"]
# **8 min.**
#
# - *Say*: walk through the figure for n = 3 by hand. The condition `rank + distance < n` is the whole trick.
# - *Room*: 2.2, 7 minutes. First mistake: rank 0 sends to all: `you sent 3.00 S, the budget is 2.00 S`. Second: it
#   works for 4 and hangs for 3: rank 2 waits `in recv (from rank 0)`. The world of 3 is the test.
# - *Stuck*: it is `tree_reduce_` backwards; the last receiver sends first.

# %% [markdown]
# Rank 0 sends (n-1) S and receives as much, while the others wait for their turn. With 64 ranks it would be 63 S.
# Whatever its link can do, the others' links are idle.
#
# ## Can others help with the passing on?
#
# Add in pairs, then in pairs of pairs: a *tree*. The first two steps of this figure are the reduce, the last two
# the broadcast. Each part shows what the ranks hold after its step; the arrows say who has sent to whom. A slot is
# filled once that rank's numbers are in; a heavy border means that all are in.


# %%
def tree_reduce_(tensor):
    """Rank 0 ends with the sum. In each round, half of those still in it send their sum and are done."""
    rank, n = me()
    distance = 1
    while distance < n:
        if rank % (2 * distance) == distance:
            send(tensor, rank - distance)
        elif rank % (2 * distance) == 0 and rank + distance < n:
            received = torch.empty_like(tensor)
            recv(received, rank + distance)
            tensor += received
        distance *= 2


def tree_all_reduce_(tensor):
    tree_reduce_(tensor)
    tree_broadcast_(tensor)  # your part


figure = plot_all_reduce_steps("tree", 4)

# %% [markdown]
# Go through it for n = 3: in the first round rank 1 sends to 0, and rank 2 has no partner; in the second it sends to
# 0. The condition `rank + distance < n` is what makes it right for a world size that is not a power of two.
#
# ### Exercise 2.2 · Broadcast by a tree  (★★, 7 min)
#
# Rank 0's tensor to all ranks, in place, in ⌈lg n⌉ rounds (lg is the logarithm to base 2; ⌈ ⌉ rounds up). In each
# round, every rank that has the tensor already passes it to one that has not. Budget: no rank sends more than
# ⌈lg n⌉ S, and nobody receives it twice.

# %% [markdown] tags=["hints-2.2"]
# 1. It is `tree_reduce_` backwards. Who received in the last round sends in the first.
# 2. Start with the largest distance, the largest power of two below n, and halve it in each round. The two
#    conditions on `rank` stay as they are.
# 3. In a round at `distance`: if `rank % (2 * distance) == 0 and rank + distance < n`, send to `rank + distance`;
#    if `rank % (2 * distance) == distance`, receive from `rank - distance`.


# %% tags=["exercise-2.2", "nbval-check-output"]
def tree_broadcast_(tensor):
    """Overwrite `tensor` with that of rank 0, on every rank."""
    rank, n = dist.get_rank(), dist.get_world_size()
    ### BEGIN SOLUTION
    # ~ # TODO: rounds with distances ..., 4, 2, 1; in each, who sends to whom?
    # ~ raise NotImplementedError("exercise 2.2")
    distance = 1
    while distance < n:
        distance *= 2
    while distance > 1:
        distance //= 2
        if rank % (2 * distance) == 0 and rank + distance < n:
            send(tensor, rank + distance)
        elif rank % (2 * distance) == distance:
            recv(tensor, rank - distance)
    ### END SOLUTION


check("2.2", tree_broadcast_)

# %% [markdown] tags=["instructor"]
# **16 min.**
#
# - *Say*: play the ring before the figure: four people, four cards each, the room counts the steps.
# - *Type*: `ring_all_gather_` live, one line at a time, with the finger on the figure. Then 2.3 is theirs, 7 minutes.
# - *Break it*: in 2.3 write `chunks[i] = received + ...`: `the right numbers are in a new tensor`. In place means
#   into the chunk.
# - *Break it*: off by one in the chunk: `rank 0: chunks[1] holds the sum ..., expected chunks[0]`. Draw n = 2 and count.
# - *Room*: 2.4, 8 minutes, or skip it: `mine` has it. The trap is a tensor that is not contiguous.

# %% [markdown]
# Fewer rounds and less for rank 0. But in the first round half of the ranks only receive, in later rounds most of
# them do nothing, and every message has all S bytes.
#
# ## What if everybody sends all the time?
#
# Cut the tensor into n *chunks*, and let every rank work on another chunk at any time. In each step, each rank sends
# one chunk to its right neighbour and gets another from its left.
#
# **Predict.** Run the cell and look at the figure. In the first half, what arrives is added; in the second half it is
# kept. How many S does each rank send in all? Put your guess in and run the cell again. Under the figure is the same to
# step through, for any of the algorithms: drag a slider, or select it and use the arrow keys; a list opens with the
# space bar. The clock is that of a link of 200 Mb/s for each rank; what α and β are comes further down.

# %% tags=["nbval-ignore-output"]
from workshop_utils.widgets import all_reduce_stepper

### BEGIN SOLUTION
# ~ my_guess_S = None
my_guess_S = 1.5
### END SOLUTION
guess("S sent by each rank of the ring", my_guess_S)
figure = plot_all_reduce_steps("ring", 4)
plt.show()
all_reduce_stepper("ring", world_size=4)

# %% [markdown]
# Follow chunk 0, the first row. It starts on rank 1, and each rank that it passes adds its own numbers. After n-1 steps
# it is complete, on rank 0. At the same time chunk 1 has ended on rank 1, and so on: that was a reduce-scatter. In the
# other n-1 steps the complete chunks go round once: an all-gather.
#
# In step k = 0, 1, …, n-2 of the second half, rank r sends chunk r - k and receives chunk r - 1 - k, both counted
# modulo n. In code:


# %% tags=["live"]
def ring_all_gather_(chunks):
    """chunks: n tensors. At the start chunks[rank] is complete; at the end all of them are, on every rank."""
    rank, n = me()
    left, right = (rank - 1) % n, (rank + 1) % n
    for k in range(n - 1):
        sending = isend(chunks[(rank - k) % n], right)
        recv(chunks[(rank - 1 - k) % n], left)
        sending.wait()


# %% [markdown]
# ### Exercise 2.3 · The first half of the ring  (★★, 7 min)
#
# `ring_reduce_scatter_` gets a list of n chunks. They are views into one tensor and may differ in size by one
# element. At the end, `chunks[rank]` holds the sum of all ranks' `chunks[rank]`; what is in the others does not
# matter. Write into the chunks themselves. Budget: (n-1)/n S sent by each rank, to one neighbour.

# %% [markdown] tags=["hints-2.3"]
# 1. Two things differ from the all-gather: what arrives is added, so it needs a tensor of its own to arrive in; and
#    the chunks are others.
# 2. The chunk that ends on rank r arrives there last. So in step k, rank r receives chunk r - 2 - k, and sends the
#    one that it received in the step before, r - 1 - k.
# 3. In the loop: `target = chunks[(rank - 2 - k) % n]`, `received = torch.empty_like(target)`, `isend` of
#    `chunks[(rank - 1 - k) % n]` to the right, `recv` into `received` from the left, `wait`, `target += received`.


# %% tags=["exercise-2.3", "nbval-check-output"]
def ring_reduce_scatter_(chunks):
    """chunks: n tensors. At the end chunks[rank] holds the sum over all ranks, in place."""
    rank, n = dist.get_rank(), dist.get_world_size()
    left, right = (rank - 1) % n, (rank + 1) % n
    ### BEGIN SOLUTION
    # ~ # TODO: n - 1 steps. In each: send one chunk to the right, receive another from the left, add it
    # ~ raise NotImplementedError("exercise 2.3")
    for k in range(n - 1):
        target = chunks[(rank - 2 - k) % n]
        received = torch.empty_like(target)
        sending = isend(chunks[(rank - 1 - k) % n], right)
        recv(received, left)
        sending.wait()
        target += received
    ### END SOLUTION


check("2.3", ring_reduce_scatter_)

# %% [markdown]
# ### Exercise 2.4 · The whole ring  (★★★, 8 min)
#
# Now for any tensor: any shape, also one that n does not divide, one with fewer elements than ranks, and one that
# is not contiguous in memory. In place, in the tensor's own dtype. Budget: 2(n-1)/n S sent by each rank, rounded up
# to whole elements.

# %% [markdown] tags=["hints-2.4"]
# 1. Both halves exist. What is missing is from tensor to chunks, and back if the chunks are a copy.
# 2. `flat = tensor.contiguous().view(-1)` shares the tensor's memory if that is contiguous, and is a copy otherwise.
#    `flat.tensor_split(n)` gives n views whose sizes differ by one at most; some may be empty.
# 3. After both halves: `tensor.copy_(flat.view(tensor.shape))`. Where `flat` shares the memory, this changes nothing.


# %% tags=["exercise-2.4", "nbval-check-output"]
ring_reduce_scatter_ = mine("ring_reduce_scatter_")


def ring_all_reduce_(tensor):
    """`tensor` holds the sum of all ranks' tensors afterwards, on every rank. Any shape and dtype."""
    ### BEGIN SOLUTION
    # ~ # TODO: cut into chunks, reduce-scatter, all-gather, and write back where needed
    # ~ raise NotImplementedError("exercise 2.4")
    flat = tensor.contiguous().view(-1)
    chunks = flat.tensor_split(dist.get_world_size())
    ring_reduce_scatter_(chunks)
    ring_all_gather_(chunks)
    tensor.copy_(flat.view(tensor.shape))
    ### END SOLUTION


check("2.4", ring_all_reduce_)

# %% tags=["nbval-ignore-output"]
my_ring_all_reduce_ = mine("ring_all_reduce_")
ring_sent = ranks.run(bytes_sent, my_ring_all_reduce_)
compare_guess("S sent by each rank of the ring", ring_sent[0] / 8e6, "S")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: as many bytes, fewer steps, and everybody talks over the longest distance first.
# - *Ask*: what is `rank ^ distance`? Flip one bit of the number: that is the partner.

# %% [markdown]
# Each rank sends 2(n-1)/n S. With many ranks that comes close to 2 S and never reaches it, where rank 0 of the naive
# one sends (n-1) S. Less is not possible: [Patarasuk and Yuan](https://doi.org/10.1016/j.jpdc.2008.09.002) proved in
# 2009 that no all-reduce does with less on its busiest rank.
#
# ## As few bytes, in fewer steps?
#
# The ring takes 2(n-1) steps. *Halving-doubling* ([Rabenseifner
# 2004](https://doi.org/10.1007/978-3-540-24685-5_1)) sends as many bytes in 2 lg n. Partners trade halves: first half
# of the tensor with somebody far away, then a quarter, an eighth. Then the same way back.


# %%
def halving_doubling_all_reduce_(tensor):
    """For a contiguous tensor and a world size that is a power of two."""
    rank, n = me()
    edges = [tensor.numel() * i // n for i in range(n + 1)]
    distances = [2**i for i in range(n.bit_length() - 1)]  # 1, 2, 4, ... below n

    def block(place, size):  # the `size` chunks around chunk `place`
        first = place // size * size
        return tensor.view(-1)[edges[first] : edges[first + size]]

    def trade(give, take, peer):
        sending = isend(give, peer)
        recv(take, peer)
        sending.wait()

    for distance in reversed(distances):  # rank ^ distance flips one bit of the number: that is the partner
        received = torch.empty_like(block(rank, distance))
        trade(block(rank ^ distance, distance), received, rank ^ distance)
        block(rank, distance).add_(received)
    for distance in distances:
        trade(block(rank, distance), block(rank ^ distance, distance), rank ^ distance)


print("sent, in S:", [num_bytes / 8e6 for num_bytes in ranks.run(bytes_sent, halving_doubling_all_reduce_)])
figure = plot_all_reduce_steps("halving-doubling", 4)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: what do all four send together? 2 (n-1) S, each of them. What differs is who sends.
# - *Say*: right in 48 of 48, on 1 to 4 ranks, three dtypes, four shapes.

# %% [markdown]
# ## Are all four right, and what do they send?
#
# Below they run on worlds of one to four ranks, made of the four that are there (`sub_world`), with other numbers on
# every rank, four shapes and three dtypes. For halving-doubling we take the one in `workshop_utils.collectives`, which
# has two more steps where n is not a power of two. That module has the other three as well.

# %% tags=["nbval-check-output"]
from workshop_utils import collectives, sub_world

tree_broadcast_ = mine("tree_broadcast_")
algorithms = {"naive": naive_all_reduce_, "tree": tree_all_reduce_, "ring": my_ring_all_reduce_}
algorithms["halving-doubling"] = collectives.halving_doubling_all_reduce_


def count_right(all_reduce_):
    right = 0
    for n in range(1, dist.get_world_size() + 1):
        with sub_world(n) as inside:
            for numbers in torch.arange(12), torch.arange(7), torch.arange(15).view(3, 5), torch.tensor(5):
                for dtype in (torch.float32, torch.bfloat16, torch.int64) if inside else ():
                    tensor = (numbers + dist.get_rank()).to(dtype)
                    all_reduce_(tensor)
                    right += int(torch.equal(tensor, (n * numbers + n * (n - 1) // 2).to(dtype)))
    return right


sent_S, budgets_S = {}, dict(zip(algorithms, (3, 2, 1.5, 1.5)))
for name, all_reduce_ in algorithms.items():
    sent_S[name] = [num_bytes / 8e6 for num_bytes in ranks.run(bytes_sent, all_reduce_)]
    assert max(sent_S[name]) <= budgets_S[name]
    right = ranks.run(count_right, all_reduce_)[0]
    print(f"{name:17} right in {right} of {12 * len(ranks)}, S sent: {sent_S[name]}")

# %% [markdown] tags=["instructor"]
# **5 min.**
#
# - *Say*: α is what you wait for an empty parcel, β is what each byte costs.
# - *Room*: 2.5, 4 minutes. Common: the ring with S instead of S/n: `is 48, expected 12`.
# - *Ask*: 64 ranks, 10 Gb/s: who wins at 1 KB, who at 100 MB? Show hands, then the figure.

# %% [markdown]
# All four send 2(n-1) S together: each rank's numbers have to get to the sum and the sum back. What differs is who
# sends, and how many messages follow one another.
#
# ## What does it cost in seconds?
#
# One message takes
#
# $$T = \alpha + S \beta$$
#
# - *α*, the latency, in seconds: what passes before the first byte arrives, however small the message
# - *β* in seconds per byte: 1 / bandwidth
# - *S* in bytes, *T* in seconds
#
# This is the *alpha-beta model* ([Hockney 1994](https://doi.org/10.1016/S0167-8191\(06\)80021-9)). Let every rank have
# a link of its own which sends and receives at the same time (*full duplex*). Then an all-reduce is a row of
# messages, and its cost can be counted ([Thakur, Rabenseifner and Gropp
# 2005](https://doi.org/10.1177/1094342005051521)):
#
# | | messages one after another | bytes of each |
# |---|---|---|
# | naive | 2(n-1), all over rank 0's link | S |
# | tree | 2⌈lg n⌉ | S |
# | ring | 2(n-1) | S/n |
# | halving-doubling, n a power of two | 2 lg n | S/2, S/4, …, S/n, and back |
#
# ### Exercise 2.5 · Predict the seconds  (★, 4 min)
#
# Turn the first three rows into a function. `link.latency_s` is α; `link.bandwidth_bytes_per_s` is 1/β.

# %% [markdown] tags=["hints-2.5"]
# 1. In each row: the number of messages, times what one of them takes.
# 2. One message takes `link.latency_s + message_bytes / link.bandwidth_bytes_per_s`. Only the ring's messages are
#    smaller than S.
# 3. ⌈lg n⌉ is `(n - 1).bit_length()`, exactly. The naive one and the ring have `2 * (n - 1)` messages, the tree has
#    `2 * (n - 1).bit_length()`.


# %% tags=["exercise-2.5", "nbval-check-output"]
def all_reduce_s(algorithm, world_size, size_bytes, link):
    """Seconds of one all-reduce in the alpha-beta model. algorithm: "naive", "tree" or "ring"."""
    ### BEGIN SOLUTION
    # ~ # TODO: how many messages follow one another, how many bytes has each, what does each take?
    # ~ raise NotImplementedError("exercise 2.5")
    n = world_size
    messages = 2 * (n - 1).bit_length() if algorithm == "tree" else 2 * (n - 1)
    message_bytes = size_bytes / n if algorithm == "ring" else size_bytes
    return messages * (link.latency_s + message_bytes / link.bandwidth_bytes_per_s)
    ### END SOLUTION


check("2.5", all_reduce_s)

# %% [markdown]
# **Predict.** 64 ranks, 10 Gb/s Ethernet. Which of the four is the fastest for 1 KB, and which for 100 MB?

# %% tags=["nbval-ignore-output"]
from workshop_utils.network import ALL_REDUCE_S, LINKS, Link, fit_link, shared_all_reduce_s
from workshop_utils.plotting.costs import plot_fastest, plot_predicted_measured, plot_seconds
from workshop_utils.widgets import alpha_beta

all_reduce_s = mine("all_reduce_s")
ethernet = LINKS["10 Gb/s Ethernet"]
for size_bytes in (1_000, 100_000_000):
    times_s = {name: all_reduce_s(name, 64, size_bytes, ethernet) for name in ("naive", "tree", "ring")}
    print(f"{size_bytes:,} bytes:", ", ".join(f"{name} {1e3 * s:,.1f} ms" for name, s in times_s.items()))
figure = plot_fastest(64, "10 Gb/s Ethernet", 100_000)
plt.show()
alpha_beta(64, "10 Gb/s Ethernet", 100_000)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: no rank has a link of its own here. So the formula counts what all send together.
# - *Cut*: the recorded figure, if you are late.

# %% [markdown]
# On the left the number of messages decides, on the right the number of bytes. Tree and ring cross in between. With 64
# ranks halving-doubling is never slower than either; with 48, no power of two, the ring passes it. Try faster links: the
# crossings move. The model does not know that links can be shared: a rank of the ring talks to two neighbours only,
# while halving-doubling sends everything over the longest distance first.
#
# ## Does this machine obey the formula?
#
# Here the ranks have no links of their own. Their messages are copied through one memory (the *loopback*), by cores
# that they share. So we count what all ranks send together, 2(n-1) S:
#
# $$T = 2(n-1)\,\alpha + 2(n-1)\,S\,\beta$$
#
# with β in seconds per byte of the whole loopback. Measure the ring for some n and S, and fit α and β.

# %%
import statistics
import time
from functools import partial


def side_by_side(contestants, size_bytes, rounds):
    """{name: median seconds} on this rank; they take turns, so that a disturbance hits all of them."""
    tensor, times_s = torch.zeros(size_bytes // 4), {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, all_reduce_ in contestants.items():
            dist.barrier()
            began_s = time.perf_counter()
            all_reduce_(tensor)
            times_s[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(times_s[name][1:]) for name in contestants}  # the first one warms up


def measure_ring(world_sizes, sizes_bytes, rounds):
    """[(world size, bytes, seconds)]"""
    rows, ring = [], {"ring": collectives.ring_all_reduce_}
    for n in world_sizes:
        with sub_world(n) as inside:
            for size in sizes_bytes if inside else ():
                rows.append((n, size, side_by_side(ring, size, rounds)["ring"]))
    return rows


# %% tags=["nbval-ignore-output"]
import json
from importlib import resources


def show_fit(title, rows):
    """Fit α and β to rows of (world size, bytes, seconds), and draw formula and rows."""
    worlds, sizes, times_s = zip(*rows)
    link = fit_link(sizes, times_s, worlds, "ring")
    off = [abs(s / shared_all_reduce_s("ring", b, n, link) - 1) for n, b, s in rows]
    print(
        f"{title}: alpha = {link.latency_s * 1e6:.0f} µs, 1 / beta = {link.bandwidth_bytes_per_s / 1e9:.2f} GB/s"
    )
    print(f"measured differs from predicted by {statistics.median(off):.0%} (median), {max(off):.0%} at most")
    curve, lines, points = [1e3 * 2**k for k in range(17)], {}, {}
    for n in sorted(set(worlds)):
        lines[f"{n} ranks"] = curve, [shared_all_reduce_s("ring", size, n, link) for size in curve]
        points[f"{n} ranks"] = zip(*[(b, s) for m, b, s in rows if m == n])
    return link, plot_seconds(title, lines, points)


rounds = 7 if PROFILE == "quick" else 31
sizes_bytes = [1_000, 8_000, 64_000, 512_000, 4_000_000, 16_000_000]
loopback, figure = show_fit(
    "The ring here, now", ranks.run(measure_ring, range(2, len(ranks) + 1), sizes_bytes, rounds)[0]
)

# %% tags=["measures", "nbval-ignore-output"]
recorded = json.loads(resources.files("workshop_utils").joinpath("recorded_ring.json").read_text())
print("recorded with", recorded["command"], "on", recorded["machine"])
_, figure = show_fit("The ring, recorded on 2 cores", recorded["rows"])

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: naive over ring on this machine, by a show of hands. Nearly everybody says 2 to 4; it is about 1.
# - *Say*: remember the tie. A benchmark on one machine says little about links.

# %% [markdown]
# The shape is the formula's: flat where α decides, straight where β does. It is not exact. Where more ranks run than
# the machine has cores, they take turns, and a message waits until its receiver has a core. And a tensor that fits
# into the processor's cache is copied faster than one that does not.
#
# ## Is the ring faster than the naive one?
#
# Each rank of the ring sends 1.5 S, where rank 0 of the naive one sends 3 S and receives 3 S.
#
# **Predict.** 4 ranks, 8 MB, on this machine. How many times as long as the ring does the naive one take?

# %% tags=["measures", "nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess_ratio = None
my_guess_ratio = 1.0
### END SOLUTION
guess("naive / ring on one machine", my_guess_ratio)
by_rank = ranks.run(side_by_side, algorithms, 8_000_000, rounds)
here_s = {name: max(times_s[name] for times_s in by_rank) for name in algorithms}
for name, time_s in here_s.items():
    print(f"{name:17} {time_s * 1e3:6.1f} ms")
compare_guess("naive / ring on one machine", here_s["naive"] / here_s["ring"])

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: three senders to one receiver? Three times as long. Two that send to each other at once? Once.
# - *Say*: same code, other links: now naive over ring is 4, which is n.

# %% [markdown]
# Somewhere around one. All four move the same 2(n-1) S through the same memory. A bottleneck at rank 0 needs
# a link that belongs to rank 0, and here there is none. What is left is the overhead of each message, and the ring has
# more of them. Whoever compares these algorithms on one machine only will
# find that they hardly differ.
#
# ## What if each rank has a link of its own?
#
# `emulate_link(link)` gives each rank a network card: our sends and receives then take as long as they would on that
# link. Messages that leave queue for the sender's card, messages that arrive queue for the receiver's. The bytes
# still go through memory, which is much faster, and the rest of the time is waited out.
#
# **Predict.** One message takes as long as it takes. How long do three take that three ranks send to one? And two that
# two ranks send to each other at once?


# %% tags=["measures", "nbval-ignore-output"]
def messages(pairs, tensor):
    """Each (src, dst) of `pairs` is a message; all start at once."""
    sends = [isend(tensor, dst) for src, dst in pairs if src == dist.get_rank()]
    for src, dst in pairs:
        if dst == dist.get_rank():
            recv(torch.empty_like(tensor), src)
    for sending in sends:
        sending.wait()


def seconds_on(link, operation, size_bytes):
    tensor = torch.zeros(size_bytes // 4)
    with emulate_link(link):
        dist.barrier()
        began_s = time.perf_counter()
        operation(tensor)
        return time.perf_counter() - began_s


link = Link(latency_s=100e-6, bandwidth_bytes_per_s=25e6)  # 200 Mb/s
for pairs in ([(1, 0)], [(src, 0) for src in range(1, len(ranks))], [(0, 1), (1, 0)]):
    time_s = max(ranks.run(seconds_on, link, partial(messages, pairs), 2_000_000))
    print(f"{time_s * 1e3:4.0f} ms = {time_s / link.message_s(2_000_000):.2f} (α + S β) for {pairs}")

# %% [markdown]
# Three senders to one receiver take three times as long, as its card takes one message at a time. Both directions at
# once take as long as one: the link is full duplex. These two facts are all that the ring needs.
#
# **Predict.** The same four all-reduces with 8 MB at 200 Mb/s per rank. Naive divided by ring?

# %% tags=["measures", "nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess_ratio = None
my_guess_ratio = 4.0
### END SOLUTION
guess("naive / ring, a link for each rank", my_guess_ratio)
predicted_s = {name: ALL_REDUCE_S[name](8e6, len(ranks), link) for name in algorithms}
linked_s = {name: max(ranks.run(seconds_on, link, f, 8_000_000)) for name, f in algorithms.items()}
compare_guess("naive / ring, a link for each rank", linked_s["naive"] / linked_s["ring"])
figure = plot_predicted_measured("8 MB, 4 ranks, 200 Mb/s for each", predicted_s, linked_s)

# %% [markdown] tags=["instructor"]
# **0 min.**
#
# - *Say*: one sentence. 7 billion parameters: minutes on Ethernet, a twentieth of a second on NVLink.

# %% [markdown]
# Now the ring wins by a factor of n, as the formula says: 2(n-1) S β against 2(n-1)/n S β. It is the same code on the
# same machine as before. Only the links are different.
#
# ## And on faster links?
#
# An emulated link cannot be faster than the memory that it stands on, so faster ones are predicted only. Three sets of
# gradients, 8 ranks, the ring. The bandwidths are from [Stas Bekman's
# collection](https://github.com/stas00/ml-engineering/tree/master/network) (Ethernet: by its name), the latencies from
# the cost model of NCCL, NVIDIA's library of collectives (Ethernet: a round figure). EFA is the network between
# Amazon's GPU machines, NVLink connects the GPUs within one machine.

# %% tags=["nbval-check-output"]
gradients_bytes = {"this MLP, float32": 199_210 * 4, "135 M, float32": 135e6 * 4, "7 B, bfloat16": 7e9 * 2}
print(" " * 20 + "".join(f"{name:>20}" for name in gradients_bytes))
for name in ("1 Gb/s Ethernet", "10 Gb/s Ethernet", "400 Gb/s EFA", "NVLink 4"):
    times_s = [all_reduce_s("ring", 8, size, LINKS[name]) for size in gradients_bytes.values()]
    print(f"{name:20}" + "".join(f"{time_s:18.5f} s" for time_s in times_s))

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: seven lines of Python per half, and gloo in C++ beside them. Read the two ratios out loud.
# - *Ask*: what does the module's ring do that ours does not? It posts its receives early.

# %% [markdown]
# This happens once in every training step. For the MLP it costs milliseconds on slow Ethernet. For seven billion
# parameters it is minutes there and a fraction of a second on NVLink: that is why such links exist, and why notebook 03
# sends gradients while the backward pass still computes.
#
# ## How good is our ring?
#
# Against [gloo](https://github.com/pytorch/gloo)'s own all-reduce, in C++, also a ring, with chunks cut into segments.

# %% tags=["measures", "nbval-ignore-output"]
contestants = {
    "your ring": my_ring_all_reduce_,
    "module": collectives.ring_all_reduce_,
    "gloo": dist.all_reduce,
}
for size_bytes in (1_000_000, 8_000_000):
    by_rank = ranks.run(side_by_side, contestants, size_bytes, rounds)
    gloo_s = {name: max(times_s[name] for times_s in by_rank) for name in contestants}
    ratios = ", ".join(f"{name} {gloo_s[name] / gloo_s['gloo']:.2f}" for name in ("your ring", "module"))
    print(f"{size_bytes / 1e6:.0f} MB: gloo {gloo_s['gloo'] * 1e3:.1f} ms; times gloo's: {ratios}")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: gloo's reduce-scatter, 0.75 S or more? 1.50: it is an all-reduce of which each rank keeps a part.
# - *Say*: in notebook 04 your ring takes its place inside torch.

# %% [markdown]
# The ring of this notebook is seven lines of Python per half. `workshop_utils/ring.py` has the one of the module, which
# does two things more: it starts a receive long before its message comes, so that the message goes straight to its
# place; and it waits for its sends at the very end.
#
# `make bench` lets them take turns for longer. On two cores, with four ranks, the module's ring and gloo take the same
# time within a fifth, from 1 MB to 64 (medians; the table is in `benchmarks/RESULTS.md`). Up to 1 MB the naive one is
# faster than both: where no rank has a link of its own, the fewest messages win.
#
# ## What are the two halves good for?
#
# In notebook 04 no rank has room for all parameters. It gathers those of one layer for a moment (all-gather), and of
# the summed gradients it needs its own part only (reduce-scatter). So each half is used by itself, with torch's
# signature: `(output, input)`.

#
# **Predict.** Each half costs (n-1)/n S, 0.75 S here. And gloo's own reduce-scatter? `wire_bytes` counts what this
# rank's connections really carried. (Only Linux tells. Elsewhere the figure for gloo is 0.)


# %% tags=["measures", "nbval-ignore-output"]
import sys


def halves(num_elements):
    rank, n = me()
    counted = wire_bytes if sys.platform == "linux" else count_traffic
    numbers = torch.arange(n * num_elements) + rank  # int64: sums are exact
    part, part_by_gloo = torch.empty(2, num_elements, dtype=torch.int64)
    with counted() as ours:
        collectives.ring_reduce_scatter(part, numbers)
        dist.barrier()
    with counted() as gloos:
        dist.reduce_scatter(part_by_gloo, list(numbers.chunk(n)))
        dist.barrier()
    whole, total = torch.empty_like(numbers), numbers.clone()
    collectives.ring_all_gather(whole, part)
    dist.all_reduce(total)
    assert torch.equal(part, part_by_gloo) and torch.equal(whole, total)
    return ours.bytes_sent / numbers.nbytes, gloos.bytes_sent / numbers.nbytes


wire_S = [statistics.mean(column) for column in zip(*ranks.run(halves, 250_000))]
print(f"reduce-scatter, S sent per rank on the wire: ring {wire_S[0]:.2f}, gloo {wire_S[1]:.2f}")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: everybody writes 2(n-1)/n S on paper and says it to a neighbour in words.
# - *Say*: you can add up gradients now. When to send which is notebook 03.

# %% [markdown]
# The parts are gloo's parts, and both halves together are gloo's all-reduce. But gloo's reduce-scatter sends twice as
# much as it has to: underneath it is an all-reduce of which each rank keeps its part. In notebook 04 we put our ring in
# its place.
#
# ## Recap
#
# - Ranks share nothing. What one knows of another was sent; two that wait for each other wait for ever.
# - Seven collectives are enough. A reduce-scatter and an all-gather make an all-reduce.
# - Any all-reduce moves 2(n-1) S in all. The ring spreads it evenly: 2(n-1)/n S for each rank, the least possible.
# - A message costs α + S β. Few messages win for small tensors, even loads win for large ones.
# - What is measured on one machine says little about links: there, naive and ring tie.
#
# **What breaks next.** You can add up gradients. But training has many of them, of all sizes, and they are ready one
# after the other while the backward pass still runs. What must be communicated, and when, so that N replicas equal one
# big batch? That is notebook 03.
#
# **References.** Hockney, *The communication challenge for MPP*, 1994 · Patarasuk and Yuan, *Bandwidth optimal
# all-reduce algorithms for clusters of workstations*, 2009 · Rabenseifner, *Optimization of collective reduction
# operations*, 2004 · Thakur, Rabenseifner and Gropp, *Optimization of collective communication operations in MPICH*,
# 2005 · [torch.distributed](https://docs.pytorch.org/docs/stable/distributed.html) ·
# [gloo](https://github.com/pytorch/gloo)

# %% tags=["key-figures", "nbval-ignore-output"]
ranks.stop()
print(
    f"ring, 4 ranks: each rank sends {max(sent_S['ring']):.2f} S; naive: rank 0 sends {max(sent_S['naive']):.0f} S"
)
print(
    f"loopback here: alpha {loopback.latency_s * 1e6:.0f} µs, {loopback.bandwidth_bytes_per_s / 1e9:.2f} GB/s for all ranks"
)
print(f"naive / ring, 8 MB: {here_s['naive'] / here_s['ring']:.2f} on one machine's loopback")
print(
    f"naive / ring, 8 MB: {linked_s['naive'] / linked_s['ring']:.2f} with 200 Mb/s for each rank (formula: 4.00)"
)
print(f"ring at 200 Mb/s: measured / predicted = {linked_s['ring'] / predicted_s['ring']:.2f}")
print(f"ring / gloo's all_reduce, 8 MB: {gloo_s['module'] / gloo_s['gloo']:.2f}")
