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
# **Predict.** 7.5 billion parameters, devices with 80 GB. One device cannot train it: 120 GB. With how many devices
# does it fit at stage 1, and with how many at stage 3? Nothing but the 16 bytes is counted.

# %%
### BEGIN SOLUTION
# ~ my_guess_devices = None
my_guess_devices = 2
### END SOLUTION
guess("80 GB devices for 7.5 B parameters, stage 1", my_guess_devices)
bytes_per_rank = mine("bytes_per_rank")
for stage in (1, 2, 3):
    fits = [n for n in range(1, 65) if sum(bytes_per_rank(stage, 7_500_000_000, n).values()) <= 80e9]
    print(f"ZeRO-{stage}: fits from {fits[0]} devices on")
    if stage == 1:
        compare_guess("80 GB devices for 7.5 B parameters, stage 1", fits[0], "devices")

# %% tags=["nbval-ignore-output"]
from workshop_utils.plotting.fully_sharded import plot_memory_bill
from workshop_utils.widgets import memory_bill

figure = plot_memory_bill(7_500_000_000, world_size=64)
plt.show()
memory_bill(7_500_000_000, world_size=64)

# %% [markdown]
# Drag the slider, and choose 70 B. Stages 1 and 2 come down to the parameters' 2 bytes and stop there: 140 GB. Only
# stage 3 goes on, without end. Two devices are enough for 7.5 B at any stage; for 70 B only stage 3 will ever do.
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

# %%
from torch.nn import functional as F

from workshop_utils.collectives import ring_all_gather, ring_all_reduce_, ring_reduce_scatter
from workshop_utils.memory import held_bytes
from workshop_utils.models import MLP

shard_of = mine("shard_of")


def flatten(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


# %% tags=["nbval-check-output"]
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
# is one half of your ring: it fills `output` with the inputs of all ranks. When your function has returned, the
# output [B, O] is all that is left: nothing may refer to the whole layer any more. Budget: one gather.

# %% [markdown] tags=["hints-4.3"]
# 1. The whole layer has `world_size * shard.numel()` elements, padding included. Make an empty tensor of that size and
#    dtype, and gather into it.
# 2. The weight is the first O · I elements, the bias the next O. What comes after that is padding. I is
#    `x_BI.shape[1]`.
# 3. `full = shard.new_empty(dist.get_world_size() * shard.numel())`, `all_gather(full, shard)`, then
#    `full[:O * I].view(O, I)` and `full[O * I : O * I + O]` go into `F.linear(x_BI, weight_OI, bias_O)`.


# %% tags=["exercise-4.3", "nbval-check-output"]
def gathered_forward(x_BI, shard, out_features, all_gather):
    """The layer's output [B, O], O = out_features. The whole layer exists only inside."""
    ### BEGIN SOLUTION
    # ~ # TODO: gather the whole layer, take weight and bias from it, compute. Shapes: weight [O, I], bias [O]
    # ~ raise NotImplementedError("exercise 4.3")
    full = shard.new_empty(dist.get_world_size() * shard.numel())
    all_gather(full, shard)
    num_weights = out_features * x_BI.shape[1]
    weight_OI = full[:num_weights].view(out_features, -1)
    bias_O = full[num_weights : num_weights + out_features]
    return F.linear(x_BI, weight_OI, bias_O)
    ### END SOLUTION


check("4.3", gathered_forward)

# %% [markdown]
# Freed, here, means that no name refers to it when the function is over.
#
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
# 2(n-1)/n S sent, where S is the bytes of the padded layer. Keep nothing whole.

# %% [markdown] tags=["hints-4.4"]
# 1. The first half is 4.3 again: gather, take the weight. Then one matrix product gives `grad_x_BI`. The gradient of
#    the whole layer needs a flat tensor as large as the gathered one, zeros where the padding is.
# 2. `grad_full = torch.zeros_like(full)`. Write into views of it: the first O · I elements get
#    `(grad_y_BO.T @ x_BI).reshape(-1)`, the next O get `grad_y_BO.sum(0)`.
# 3. `grad_shard = torch.empty_like(shard)`, `reduce_scatter(grad_shard, grad_full)`, and return
#    `grad_y_BO @ weight_OI, grad_shard / dist.get_world_size()`.


# %% tags=["exercise-4.4", "nbval-check-output"]
def gathered_backward(grad_y_BO, x_BI, shard, all_gather, reduce_scatter):
    """(grad_x [B, I] of this rank's images, this rank's part of the average gradient, like `shard`)."""
    ### BEGIN SOLUTION
    # ~ # TODO: gather again; grad_x; the whole layer's gradient, flat and padded; reduce-scatter it; average
    # ~ raise NotImplementedError("exercise 4.4")
    full = shard.new_empty(dist.get_world_size() * shard.numel())
    all_gather(full, shard)
    O, I = grad_y_BO.shape[1], x_BI.shape[1]
    grad_x_BI = grad_y_BO @ full[: O * I].view(O, I)
    grad_full = torch.zeros_like(full)
    grad_full[: O * I].view(O, I).copy_(grad_y_BO.T @ x_BI)
    grad_full[O * I : O * I + O] = grad_y_BO.sum(0)
    grad_shard = torch.empty_like(shard)
    reduce_scatter(grad_shard, grad_full)
    return grad_x_BI, grad_shard / dist.get_world_size()
    ### END SOLUTION


check("4.4", gathered_backward)

# %% [markdown]
# ## Does the whole network train?
#
# `ShardedLinear` keeps a shard and nothing else. Autograd calls your two functions: `forward` on the way there,
# `backward` on the way back. What it saves in between is the input and the shard.

# %% tags=["nbval-ignore-output"]
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


# %% [markdown]
# The proof: after every step, the parameters equal those of one process which accumulates the same parts of the
# batch, one after another, as in notebook 01. The optimizer is Adam, on shards: it works entry by entry, so it does
# not notice.
#
# **Predict.** On two ranks: equal in every bit, or nearly? And on four?

# %% tags=["nbval-ignore-output"]
from workshop_utils import sub_world
from workshop_utils.data import load_mnist

data = load_mnist()
images, labels = data.train_images[:240].double(), data.train_labels[:240].clone()


def gathered(layer, numel):
    full = layer.shard.new_empty(dist.get_world_size() * layer.shard.numel())
    ring_all_gather(full, layer.shard.detach())
    return full[:numel]


def forward_mlp(fc1, fc2, fc3, x_BD):
    return fc3(fc2(fc1(x_BD).relu()).relu())


# %% tags=["nbval-check-output"]
def compare_with_one_process(n, parts):
    """How far the parameters are from those of one process, at most, after each of 4 steps. float64."""
    with sub_world(n) as inside:
        if not inside:
            return None
        torch.manual_seed(dist.get_rank())  # the ranks begin differently
        rank, one, off = dist.get_rank(), MLP().double(), []
        for parameter in one.parameters():
            dist.broadcast(parameter.detach(), src=0)
        sharded = nn.ModuleList(ShardedLinear(layer) for layer in one.children())
        adams = [torch.optim.Adam(model.parameters()) for model in (sharded, one)]
        for _ in range(4):
            F.cross_entropy(forward_mlp(*sharded, images.chunk(n)[rank]), labels.chunk(n)[rank]).backward()
            for x, y in zip(images.chunk(parts), labels.chunk(parts)):
                (F.cross_entropy(one(x), y) / parts).backward()
            for adam in adams:
                adam.step()
                adam.zero_grad()
            pairs = [(layer, flatten(whole.parameters())) for layer, whole in zip(sharded, one.children())]
            off.append(
                max((gathered(layer, flat.numel()) - flat).abs().max().item() for layer, flat in pairs)
            )
        return off


for n, parts in ((2, 2), (2, 1), (3, 3), (4, 1)):
    off = ranks.run(compare_with_one_process, n, parts)[0]
    assert max(off) < 1e-10 and (max(off) == 0 or parts != 2)
    print(
        f"{n} ranks, one process with {parts} parts: {'equal' if max(off) == 0 else 'less than 1e-10 apart'}"
    )
