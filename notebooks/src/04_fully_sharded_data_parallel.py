# %% [markdown]
# # 04 · Fully sharded data parallel
#
# **How do N devices hold a model that fits on none of them, and what does that cost?**
#
# After this notebook you can
#
# - say what each parameter costs in training, and what ZeRO-1, 2 and 3 divide by N;
# - write sharded training by hand, and prove it equal to one process;
# - choose units, precision, offloading and checkpointing for torch's `fully_shard`, and measure what each buys;
# - count what it sends, make it send less with your own ring, and say when it hurts.
#
# 50 minutes. It builds on [notebook 02](02_all_reduce.ipynb) (the two halves of the ring) and [notebook
# 03](03_distributed_data_parallel.ipynb) (replicas whose gradients are averaged).

# %% [markdown] tags=["instructor"]
# **For the instructor.** Do exercise 4.3 together and let the room do 4.4: it is 4.3 again, and a reduce-scatter. Ask
# for the guess "step time with your ring / gloo's" by a show of hands before the cell runs, and let somebody read out
# the number of their own machine. If time is short, skip "What else can be turned?"; nothing later needs it.

# %% tags=["parameters"]
PROFILE = "quick"  # "full": more repeats, and the sections marked extra; about a minute longer

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
# **5 min.**
#
# - *Say*: 2 + 2 + 12. Write it on the board and leave it there until the end of 08.
# - *Ask*: why a copy in float32? Type `torch.tensor(1.0, dtype=torch.bfloat16) - 0.001`: it is 1.
# - *Room*: 4.1, 3 minutes. Typical: the master weight forgotten: `optimizer is 60,000,000,000, expected
#   90,000,000,000`.
# - *Ask*: 15 B on 80 GB cards: how many at stage 1? 9; at stage 3, 3. Then let somebody drag the slider.

# %% [markdown]
# ## What does one parameter cost?
#
# Data parallel training puts everything on every rank. So the largest model is what one device can hold. Training
# in *mixed precision* computes in bfloat16 (bf16), 2 bytes a number, and updates in float32:
#
# | bytes | what | kind |
# |---|---|---|
# | 2 | the parameter in bf16, to compute with | parameters |
# | 2 | its gradient in bf16 | gradients |
# | 4 | the parameter in float32, the *master weight* | optimizer |
# | 4 + 4 | Adam's two moments in float32 | optimizer |
#
# 16 bytes for one parameter. Why the copy in float32? bf16 has 8 significant binary digits:
# `torch.tensor(1.0, dtype=torch.bfloat16) - 0.001` is 1. Small updates would be lost, all of them.
#
# But N replicas need not all keep everything. *ZeRO* ([Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054))
# divides in three stages. Stage 1 divides the optimizer's part: each rank updates its own 1/N and sends the result
# round. Stage 2 divides the gradients as well: a rank needs the sum for its own part only. Stage 3 divides the
# parameters too, and is what torch calls *fully sharded data parallel*, FSDP.
#
# ### Exercise 4.1 · The bill  (★, 3 min)
#
# Bytes that one rank holds, by kind. Stage 0 is data parallel: nothing is divided.

# %% [markdown] tags=["hints-4.1"]
# 1. The table gives bytes per parameter for each of the three kinds: 2, 2 and 12. Which of them does stage s divide?
# 2. Stage 1 divides the optimizer's 12, stage 2 also the gradients' 2, stage 3 also the parameters' 2.
# 3. `num_parameters * 2 / (world_size if stage >= 3 else 1)` are the parameters. The gradients ask for
#    `stage >= 2`, the optimizer for `stage >= 1`, with 12 in place of 2.


# %% tags=["exercise-4.1", "nbval-check-output"]
def bytes_per_rank(stage, num_parameters, world_size):
    """{"parameters": bytes, "gradients": bytes, "optimizer": bytes} on each rank. stage: 0, 1, 2 or 3."""
    ### BEGIN SOLUTION
    # ~ # TODO: 2, 2 and 12 bytes per parameter; which of them does this stage divide by world_size?
    # ~ raise NotImplementedError("exercise 4.1")
    share = 1 / world_size
    return {
        "parameters": num_parameters * 2 * (share if stage >= 3 else 1),
        "gradients": num_parameters * 2 * (share if stage >= 2 else 1),
        "optimizer": num_parameters * 12 * (share if stage >= 1 else 1),
    }
    ### END SOLUTION


check("4.1", bytes_per_rank)

# %% [markdown]
# **Predict.** 15 billion parameters, devices with 80 GB. One cannot train it: 240 GB. How many are needed at stage 1,
# and how many at stage 3? Nothing but the 16 bytes is counted.

# %% tags=["nbval-ignore-output"]
from workshop_utils.plotting.fully_sharded import plot_memory_bill
from workshop_utils.widgets import memory_bill

### BEGIN SOLUTION
# ~ my_guess_devices = None
my_guess_devices = 8
### END SOLUTION
guess("80 GB devices for 15 B, stage 1", my_guess_devices)
bytes_per_rank = mine("bytes_per_rank")
for stage in (1, 2, 3):
    fits = [n for n in range(1, 65) if sum(bytes_per_rank(stage, 15_000_000_000, n).values()) <= 80e9]
    print(f"ZeRO-{stage}: fits from {fits[0]} devices on")
    if stage == 1:
        compare_guess("80 GB devices for 15 B, stage 1", fits[0], "devices")

figure = plot_memory_bill(7_500_000_000, world_size=64)
plt.show()
memory_bill(7_500_000_000, world_size=64)

# %% [markdown] tags=["instructor"]
# **5 min.**
#
# - *Room*: 4.2, 4 minutes.
# - *Break it*: return the slice itself: `the shard is a view of the flat tensor`. It saves nothing: the whole stays
#   alive.
# - *Break it*: forget the padding: `rank 3: 10 elements on 4 ranks: the shard has 1 elements, expected 3`.
# - *Ask*: what will the bill be off by? Two elements of padding and Adam's step counter.

# %% [markdown]
# Drag the slider, and choose 70 B. Stage 1 comes down to 4 bytes per parameter and stops there, stage 2 to 2 bytes:
# 140 GB. Only stage 3 goes on. For models beyond one device it is the only one of the three. Choose fp32: 16 bytes again, but
# 4, 4 and 8, so stage 1 leaves more on each rank.
#
# ## How is a tensor cut?
#
# The parameters of one layer, flat, one after another. Each rank keeps one piece, its *shard*. The collectives want
# pieces of equal size, so the last are filled up with zeros (*padded*).
#
# ### Exercise 4.2 · Shard and pad  (★, 4 min)
#
# The shard of `rank`: ceil(numel / world_size) elements, zeros where the tensor has ended. Budget: the shard's
# storage holds the shard and nothing else. A view would keep the whole tensor in memory.

# %% [markdown] tags=["hints-4.2"]
# 1. All shards have the same size. Which elements belong to rank r? The last rank with elements may have fewer, and
#    ranks after it none.
# 2. `size = -(-flat.numel() // world_size)` rounds up. `flat[rank * size : (rank + 1) * size]` may be shorter than
#    `size`, or empty: slicing past the end is no error.
# 3. `shard = flat.new_zeros(size)`, `part = flat[...]` as above, `shard[: part.numel()] = part`, `return shard`.


# %% tags=["exercise-4.2", "nbval-check-output"]
def shard_of(flat, rank, world_size):
    """The rank-th of world_size equal parts of `flat` [numel], in memory of its own, zeros beyond the end."""
    ### BEGIN SOLUTION
    # ~ # TODO: the size of a shard, rounded up; zeros of that size; copy in what there is
    # ~ raise NotImplementedError("exercise 4.2")
    size = -(-flat.numel() // world_size)
    shard = flat.new_zeros(size)
    part = flat[rank * size : (rank + 1) * size]
    shard[: part.numel()] = part
    return shard
    ### END SOLUTION


check("4.2", shard_of)

# %% [markdown]
# Is the bill true? Below, every rank really holds what each stage says, after one step of mixed-precision Adam on
# the network of notebook 01.
#
# **Predict.** What will the formula be off by, and why?

# %% tags=["nbval-ignore-output"]
from torch.nn import functional as F

from workshop_utils.collectives import ring_all_gather, ring_all_reduce_, ring_reduce_scatter
from workshop_utils.data import load_mnist
from workshop_utils.memory import held_bytes
from workshop_utils.models import MLP

data = load_mnist()
images, labels = data.train_images[:240].clone(), data.train_labels[:240].clone()
x_BD, shard_of = images.double(), mine("shard_of")


def flatten(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


# %% tags=["measures", "nbval-ignore-output"]
def hold_after_a_step(stage):
    rank, n, model = dist.get_rank(), dist.get_world_size(), MLP().bfloat16()
    model(torch.rand(32, 784).bfloat16()).logsumexp(1).mean().backward()
    parameters, gradients = flatten(model.parameters()), flatten(p.grad for p in model.parameters())
    mine_only = (lambda flat: shard_of(flat, rank, n)) if stage >= 1 else (lambda flat: flat)
    ring_all_reduce_(gradients)
    master = mine_only(parameters).float()  # what this rank updates
    master.grad = mine_only(gradients).float() / n
    adam = torch.optim.Adam([master])
    adam.step()
    kept = {"parameters": [master.bfloat16() if stage >= 3 else parameters]}
    kept["gradients"] = [mine_only(gradients) if stage >= 2 else gradients]
    kept["optimizer"] = [master, *adam.state[master].values()]
    return {kind: held_bytes(tensors) for kind, tensors in kept.items()}


for stage in range(4):
    held, formula = ranks.run(hold_after_a_step, stage)[0], bytes_per_rank(stage, 199_210, len(ranks))
    print(
        f"stage {stage}: {sum(held.values()):>9,} bytes held, formula {sum(formula.values()):>11,.0f}", held
    )
    assert all(abs(held[kind] / formula[kind] - 1) < 0.05 for kind in held)

# %% [markdown] tags=["instructor"]
# **14 min.**
#
# - *Type*: 4.3 together, with the room telling you the lines: gather, compute, free.
# - *Break it*: free before you compute: RuntimeError, `storage has 0 bytes: it was freed too early`. They will meet
#   it in torch.
# - *Say*: the three formulas of backward; only the first needs W.
# - *Room*: 4.4, 8 minutes: it is 4.3 again and a reduce-scatter. `grad_shard is the sum of all ranks' gradients, 2
#   times too large` is the usual one.
# - *Stuck*: `%catchup 04.4` or `mine`; nobody has to write it to go on.

# %% [markdown]
# Off by the padding, two elements, and by Adam's step counter.
#
# ## How can a layer compute if no rank has it?
#
# By having it for a moment. Before its forward the layer is *gathered* from all ranks' shards, and right after it the
# whole is *freed*. What is gathered and freed together is called a *unit*. Here each linear layer is one.
#
# ### Exercise 4.3 · Gather, compute, free  (★★, 5 min)
#
# `shard` is this rank's part of weight [O, I] and bias [O], flat, in this order, padded. `all_gather(output, input)`
# is one half of your ring: it fills `output` with the inputs of all ranks. Free the whole layer as torch does: let its
# storage have 0 bytes, `full.untyped_storage().resize_(0)`. Then it is gone whoever still has a name for it. Budget:
# one gather, and no byte of the whole layer when your function returns.

# %% [markdown] tags=["hints-4.3"]
# 1. The whole layer has `world_size * shard.numel()` elements, padding included. Make an empty tensor of that size and
#    dtype, and gather into it.
# 2. The weight is the first O · I elements, the bias the next O. What comes after that is padding. I is
#    `x_BI.shape[1]`.
# 3. `full = shard.new_empty(dist.get_world_size() * shard.numel())`, `all_gather(full, shard)`, then
#    `full[:O * I].view(O, I)` and `full[O * I : O * I + O]` go into `y_BO = F.linear(x_BI, weight_OI, bias_O)`. Free,
#    and return `y_BO`.


# %% tags=["exercise-4.3", "nbval-ignore-output"]
def gathered_forward(x_BI, shard, out_features, all_gather):
    """The layer's output [B, O], O = out_features. The whole layer exists only inside."""
    ### BEGIN SOLUTION
    # ~ # TODO: gather the whole layer, take weight [O, I] and bias [O] from it, compute, free
    # ~ raise NotImplementedError("exercise 4.3")
    full = shard.new_empty(dist.get_world_size() * shard.numel())
    all_gather(full, shard)
    num_weights = out_features * x_BI.shape[1]
    weight_OI = full[:num_weights].view(out_features, -1)
    bias_O = full[num_weights : num_weights + out_features]
    y_BO = F.linear(x_BI, weight_OI, bias_O)
    full.untyped_storage().resize_(0)
    return y_BO
    ### END SOLUTION


check("4.3", gathered_forward)

# %% [markdown]
# In backward the layer is needed once more. With $y = x W^T + b$ and the gradient of the loss by $y$ given:
#
# $$ \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y} W \qquad
# \frac{\partial L}{\partial W} = \Big(\frac{\partial L}{\partial y}\Big)^{T} x \qquad
# \frac{\partial L}{\partial b} = \sum_{i=1}^{B} \frac{\partial L}{\partial y_i} $$
#
# $L$: the loss of this rank's batch (nats). $x$ [B, I], $y$ [B, O], $W$ [O, I], $b$ [O]; $i$ counts images.
#
# The first needs $W$, which is gone: gather it again. The other two are the gradient of the whole layer, from this
# rank's images. Averaged over the ranks, and only the own part of it: that is a reduce-scatter.
#
# ### Exercise 4.4 · Gather again, reduce-scatter  (★★★, 8 min)
#
# Return `grad_x_BI` and the gradient of the shard, averaged over the ranks: same shape and dtype as the shard.
# `reduce_scatter(output, input)` leaves the sum over the ranks of the rank-th part of `input` in `output`. Budget:
# 2(n-1)/n S sent, where S is the bytes of the padded layer, and again nothing whole when you return.

# %% [markdown] tags=["hints-4.4"]
# 1. The first half is 4.3 again: gather, take the weight, one matrix product for `grad_x_BI`, free. The gradient of
#    the whole layer needs a flat tensor as large as the gathered one, zeros where the padding is.
# 2. `grad_full = torch.zeros_like(full)`, before `full` is freed. Write into it: the first O · I elements get
#    `(grad_y_BO.T @ x_BI).reshape(-1)`, the next O get `grad_y_BO.sum(0)`.
# 3. `grad_shard = torch.empty_like(shard)`, `reduce_scatter(grad_shard, grad_full)`, and return
#    `grad_y_BO @ weight_OI, grad_shard / dist.get_world_size()`.


# %% tags=["exercise-4.4", "nbval-ignore-output"]
def gathered_backward(grad_y_BO, x_BI, shard, all_gather, reduce_scatter):
    """(grad_x [B, I] of this rank's images, this rank's part of the average gradient, like `shard`)."""
    ### BEGIN SOLUTION
    # ~ # TODO: gather again, grad_x, free; the whole layer's gradient, flat and padded; reduce-scatter it; average
    # ~ raise NotImplementedError("exercise 4.4")
    full = shard.new_empty(dist.get_world_size() * shard.numel())
    all_gather(full, shard)
    O, I = grad_y_BO.shape[1], x_BI.shape[1]
    grad_x_BI = grad_y_BO @ full[: O * I].view(O, I)
    grad_full = torch.zeros_like(full)
    full.untyped_storage().resize_(0)
    grad_full[: O * I] = (grad_y_BO.T @ x_BI).reshape(-1)
    grad_full[O * I : O * I + O] = grad_y_BO.sum(0)
    grad_shard = torch.empty_like(shard)
    reduce_scatter(grad_shard, grad_full)
    return grad_x_BI, grad_shard / dist.get_world_size()
    ### END SOLUTION


check("4.4", gathered_backward)

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Type*: `ShardedLinear` live, the autograd Function first: forward calls your forward, backward your backward.
# - *Ask*: equal in every bit on two ranks? And on four? Yes; no: the sums have another order.
# - *Say*: what autograd saves is the input and the shard. That is the point of the whole class.

# %% [markdown]
# ## Does the whole network train?
#
# `ShardedLinear` keeps a shard and nothing else. Autograd calls your two functions: `forward` on the way there,
# `backward` on the way back. What it saves in between is the input and the shard.
#
# The proof: after every step, the parameters equal those of one process which accumulates the same parts of the
# batch, one after another, as in notebook 01. The optimizer is Adam, on shards: it works entry by entry, so it does
# not notice.
#
# **Predict.** On two ranks: equal in every bit, or nearly? And on four?

# %% tags=["live", "nbval-ignore-output"]
gathered_forward, gathered_backward = mine("gathered_forward"), mine("gathered_backward")


class ShardedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BI, shard, layer):
        ctx.save_for_backward(x_BI, shard)
        ctx.layer = layer
        return gathered_forward(x_BI, shard, layer.out_features, layer.all_gather)

    @staticmethod
    def backward(ctx, grad_y_BO):
        x_BI, shard = ctx.saved_tensors
        return *gathered_backward(grad_y_BO, x_BI, shard, ctx.layer.all_gather, ring_reduce_scatter), None


class ShardedLinear(nn.Module):
    def __init__(self, linear, all_gather=ring_all_gather):
        super().__init__()
        flat = flatten([linear.weight, linear.bias])
        self.shard = nn.Parameter(shard_of(flat, dist.get_rank(), dist.get_world_size()))
        self.out_features, self.all_gather = linear.out_features, all_gather

    def forward(self, x_BI):
        return ShardedFunction.apply(x_BI, self.shard, self)


# %% tags=["nbval-check-output"]
from workshop_utils import sub_world


def compare_with_one_process(n, parts):
    """How far this rank's shards are from those of one process, at most, after each of 4 steps. float64."""
    with sub_world(n) as inside:
        if not inside:
            return 0.0
        torch.manual_seed(0)
        rank, one, sharded, off = dist.get_rank(), MLP().double(), MLP(), []
        for name, layer in one.named_children():
            setattr(sharded, name, ShardedLinear(layer))
        adams = [torch.optim.Adam(model.parameters()) for model in (sharded, one)]
        for _ in range(4):
            F.cross_entropy(sharded(x_BD.chunk(n)[rank]), labels.chunk(n)[rank]).backward()
            for x, y in zip(x_BD.chunk(parts), labels.chunk(parts)):
                (F.cross_entropy(one(x), y) / parts).backward()
            for adam in adams:
                adam.step()
                adam.zero_grad()
            for layer, whole in zip(sharded.children(), one.children()):
                wanted = shard_of(flatten(whole.parameters()), rank, n)
                off.append((layer.shard - wanted).abs().max().item())
        return max(off)


# %% tags=["nbval-ignore-output"]
for n, parts in (pair for pair in ((2, 2), (2, 1), (3, 3), (4, 1)) if pair[0] <= len(ranks)):
    off = max(ranks.run(compare_with_one_process, n, parts))
    print(f"{n} ranks, one process with {parts} parts: {'equal' if off == 0 else 'less than 1e-10 apart'}")
    assert off < 1e-10

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: layers of 628, 161 and 8 KB: how high does the curve go? To 628, never 789.
# - *Say*: the curve is at zero after the step. That is the proof that the layer is gone.

# %% [markdown]
# Two ranks and the same two halves in one process: equal in every bit, after every step, if your forward calls
# `F.linear` as `nn.Linear` does (`x @ W.T + b` rounds the product before it adds b). Otherwise the sums are
# formed in another order, and float64 shows by how little that matters.
#
# ## Is the layer really gone?
#
# A storage can be asked for its bytes at any time. So let `all_gather` keep a name for each tensor that it fills, and
# ask all of them after each event of a step.
#
# **Predict.** The layers have 628, 161 and 8 KB. How high will the curve go, and where will it be highest?

# %% tags=["nbval-ignore-output"]
from functools import partial

from workshop_utils.plotting.fully_sharded import plot_live_bytes


def live_bytes_along_a_step():
    """[(event, bytes of full parameters alive)] of one step on this rank."""
    gathered, events = [], []

    def note(label):
        events.append((label, sum(full.untyped_storage().nbytes() for full in gathered)))

    def watched(name, output, input):
        ring_all_gather(output, input)
        gathered.append(output)
        note(f"gather {name}")

    model = MLP()
    for name, layer in list(model.named_children()):
        layer = ShardedLinear(layer, partial(watched, name))
        layer.register_forward_hook(lambda *_, name=name: note(f"{name} forward done"))
        layer.shard.register_post_accumulate_grad_hook(lambda _, name=name: note(f"{name} backward done"))
        setattr(model, name, layer)
    F.cross_entropy(model(images), labels).backward()
    return events


# %% tags=["nbval-ignore-output"]
by_rank = ranks.run(live_bytes_along_a_step)
labels_of_events = [label for label, _ in by_rank[0]]
curves = {f"rank {rank}": [alive for _, alive in events] for rank, events in enumerate(by_rank)}
two_largest = {"two largest units": 4 * (784 * 200 + 200 + 200 * 200 + 200)}
assert max(max(curve) for curve in curves.values()) <= two_largest["two largest units"]
assert all(curve[-1] == 0 for curve in curves.values())
figure = plot_live_bytes(
    "One unit at a time, and nothing after the step", curves, labels_of_events, two_largest
)

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: the same for any module: hooks, and a root unit for what is in no unit.
# - *Ask*: what does each switch send, in S (n-1)/n? 3 by default, 2 with either of them.

# %% [markdown]
# One unit is alive at any time, never two, so the peak is the largest unit. Two would be alive if the next were
# gathered while this one computes; that is why two is the limit that one states.
#
# ## And any other network?
#
# `workshop_utils.fully_sharded` has the same for any module. Units are found by type; what is in none (norm layers,
# the class token of a vision transformer) forms a root unit. Instead of a function per layer type it has hooks, and it
# empties the storage under the parameters, so that what autograd saved is emptied with them.
#
# We try it on two networks. A *vision transformer* cuts an image into patches, makes a row of features of each, adds
# one more row (the class token, which will answer), and sends them through a stack of equal *blocks*: attention, which
# lets rows look at each other, and two linear layers.

# %% tags=["nbval-ignore-output"]
from workshop_utils.fully_sharded import FullyShardedDataParallel
from workshop_utils.models import SmallViT


def module_against_one_process(make_model):
    torch.manual_seed(dist.get_rank())  # the ranks begin differently; rank 0's weights are sent to all
    sharded, one, off = FullyShardedDataParallel(make_model().double()), make_model().double(), []
    one.load_state_dict(sharded.full_state_dict())
    sgds = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (sharded, one)]
    part = slice(dist.get_rank(), None, dist.get_world_size())
    for x, y in zip(x_BD.split(16)[:3], labels.split(16)):
        F.cross_entropy(sharded(x[part]), y[part]).backward()
        sharded.finish_gradient_sync()
        F.cross_entropy(one(x), y).backward()
        for sgd in sgds:
            sgd.step()
            sgd.zero_grad()
        off += [(w - one.state_dict()[key]).abs().max() for key, w in sharded.full_state_dict().items()]
    return max(off)


for make_model in (MLP, partial(SmallViT, layers=2, width=32)):
    assert max(ranks.run(module_against_one_process, make_model)) < 1e-10
    print("module and one process: less than 1e-10 apart after each of 3 steps")

# %% [markdown]
# It has two switches. `reshard_after_forward=False` keeps a unit from its forward to its backward: the second gather
# is spared, the memory is not. `compute_dtype=torch.bfloat16` gathers and computes in bf16; shards, the sum of the
# gradients and the optimizer stay in float32.
#
# **Predict.** Bytes sent in a step, in units of S (n-1)/n, where S is the float32 parameters: 3 by default. And with
# each switch?

# %% tags=["nbval-ignore-output"]
from workshop_utils.point_to_point import count_traffic, emulate_link


def use_module(**options):
    """Bytes that this rank sends in a step, and bytes of full parameters at each event of it."""
    model, alive = FullyShardedDataParallel(MLP(), **options), []

    def note(*_):
        alive.append(model.full_parameter_bytes())

    for layer, shard in zip(model.module.children(), model.parameters()):
        layer.register_forward_pre_hook(note)
        layer.register_forward_hook(lambda layer, x, y: note() or y.register_hook(note) and None)
        shard.register_post_accumulate_grad_hook(note)
    with count_traffic() as traffic:
        F.cross_entropy(model(images).float(), labels).backward()
    return traffic.bytes_sent, alive


switches = {"default": {}, "reshard off": {"reshard_after_forward": False}}
curves, switches["bf16"] = {}, {"compute_dtype": torch.bfloat16}
for name in switches:
    num_bytes, curves[name] = ranks.run(use_module, **switches[name])[0]
    print(f"{name:12} sends {num_bytes / (4 * 199_210 * 3 / 4):.2f} S(n-1)/n")
figure = plot_live_bytes("The same with each switch, rank 0", curves, labels_of_events, two_largest)

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: always pass a mesh. Without one torch takes the machine's GPU, and gloo's ranks fail.
# - *Say*: a DTensor says of what it is a shard. Ours is one flat shard per unit, torch's cuts each parameter's rows.

# %% [markdown]
# Without resharding the curve climbs to the whole model at the end of the forward. bf16 halves the units and the two
# gathers, and the updates are still made in float32.
#
# ## What does torch make of it?
#
# `fully_shard` turns a module into a unit, in place; the last call is for the root. It takes a *mesh*: the ranks in a
# grid, and on which device. Always pass one. Without it torch takes the machine's GPU if there is one, and gloo's
# ranks on a CPU fail. Its parameters are *DTensors*: each says that it is a shard, of what, and on which mesh.

# %%
import warnings

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard_with_torch(model, units, **options):
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place changes of its output
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for unit in units:
        fully_shard(unit, **options)
    return fully_shard(model, **options)


def deep(width=512):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))


# %% tags=["measures", "nbval-ignore-output"]
def ours_and_torchs():
    """How far apart the weights are, at most, after each of 3 steps, and a shard. float64."""
    ours, model, off = FullyShardedDataParallel(MLP().double()), MLP().double(), []
    model.load_state_dict(ours.full_state_dict())
    torchs = shard_with_torch(model, model.children())
    adams = [torch.optim.Adam(net.parameters()) for net in (ours, torchs)]
    part = slice(dist.get_rank(), None, dist.get_world_size())
    for _ in range(3):
        for net, adam in zip((ours, torchs), adams):
            adam.zero_grad()
            F.cross_entropy(net(x_BD[part]), labels[part]).backward()
            if net is ours:
                net.finish_gradient_sync()
            adam.step()
        whole = ours.full_state_dict()
        off += [(p.full_tensor() - whole[name]).abs().max().item() for name, p in torchs.named_parameters()]
    return max(off), torchs.fc1.weight.placements, list(torchs.fc1.weight.to_local().shape)


off, placements, local = ranks.run(ours_and_torchs)[1]
print("ours and fully_shard, after each of 3 steps, apart by less than 1e-10:", off < 1e-10)
print(f"fc1.weight is {placements}; rank 1 holds {local} of [200, 784]")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: one unit, one per block, one per layer: which holds most, which calls most collectives?
# - *Say*: a block is the usual choice; three numbers per line in the output say why.

# %% [markdown]
# The same weights, step by step. Where ours keeps one flat shard for a unit, torch cuts each parameter along its first
# dimension.
#
# ## What is a good unit?
#
# **Predict.** A small vision transformer, three ways: one unit, a unit per block, a unit per layer. Which holds most
# at once, and which calls most collectives?

# %% tags=["nbval-ignore-output"]
from workshop_utils.probes import count_collectives, sent_bytes, take_turns


def units_of(vit, what):
    kinds = (nn.Linear, nn.MultiheadAttention, nn.Conv2d)
    layers = [module for module in vit.modules() if type(module) in kinds]
    return {"one unit": [], "per block": vit.vit.encoder.layers, "per layer": layers}[what]


def wrap_vit(what):
    vit = SmallViT()
    shard_with_torch(vit, units_of(vit, what))
    return count_collectives(vit, lambda: F.cross_entropy(vit(images[:8]), labels[:8]).backward())


print(f"{sum(p.nbytes for p in SmallViT().parameters()) / 1e3:.0f} KB in all")
for what in ("one unit", "per block", "per layer"):
    seen = ranks.run(wrap_vit, what)[0]
    print(f"{what:10} peak {seen.peak_bytes / 1e3:4.0f} KB whole", end=", ")
    print(f"{seen.all_gathers:2} all-gathers, {seen.reduce_scatters:2} reduce-scatters")

# %% [markdown] tags=["instructor"]
# **3 min.**
#
# - *Ask*: in bf16, which dtype has the output, which the shard, which the gradient? bf16, float32, float32.
# - *Ask*: checkpointing: 1.1, 1.3 or 2 times the time? A third more in theory; here more, the blocks are small.
# - *Say*: clipping by hand needs one all-reduce. Look at the four different norms.
# - *Cut*: this section; nothing later needs it.

# %% [markdown]
# One unit is whole for the entire step: what is divided is gradients and optimizer state alone. A unit per layer holds
# least, and calls three times as many collectives as a unit per block. Each costs at least α, and small ones cost
# little else. A block is the usual choice. (The root, here what no block owns, stays whole from its forward to its
# backward: the end of the network is in it, and backward begins there.)
#
# ## What else can be turned?
#
# `MixedPrecisionPolicy` is our `compute_dtype`. `CPUOffloadPolicy` keeps shards, gradients and optimizer state in the
# host's memory, and copies a unit to the device to compute. On a CPU there is nothing to copy, and `pin_memory=False`
# is needed.
#
# **Predict.** In bf16, which dtype has the output, which the shard, which the gradient?

# %% tags=["measures", "nbval-ignore-output"]
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy


def train_with(**policies):
    torch.manual_seed(0)
    model = MLP()
    shard_with_torch(model, model.children(), **policies)
    adam, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(12):
        adam.zero_grad()
        output = model(images)
        losses.append(F.cross_entropy(output.float(), labels))
        losses[-1].backward()
        adam.step()
    weight = model.fc1.weight
    return output.dtype, weight.dtype, weight.grad.dtype, losses[-1].item() < losses[0].item() / 2


for name, policies in {
    "float32": {},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}.items():
    output, weight, gradient, learns = ranks.run(train_with, **policies)[0]
    print(f"{name:8} output {output}, shard {weight}, its gradient {gradient}; loss halved: {learns}")

# %% [markdown]
# Sharding does not touch the activations. *Activation checkpointing* does: keep only the input of each block, and
# compute the block's forward again when its backward comes.
#
# **Predict.** How many times as long does a step take: 1.1, 1.3, 2?

# %% tags=["measures", "nbval-ignore-output"]
from torch.utils.checkpoint import checkpoint
from workshop_utils.memory import record_activations


def small_vit(checkpointing):
    torch.manual_seed(0)
    model = SmallViT()
    for block in model.vit.encoder.layers if checkpointing else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def vit_loss(vit, batch=32):
    return F.cross_entropy(vit(images[:batch]), labels[:batch])


torch.set_num_threads(1)  # as on a rank
vits, kept = {"plain": small_vit(False), "checkpointed": small_vit(True)}, {}
for name, vit in vits.items():
    with record_activations(vit) as saved:
        vit_loss(vit)
    kept[name] = saved.total_bytes
vit_s = take_turns({name: lambda vit=vit: vit_loss(vit).backward() for name, vit in vits.items()}, 4)
for name in vits:
    print(f"{name:12} {kept[name] / 1e6:4.1f} MB, {vit_s[name] / vit_s['plain']:.2f} times the step time")

# %% [markdown]
# A fraction of the memory, for one more forward: a third of a step, as a backward costs two forwards. With blocks as
# small as these, what torch does around each call comes on top. [Stas
# Bekman](https://github.com/stas00/ml-engineering) reports 20 to 25% of the throughput. With sharding: first
# checkpoint, then `fully_shard`. The unit is gathered once for both, the second forward and the backward.
#
# One more trap. Clipping needs the norm of the whole gradient, and each rank has a part of it.


# %% tags=["measures", "nbval-ignore-output"]
def norms(checkpointing):
    vit = small_vit(checkpointing)
    shard_with_torch(vit, units_of(vit, "per block"))
    vit_loss(vit, 8).backward()
    own = torch.cat([p.grad.to_local().reshape(-1) for p in vit.parameters()]).norm().item()
    return own, nn.utils.clip_grad_norm_(vit.parameters(), 0.1).full_tensor().item()


vit = small_vit(False)
vit_loss(vit, 8).backward()
expected = nn.utils.clip_grad_norm_(vit.parameters(), 0.1).item()
(own, plain), (_, checkpointed) = zip(*ranks.run(norms, False)), zip(*ranks.run(norms, True))
print(f"of each rank's shards {[round(norm, 2) for norm in own]}, of one process {expected:.2f}")
print(f"clip_grad_norm_ of DTensors: {plain[0]:.2f}, with checkpointing {checkpointed[0]:.2f}")
assert max(abs(norm - expected) for norm in plain + checkpointed) < 1e-3

# %% [markdown]
# torch's function understands DTensors and adds the squares up over the ranks. Whoever shards by hand sends one number
# round with an all-reduce. Without it each rank clips by another factor, and nobody is told.
#
# ### Extra · A grid of ranks, prefetch, meta device, checkpoints  (6 min)
#
# Three cells, off in the quick profile. *HSDP*, hybrid sharding, shards inside a group and replicates between groups: a
# mesh with two dimensions. Gathers stay inside the group, and only the gradients of a shard cross. *Prefetch* starts
# the next unit's gather while this one computes: more overlap, one more unit in memory. Look whether the gradients
# agree, and how large the shards are.
#
# On the *meta* device tensors have shapes and no memory. Build a model there that a rank has no room for, shard it, and
# give memory to the shards only. And `torch.distributed.checkpoint` writes a file per rank and a table of who has what,
# so that another number of ranks can read it.


# %% tags=["extra", "nbval-ignore-output"]
def grid_and_prefetch(hybrid, prefetch):
    names, n = ("replicate", "shard")[not hybrid :], dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, n // 2) if hybrid else (n,), mesh_dim_names=names)
    model, x = deep(), torch.rand(64, 512, generator=torch.Generator().manual_seed(0))
    shard_with_torch(model, model, mesh=mesh)
    for layer, following in zip(model, list(model)[1:]) if prefetch else ():
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    step_s = take_turns({"": lambda: model(x).square().mean().backward()}, 10)[""]
    weight = model[0].weight
    return list(weight.to_local().shape), step_s, weight.grad.full_tensor().norm().item()


if PROFILE == "full":
    for hybrid, prefetch in ((False, False), (False, True), (True, False)):
        shape, step_s, norm = ranks.run(grid_and_prefetch, hybrid, prefetch)[0]
        print(
            f"2 groups: {hybrid!s:5} prefetch: {prefetch!s:5} shard {shape}, {step_s * 1e3:.0f} ms, gradient {norm:.6f}"
        )


# %% tags=["extra", "nbval-ignore-output"]
def from_meta(budget_bytes):
    with torch.device("meta"):
        model = MLP(hidden=4000)
    shard_with_torch(model, model.children())
    model.to_empty(device="cpu")
    warnings.filterwarnings("ignore", message="DTensor random operators")
    torch.manual_seed(0)
    for layer in model.children():
        layer.reset_parameters()  # each rank fills its own shards
    held = held_bytes(p.to_local() for p in model.parameters())
    assert held <= budget_bytes and sum(p.nbytes for p in model.parameters()) > budget_bytes
    return held, F.cross_entropy(model(images), labels).item()


if PROFILE == "full":
    for held, loss in ranks.run(from_meta, 40_000_000):
        print(f"{held / 1e6:.1f} MB of 76.7 MB on this rank, loss {loss:.2f}")

# %% tags=["extra", "nbval-ignore-output"]
import tempfile

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict


def save_or_load(folder, n, save):
    """Save on n ranks, or load what was saved. Returns all parameters, flat."""
    with sub_world(n) as inside:
        if not inside:
            return None
        torch.manual_seed(n)  # other weights in each world, until they are loaded
        model = MLP()
        state = {"model": get_model_state_dict(shard_with_torch(model, model.children()))}
        (dcp.save if save else dcp.load)(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        return flatten(p.full_tensor() for p in model.parameters())


with tempfile.TemporaryDirectory() as folder:
    for n in (len(ranks), 2, 1) if PROFILE == "full" else ():
        weights = ranks.run(save_or_load, folder, n, save=n == len(ranks))[0]
        saved = weights if n == len(ranks) else saved
        print(f"saved on {len(ranks)} ranks, there on {n}: equal {torch.equal(saved, weights)}")

# %% [markdown] tags=["instructor"]
# **5 min.**
#
# - *Room*: 4.5, 4 minutes. `That is what data parallel sends`: 2 collectives instead of 3.
# - *Break it*: pad the sum instead of each unit: `Each unit is padded by itself`.
# - *Ask*: `fully_shard` on gloo: 3.0? It is 4.0; what did notebook 02 find about gloo's reduce-scatter?

# %% [markdown]
# ## What does it send?
#
# Per unit and step: two gathers and a reduce-scatter, each (n-1)/n of the padded unit.
#
# ### Exercise 4.5 · Bytes in a step  (★★, 4 min)
#
# Bytes that one rank sends in one step in float32, exactly. The check counts them on the ranks.

# %% [markdown] tags=["hints-4.5"]
# 1. In a ring each of the three sends n-1 messages of one shard. How many bytes has the shard of one unit?
# 2. A shard has `-(-numel // world_size)` elements of 4 bytes. Pad each unit by itself, then add up.
# 3. `collectives = 3 if reshard_after_forward else 2`, and for each unit
#    `collectives * (world_size - 1) * 4 * -(-numel // world_size)`.


# %% tags=["exercise-4.5", "nbval-ignore-output"]
def bytes_sent_per_step(unit_numels, world_size, reshard_after_forward=True):
    """Bytes sent by each rank in one step. unit_numels: the number of parameters of each unit."""
    ### BEGIN SOLUTION
    # ~ # TODO: how many collectives per unit, how many messages in each, how many bytes in a message?
    # ~ raise NotImplementedError("exercise 4.5")
    collectives = 3 if reshard_after_forward else 2
    shard_bytes = sum(4 * -(-numel // world_size) for numel in unit_numels)
    return collectives * (world_size - 1) * shard_bytes
    ### END SOLUTION


check("4.5", bytes_sent_per_step)

# %% [markdown]
# So 3 S (n-1)/n, where data parallel sends 2. Now count torch's, on the wire.
#
# **Predict.** `fully_shard` on gloo: 3.0? Remember what notebook 02 found about gloo's reduce-scatter.


# %% tags=["nbval-ignore-output"]
def sharded_deep(plug_in=lambda model: None, width=512, **options):
    model = deep(width)
    shard_with_torch(model, model, **options)
    plug_in(model)
    return model


def sent_in_a_step(make_model):
    """What this rank sends, in units of S (n-1)/n."""
    model, x, n = make_model(), torch.rand(16, 512), dist.get_world_size()
    S = sum(p.nbytes for p in deep().parameters())
    return sent_bytes(lambda: model(x).square().mean().backward()) / (S * (n - 1) / n)


contestants = {
    "DistributedDataParallel": lambda: nn.parallel.DistributedDataParallel(deep()),
    "ours": lambda: FullyShardedDataParallel(deep()),
    "fully_shard": sharded_deep,
    "fully_shard, reshard off": partial(sharded_deep, reshard_after_forward=False),
}
sent = {name: sum(ranks.run(sent_in_a_step, make)) / len(ranks) for name, make in contestants.items()}
print("\n".join(f"{name:26} {units:.2f} S (n-1)/n" for name, units in sent.items()))

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: your ring from notebook 02 goes into torch here. Whoever passed 2.3 runs their own code.
# - *Ask*: step time with your ring over gloo's, by a show of hands; then let somebody read out their own machine's
#   number.

# %% [markdown]
# 4 instead of 3: gloo makes an all-reduce of it, and throws away what this rank does not need. On a CPU sharding sends
# twice what data parallel sends, where 1.5 times would do. You have something better.
#
# ## Your ring in torch
#
# `fully_shard` lets its reduce-scatter be replaced. It wants an object with two methods, and yours is the first half
# of your ring, exercise 2.3.

# %% tags=["nbval-ignore-output"]
from workshop_utils.fully_sharded import use_ring_reduce_scatter

my_reduce_scatter_ = mine("ring_reduce_scatter_")


class MyReduceScatter:
    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        chunks = list(input_tensor.view(-1).chunk(dist.get_world_size()))
        my_reduce_scatter_(chunks)
        factor = 1 / len(chunks) if op == dist.ReduceOp.AVG else 1
        output_tensor.copy_(chunks[dist.get_rank()].view_as(output_tensor) * factor)


def use_mine(model):
    for unit in (m for m in model.modules() if hasattr(m, "set_custom_reduce_scatter")):
        unit.set_custom_reduce_scatter(MyReduceScatter())


rings = {"gloo": lambda model: None, "your ring": use_mine, "module's ring": use_ring_reduce_scatter}
for name, ring in rings.items():
    sent[name] = sum(ranks.run(sent_in_a_step, partial(sharded_deep, ring))) / len(ranks)
    print(f"{name:14} {sent[name]:.2f} S (n-1)/n")

# %% [markdown]
# 3.0: what the formula says. Are the weights the same? And is it faster?
#
# **Predict.** Eight layers of 1024 by 1024, four ranks on this machine, the three take turns. What is the step time
# with your ring, in units of gloo's?

# %% tags=["measures", "nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess_ratio = None
my_guess_ratio = 0.75
### END SOLUTION
guess("step time with your ring / gloo's", my_guess_ratio)


def race(rounds):
    models = {name: sharded_deep(plug_in, 1024) for name, plug_in in rings.items()}
    sgds, x = {k: torch.optim.SGD(m.parameters(), lr=0.1) for k, m in models.items()}, torch.rand(16, 1024)

    def step(name):
        models[name](x).square().mean().backward()
        sgds[name].step()
        sgds[name].zero_grad()

    times_s = take_turns({name: partial(step, name) for name in rings}, rounds)
    gloos, *others = (flatten(p.to_local() for p in model.parameters()) for model in models.values())
    return times_s, max((gloos - weights).abs().max().item() for weights in others)


by_rank = ranks.run(race, 4 if PROFILE == "quick" else 15)
step_s = {name: max(times[name] for times, _ in by_rank) for name in rings}
assert max(off for _, off in by_rank) < 1e-6
for name, time_s in step_s.items():
    print(f"{name:14} {time_s * 1e3:4.0f} ms a step, {time_s / step_s['gloo']:.2f} of gloo's")
compare_guess("step time with your ring / gloo's", step_s["your ring"] / step_s["gloo"])

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: what share of a step is communication at 200 Mb/s? Nearly all of it.
# - *Say*: the bytes stop growing with n, the latency does not.

# %% [markdown]
# The same weights, from code that you wrote. What the ratio is depends on the machine, and on who else is at work
# while you measure; `make bench` takes more turns, and `benchmarks/RESULTS.md` has the table of an idle one. There are
# fewer bytes to copy, and copying is most of what a step does here. Yours is in Python, and starts no receive before
# its message comes; the module's does.
#
# ## What does sharding cost on a network?
#
# On one machine all ranks share one memory. So give each a link again, as in notebook 02, and compare with the
# formula: three collectives for each unit, (n-1) α + (n-1)/n S β each.
#
# **Predict.** The MLP with 512 images on each rank. Links of 2 Gb/s, 500 Mb/s and 200 Mb/s: what share of a step is
# communication on two ranks, and on four?

# %% tags=["nbval-ignore-output"]
from workshop_utils.network import LINKS, Link, all_gather_s, reduce_scatter_s
from workshop_utils.plotting.fully_sharded import plot_communication_share


def seconds_of_a_step(n, link):
    """Median seconds of a step on this link, and of the same arithmetic on a plain MLP, on this rank."""
    with sub_world(n) as inside:
        if not inside:
            return None
        models, x, y = {"sharded": MLP(), "plain": MLP()}, torch.rand(512, 784), torch.arange(512) % 10
        for name, layer in models["plain"].named_children():
            setattr(models["sharded"], name, ShardedLinear(layer))
        steps = {
            name: (lambda model=model: F.cross_entropy(model(x), y).backward())
            for name, model in models.items()
        }
        with emulate_link(link):
            return tuple(take_turns(steps, 3).values())


def communication_s(n, link):
    units = [4 * numel for numel in (784 * 200 + 200, 200 * 200 + 200, 200 * 10 + 10)]
    return sum(2 * all_gather_s(S, n, link) + reduce_scatter_s(S, n, link) for S in units)


# %% tags=["measures", "nbval-ignore-output"]
links = {f"{mbit:,} Mb/s": Link(100e-6, mbit * 1e6 / 8) for mbit in (200, 500, 2000)}
measured_s, worlds, few_and_all = {}, [2, 4, 8, 16, 32, 64], sorted({2, len(ranks)})
for name, link in links.items():
    for n in few_and_all:
        here_s, arithmetic_s = map(max, zip(*ranks.run(seconds_of_a_step, n, link)[:n]))
        measured_s[name, n] = here_s - arithmetic_s
        print(f"{name}, {n} ranks: communication {measured_s[name, n] * 1e3:.0f} ms", end=", ")
        print(f"predicted {communication_s(n, link) * 1e3:.0f} ms, arithmetic {arithmetic_s * 1e3:.0f} ms")


def share(seconds):
    return seconds / (seconds + arithmetic_s)  # that of all ranks here


lines = {name: (worlds, [share(communication_s(k, link)) for k in worlds]) for name, link in links.items()}
points = {name: (few_and_all, [share(measured_s[name, n]) for n in few_and_all]) for name in links}
title = "What communication takes of a step of the MLP"
figure = plot_communication_share(title, lines, points, xlabel="ranks", log=True)

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: F over B T: the size of the model is not in it. Tokens per device decide.
# - *Ask*: how many tokens keep an A100 busy over 10 Gb/s? 140,000. Over NVLink 3? 583.

# %% [markdown]
# The bytes stop growing: (n-1)/n is nearly 1 from eight ranks on. The latency does not, 9 (n-1) α with three units, and
# with units this small it takes over on the fast link. Where more ranks run than there are cores, some of what is
# measured here as communication is waiting for a core.
#
# ## When does it pay?
#
# Let Ψ parameters be computed with in bf16. In a step each rank sends 3 times 2 Ψ bytes, for large n, and computes
# 6 Ψ T operations for its T tokens (a multiplication and an addition for each, once in the forward and twice in the
# backward). So, whatever the size of the model:
#
# $$ \frac{\text{communication}}{\text{computation}} = \frac{6 \Psi / B}{6 \Psi T / F} = \frac{F}{B\,T} $$
#
# - *F*: operations per second of one device
# - *B*: bytes per second of its link
# - *T*: tokens per device and step
#
# The [FSDP paper](https://arxiv.org/abs/2304.11277) reached 173 to 186 · 10¹² operations per second on an A100.
#
# **Predict.** How many tokens per device keep an A100 busy for as long as it sends, over 10 Gb/s Ethernet? Over NVLink?

# %% tags=["nbval-ignore-output"]
import json
from importlib import resources

from workshop_utils.plotting import costs
from workshop_utils.plotting.fully_sharded import plot_recorded_shares

flops_per_s, tokens = 175e12, [10 * 2**k for k in range(17)]
lines = {}
for name in ("10 Gb/s Ethernet", "PCIe 4 x16", "400 Gb/s EFA", "NVLink 3"):
    bandwidth = LINKS[name].bandwidth_bytes_per_s
    print(f"{name:17} {flops_per_s / bandwidth:>9,.0f} tokens per device: as long to send as to compute")
    lines[name] = tokens, [1 / (1 + bandwidth * T / flops_per_s) for T in tokens]
title = "Predicted: A100, any model size, nothing overlapped"
figure = plot_communication_share(title, lines, xlabel="tokens per device and step", log=True)

recorded = json.loads(resources.files("workshop_utils").joinpath("recorded_fsdp.json").read_text())
print("recorded with", recorded["command"], "on", recorded["machine"])
print(f"{recorded['model']}; latency {recorded['latency_s'] * 1e3:g} ms")
figure = plot_recorded_shares(recorded)
hosts = json.loads(resources.files("workshop_utils").joinpath("recorded_multihost.json").read_text())
figure = costs.plot_multihost(hosts["rows"])

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: which sends least? Whole parameters kept for two parts: a third of what two plain parts send.
# - *Say*: each line trades memory for bytes. HSDP puts the groups where the fast links are.

# %% [markdown]
# With a few thousand tokens per device NVLink hardly shows, PCIe takes half of a step if nothing overlaps, and Ethernet
# nearly all. Overlap hides communication behind computation until it is the longer of the two.
#
# The second figure was recorded, with more ranks and more time than there is here. At each link sharding pays more
# than data parallel: half as many bytes again, and messages for every unit. Points above the lines are what the
# formula leaves out: waiting for a core, and Python. Lines that fall do so because eight ranks share two cores: the
# arithmetic takes longer, and communication is a smaller part.
#
# The third is from two hosts: network namespaces whose links the kernel holds to a rate, with torchrun across them
# (`cluster/multihost_lab.sh`). `fully_shard` between them sends 4 S(n-1)/n, ours on the emulated link 3. So the two differ on
# the right, and agree on the left, where both send the same.
#
# ## What helps where links are slow?
#
# Each of these trades memory for bytes. Counted on four ranks, with the ring in torch, eight layers of 256 by 256. S
# is the parameters' bytes; two parts of a batch are accumulated in the last two lines.
#
# **Predict.** Which of them sends least?


# %% tags=["nbval-ignore-output"]
def mitigated(size=1, hybrid=False, parts=1, keep_whole=False):
    """(S sent, gathers, peak of whole parameters in S) of one step on this rank; a unit has `size` layers."""
    names, n = ("replicate", "shard")[not hybrid :], dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, n // 2) if hybrid else (n,), mesh_dim_names=names)
    model, x = deep(256), torch.rand(16, 256)
    S, units = (
        sum(p.nbytes for p in model.parameters()),
        [list(model)[i : i + size] for i in range(0, 8, size)],
    )
    shard_with_torch(model, units, mesh=mesh, reshard_after_forward=not keep_whole)
    use_ring_reduce_scatter(model)

    def step():
        for last in [False] * (parts - 1) + [True]:
            if keep_whole:
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last)
            model(x).square().mean().backward()

    S_sent, seen = sent_bytes(step) / S, count_collectives(model, step)
    return S_sent, seen.all_gathers, seen.peak_bytes / S


# %% tags=["measures", "nbval-ignore-output"]
configurations = {
    "a unit per layer": {},
    "a unit per 4 layers": {"size": 4},
    "reshard off": {"keep_whole": True},
    "HSDP, 2 groups": {"hybrid": True},
    "2 parts": {"parts": 2},
    "2 parts, kept whole": {"parts": 2, "keep_whole": True},
}
for name, options in configurations.items():
    S_sent, gathers, peak = ranks.run(mitigated, **options)[0]
    print(f"{name:20} sends {S_sent:.2f} S, {gathers:2} gathers, peak {peak:.2f} S whole")

place = recorded["mitigations_on"]
print(f"\nour class, recorded: {place['world_size']} ranks, {place['gigabits_per_s']:g} Gb/s each")
for what, recorded_s, _, _, samples in recorded["mitigations"]:
    print(f"{what:48} {recorded_s * 1e3:4.0f} ms a step, {recorded_s / samples * 1e3:5.2f} ms an image")

# %% [markdown] tags=["instructor"]
# **3 min.**
#
# - *Say*: nobody raised in the first; look for the rank that is somewhere else. It is rank 1, already in backward.
# - *Break it*: both cells are the mistakes. The first ends by its deadline of 3 s, the second with the same error on
#   all ranks.
# - *Ask*: "storage of size 0": who freed it, and who still uses it?

# %% [markdown]
# - **Larger units** send the same in fewer messages: for links with a high latency.
# - **Reshard off** spares a third of the bytes and holds the whole model: fine where gradients and optimizer state
#   are what does not fit. It sends what ZeRO-2 sends.
# - **HSDP** sends hardly less, but only its all-reduce, a quarter of these bytes, leaves the group of two. Put
#   the groups where the fast links are.
# - **Accumulating** two parts costs twice the bytes, unless parameters and gradients stay whole in between: then a
#   step sends as much as one without resharding, for twice the images.
#
# The recorded list has the time, on a link with a latency of 0.5 ms. One unit nearly halves the step, four times the
# batch costs hardly more than one, and accumulating by itself saves nothing: look at the milliseconds for an image.
#
# ## Read this error
#
# Two failures, for real. In the first, rank 1 skips the last layer, as a network does that draws which layers to drop
# with each rank's own seed.

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 3
from torch import nn
from workshop_utils.fully_sharded import FullyShardedDataParallel


class DropsLayers(nn.Sequential):
    def forward(self, h):
        for i, layer in enumerate(self):
            if (rank, i) != (1, 3):
                h = layer(h).relu()
        return h


model = FullyShardedDataParallel(DropsLayers(*(nn.Linear(64, 64) for _ in range(4))))
model(torch.rand(8, 64)).sum().backward()

# %% [markdown]
# **What it says.** Nobody raised; all wait. Look for the rank that is somewhere else than the others: three are in the
# forward and gather a layer, and rank 1 is in backward already.
#
# **What happened.** A gather needs all ranks, and rank 1 never comes to this one. Ours gives each unit a number, so
# that units cannot be mixed up. gloo under torch goes by the order alone. There another unit of the same size is taken
# for this one without a word, and one of another size ends a process: `op.preamble.length <= op.nbytes … collective
# mismatch`.
#
# **The cure.** All ranks use the same units in the same order. Draw such decisions from a seed that all ranks share.
#
# In the second, the gather in backward is left out.

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 60
import warnings
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
mesh = init_device_mesh("cpu", (world_size,))
model = nn.Sequential(*(fully_shard(nn.Linear(64, 64), mesh=mesh) for _ in range(3)))
fully_shard(model, mesh=mesh)
model[1].set_unshard_in_backward(False)
model(torch.rand(8, 64)).sum().backward()

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: how many numbers of the recap can the room say without looking? 16, 3 against 2, F over B.
# - *Say*: all this divides the bill. Making it smaller is 05.

# %% [markdown]
# **What it says.** The same error on all ranks, so any traceback will do. The last line: a tensor of sizes [64, 64]
# wants its storage, and the storage has size 0. That is a freed parameter which somebody still uses.
#
# **What happened.** Autograd saved the weight, FSDP emptied its storage after the forward, and nobody filled it again.
#
# **The cure.** Here, the line with `set_unshard_in_backward`. Mostly it is a weight that is used where its unit's
# forward is not called: `model.layer.forward(x)` in place of `model.layer(x)`, or a weight shared by two units.
#
# ## Recap
#
# - Training costs 16 bytes per parameter. ZeRO-1, 2 and 3 divide optimizer state, gradients, parameters by N.
# - A unit is whole only while it computes: gather, compute, free; gather again, reduce-scatter, step on shards.
# - Equal to one process, to the last bit on two ranks. Sharding changes where numbers are, not what they are.
# - It sends 3 S (n-1)/n where data parallel sends 2, and gloo made 4 of it until your ring took over.
# - It pays where tokens per device exceed F / B. Below that: keep more whole, or shard within the fast links only.
#
# **What breaks next.** All of this divides the bill among devices. It does not make it smaller. If the task is new and
# the network is not, must every parameter be trained? How few are enough? That is notebook 05.
#
# **References.** Rajbhandari et al., *ZeRO: Memory optimizations toward training trillion parameter models*, 2020,
# [arXiv:1910.02054](https://arxiv.org/abs/1910.02054) · Zhao et al., *PyTorch FSDP: Experiences on scaling fully
# sharded data parallel*, 2023, [arXiv:2304.11277](https://arxiv.org/abs/2304.11277) ·
# [fully_shard](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) ·
# [distributed checkpoint](https://docs.pytorch.org/docs/stable/distributed.checkpoint.html)

# %% tags=["key-figures", "nbval-ignore-output"]
ranks.stop()
print(f"sent, in S (n-1)/n: DDP {sent['DistributedDataParallel']:.2f}, ours {sent['ours']:.2f}", end=", ")
print(f"fully_shard {sent['gloo']:.2f}, with your ring {sent['your ring']:.2f}")
for name in ("your ring", "module's ring"):
    print(f"step time of fully_shard with {name}: {step_s[name] / step_s['gloo']:.2f} of that with gloo's")
print(f"activation checkpointing: {kept['plain'] / kept['checkpointed']:.1f} times less memory", end=", ")
print(f"{vit_s['checkpointed'] / vit_s['plain']:.2f} times the step time")
