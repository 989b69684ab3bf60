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
# 45 minutes. It builds on [notebook 04](04_fully_sharded_data_parallel.ipynb) (units, gathers, 16 bytes for a
# parameter) and [notebook 07](07_qlora.ipynb) (NF4, `QLoRALinear`). It uses SmolLM2, as 07 did: if you have not fetched
# it, run `python -m workshop_utils fetch` in a terminal. Without it every cell still runs, with a tiny random network,
# and what is measured then means little.

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

# %% [markdown]
# ## What does a model cost now?
#
# In 04 a parameter cost 16 bytes in training, and FSDP divided them all by the number of GPUs. In 07 the frozen part
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
# bits, scores and their gradient. `plan_memory` adds these up, from formulas that are in its docstrings with their
# sources. It needs the shapes only, so it builds the model on the meta device.
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

# %% [markdown]
# LoRA removes the states, NF4 most of the weights, FSDP half of what is left. After that the bar is made of what none
# of the three touches: activations, scores, and the embedding, gathered whole. Try "checkpointing", and longer texts.
#
# The same on the command line: `python -m workshop_utils plan llama-8b --strategy fsdp --world-size 2 --method qlora`.
#
# ## Do you believe it?
#
# A prediction is worth its errors. Here is every published figure that we know for such runs, with its settings put
# into the formulas, and nothing adjusted.

# %% tags=["nbval-ignore-output"]
from workshop_utils.published_memory import predicted_against_published

published = predicted_against_published()
figure = plot_published(published)
plt.show()
for row in published:
    if abs(row.error) > 0.15:
        print(f"{row.name}: off by {row.error:+.0%}. {row.why}")

# %% [markdown]
# Where a source gives the memory that tensors took, the formulas are close. Where they are off, it is downwards, and the
# source gives something larger: what the allocator had reserved, or what the driver saw. So leave room. `fits` sets
# aside 1.3 GiB for CUDA itself; fragmentation comes on top.
#
# ## And on these ranks?
#
# Now SmolLM2, with full fine-tuning, LoRA and QLoRA under torch's `fully_shard`: what two ranks really hold after a
# step, beside the plan. In the quick profile the first 6 of its 30 layers, so that it fits into a minute.
#
# **Predict.** How many times less does QLoRA hold than full fine-tuning, activations left out: 4, 8, 16 times?

# %%
import warnings

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from workshop_utils import lora
from workshop_utils.language_model import load_language_model
from workshop_utils.memory import held_bytes, record_activations
from workshop_utils.model_specs import ModelSpec
from workshop_utils.ring_in_fsdp import use_ring_reduce_scatter

NUM_LAYERS = 6 if PROFILE == "quick" else 30


def first_layers():
    """(SmolLM2 with its first layers, its embedding and its head, in float32; its tokenizer)."""
    model, tokenizer = load_language_model(stand_in=True)
    model.model.layers = model.model.layers[:NUM_LAYERS]
    return model.train(), tokenizer


# %%
def adapted(method):
    """(the model ready for "full", "lora" or "qlora", its tokenizer); the same adapter on every rank."""
    from workshop_utils import qlora

    model, tokenizer = first_layers()
    torch.manual_seed(0)
    if method != "full":
        apply = {"lora": lora.apply_lora, "qlora": qlora.apply_qlora}[method]
        apply(model, "all-linear", r=8, lora_alpha=16)
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


def my_share(tokenizer, steps=1, batch_size=4):
    """This rank's part of each step's batch of sentences."""
    rank, n = dist.get_rank(), dist.get_world_size()
    batches = training_batches(steps, batch_size, tokenizer, seed=0)
    return [{name: tensor.chunk(n)[rank] for name, tensor in batch.items()} for batch in batches]


# %%
def hold_and_send(method):
    """What this rank holds after a step by kind, what it sent in one, and the shape of its batch."""
    model, tokenizer = adapted(method)
    shard_(model)
    (batch,) = my_share(tokenizer)
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

# %% tags=["nbval-ignore-output"]
from workshop_utils.language_model import is_fetched

for method, kinds in held.items():
    plan = planned[method].by_kind() | {"activations": planned[method].saved_bytes}
    for kind, got in kinds.items():
        limit = 0.20 if kind == "activations" else 0.05
        assert abs(plan[kind] / got - 1) < limit or not is_fetched(), (method, kind)
print("parameters, gradients and optimizer state within 5% of the plan, activations within 20%")

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
# And torch's `fully_shard`? It takes integers too, and leaves those alone. Which is one more way to be right, and none
# less to be wrong. One weight matrix of SmolLM2, quantised, its codes stored in four dtypes, `param_dtype` bf16.
#
# **Predict.** Which of the four arrive intact? And which goes wrong without anybody noticing?


# %%
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


# %% tags=["nbval-ignore-output"]
from dataclasses import replace

from workshop_utils.quantization import dequantize_nf4, quantize_nf4

### BEGIN SOLUTION
# ~ my_guess_intact = None  # 0 to 4 of uint8, bfloat16, float16, float32
my_guess_intact = 2
### END SOLUTION
guess("storage dtypes that arrive intact under bf16", my_guess_intact)
weight = first_layers()[0].model.layers[0].mlp.down_proj.weight.detach()
quantized, seen, changed = quantize_nf4(weight), {}, {}
for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
    got = ranks.run(arrives, quantized.packed, storage)[0]
    name, same_size = str(storage).removeprefix("torch."), len(got) == len(quantized.packed)
    print(f"stored as {name:9} {len(got):>9,} of {len(quantized.packed):,} bytes arrive", end=", ")
    changed[name] = (got != quantized.packed).float().mean().item() if same_size else 1.0
    print(f"{changed[name]:.1%} of them changed" if same_size else "their number is wrong")
    if same_size:
        seen[f"stored as {name}"] = dequantize_nf4(replace(quantized, packed=got))[:96, :96]
figure = figures.plot_arrivals("A corner of down_proj, dequantised", {"the weight": weight[:96, :96]} | seen)
plt.show()
compare_guess("storage dtypes that arrive intact under bf16", sum(share == 0 for share in changed.values()))

# %% [markdown]
# uint8 and bf16 arrive. float32 arrives as half as many bytes, so the next reshape fails: loud. float16 is the bad one:
# the size is right, no line raises, and the weights are noise, on the same scale and with the same histogram as before.
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
            layer = bitsandbytes.nn.Linear4bit(
                **sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
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
    before = [p.to_local().clone() for p in frozen]
    batches = list(training_batches(steps, 4, tokenizer, seed=0))
    alone, together = train(one, batches, [0, 1]), train(sharded, batches, [dist.get_rank()])
    for loss in together:
        dist.all_reduce(loss)
    sharded.reshard()
    changed = sum((p.to_local() != old).sum().item() for p, old in zip(frozen, before))
    return torch.stack(alone), torch.stack(together), changed, sum(old.nbytes for old in before)


# %% tags=["nbval-ignore-output"]
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
def bytes_sent_per_step(units, world_size):
    """Bytes sent by each rank. units: [(frozen bytes, trained bytes, times that it is gathered), ...]."""
    ### BEGIN SOLUTION
    # ~ # TODO: gathers of all, one reduce-scatter of what is trained, (n-1)/n of each
    # ~ raise NotImplementedError("exercise 8.3")
    sent = 0
    for frozen, trained, gathers in units:
        sent += gathers * (frozen + trained) + trained
    return sent * (world_size - 1) / world_size
    ### END SOLUTION


check("8.3", bytes_sent_per_step)

# %% [markdown]
# **Predict.** QLoRA gathers codes, LoRA the weights in float32 here. How many times less does a step send with QLoRA than
# with full fine-tuning?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess_sent = None
my_guess_sent = 4
### END SOLUTION
guess("full / QLoRA, bytes sent", my_guess_sent)
bytes_sent_per_step = mine("bytes_sent_per_step")


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
    frozen = bytes_sent_per_step([(f, 0, g) for f, t, g in sizes], 2)
    gathered = sum(g * t for f, t, g in sizes) / 2
    reduced = bytes_sent_per_step(sizes, 2) - frozen - gathered
    return dict(zip(figures.PARTS, (frozen, gathered, reduced)))


# %% tags=["nbval-ignore-output"]
parts = {method: parts_of(method) for method in ("full", "lora", "qlora")}
figure = figures.plot_sent(f"A step of SmolLM2, {NUM_LAYERS} layers, float32, two ranks", parts, sent)
plt.show()
for method in parts:
    print(f"{method:6} sent {sent[method]:>12,} bytes, formula {sum(parts[method].values()):>14,.0f}")
compare_guess("full / QLoRA, bytes sent", sent["full"] / sent["qlora"])
ddp = plan_memory(spec, "ddp", 2, method="qlora", precision="fp32", **shape).traffic_bytes
print(f"data parallel with QLoRA would send {ddp / 1e6:.1f} MB")
