# %% [markdown]
# # 08 · FSDP and QLoRA
#
# **What can I fine-tune on the small GPUs I have?**
#
# After this notebook you can
#
# - say before you start how many bytes each GPU will hold, by kind, and how far such a prediction is off;
# - shard a model in 4 bits over ranks without changing a bit, and prove that it trains as one process does;
# - count what full fine-tuning, LoRA and QLoRA send, and see when the link decides and when the memory;
# - choose a configuration one setting at a time, and defend it.
#
# 45 minutes, of which 22 are exercises. It builds on [notebook 04](04_fully_sharded_data_parallel.ipynb) (units,
# gathers, 16 bytes for a parameter) and [notebook 07](07_qlora.ipynb) (NF4, `QLoRALinear`). It uses SmolLM2, as 07 did: if you have not fetched
# it, run `python -m workshop_utils fetch` in a terminal. Without it every cell still runs, with a tiny random network,
# and what is measured then means little.

# %% [markdown] tags=["instructor"]
# **For the instructor.** Begin with the widget and a model that somebody in the room wants to train. 8.1 goes quickly; give
# the time to 8.2, where `to` in place of `view` is what people write, and show the picture of the noise before you say
# which dtype it was. End with 8.4 in pairs: each pair defends its choice against another one that fits. If time is
# short, skip "Memory against stability" and the settings; nothing later needs them.

# %% tags=["parameters"]
PROFILE = "quick"  # "full": all 30 layers of SmolLM2, and each setting measured here; about 6 minutes longer

# %%
import torch
import torch.distributed as dist
from torch import nn
import matplotlib.pyplot as plt

from workshop_utils import check, compare_guess, guess, hint, mine, solution, start_ranks, use_style

use_style()

# %% tags=["nbval-ignore-output"]
ranks = start_ranks(2)

# %% [markdown] tags=["instructor"]
# **6 min.**
#
# - *Say*: begin with the planner and a model that somebody in the room wants to train.
# - *Room*: 8.1, 4 minutes. `activations is 750,000,000, expected 1,500,000,000 ... divides none`: no strategy divides
#   them.
# - *Break it*: give the base Adam's moments: `The base is frozen`.
# - *Ask*: Llama 8B on two GPUs, full and QLoRA, in GiB? 69 and 8. Then tick "checkpointing" and take longer texts.

# %% [markdown]
# ## What does a model cost now?
#
# In 04 a parameter cost 16 bytes in training, and FSDP divided them all by the number of GPUs, n. In 07 the frozen part
# shrank to 4.127 bits. Together:
#
# | what | bytes for each number | divided by n |
# |---|---|---|
# | weights of the linear layers in the blocks, NF4 with double quantisation | (4 + 8/64 + 32/(64 · 256)) / 8 | yes |
# | embedding, head, norms: not quantised, bf16 | 2 | yes |
# | adapter, its gradient, Adam's two moments: float32 | 4, 4, 4 + 4 | yes |
# | activations: of the GPU's own batch | | no |
#
# ### Exercise 8.1 · The bill of FSDP with QLoRA  (★, 4 min)
#
# Bytes that stay on each GPU, by kind. `num_quantized`, `num_other`, `num_adapter` count numbers of the first three rows.

# %% [markdown] tags=["hints-8.1"]
# 1. Four kinds. Three are divided by `world_size`. Which of the three groups of numbers have a gradient?
# 2. `nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)` are bits, so divide by 8. What is frozen has neither gradient nor
#    moments; the adapter is a parameter too.
# 3. `frozen = num_quantized * nf4_bits / 8 + 2 * num_other`, parameters are `(frozen + 4 * num_adapter) / world_size`,
#    gradients `4 * num_adapter / world_size`, optimizer twice that; `activation_bytes` stay as they are.


# %% tags=["exercise-8.1", "nbval-check-output"]
def bytes_per_gpu(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    """{"parameters": bytes, "gradients": ..., "optimizer": ..., "activations": ...} on each GPU."""
    ### BEGIN SOLUTION
    # ~ # TODO: 4.127 bits, 2 bytes, 4 bytes; what has a gradient; what is divided by world_size
    # ~ raise NotImplementedError("exercise 8.1")
    nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)
    frozen = num_quantized * nf4_bits / 8 + 2 * num_other
    return {
        "parameters": (frozen + 4 * num_adapter) / world_size,
        "gradients": 4 * num_adapter / world_size,
        "optimizer": 8 * num_adapter / world_size,
        "activations": activation_bytes,
    }
    ### END SOLUTION


check("8.1", bytes_per_gpu)

# %% [markdown]
# That is what *stays*. What comes and goes in a step must fit as well: units while they are whole, a weight out of its 4
# bits, and the scores (*logits*: for each token one for each word of the vocabulary) with their gradient. `plan_memory`
# adds these up, from formulas that are in its docstrings with their sources. It needs the shapes only, so it builds the
# model on the meta device, without numbers.
#
# **Predict.** Llama 8B, one sequence of 512 tokens on each of two GPUs, FSDP. Full fine-tuning takes how many GiB on
# each? And QLoRA?

# %% tags=["nbval-ignore-output"]
from workshop_utils.memory_plan import plan_memory
from workshop_utils.plotting.planner import plot_plans, plot_published
from workshop_utils.widgets import planner

### BEGIN SOLUTION
# ~ my_guess_full = my_guess_qlora = None  # GiB
my_guess_full, my_guess_qlora = 70, 8
### END SOLUTION
guess("8B on 2 GPUs, full, GiB", my_guess_full)
guess("8B on 2 GPUs, QLoRA, GiB", my_guess_qlora)
plans = {
    f"{method}, {strategy}": plan_memory("llama-8b", strategy, 2, method=method)
    for method in ("full", "lora", "qlora")
    for strategy in ("ddp", "fsdp")
}
figure = plot_plans("Llama 8B on two GPUs, 512 tokens each", plans)
plt.show()
compare_guess("8B on 2 GPUs, full, GiB", plans["full, fsdp"].total_bytes / 2**30, "GiB")
compare_guess("8B on 2 GPUs, QLoRA, GiB", plans["qlora, fsdp"].total_bytes / 2**30, "GiB")
planner("llama-8b", "qlora", 2)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: do you believe it? Where is it off, and in which direction? Downwards: the source gives what the allocator
#   reserved.
# - *Say*: so leave room.

# %% [markdown]
# LoRA removes the states, NF4 most of the weights, FSDP half of what is left. After that the bar is made of what none
# of the three touches: activations, scores, and the embedding, gathered whole. (The number at the end of a bar
# includes 1.3 GiB for CUDA. Your guess is compared without.) Try "checkpointing", and longer texts.
#
# The same on the command line: `python -m workshop_utils plan llama-8b --gpus 2 --method qlora`.
#
# ## Do you believe it?
#
# A prediction is worth its errors. Here is every published figure that we know for such runs, with its settings put
# into the formulas, and nothing adjusted.

# %% tags=["measures", "nbval-ignore-output"]
from workshop_utils.published_memory import predicted_against_published

published = predicted_against_published()
figure = plot_published(published)
plt.show()
for row in published:
    if abs(row.error) > 0.15:
        print(f"{row.name}: off by {row.error:+.0%}. {row.why}")

# %% [markdown] tags=["instructor"]
# **3 min.**
#
# - *Say*: three methods on two real ranks, each beside its plan. It takes a while: talk through the table of 08.1
#   meanwhile.
# - *Ask*: how many times less does QLoRA hold? 6 here: half of an embedding that nobody quantised is most of it.

# %% [markdown]
# Where a source gives the memory that tensors took, the formulas are close. Where they are off, it is downwards, and the
# source gives something larger: what the allocator had reserved, or what the driver saw. So leave room. `fits` sets
# aside 1.3 GiB for CUDA itself; fragmentation comes on top. Hollow points are figures that we know at second hand.
#
# ## And on these ranks?
#
# Now SmolLM2, with full fine-tuning, LoRA and QLoRA under torch's `fully_shard`: what two ranks really hold after a
# step, beside the plan. In the quick profile the first 6 of its 30 layers, so that it fits into a minute.
#
# **Predict.** How many times less does QLoRA hold than full fine-tuning, activations left out: 4, 8, 16 times?

# %% tags=["nbval-ignore-output"]
import contextlib
import warnings

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from workshop_utils import lora, qlora
from workshop_utils.language_model import is_fetched, load_language_model
from workshop_utils.memory import held_bytes, record_activations
from workshop_utils.model_specs import ModelSpec
from workshop_utils.ring_in_fsdp import use_ring_reduce_scatter

NUM_LAYERS, BATCH_SIZE = (6, 2) if PROFILE == "quick" else (30, 8)
if not is_fetched():
    print("SmolLM2 is not fetched: a tiny random network stands in, and its bytes and losses mean little")


def first_layers():
    """(SmolLM2 with its first layers, its embedding and its head, in float32; its tokenizer)."""
    with contextlib.redirect_stdout(None):  # what stands in for it says so, on every rank
        model, tokenizer = load_language_model(stand_in=True)
    model.model.layers = model.model.layers[:NUM_LAYERS]
    return model.train(), tokenizer


# %%
def adapted(method):
    """(the model ready for "full", "lora" or "qlora", its tokenizer); the same adapter on every rank."""
    model, tokenizer = first_layers()
    torch.manual_seed(0)
    if method == "lora":
        lora.apply_lora(model, "all-linear", r=8, lora_alpha=16)
    if method == "qlora":
        storage = qlora.SHARDABLE_STORAGE  # of the codes: bytes, or what this torch can shard
        qlora.apply_qlora(model, "all-linear", r=8, lora_alpha=16, quant_storage=storage)
    return model, tokenizer


def shard_(model, **options):
    """A unit for each block, and the root; gradients by our ring, as gloo's own sends twice as much (04)."""
    warnings.filterwarnings("ignore")
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for block in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(block, **options)
    use_ring_reduce_scatter(fully_shard(model, **options))
    return model


# %%
from workshop_utils.probes import sent_bytes
from workshop_utils.records import training_batches


def my_share(tokenizer):
    """This rank's part of a batch of sentences."""
    (batch,) = training_batches(1, BATCH_SIZE, tokenizer, seed=0)
    return {name: tensor.chunk(dist.get_world_size())[dist.get_rank()] for name, tensor in batch.items()}


# %%
def hold_and_send(method):
    """What this rank holds after a step by kind, what it sent in one, and the shape of its batch."""
    model, tokenizer = adapted(method)
    shard_(model)
    batch = my_share(tokenizer)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-4, foreach=False)
    sent = sent_bytes(lambda: model(**batch, use_cache=False).loss.backward())
    adam.step()
    own = [p.to_local() for p in model.parameters()]
    gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    state = [getattr(v, "_local_tensor", v) for values in adam.state.values() for v in values.values()]
    held = {"parameters": held_bytes(own), "gradients": held_bytes(gradients), "optimizer": held_bytes(state)}
    for unit in (m for m in model.modules() if hasattr(m, "unshard")):
        unit.unshard()  # what is gathered is no activation
    with record_activations(model) as saved:
        model(**batch, use_cache=False)
    return held | {"activations": saved.total_bytes}, sent, tuple(batch["input_ids"].shape)


# %% tags=["nbval-ignore-output"]
from workshop_utils.plotting import fsdp_qlora as figures

### BEGIN SOLUTION
# ~ my_guess_times = None
my_guess_times = 8
### END SOLUTION
guess("full / QLoRA, bytes that stay", my_guess_times)
spec = ModelSpec.from_model(first_layers()[0], "these layers")
held, sent, planned = {}, {}, {}
for method in ("full", "lora", "qlora"):
    held[method], sent[method], (batch_size, length) = ranks.run(hold_and_send, method)[0]
    shape = {"batch_size": batch_size, "length": length}
    planned[method] = plan_memory(spec, "fsdp", 2, method=method, precision="fp32", **shape)
    for kind, got in held[method].items():
        want = planned[method].saved_bytes if kind == "activations" else planned[method].by_kind()[kind]
        print(f"{method:6}{kind:12} {got:>12,} bytes, predicted {want:>12,.0f}, off by {want / got - 1:+.2%}")
totals = {m: planned[m].saved_bytes + sum(list(planned[m].by_kind().values())[:3]) for m in planned}
figure = figures.plot_by_kind(f"SmolLM2, {NUM_LAYERS} layers, FSDP on two ranks, float32", held, totals)
plt.show()
stay = {method: sum(list(kinds.values())[:3]) for method, kinds in held.items()}
compare_guess("full / QLoRA, bytes that stay", stay["full"] / stay["qlora"])

# %% tags=["measures", "nbval-ignore-output"]
for method, kinds in held.items():
    plan = planned[method].by_kind() | {"activations": planned[method].saved_bytes}
    for kind, got in kinds.items():
        limit = 0.20 if kind == "activations" else 0.05
        assert abs(plan[kind] / got - 1) < limit or not is_fetched(), (method, kind)
print("parameters, gradients and optimizer state within 5% of the plan, activations within 20%")

# %% [markdown] tags=["instructor"]
# **8 min.**
#
# - *Say*: FSDP casts what it gathers. Codes are no numbers.
# - *Room*: 8.2, 6 minutes. What people write is `to` in place of `view`: `view() reads the same bytes`, says the
#   check.
# - *Break it*: always float32: `no bfloat16, so it was cast`.
# - *Type*: `Codes` live, then ask which of four dtypes arrive. Show the picture of the noise before you say which it
#   was.
# - *Say*: float16 is the bad one: the size is right, nothing raises. An integer, or `param_dtype`.

# %% [markdown]
# The formulas are off by a fraction of a percent: Adam's step counters, and a few numbers for each token. QLoRA's bar
# has two parts: half of an embedding that nobody quantised, and activations, the same for all three.
#
# ## How do four bits travel?
#
# FSDP gathers parameters, and parameters are floats: in mixed precision it *casts* them to `param_dtype` on the way.
# Codes packed two to a byte are no numbers that one may cast. FSDP1 even refused anything but floats, so libraries
# learned to disguise the bytes as floats: `quant_storage` is the name of it.
#
# ### Exercise 8.2 · Bytes in disguise  (★★, 6 min)
#
# `codes` are this rank's packed codes, uint8, equally many on each rank. `all_gather(tensor)` does what FSDP does:
# it takes floats only, casts them to `param_dtype`, and returns those of all ranks, one after another. Return all
# ranks' codes, uint8, in order, each bit as it was. Budget: one gather, and no byte more than the codes have (rounded
# up to whole numbers of `param_dtype`).

# %% [markdown] tags=["hints-8.2"]
# 1. What is already of `param_dtype` is not cast. So which dtype must the bytes seem to be? And what about a number of
#    bytes that is odd?
# 2. `tensor.view(dtype)` reads the same bytes as another dtype, without changing one; `tensor.to(dtype)` makes new
#    numbers. A view needs a multiple of `param_dtype.itemsize` bytes: pad with zeros, `F.pad(codes, (0, missing))`.
# 3. `padded = F.pad(codes, (0, -len(codes) % param_dtype.itemsize))`, `all_gather(padded.view(param_dtype))`, back with
#    `.view(torch.uint8)`, then `.view(-1, len(padded))` has a row for each rank: keep its first `len(codes)`.

# %% tags=["exercise-8.2", "nbval-ignore-output"]
from torch.nn import functional as F


def gather_codes(codes, param_dtype, all_gather):
    """All ranks' codes [n * len(codes)], uint8, bit for bit, through a gather that casts floats to param_dtype."""
    ### BEGIN SOLUTION
    # ~ # TODO: pad to whole numbers of param_dtype, disguise, gather once, undo the disguise, cut the padding out
    # ~ raise NotImplementedError("exercise 8.2")
    padded = F.pad(codes, (0, -len(codes) % param_dtype.itemsize))
    gathered = all_gather(padded.view(param_dtype)).view(torch.uint8)
    return gathered.view(-1, len(padded))[:, : len(codes)].reshape(-1)
    ### END SOLUTION


check("8.2", gather_codes)

# %% [markdown]
# And torch's `fully_shard`? From torch 2.13 on it takes integers too, and leaves those alone: one more way to be right,
# and as many as before to be wrong. (Older ones refuse integers; there this notebook disguises its codes as bf16.) One weight
# matrix of SmolLM2, quantised, its codes stored in four dtypes, `param_dtype` bf16.
#
# **Predict.** Which of the four arrive intact? And which goes wrong without anybody noticing?


# %% tags=["live"]
class Codes(nn.Module):
    """Packed codes as a frozen parameter of a storage dtype. The forward returns what has arrived."""

    def __init__(self, packed, storage):
        super().__init__()
        self.packed = nn.Parameter(packed.view(storage), requires_grad=False)

    def forward(self):
        return self.packed.detach().clone()


def arrives(packed, storage):
    """The bytes that a forward sees under fully_shard with bf16."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return fully_shard(Codes(packed, storage), mesh=mesh, mp_policy=policy)().view(torch.uint8)


# %% tags=["measures", "nbval-ignore-output"]
from dataclasses import replace

from workshop_utils.quantization import dequantize_nf4, quantize_nf4

### BEGIN SOLUTION
# ~ my_guess_intact = None  # 0 to 4 of uint8, bfloat16, float16, float32
my_guess_intact = 2
### END SOLUTION
guess("storage dtypes that arrive intact under bf16", my_guess_intact)
weight = first_layers()[0].model.layers[0].mlp.down_proj.weight.detach()
quantized, seen, changed = quantize_nf4(weight), {}, {}
for storage in dict.fromkeys([qlora.SHARDABLE_STORAGE, torch.bfloat16, torch.float16, torch.float32]):
    got = ranks.run(arrives, quantized.packed, storage)[0]
    name, same_size = str(storage).removeprefix("torch."), len(got) == len(quantized.packed)
    print(f"stored as {name:9} {len(got):>9,} of {len(quantized.packed):,} bytes arrive", end=", ")
    changed[name] = (got != quantized.packed).float().mean().item() if same_size else 1.0
    print(f"{changed[name]:.1%} of them changed" if same_size else "their number is wrong")
    if same_size:
        seen[f"stored as {name}"] = dequantize_nf4(replace(quantized, packed=got))[:40, :40]
figure = figures.plot_arrivals("A corner of down_proj, dequantised", {"the weight": weight[:40, :40]} | seen)
plt.show()
compare_guess("storage dtypes that arrive intact under bf16", sum(share == 0 for share in changed.values()))

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: after three steps, how many bytes of the sharded codes have changed? None, on both.
# - *Say*: `fully_shard` sends no weights round. Ranks that draw the adapter from different seeds train a patchwork.

# %% [markdown]
# uint8 and bf16 arrive. float32 arrives as half as many bytes, so the next reshape fails: loud. float16 is the bad one:
# the size is right, no line raises, and the weights are noise on the scale of weights.
# Training will even "work": the adapter learns what it can on top of noise.
#
# The rule: *the storage dtype is an integer, or it is `param_dtype`.* Scales must not be cast either. Our `NF4Linear`
# keeps codes and scales as uint8, the float32 ones byte by byte; bitsandbytes keeps its scales out of the parameters,
# so that each GPU has them all: 0.127 bits for each weight, 1.1 GB for 70B.
#
# ## Does it train as one process does?
#
# The proof from 04: two ranks against one process that accumulates the two halves. Ours, and bitsandbytes' `Linear4bit`
# with PEFT's adapters, which knows nothing of our ring or of this notebook.
#
# **Predict.** After three steps: how many bytes of the sharded codes have changed, and how far apart are the losses?

# %%
import logging


def librarys():
    """The same model with bitsandbytes' 4-bit layers and PEFT's adapters."""
    logging.disable(logging.WARNING)  # bitsandbytes speaks of kernels at import
    import bitsandbytes
    import peft

    warnings.filterwarnings("ignore")
    model, tokenizer = first_layers()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
            storage = {"quant_type": "nf4", "quant_storage": qlora.SHARDABLE_STORAGE}
            layer = bitsandbytes.nn.Linear4bit(**sizes, bias=False, compute_dtype=torch.float32, **storage)
            layer.load_state_dict(linear.state_dict())
            model.set_submodule(name, layer.to("cpu"))  # this quantises
    model.is_loaded_in_4bit = True
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(model, config), tokenizer


# %%
def train(model, batches, parts):
    """Losses of the global batch; one process takes all parts, a rank its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam, losses = torch.optim.AdamW(trained, lr=4e-4, foreach=False), []
    for batch in batches:
        losses.append(torch.zeros(()))
        for part in parts:
            share = {name: tensor.chunk(dist.get_world_size())[part] for name, tensor in batch.items()}
            loss = model(**share, use_cache=False).loss
            (loss / len(parts)).backward()
            losses[-1] += loss.detach() / dist.get_world_size()
        adam.step()
        adam.zero_grad()
    return losses


# %%
def beside_one_process(make, steps):
    """(losses of one process, of the ranks, frozen bytes that changed, frozen bytes) of this rank."""
    (one, tokenizer), (sharded, _) = make(), make()
    shard_(sharded)
    frozen = [p for p in sharded.parameters() if not p.requires_grad]
    before = [
        p.to_local().clone().view(torch.uint8) for p in frozen
    ]  # bytes: as numbers NaN differs from NaN
    batches = list(training_batches(steps, BATCH_SIZE, tokenizer, seed=0))
    alone, together = train(one, batches, [0, 1]), train(sharded, batches, [dist.get_rank()])
    for loss in together:
        dist.all_reduce(loss)
    sharded.reshard()
    changed = sum((p.to_local().view(torch.uint8) != old).sum().item() for p, old in zip(frozen, before))
    return torch.stack(alone), torch.stack(together), changed, sum(old.nbytes for old in before)


# %% tags=["measures", "nbval-ignore-output"]
from functools import partial

apart = {}
for name, make in {"ours": partial(adapted, "qlora"), "bitsandbytes": librarys}.items():
    alone, together, num_changed, num_bytes = ranks.run(beside_one_process, make, 3)[0]
    apart[name] = (alone - together).abs().max().item()
    print(
        f"{name:13} losses {[round(loss, 4) for loss in together.tolist()]}, largest difference {apart[name]:.0e}"
    )
    print(f"{'':13} {num_changed} of {num_bytes:,} frozen bytes on this rank have changed")
    assert num_changed == 0 and apart[name] < 1e-4

# %% [markdown] tags=["instructor"]
# **6 min.**
#
# - *Room*: 8.3, 4 minutes. `What is frozen has no gradient` and `again for its backward` are the two complaints.
# - *Ask*: QLoRA sends how many times less than full? 3.4 here: the embedding is gathered whole.
# - *Say*: the last line: data parallel sends 2 MB. Where it fits whole, do not shard.

# %% [markdown]
# Not a bit of the base has changed, and the losses are those of one process, ours and the library's. Note that
# `fully_shard` sends no weights round: each rank cuts its part out of the model that it has built itself. Ranks that
# draw the adapter from different seeds train a patchwork, and nobody is told.
#
# ## What goes over the wire?
#
# ### Exercise 8.3 · Bytes of a step  (★★, 4 min)
#
# Bytes that each rank sends in one step. A unit is (frozen bytes, trained bytes, gathers): gathered whole that many
# times, 2 for a block and 1 for the root, which torch keeps whole from its forward to its backward. The gradients are
# as large as what is trained. The check counts on the ranks.

# %% [markdown] tags=["hints-8.3"]
# 1. Each collective costs (n-1)/n of its bytes. What is gathered, and what is reduce-scattered?
# 2. Gathered is the whole unit, frozen and trained. Reduced are gradients, and what is frozen has none.
# 3. Add `gathers * (frozen + trained) + trained` over the units, then multiply by `(world_size - 1) / world_size`.


# %% tags=["exercise-8.3", "nbval-ignore-output"]
def bytes_of_a_step(units, world_size):
    """Bytes sent by each rank. units: [(frozen bytes, trained bytes, times that it is gathered), ...]."""
    ### BEGIN SOLUTION
    # ~ # TODO: gathers of all, one reduce-scatter of what is trained, (n-1)/n of each
    # ~ raise NotImplementedError("exercise 8.3")
    sent = 0
    for frozen, trained, gathers in units:
        sent += gathers * (frozen + trained) + trained
    return sent * (world_size - 1) / world_size
    ### END SOLUTION


check("8.3", bytes_of_a_step)

# %% [markdown]
# **Predict.** QLoRA gathers codes, LoRA the weights in float32 here. How many times less does a step send with QLoRA than
# with full fine-tuning?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess_sent = None
my_guess_sent = 4
### END SOLUTION
guess("full / QLoRA, bytes sent", my_guess_sent)
bytes_of_a_step = mine("bytes_of_a_step")


def parts_of(method):
    """What the formula adds up for this method: {part: bytes} of one rank."""
    model, _ = adapted(method)
    blocks = list(model.model.layers)
    inside = {id(p) for block in blocks for p in block.parameters()}
    units = [(list(block.parameters()), 2) for block in blocks]
    units.append(([p for p in model.parameters() if id(p) not in inside], 1))
    sizes = [
        [sum(p.nbytes for p in ps if p.requires_grad is t) for t in (False, True)] + [g] for ps, g in units
    ]
    frozen = bytes_of_a_step([(f, 0, g) for f, t, g in sizes], 2)
    gathered = sum(g * t for f, t, g in sizes) / 2
    reduced = bytes_of_a_step(sizes, 2) - frozen - gathered
    return dict(zip(figures.PARTS, (frozen, gathered, reduced)))


# %% tags=["measures", "nbval-ignore-output"]
parts = {method: parts_of(method) for method in ("full", "lora", "qlora")}
figure = figures.plot_sent(f"A step of SmolLM2, {NUM_LAYERS} layers, float32, two ranks", parts, sent)
plt.show()
for method, summands in parts.items():
    print(f"{method:6} sent {sent[method]:>12,} bytes, formula {sum(summands.values()):>14,.0f}")
compare_guess("full / QLoRA, bytes sent", sent["full"] / sent["qlora"])
ddp = plan_memory(spec, "ddp", 2, method="qlora", precision="fp32", **shape).traffic_bytes
print(f"data parallel with QLoRA would send {ddp / 1e6:.1f} MB")

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: grey bars did not change. Read the order in which to save: 4 bits and LoRA, checkpointing, FSDP, offload
#   last.
# - *Cut*: this section, if you are late.

# %% [markdown]
# Full fine-tuning gathers twice and reduces everything; LoRA's gradients are next to nothing, but its base is gathered as
# before; QLoRA's base is gathered in 4 bits. In all three the embedding is gathered once, whole, in 16 or 32 bits: with
# so small a model it is most of QLoRA's traffic.
#
# The last line is worth a thought. Where the whole model *fits* on each GPU, data parallel sends the adapter's gradients
# and nothing else. FSDP buys memory with bytes sent, and 4 bits may have made the purchase unnecessary.
#
# ## One setting at a time
#
# FSDP with LoRA on all of SmolLM2, and one thing changed.
#
# **Predict.** Which of these saves most bytes on a rank: NF4, checkpointing, bf16? Which change costs most time?

# %% tags=["nbval-ignore-output"]
import json
from importlib import resources

recorded = json.loads(resources.files("workshop_utils").joinpath("recorded_fsdp_qlora.json").read_text())
print("recorded with", recorded["command"], "on", recorded["machine"], "on", recorded["recorded"])
figure = figures.plot_settings("FSDP with LoRA on SmolLM2, two ranks, 8 sentences", recorded["settings"])
plt.show()
for row in recorded["settings"]:
    losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
    print(f"{row['changed']:26} losses {losses}; {row['gathers']} gathers")

# %% [markdown]
# Grey bars did not change; a dashed line is "nothing". **Bytes.** Checkpointing saves 286 MB, bf16 269 of weights and
# activations together, NF4 185, all of them weights. **Sent.** NF4 sends a third. Two parts send twice as much: each part
# gathers every unit anew, and to reduce once saves next to nothing, because LoRA's gradients *are* next to nothing.
# Accumulate under FSDP only if the batch does not fit. **Time.** So parts cost most, then offload, checkpointing (a
# second forward) and small units (422 gathers in place of 62). One unit is no faster than blocks, and holds it all at once.
#
# **Losses.** Units, offload, checkpointing and resharding change nothing but cost. Nor does accumulation, but for one
# thing: the mean over parts weighs each part alike, however many tokens it has. bf16 and NF4 change what is computed.
#
# On a CPU there is nothing to offload *to*: that row shows what it costs to ask for it. On a GPU the states leave the
# card, and each gather comes over PCIe first.
#
# | setting | lines | must agree with | what breaks if it does not |
# |---|---|---|---|
# | mixed precision | 2 | storage dtype of codes; `compute_dtype` of 4-bit layers | weights become noise, silently if sizes agree |
# | wrapping policy | 2 | the model's block class; tied weights in one unit | a unit for all: no memory saved; a weight used outside its unit: "storage of size 0" |
# | checkpointing | 1 | non-reentrant (the older kind needs inputs with gradients, and a frozen embedding gives none) | no gradients at all |
# | offload | 1 | host memory; pinned memory; an optimizer for the CPU | a host that swaps, or is killed |
# | accumulation | 2 | gradient sync off for all parts but the last; loss divided | gradients whole on each rank, if the sync is off |
# | NF4 | 3 | all of the above; seeds of the adapter | see above |
#
# **In which order?** First 4 bits and LoRA: they cost least and save most. Then checkpointing, because activations are
# what no strategy divides. Then FSDP, if it still does not fit. Then shorter batches and accumulation. Offload last.
#
# ### Extra · The same on your machine  (3 min)

# %% tags=["extra", "nbval-ignore-output"]
from torch.distributed.fsdp import CPUOffloadPolicy

from workshop_utils.probes import count_collectives, take_turns


def one_setting(checkpointing=False, **options):
    """(seconds of a step, most bytes whole at a time) of this rank."""
    model, tokenizer = adapted("lora")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shard_(model, **options)
    batch = my_share(tokenizer)

    def step():
        model(**batch, use_cache=False).loss.backward()

    return take_turns({"": step}, 3)[""], count_collectives(model, step).peak_bytes


# %% tags=["extra", "nbval-ignore-output"]
bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
changes = {
    "nothing": {},
    "checkpointing": {"checkpointing": True},
    "kept whole": {"reshard_after_forward": False},
}
changes |= {"bf16": {"mp_policy": bf16}, "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}}
for name, change in changes.items() if PROFILE == "full" else ():
    step_s, peak = ranks.run(one_setting, **change)[0]
    print(f"{name:14} {step_s:.2f} s a step, {peak / 1e6:4.0f} MB whole at most")

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: which keeps the loss from falling: bf16 reduction, adapters in bf16, r = 2, a rate of 1e-2? The rate.
# - *Cut*: this section, if you are late; nothing later needs it.

# %% [markdown]
# ## Memory against stability
#
# Some savings cost accuracy. Which? QLoRA under FSDP on the sentences of 07, the same batches for each change.
#
# **Predict.** Which of these will keep the loss from falling: gradients reduced in bf16; adapter and Adam in bf16; r = 2; a
# learning rate of 1e-2?

# %% tags=["measures", "nbval-ignore-output"]
groups = {
    "precision": ["learning rate 4e-4, r = 8", "reduced in bf16", "adapter and Adam in bf16", "LoRA on bf16"],
    "learning rate": [
        "learning rate 4e-4, r = 8",
        "learning rate 1e-4",
        "learning rate 2e-3",
        "learning rate 1e-2",
    ],
    "r": ["learning rate 4e-4, r = 8", "r = 2", "r = 32"],
}
figure = figures.plot_stability(
    "QLoRA under FSDP, two ranks: one change at a time, a line for each seed", recorded["stability"], groups
)
plt.show()
print(f"{'':26} {'MB stay':>8} {'mean of the last 3 losses':>26} {'worst seed':>11} {'highest':>8}")
for name, megabytes, mean, best, worst, highest in figures.stability_table(recorded["stability"]):
    print(f"{name:26} {megabytes:8.1f} {mean:26.3f} {worst:11.3f} {highest:8.2f}")

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: ViT-L on 2 x 8 GB: does FSDP make it fit? No: activations fill the card; checkpointing does, on one GPU.
# - *Say*: 70 B on two cards of 24 GB: with offload, and with hours.

# %% [markdown]
# **Precision.** The curves lie on each other. Gradients reduced in bf16, even adapter and moments kept in bf16, move a loss
# by thousandths, less than another seed does; they save little, because LoRA had left little. NF4 costs most at the start,
# where the base alone speaks, and less at the end: the adapter learns around the rounding. It saves half of the bytes.
#
# **Learning rate.** Here runs are won and lost. 1e-4 has hardly begun after these steps. 2e-3 is several times faster than
# 4e-4. 1e-2 shows what a *loss spike* is: a step too far, a loss above where it all began (4.0 with the second seed), and
# many steps to come back, if it comes back. No setting that saves memory does as much, and no byte counter shows it. Look
# at the first twenty losses before you leave a run alone.
#
# **r.** At the same rate and the same lora_alpha / r, r = 32 is far ahead of r = 2: Adam moves each number of B by about
# the rate, and sixteen times as many of them work on the same outputs. In a short run a small r looks like a small
# learning rate. Do not judge r before each has a rate of its own.
#
# Sixteen steps are short. In bf16 an update a few hundred times smaller than its number is lost (04), which adds up over
# thousands: keep what is *trained* in float32 while it is small. Reduce in float32 where ranks are many: each sum rounds.
#
# ## Three cases
#
# Settings that people have run, and what the planner says of each. A "24 GB" card has 24 GiB; 1.3 of them are CUDA's.

# %% tags=["measures", "nbval-ignore-output"]
rows = """ViT-L, full, 1 GPU:      vit-l single 1 full
ViT-L, full, 1 GPU, ckpt:   vit-l single 1 full checkpointing
ViT-L, full, FSDP:          vit-l fsdp 2 full
ViT-L, full, FSDP, ckpt:    vit-l fsdp 2 full checkpointing
8B, LoRA, FSDP, ckpt:       llama-8b fsdp 2 lora checkpointing
8B, QLoRA, FSDP, ckpt:      llama-8b fsdp 2 qlora checkpointing
8B, QLoRA, DDP, ckpt:       llama-8b ddp 2 qlora checkpointing
70B, QLoRA, FSDP, ckpt:     llama-2-70b fsdp 2 qlora checkpointing
70B, QLoRA, FSDP, offload:  llama-2-70b fsdp 2 qlora checkpointing offload"""
case_plans, budgets_gib = {}, {"ViT-L": 8, "8B": 16, "70B": 24}
for name, words in (row.split(": ") for row in rows.splitlines()):
    model, strategy, n, method, *switches = words.split()
    size = {"batch_size": 32} if model == "vit-l" else {"length": 2048, "batch_size": 1 + ("70b" in model)}
    size |= dict.fromkeys(switches, True)
    case_plans[name] = plan_memory(model, strategy, int(n), method=method, **size)
figure = plot_plans("ViT-L (32 images), 8B (2,048 tokens), 70B (2 x 2,048)", case_plans)
plt.show()
for name, plan in case_plans.items():
    card = budgets_gib[name.split(",")[0]]
    fits = "fits" if plan.fits(card * 2**30) else "does not fit"
    print(f"{name:26} {fits:12} {card:2} GB; sends {plan.traffic_bytes / 1e9:6.2f} GB a step", end=", ")
    print(f"host {plan.host_bytes / 1e9:5.1f} GB, {plan.compute_s:.2f} s + {plan.communication_s:.2f} s")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: from how many tokens on does QLoRA under FSDP compute longer than it sends? About a thousand over PCIe 4.
# - *Say*: the first cure is not to shard what fits.

# %% [markdown]
# - **ViT-L on 2 x 8 GB.** What fills the card is activations. FSDP alone does not make it fit, checkpointing does, on one
#   GPU even; then two GPUs are for speed, or for larger batches.
# - **8B on 2 x 16 GB.** LoRA on bf16 fits under FSDP; QLoRA fits without sharding anything.
# - **70B on 2 x 24 GB.** 4 bits alone are 35 GB. Sharded, predicted 29 GB on each card; PEFT's documentation has 35.6. With
#   offload it fits: predicted 10 GB; fsdp_qlora's authors saw 14.92 GiB reserved (2 x 3090 and 2 x 4090), PEFT's
#   documentation has 19.6 GB, and 107 GB on the host. Hours, too: 11,795 s against 4,399 s for the same data on
#   the two kinds of card. (With each source's own settings, the formulas gave 29.9 GB, 11 GiB and 11.8 GB above.)
#
# ## When does the link decide?
#
# In 04 a step was half communication where tokens per GPU times the link's bandwidth equalled the GPU's speed. Now the
# gathers are in 4 bits and the gradients are gone.
#
# **Predict.** 8B on two A100s over PCIe 4, nothing overlapped. From how many tokens on, 64 doubled again and again, does
# QLoRA under FSDP communicate for less than half of its step?

# %% tags=["measures", "nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess_tokens = None
my_guess_tokens = 500
### END SOLUTION
guess("tokens from which QLoRA computes longer than it sends", my_guess_tokens)
from workshop_utils.network import LINKS

tokens, lines = [64 * 2**k for k in range(9)], {}
for label, strategy, method, link in (
    ("full, FSDP, PCIe 4", "fsdp", "full", "PCIe 4 x16"),
    ("LoRA, FSDP, PCIe 4", "fsdp", "lora", "PCIe 4 x16"),
    ("QLoRA, FSDP, PCIe 4", "fsdp", "qlora", "PCIe 4 x16"),
    ("QLoRA, FSDP, 10 Gb/s", "fsdp", "qlora", "10 Gb/s Ethernet"),
    ("QLoRA, DDP, 10 Gb/s", "ddp", "qlora", "10 Gb/s Ethernet"),
):
    plans = [plan_memory("llama-8b", strategy, 2, method=method, length=t, link=LINKS[link]) for t in tokens]
    lines[label] = tokens, [plan.communication_s / plan.serial_step_s for plan in plans]
half = next(t for t, share in zip(*lines["QLoRA, FSDP, PCIe 4"]) if share < 0.5)
figure = figures.plot_shares(
    "Llama 8B on two A100s: communication, nothing overlapped", lines, {"half": half}
)
plt.show()
compare_guess("tokens from which QLoRA computes longer than it sends", half, "tokens")

# %% [markdown] tags=["instructor"]
# **8 min.**
#
# - *Room*: 8.4 in pairs, 8 minutes; then each pair defends its choice against another one that fits.
# - *Break it*: LoRA in place of QLoRA: `does not fit ... Against parameters: fewer bits`.
# - *Break it*: without checkpointing: `Against activations: checkpointing`.
# - *Ask*: what is the largest kind? Logits; nobody says it at first. No strategy of this series divides them.

# %% [markdown]
# The planner's A100 reaches 40% of its peak; a slower card moves all lines to the left. What to do where the link decides,
# in this order:
#
# 1. Do not shard what fits: DDP or ZeRO-2 with QLoRA send only adapters.
# 2. More tokens for each gather: longer batches, or accumulation with `set_reshard_after_backward(False)` between parts.
# 3. Keep units whole after forward (`reshard_after_forward=False`), where there is room: one gather less.
# 4. Shard within the machine and replicate between machines (HSDP, notebook 04).
#
# fsdp_qlora's authors measured this for 7B with LoRA: two 3090s on narrow slots took 1,199 s with FSDP and 881 s with DDP, two
# 4090s on x16 slots 481 and 437.
#
# ## Your turn: choose, and defend it
#
# ### Exercise 8.4 · 8B on 2 x 16 GB  (★★★, 8 min)
#
# Two GPUs of 16 GB, PCIe 4, a host with 64 GB. Llama 8B is to learn from texts of 4,096 tokens, at least one on each GPU
# in a step. Choose strategy ("ddp", "zero1", "zero2", "fsdp"), method ("full", "lora", "qlora"), checkpointing, offload
# and batch_size (on each GPU). To show that you know why, name the `largest` kind of bytes in your plan: one of
# parameters, gradients, optimizer, activations, logits, temporary. Budget: at most 1.25 times the seconds per token of
# the best configuration that fits. The check asks the planner, and so may you: `plan_memory`, or the widget above.

# %% [markdown] tags=["hints-8.4"]
# 1. `plan_memory("llama-8b", "fsdp", 2, method="qlora", length=4096).by_kind()` shows what fills the card. Try the widget
#    above with 4,096 tokens.
# 2. Without checkpointing the activations of 4,096 tokens are 22 GiB by themselves. And LoRA on bf16 has 7.5 GiB of
#    parameters even when sharded.
# 3. QLoRA with checkpointing fits under FSDP, and even under DDP. Offload is not needed, and costs. What is largest then
#    are the scores and their gradients, 128,256 for each token.

# %% tags=["exercise-8.4", "nbval-check-output"]
### BEGIN SOLUTION
# ~ my_configuration = None  # {"strategy": ..., "method": ..., "checkpointing": ..., "offload": ..., ...}
my_configuration = {
    "strategy": "fsdp",
    "method": "qlora",
    "checkpointing": True,
    "offload": False,
    "batch_size": 1,
    "largest": "logits",
}
### END SOLUTION
check("8.4", my_configuration)

# %% tags=["measures", "nbval-ignore-output"]
chosen = dict(mine("my_configuration"))
chosen.pop("largest")
yours = {"your choice": plan_memory("llama-8b", chosen.pop("strategy"), 2, length=4096, **chosen)}
without = chosen | {"offload": False}
for strategy in ("ddp", "fsdp"):
    yours[f"{strategy}, same method"] = plan_memory("llama-8b", strategy, 2, length=4096, **without)
figure = plot_plans("Llama 8B on two GPUs of 16 GB, 4,096 tokens each", yours)
plt.show()
for name, plan in yours.items():
    print(
        f"{name:18} {plan.traffic_bytes / 1e9:5.2f} GB sent, {plan.serial_step_s:.2f} s if nothing overlaps"
    )

# %% [markdown] tags=["instructor"]
# **0 min.**
#
# - *Say*: the command is the whole section. Run it in the break if you like.

# %% [markdown]
# More than one configuration is right. Under DDP it fits as well, and sends sixty times less; under FSDP there is a GiB
# more room, for a longer text or a larger r. The largest kind is none that this workshop has divided: scores. Losses
# that never form all scores at once (chunked, or fused with the head) take them away.
#
# ## Run it for real
#
# The same training as a script, for two ranks here or eight GPUs there, with checkpoints of the adapter (`cluster/README.md`
# has the rest). Where there is a GPU for each rank, it takes them, with nccl; otherwise the CPU, with gloo. Its losses are
# those of one process, too.

# %% tags=["measures", "nbval-ignore-output"]
import subprocess
import sys

command = "-m torch.distributed.run --standalone --nproc-per-node=2 -m workshop_utils.train"
command += " --model smollm2 --strategy fsdp --lora-r 8 --quantize nf4 --steps 4"
print("torchrun --nproc-per-node=2" + command.partition("--nproc-per-node=2")[2])
if PROFILE == "full":
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, timeout=300, check=False
    )
    print(done.stdout[-1500:] or done.stderr[-1500:])

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: show the error without the text under it. Ask: "invalid for input of size": half of what? Of the codes'
#   bytes.
# - *Break it*: the cell is the mistake; put `quant_storage=torch.bfloat16` in its place, and it runs.

# %% [markdown]
# ## Read this error
#
# bitsandbytes' layer, its codes stored as float32, and `param_dtype` bf16: the loud half of the trap.

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 60
import logging, warnings

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")
import bitsandbytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

storage = {
    "quant_storage": torch.float32,
    "compute_dtype": torch.bfloat16,
    "bias": False,
    "quant_type": "nf4",
}
layer = bitsandbytes.nn.Linear4bit(128, 64, **storage).to("cpu")
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
fully_shard(layer, mesh=init_device_mesh("cpu", (world_size,)), mp_policy=policy)
layer(torch.rand(4, 128))

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: for each method the same losses, whatever the strategy. Strategies move bytes, they do not change the
#   training.
# - *Ask*: which row is yours?

# %% [markdown]
# **What it says.** A shape that is "invalid for input of size" half of what it should be, deep inside bitsandbytes.
#
# **What happened.** 4,096 bytes of codes were 1,024 float32 numbers; FSDP made 1,024 bf16 numbers of them, 2,048 bytes.
#
# **The cure.** `quant_storage=torch.bfloat16`, the policy's own dtype, or uint8. In `transformers` it is
# `bnb_4bit_quant_storage`, and PEFT's documentation asks for it to equal `torch_dtype`.
#
# ## What is possible today
#
# All of it once more, measured: SmolLM2, 8 sentences a step, float32, one thread for each process.

# %% tags=["measures", "nbval-ignore-output"]
table = {(row["strategy"], row["method"]): row for row in recorded["strategies"]}
print(f"{'':15} {'MB stay':>8} {'activations':>12} {'MB sent':>8} {'s a step':>9}   loss of the last step")
for (strategy, method), row in table.items():
    stays, saved_mb = sum(row["held_bytes"].values()) / 1e6, row["activations_bytes"] / 1e6
    print(
        f"{strategy + ', ' + method:15} {stays:8,.0f} {saved_mb:9,.0f} MB {row['sent_bytes'] / 1e6:8,.1f}",
        end=" ",
    )
    print(f"{row['step_s']:9.2f}   {row['losses'][-1]:.4f}")
for method in ("full", "lora", "qlora"):
    losses = [row["losses"] for (_, m), row in table.items() if m == method]
    assert all(abs(a - b) < 5e-3 for other in losses for a, b in zip(losses[0], other, strict=True)), method
print("for each method the same losses, whatever the strategy")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: each person names one thing to try on Monday, with the plan command for it.
# - *Say*: a model's own `config.json` goes into the planner.

# %% [markdown]
# | | lines changed | ways to fail | choose it when |
# |---|---|---|---|
# | single | 0 | out of memory | it fits, and time is no matter |
# | DDP | 3, and a sampler | unused parameters, uneven batches (03) | it fits on each GPU |
# | FSDP | about 6 | units, tied weights, gathers out of order (04) | states or weights do not fit |
# | + LoRA | 1 | learning rate, target modules (05) | the task is near what the model knows |
# | + QLoRA | 2 | storage dtype, merging into 4 bits (07, 08) | the frozen weights are what does not fit |
#
# **What comes next** is at work on the rest of the bar: [torchao](https://github.com/pytorch/ao) keeps weights in 4 bits as
# tensors of its own that `fully_shard` knows how to gather, with no disguise;
# [torchtitan](https://github.com/pytorch/torchtitan) combines FSDP with tensor and pipeline parallelism; chunked losses
# ([Liger](https://github.com/linkedin/Liger-Kernel)) remove the scores.
#
# ## Recap
#
# - A plan needs shapes and formulas only. Measured here, it is right to a percent; on GPUs leave room for the allocator.
# - FSDP divides weights and states, LoRA removes states, 4 bits shrink weights. Nothing divides activations: checkpoint.
# - Codes travel as integers, or disguised as `param_dtype`. Anything else is noise, and may be silent.
# - Sharded QLoRA equals one process, and gathers an eighth of float32's bytes. What fits whole is better not sharded.
# - Then tune the learning rate: it breaks more runs than 4 bits do.
#
# **The end of the series.** From one step of one network to a model that fits on no GPU you own. Take your own model's
# `config.json`, and ask: `python -m workshop_utils plan path/to/config.json`.
#
# **References.** Dettmers et al. 2023, *QLoRA*, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314) · Zhao et al. 2023,
# *PyTorch FSDP*, [arXiv:2304.11277](https://arxiv.org/abs/2304.11277) · Rajbhandari et al. 2020, *ZeRO*,
# [arXiv:1910.02054](https://arxiv.org/abs/1910.02054) · Korthikanti et al. 2022, *Reducing activation recomputation*,
# [arXiv:2205.05198](https://arxiv.org/abs/2205.05198) ·
# [fsdp_qlora](https://github.com/AnswerDotAI/fsdp_qlora) · [PEFT with
# FSDP](https://huggingface.co/docs/peft/accelerate/fsdp) ·
# [fully_shard](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)

# %% tags=["key-figures", "nbval-ignore-output"]
ranks.stop()
print(f"bytes that stay, full / QLoRA under FSDP: {stay['full'] / stay['qlora']:.1f}", end="; ")
print(f"bytes sent: {sent['full'] / sent['qlora']:.1f}")
print(
    f"losses of two ranks and one process: ours {apart['ours']:.0e}, bitsandbytes {apart['bitsandbytes']:.0e} apart"
)
print(f"Llama 8B on two GPUs, QLoRA under FSDP: sends less than it computes from {half} tokens on")
close = sum(abs(row.error) <= 0.15 for row in published)
print(f"{close} of {len(published)} published figures predicted within 15%")
