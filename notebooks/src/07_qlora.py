# %% [markdown]
# # 07 · QLoRA
#
# **How few bits can the frozen part live in?**
#
# After this notebook you can
#
# - store a weight matrix in 4.127 bits per number, by hand, with the same codes as the library bitsandbytes;
# - say which sixteen values to keep, why in blocks, and what one outlier costs;
# - write a linear layer that keeps codes instead of weights between forward and backward, and train LoRA beside it;
# - teach a language model a new skill on this machine, and say what the four bits cost in accuracy, memory and time.
#
# 45 minutes, of which 24 are exercises. It builds on [notebook 05](05_lora.ipynb) (LoRA) and
# [01](01_single_device_mlp.ipynb) (memory).
#
# It works on SmolLM2-135M-Instruct. Fetch it once, in a terminal: `python -m workshop_utils fetch`. That loads about
# 100 MB, keeps 270 MB in your cache and takes a minute or two. This notebook downloads nothing. Without the model it
# still runs: a tiny random network stands in, and says so. What is printed about the language model then means nothing.

# %% [markdown] tags=["instructor"]
# **For the instructor.** Code 7.2 and 7.5 live; 7.1, 7.3 and 7.4 are quick for a room. Before the outlier cell, let people
# commit to a number: nobody says 100%. In 7.5 ask first why the naive chain holds all sixteen weights; the answer is the
# exercise. Fetch the model the day before, on the machine you present with. With time left, run `PROFILE = "full"` during
# the break: the room sees nothing right become nearly everything. If time is short, skip the entropy and the optimizers.

# %% tags=["parameters"]
PROFILE = "quick"  # "full": every weight, and SmolLM2 learns the skill; about 5 minutes on two cores

# %%
import torch
from torch import nn
import matplotlib.pyplot as plt

from workshop_utils import check, compare_guess, guess, hint, mine, solution, use_style

use_style()

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: LoRA is on; what is left of the bill? Nearly all is the base, and nobody updates it.
# - *Say*: a weight that is only read needs fewer digits than one that is trained.

# %% [markdown]
# ## Where are the bytes now?
#
# In 05, LoRA made gradients and optimizer state small. What is left? Load a real language model, put LoRA on every
# linear layer, and add up what training holds, before any activation.

# %% tags=["nbval-ignore-output"]
import copy
import json
import time
import warnings
from importlib import resources

from workshop_utils import lora
from workshop_utils.language_model import is_fetched, load_language_model
from workshop_utils.plotting import quantization as figures

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
quick, fetched = PROFILE == "quick", is_fetched()
base, tokenizer = load_language_model(torch.float32, stand_in=True)
num_parameters = sum(p.numel() for p in base.parameters())
linear = [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
linear_weights = sum(layer.weight.numel() for layer in linear)
trained = sum(8 * (layer.in_features + layer.out_features) for layer in linear)  # LoRA, r = 8
bills = {}
for name, held, n in (("full", num_parameters, num_parameters), ("LoRA", num_parameters + trained, trained)):
    bills[name] = {"parameters": 4 * held, "gradients": 4 * n, "optimizer": 8 * n}
figure = figures.plot_bills("Training in float32 with Adam, activations left out", bills)
plt.show()
print(f"{num_parameters:,} parameters, {linear_weights:,} of them in linear layers; LoRA trains {trained:,}")

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Say*: absmax, divide, times 127, round. Half a step is the largest error.
# - *Ask*: one outlier of 50 among 65,536, four bits: how many weights become 0? Let people commit: nobody says 100%.
# - *Say*: the cure is a scale per block; the outlier then spoils 63 neighbours.

# %% [markdown]
# Nearly all that is left is the base, and it is *frozen*: nobody adds a small update to it. A weight that is only read
# needs far fewer digits than one that is trained. For 7 billion parameters, 28 GB in float32 and 14 GB in bfloat16 could
# be 3.6 GB. This is *QLoRA* ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)): LoRA on a base in four bits.
#
# ## How does a number fit into eight bits?
#
# *Quantising* replaces each number by the nearest of a few values and keeps that value's *code*. The simplest values
# are evenly spaced: divide by the largest magnitude, the *absmax*, so that all lie between -1 and 1; multiply by 127;
# round. What is kept are whole numbers of 8 bits and one scale.

# %% tags=["nbval-check-output"]
weights = torch.tensor([0.31, -1.27, 0.084, 0.557, -0.003])
absmax = weights.abs().max()
codes = (weights / absmax * 127).round().to(torch.int8)
back = codes.float() / 127 * absmax
print("codes ", codes.tolist(), "and absmax", f"{absmax:.2f}")
print("back  ", [f"{value:.3f}" for value in back.tolist()])
print(f"largest error {(back - weights).abs().max():.4f}, half a step is {absmax / 127 / 2:.4f}")

# %% [markdown]
# No error is larger than half a step, and a step is absmax / 127. So everything depends on the largest weight. With four
# bits there are 15 values, -7 to 7, and a step is absmax / 7.
#
# **Predict.** 65,536 normal weights and one *outlier*, 50 standard deviations large. Four bits, one scale for the
# tensor: how many of the weights become 0, in percent? And with eight bits?

# %%
### BEGIN SOLUTION
# ~ my_guess = None  # percent, four bits
my_guess = 60
### END SOLUTION
guess("weights that become 0, four bits", my_guess)


def absmax_round_trip(weight, bits, block_size):
    """Whole numbers of `bits` with one scale per block, and back again; weight [n], n a multiple of block_size."""
    rows, largest = weight.view(-1, block_size), 2 ** (bits - 1) - 1
    absmax = rows.abs().amax(dim=1, keepdim=True)
    return ((rows / absmax * largest).round() / largest * absmax).view(-1)


torch.manual_seed(0)
normal = torch.randn(65_536)
spoiled = normal.clone()
spoiled[1000] = 50.0
for bits in (8, 4):
    for block_size in (65_536, 64):
        back = absmax_round_trip(spoiled, bits, block_size)
        error = (back - spoiled).square().mean()
        zero = 100 * (back == 0).float().mean().item()
        print(f"int{bits}, blocks of {block_size:6,}: mean squared error {error:.6f}, {zero:5.1f}% became 0")
        if (bits, block_size) == (4, 65_536):
            compare_guess("weights that become 0, four bits", zero, "%")

# %% [markdown] tags=["instructor"]
# **13 min.**
#
# - *Say*: sixteen values where the weights are dense: quantiles, eight above, seven below, an exact 0.
# - *Room*: 7.1, 5 minutes. `0 is there 3 times: the last probability, 0.5` is the usual one.
# - *Type*: 7.2 live. First `bucketize` by the levels: `All wrong codes are one too high: bucketize by the midpoints`.
# - *Break it*: divide by the absmax without the clamp: a row of zeros, `codes[16] is 0, expected 7`: NaN.
# - *Ask*: NF4's error over int4's? Three quarters, not half. And with one outlier: the block decides, not the format.

# %% [markdown]
# One weight of 65,536 erased nearly all others: a step is 50 / 7, so everything below 3.6 is nearest to 0. Eight bits
# survive, with a sixth of the weights gone. The cure is to give each *block* of 64 weights its own absmax. The outlier
# then spoils 63 neighbours and nobody else. The price: a scale per block, 32 / 64 = 0.5 bits per weight.
#
# ## Which sixteen values?
#
# Evenly spaced values suit evenly spread weights. Trained weights are not: most are small, roughly a bell curve. If each
# of 16 values is to be used about equally often, they must lie closer together where the weights are dense: at
# *quantiles* of the normal distribution. That is *NF4*, the 4-bit NormalFloat of the QLoRA paper.
#
# A quantile turns a probability into a value: half of all normal numbers lie below quantile(0.5) = 0. Of the 16 values
# one must be 0 exactly (padding, and weights that are 0, must stay 0). That leaves 15: eight above 0 and seven below.
#
# ### Exercise 7.1 · The levels of NF4  (★★, 5 min)
#
# Start at the probability $1 - \frac{1}{2}(\frac{1}{32} + \frac{1}{30})$, called `offset`: quantile(1) would be infinite.
# Positive levels: the quantiles of 9 evenly spaced probabilities from `offset` to 0.5, without the last. Negative
# levels: minus the quantiles of 8 probabilities from `offset` to 0.5, without the last. Add 0, sort, divide by the
# largest. A float32 tensor [16].

# %% [markdown] tags=["hints-7.1"]
# 1. `torch.linspace(offset, 0.5, 9)` has 9 probabilities; the last, 0.5, has the quantile 0. With it there would be more
#    than one 0.
# 2. `NormalDist().inv_cdf(p)` is the quantile of one probability; it wants a Python float: loop over
#    `torch.linspace(offset, 0.5, 9)[:-1].tolist()`.
# 3. `positive = [NormalDist().inv_cdf(p) for p in ...]`, `negative = [-NormalDist().inv_cdf(p) for p in ...]` with 8
#    instead of 9, `levels = torch.tensor(sorted(negative + [0.0] + positive))`, `return levels / levels.max()`.

# %% tags=["exercise-7.1"]
from statistics import NormalDist


def nf4_levels():
    """The 16 levels of NF4, ascending, float32 [16], from -1 to 1."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    ### BEGIN SOLUTION
    # ~ # TODO: 8 positive quantiles, 7 negative ones, 0; sorted, divided by the largest
    # ~ raise NotImplementedError("exercise 7.1")
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted(negative + [0.0] + positive))
    return levels / levels.max()
    ### END SOLUTION


check("7.1", nf4_levels)

# %% tags=["nbval-ignore-output"]
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would suggest a package that we do not need
import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional

torch.compiler.set_stance("force_eager")  # it compiles parts of itself on a CPU: we do not wait for that

from workshop_utils import quantization

NF4 = mine("nf4_levels")()
table = bnb_functional.get_4bit_type("nf4", device="cpu")
print(f"yours and the table inside bitsandbytes differ by {(NF4 - table).abs().max():.0e}")
assert torch.equal(quantization.nf4_levels(), table)
formats = {
    "int4": torch.arange(-7, 8) / 7,
    "FP4": quantization.fp4_levels().unique(),
    "NF4": quantization.nf4_levels(),
}
figure = figures.plot_levels(formats)

# %% [markdown]
# The module's levels are equal to the library's in every bit: it writes the offset with seven digits, 0.9677083, as
# bitsandbytes did. *FP4* is the other candidate: a sign, two bits of exponent, one of mantissa, like a tiny float32.
# int4 and FP4 get 15 values out of 16 codes: int4 leaves -8 unused, FP4 has 0 and -0.
#
# ### Exercise 7.2 · Quantise in blocks  (★★, 6 min)
#
# Read the weight row by row as one long list of n numbers, cut it into blocks, give each its absmax, and each number
# the code of the nearest level. n need not be a multiple of the block size: the last block is shorter. A block may
# hold nothing but zeros, and they must come back as zeros.

# %% [markdown] tags=["hints-7.2"]
# 1. `F.pad(flat, (0, -len(flat) % block_size))` appends zeros, as many as are missing. Then `.view(-1, block_size)` has
#    a row per block. Cut the extra codes off at the end.
# 2. Between two levels, the nearest changes at the midpoint: `torch.bucketize(scaled, midpoints)` counts how many
#    midpoints lie below each number, and that is the code. 0 / 0 is NaN: `absmax.clamp(min=1e-38)`.
# 3. `rows = F.pad(...).view(-1, block_size)`, `absmax = rows.abs().amax(dim=1)`,
#    `scaled = rows * (1 / absmax.clamp(min=1e-38))[:, None]`,
#    `codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)`,
#    `return codes.flatten()[: len(flat)].to(torch.uint8), absmax`.

# %% tags=["exercise-7.2"]
from torch.nn import functional as F


def quantize_blocks(weight, levels, block_size):
    """(codes uint8 [n], absmax float32 [blocks]) of a weight of any shape; levels ascending, one of them 0."""
    flat = weight.flatten().float()
    ### BEGIN SOLUTION
    # ~ # TODO: fill up and cut into rows; absmax of each row; scaled to -1..1; the nearest level's index
    # ~ raise NotImplementedError("exercise 7.2")
    rows = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = rows.abs().amax(dim=1)
    scaled = rows * (1 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return codes.flatten()[: len(flat)].to(torch.uint8), absmax
    ### END SOLUTION


check("7.2", quantize_blocks)

# %% [markdown]
# **Predict.** Normal weights, blocks of 64: the error of NF4 as a share of the error of int4?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # a fraction
my_guess = 0.5
### END SOLUTION
guess("error of NF4 over int4", my_guess)

quantize_blocks = mine("quantize_blocks")


def dequantize_blocks(codes, absmax, levels, block_size):  # float32 [n]
    return levels[codes.int()] * absmax.repeat_interleave(block_size)[: len(codes)]


def squared_error(weight, levels, block_size):
    """Squared error over squared weight, both summed."""
    back = dequantize_blocks(*quantize_blocks(weight, levels, block_size), levels, block_size)
    return ((back - weight).square().sum() / weight.square().sum()).item()


panels, sizes = {"normal weights": {}, "with one outlier of 50": {}}, (16, 64, 256, 1024, 4096, 65_536)
for panel, w in zip(panels.values(), (normal, spoiled), strict=True):
    for name, levels in formats.items():
        panel[name] = {size: squared_error(w, levels, size) for size in sizes}
on_normal = {name: errors[64] for name, errors in panels["normal weights"].items()}
figure = figures.plot_error_by_block(panels)
print("blocks of 64:", ", ".join(f"{name} {error:.5f}" for name, error in on_normal.items()))
compare_guess("error of NF4 over int4", on_normal["NF4"] / on_normal["int4"])

# %% [markdown]
# Without an outlier, NF4 has three quarters of int4's error, at the same size. FP4 is worse than both here: it spends
# values near 0, where rounding costs little anyway. (The paper reports that language models fare better with FP4 than with
# int4; a squared error is not everything.) With one outlier, blocks decide, not the format: in one large block NF4 is no
# better than the others. Small blocks are better and cost more scales; 64 is the usual choice. Look into two blocks:

# %% tags=["nbval-ignore-output"]
from workshop_utils.widgets import quantization_explorer

figure = figures.plot_quantization("NF4", block_size=64, outlier=20)
plt.show()
for name, levels in formats.items():
    codes, _ = quantize_blocks(normal, levels, 64)
    shares = torch.bincount(codes.int(), minlength=len(levels)) / len(codes)
    entropy = -(shares * shares.clamp(min=1e-12).log2()).sum()
    print(
        f"{name}: used between {shares.min():.1%} and {shares.max():.1%} of the time, {entropy:.1f} bits a code"
    )
quantization_explorer("NF4", block_size=64, outlier=20)

# %% [markdown] tags=["instructor"]
# **9 min.**
#
# - *Room*: 7.3, 4 minutes. The halves swapped: `packed[0] is 33, expected 18`.
# - *Ask*: the scales are 440 MB for 7 B. What do they look like? All positive and alike: take the mean off, quantise
#   again.
# - *Room*: 7.4, 4 minutes. `The mean was forgotten` is the one to wait for.
# - *Say*: 4 + 8/64 + 32/(64 x 256) = 4.127. Write it under the 16 of notebook 04.

# %% [markdown]
# Lines are the values that a block can hold. Drag the block size to 4,096: the outlier's block is now everybody's. Drag the
# outlier to 0, and compare the formats.
#
# Does NF4 use its codes equally often, as the idea was? The last lines count. The *entropy* of the codes says how many bits
# each of them really carries; 4 would be perfect.
#
# Nearly, not quite: the quantiles are those of a normal number, and here each number was divided by the largest of its
# 64. The ends are used least.
#
# ## Two codes to a byte
#
# torch's smallest number takes a byte, so a code still takes 8 bits. Put two into one.
#
# ### Exercise 7.3 · Pack and unpack  (★, 4 min)
#
# Keep codes 0 to 15 two to a byte, the first of a pair in the upper four bits. Fill an odd end up with 7, the code of
# the level 0. Budget: the object holds the bytes and how many codes there are, nothing more.

# %% [markdown] tags=["hints-7.3"]
# 1. A byte is `first * 16 + second`. `codes[0::2]` are the first of each pair, `codes[1::2]` the second.
# 2. Back: `packed // 16` and `packed % 16` (or `packed >> 4` and `packed & 15`), interleaved, cut to the old length.
# 3. `codes = F.pad(codes, (0, len(codes) % 2), value=7)`, `self.packed = codes[0::2] * 16 + codes[1::2]`; and
#    `torch.stack([self.packed // 16, self.packed % 16], dim=1).flatten()[: self.n]`.


# %% tags=["exercise-7.3"]
class Nibbles:
    """Codes 0..15 (uint8 [n]) in `.packed`, uint8 [ceil(n / 2)]; `.unpack()` gives them back."""

    def __init__(self, codes):
        self.n = len(codes)
        ### BEGIN SOLUTION
        # ~ # TODO: fill an odd end up with 7; self.packed
        # ~ raise NotImplementedError("exercise 7.3")
        codes = F.pad(codes, (0, self.n % 2), value=7)
        self.packed = codes[0::2] * 16 + codes[1::2]
        ### END SOLUTION

    def unpack(self):
        ### BEGIN SOLUTION
        # ~ raise NotImplementedError("exercise 7.3")  # TODO: uint8 [n]
        return torch.stack([self.packed // 16, self.packed % 16], dim=1).flatten()[: self.n]
        ### END SOLUTION


check("7.3", Nibbles)

# %% [markdown]
# That makes 4 bits for the code and 32 / 64 for the scale: 4.5 per weight. For 7 billion weights the scales alone are
# 440 MB. What do they look like?

# %% tags=["nbval-ignore-output"]
weight = base.model.layers[0].mlp.up_proj.weight.detach()
codes, absmax = quantize_blocks(weight, quantization.nf4_levels(), 64)
print(
    f"{len(absmax):,} scales of a weight {list(weight.shape)}: from {absmax.min():.3f} to {absmax.max():.3f}"
)
print(f"mean {absmax.mean():.3f}, standard deviation {absmax.std():.3f}")
dynamic = quantization.dynamic_levels()
print(
    f"256 levels for them: {dynamic[:3].tolist()} ... {dynamic[126:129].tolist()} ... {dynamic[-3:].tolist()}"
)

# %% [markdown]
# All positive, and most near their mean. So take the mean off, and *quantise the scales*: 8 bits each, in blocks of
# 256 with a scale of their own. The paper calls this *double quantisation*. bitsandbytes uses 256 levels that are dense
# around 0; you get them as `levels`.
#
# ### Exercise 7.4 · Double quantisation  (★★, 4 min)
#
# From absmax [blocks] make codes (uint8), scales (float32, one per 256) and the mean. You have `quantize_blocks`.
#
# **Predict**, too: how many bits per weight will there be in all?

# %% [markdown] tags=["hints-7.4"]
# 1. Without the mean, all values are positive, and the negative half of the levels is never used.
# 2. `quantize_blocks(absmax - mean, levels, block_size)` gives codes and scales.
# 3. `mean = absmax.mean()`, `codes, scales = quantize_blocks(absmax - mean, levels, block_size)`,
#    `return codes, scales, mean`.


# %% tags=["exercise-7.4"]
def double_quantize(absmax, levels, block_size=256):
    """(codes uint8 [blocks], scales float32 [blocks / 256], mean): levels[code] * scale + mean is absmax, nearly."""
    ### BEGIN SOLUTION
    # ~ # TODO: quantise what is left without the mean
    # ~ raise NotImplementedError("exercise 7.4")
    mean = absmax.mean()
    codes, scales = quantize_blocks(absmax - mean, levels, block_size)
    return codes, scales, mean
    ### END SOLUTION


check("7.4", double_quantize)

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # bits per weight
my_guess = 4.13
### END SOLUTION
guess("bits per weight", my_guess)

from workshop_utils.memory import held_bytes

Nibbles, double_quantize = mine("Nibbles"), mine("double_quantize")


class NF4ByHand:
    """A weight as packed codes, codes of its scales, their scales, and one mean."""

    def __init__(self, weight, block_size=64):
        self.shape, self.block_size = weight.shape, block_size
        codes, absmax = quantize_blocks(weight, NF4, block_size)
        self.nibbles = Nibbles(codes)
        self.scale_codes, self.scales, self.mean = double_quantize(absmax, dynamic)

    def dequantize(self):
        absmax = dequantize_blocks(self.scale_codes, self.scales, dynamic, 256) + self.mean
        return dequantize_blocks(self.nibbles.unpack(), absmax, NF4, self.block_size).view(self.shape)


# %% tags=["nbval-ignore-output"]
by_hand = NF4ByHand(weight)
parts = {
    "packed codes": by_hand.nibbles.packed,
    "codes of scales": by_hand.scale_codes,
    "scales of scales": by_hand.scales,
    "mean": torch.as_tensor(by_hand.mean),
}
for name, tensor in parts.items():
    print(f"{name:17} {tensor.nbytes:>9,} bytes, {8 * tensor.nbytes / weight.numel():.4f} bits per weight")
bits = 8 * held_bytes(parts.values()) / weight.numel()
compare_guess("bits per weight", bits)
by_module = quantization.quantize_nf4(weight)
print(
    f"the module's NF4Tensor: {by_module.bits_per_parameter:.4f} bits per parameter, {by_module.nbytes:,} bytes"
)
error = {
    "scales in float32": dequantize_blocks(codes, absmax, quantization.nf4_levels(), 64).view_as(weight),
    "scales in 8 bits": by_hand.dequantize(),
}
for name, back in error.items():
    print(f"{name}: squared error {((back - weight).square().sum() / weight.square().sum()).item():.5f}")
assert abs(bits - 4.127) < 0.01

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: codes and scales equal to the library's, bit for bit. Your bytes too, or nearly.
# - *Ask*: why may a code differ by one? 1/absmax and a division round differently at the midpoint.

# %% [markdown]
# 4.127 bits: 8 / 64 + 32 / (64 x 256) instead of half a bit, and the error hardly changes. On 65 billion weights that
# saves 3 GB. (The paper writes FP8 for the scales; bitsandbytes, which everybody runs, takes the 256 levels.)
#
# ## The library's: bitsandbytes
#
# Now the same numbers from the library: other shapes, odd sizes, another dtype, a block of zeros. The module multiplies by
# 1 / absmax, as bitsandbytes does. If your code divides, a weight halfway between two levels may fall the other way.

# %% tags=["measures", "nbval-ignore-output"]
torch.manual_seed(0)
with_zeros = torch.randn(8, 64)
with_zeros[3] = 0
cases = {
    "float32 [576, 1536]": torch.randn(576, 1536),
    "bfloat16 [33, 65]": torch.randn(33, 65).bfloat16(),
    "float32 [1001]": torch.randn(1001),
    "a block of zeros": with_zeros,
}
options = {"blocksize": 64, "quant_type": "nf4"}
for name, w in cases.items():
    ours, double = (quantization.quantize_nf4(w, double_quant=twice) for twice in (False, True))
    packed, state = bnb_functional.quantize_4bit(w.flatten(), **options, compress_statistics=False)
    values = bnb_functional.dequantize_4bit(packed, state).view_as(w)
    apart = (quantization.dequantize_nf4(ours) - values).abs().max()
    assert torch.equal(ours.packed, packed.flatten()) and torch.equal(ours.absmax, state.absmax)
    _, state = bnb_functional.quantize_4bit(w.flatten(), **options, compress_statistics=True)
    steps_off = (double.absmax_codes.int() - state.absmax.flatten().int()).abs()
    differ = (Nibbles(quantize_blocks(w, NF4, 64)[0]).packed != ours.packed).float().mean()
    assert apart < 1e-6 and differ < 1e-3 and steps_off.max() <= 1
    print(f"{name:20} codes and scales equal, values differ by {apart:.0e}, your bytes by {differ:.3%}")
    print(f"{'':20} double: {(steps_off > 0).float().mean():.2%} of the scales' codes are the next one")

# %% [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: hardest to quantise: first blocks, last, or between? The first.
# - *Say*: read the last line: 13 different values in 32 weights means that the file had been in four bits before.
# - *Cut*: kurtosis, if you are late.

# %% [markdown]
# Codes, scales and values agree to the bit. With double quantisation, the 8-bit code of a scale is now and then one beside the
# library's, whose CPU code rounds near-ties the other way.
#
# ## What do four bits cost a real model?
#
# Normal weights are a model of weights. Here are the real ones: each linear layer of all 30 blocks, relative error of
# int4, FP4 and NF4. (In the quick profile the first 16,384 weights of each; blocks are independent, so that is a sample.)
#
# **Predict.** Which layers are hardest to quantise: the first blocks, the last, or those in between?

# %% tags=["measures", "nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # "first", "middle" or "last"
my_guess = "last"
### END SOLUTION
guess("the hardest block", my_guess)

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
by_layer = {name: {kind: [] for kind in KINDS} for name in formats}
kurtosis = {kind: [] for kind in KINDS}
for block in base.model.layers:
    for kind, layer in (
        (n.rpartition(".")[2], m) for n, m in block.named_modules() if isinstance(m, nn.Linear)
    ):
        w = layer.weight.detach().flatten()[: 16_384 if quick else None]
        kurtosis[kind].append((((w - w.mean()) / w.std()) ** 4).mean().item())
        for name, levels in formats.items():
            codes, absmax = quantization.quantize_blockwise(w, levels, 64)
            back = quantization.dequantize_blockwise(codes, absmax, levels, 64)
            by_layer[name][kind].append(((back - w).square().sum() / w.square().sum()).item())
title = "Error of each layer of SmolLM2 (dashed: normal weights)" if fetched else "Stand-in: random weights"
figure = figures.plot_errors_by_layer(
    title,
    {name: {k.removesuffix("_proj"): e for k, e in kinds.items()} for name, kinds in by_layer.items()},
    on_normal,
)
plt.show()

# %% tags=["measures", "nbval-ignore-output"]
import statistics

on_real = {
    name: statistics.mean(e for layers in kinds.values() for e in layers) for name, kinds in by_layer.items()
}
for name, error in on_real.items():
    print(f"{name}: mean {error:.5f}, on normal weights {on_normal[name]:.5f}")
depth = [statistics.mean(by_layer["NF4"][kind][i] for kind in KINDS) for i in range(len(base.model.layers))]
hardest = max(range(len(depth)), key=depth.__getitem__)
third = ("first", "middle", "last")[min(2, 3 * hardest // len(depth))]
compare_guess("the hardest block", third)
worst = max((e, kind, i) for kind, errors in by_layer["int4"].items() for i, e in enumerate(errors))
tails = kurtosis[worst[1]][worst[2]]
print(f"int4 is worst at {worst[1]} of block {worst[2]}: error {worst[0]:.4f}, kurtosis {tails:.1f}")
usual = statistics.median(value for found in kurtosis.values() for value in found)
print(f"median kurtosis {usual:.1f} (normal: 3)")
rows = base.model.layers[-1].mlp.up_proj.weight.detach().flatten()[:6400].view(-1, 32)
distinct = statistics.mean(len(row.unique()) for row in rows)
print(f"32 weights side by side have {distinct:.1f} different values on average")

# %% [markdown] tags=["instructor"]
# **8 min.**
#
# - *Ask*: sixteen layers of 1 MiB, dequantised one after the other: how much at the peak? 18 MiB. Who holds them?
#   Autograd.
# - *Type*: 7.5 live. First save the weight: `after the forward the weight is still held, 120 bytes`. Then the codes.
# - *Break it*: save x as well: `x is saved, 96 bytes. It is needed for the gradient of W alone`, and W is frozen.
# - *Type*: `QLoRALinear`: codes_linear plus LoRA. Say: QLoRA is LoRA on a rounded base, to float32's rounding.

# %% [markdown]
# Most layers behave nearly like normal numbers: the bell curve was a good guess. Block 0 is the hardest. Hard layers have
# heavy tails (*kurtosis* is 3 for normal numbers and grows with the tails); int4 suffers there, NF4 much less.
#
# The last line is a warning. If it says about 13, and never more than 16, your model came from a Python package, to
# which `fetch` turns where the Hub does not answer, and its weights had been through another 4-bit format (Q4_1 of
# llama.cpp, blocks of 32) before. So the base that we quantise is not
# the original, but one already rounded. Every comparison below starts from that same base. From the Hub it is near 32.
#
# ## A layer that keeps codes
#
# A forward needs $W$, so we dequantise, multiply, and throw $W$ away. Do we? The next cell makes a meter for the bytes that
# are alive, and you need not read it.


# %% tags=["nbval-ignore-output"]
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once, looked at after each operation."""

    def __init__(self):
        super().__init__()
        self.refs, self.peak_bytes = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.refs[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.refs = {key: kept for key, kept in self.refs.items() if not kept[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.refs.values()))
        return result


# %% [markdown]
# **Predict.** A chain of 16 layers [512, 512], 1 MiB each in float32 and 0.13 MiB in NF4. The forward dequantises one after the
# other. How many MiB are alive at the peak of a training step?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # MiB
my_guess = 2
### END SOLUTION
guess("MiB at the peak, naive", my_guess)

torch.manual_seed(0)
chain = [quantization.quantize_nf4(torch.randn(512, 512) / 512**0.5) for _ in range(16)]
x = torch.randn(8, 512, requires_grad=True)


def peak_of_a_step(linear):
    """(peak MiB, gradient of x) of one forward and backward through the chain."""
    x.grad = None
    with LiveBytes() as live:
        y = x
        for quantized in chain:
            y = linear(y, quantized)
        y.square().mean().backward()
    return live.peak_bytes / 2**20, x.grad.clone()


naive_mib, naive_grad = peak_of_a_step(lambda x, q: F.linear(x, quantization.dequantize_nf4(q)))
compare_guess("MiB at the peak, naive", naive_mib, "MiB")

# %% [markdown]
# All 16 weights at once, in full precision. Autograd needs $W$ again: the gradient of the input is $g_x = g_y W$, where
# $g_y$ [..., out] is the gradient of the output. So it keeps each $W$ from forward to backward, and the four bits have
# saved nothing. The cure: tell autograd to keep the *codes*, and dequantise a second time in the backward.
#
# A `torch.autograd.Function` has a `forward` and a `backward` of its own. What the forward puts on `ctx` is kept;
# `ctx.save_for_backward(tensor)` is the way for tensors.
#
# ### Exercise 7.5 · Save codes, not weights  (★★★, 5 min)
#
# $y = x W^T$ with $W$ = `dequantize(packed)`, [out, in]. `backward` gets $g_y$ and returns the gradient of x, and None for
# the two other inputs. The base is frozen: no gradient for it. Budget: between forward and backward nothing is held but
# `packed`, and each of the two dequantises once.

# %% [markdown] tags=["hints-7.5"]
# 1. What does $g_x = g_y W$ need? Not x: that would be for the gradient of W, which nobody wants.
# 2. `ctx.save_for_backward(packed)` and `ctx.dequantize = dequantize` in the forward; `(packed,) = ctx.saved_tensors` in
#    the backward.
# 3. Forward: hint 2, then `return x @ dequantize(packed).T`. Backward:
#    `return grad_y @ ctx.dequantize(packed), None, None`.


# %% tags=["exercise-7.5"]
class CodesLinear(torch.autograd.Function):
    """x [..., in] and packed codes to x W^T [..., out], with W = dequantize(packed) [out, in]."""

    @staticmethod
    def forward(ctx, x, packed, dequantize):
        ### BEGIN SOLUTION
        # ~ raise NotImplementedError("exercise 7.5")  # TODO: keep what the backward needs, return y
        ctx.save_for_backward(packed)
        ctx.dequantize = dequantize
        return x @ dequantize(packed).T
        ### END SOLUTION

    @staticmethod
    def backward(ctx, grad_y):
        ### BEGIN SOLUTION
        # ~ raise NotImplementedError("exercise 7.5")  # TODO: a value for each of x, packed, dequantize
        (packed,) = ctx.saved_tensors
        return grad_y @ ctx.dequantize(packed), None, None
        ### END SOLUTION


check("7.5", CodesLinear)

# %% tags=["nbval-ignore-output"]
CodesLinear = mine("CodesLinear")


def codes_linear(x, quantized):
    return CodesLinear.apply(x, quantized.packed, lambda packed: quantization.dequantize_nf4(quantized))


codes_mib, codes_grad = peak_of_a_step(codes_linear)
print(f"peak: weights kept {naive_mib:.1f} MiB, codes kept {codes_mib:.1f} MiB")
print("gradients equal:", torch.allclose(codes_grad, naive_grad, rtol=1e-5, atol=1e-8))
assert codes_mib < naive_mib / 4

# %% [markdown]
# One weight at a time, and nothing more than the codes in between. The price is time: each step dequantises every
# layer twice. Add LoRA, and QLoRA is done:


# %% tags=["live"]
class QLoRALinear(nn.Module):
    """LoRA beside a base in NF4: y = W x + bias + lora_alpha / r B A x; x [..., in], A [r, in], B [out, r]."""

    def __init__(self, base_layer, r, lora_alpha):
        super().__init__()
        self.quantized, self.bias = quantization.quantize_nf4(base_layer.weight.detach()), base_layer.bias
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = lora_alpha / r

    def forward(self, x):
        y = codes_linear(x, self.quantized)
        if self.bias is not None:
            y = y + self.bias.detach()
        return y + self.lora_B(self.lora_A(x) * self.scaling)


# %% [markdown]
# Is it LoRA? On the *dequantised* weight, yes, and gradients must be equal. So four layers side by side, with equal A and
# B: by hand, the module's, LoRA of 05 on the dequantised weight, and the library's, PEFT on `bnb.nn.Linear4bit`.

# %% tags=["nbval-ignore-output"]
import peft

from workshop_utils import qlora


def library_layer(linear, r, lora_alpha):
    """PEFT's LoRA on bitsandbytes' Linear4bit."""
    settings = {"quant_type": "nf4", "compute_dtype": torch.float32}
    quantized = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **settings)
    quantized.load_state_dict(linear.state_dict())
    model = nn.Sequential(quantized.to("cpu"))
    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=["0"])
    return peft.get_peft_model(model, config)


torch.manual_seed(0)
linear = nn.Linear(576, 192)
rounded = copy.deepcopy(linear)
rounded.weight.data = quantization.dequantize_nf4(quantization.quantize_nf4(linear.weight.detach()))
layers = {
    "LoRA on the rounded weight": lora.LoRALinear(rounded, r=8, lora_alpha=16),
    "by hand": QLoRALinear(linear, r=8, lora_alpha=16),
    "the module's": qlora.QLoRALinear(copy.deepcopy(linear), r=8, lora_alpha=16),
    "peft + bitsandbytes": library_layer(linear, r=8, lora_alpha=16),
}

# %% tags=["measures", "nbval-ignore-output"]
A, B, x_probe = torch.randn(8, 576) / 24, torch.randn(192, 8), torch.randn(4, 10, 576)
seen = {}
for name, layer in layers.items():
    factors = {
        letter: next(p for n, p in layer.named_parameters() if f"lora_{letter}" in n) for letter in "AB"
    }
    for letter, value in (("A", A), ("B", B)):
        factors[letter].data.copy_(value)
    x_in = x_probe.clone().requires_grad_()
    y = layer(x_in)
    y.square().mean().backward()
    seen[name] = {
        "y": y.detach(),
        "grad of x": x_in.grad,
        **{f"grad of {k}": p.grad for k, p in factors.items()},
    }
reference = seen.pop("LoRA on the rounded weight")
for name, tensors in seen.items():
    apart = {
        k: ((t - reference[k]).abs().max() / reference[k].abs().max()).item() for k, t in tensors.items()
    }
    print(f"{name:20}", ", ".join(f"{k} {value:.0e}" for k, value in apart.items()))
    assert max(apart.values()) < (1e-5 if name != "peft + bitsandbytes" else 1e-3)

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Say*: the model does not know which keys we want: 0 of 4 right before.
# - *Ask*: 538 MB, linear layers in four bits: what remains? 168, and 113 of these are the embedding.
# - *Say*: the quick profile does 5 steps. With time, run `PROFILE = "full"` in the break: nothing right becomes
#   nearly all.
# - *Ask*: points lost to four bits in the end? The recording says; one record is two points, so read no more into it.

# %% [markdown]
# QLoRA *is* LoRA on a rounded base: outputs and gradients agree to float32's rounding. The library's differ a little more,
# by the scale codes that fell on the other side. Note what is not in the table: no gradient reaches the base.
#
# From here on `workshop_utils.qlora` does the work: `QLoRALinear` as yours, with its packed bytes as parameters that never
# get a gradient (so that notebook 08 can shard them), and `apply_qlora`, which is `apply_lora` with four bits.
#
# ## The real thing: a new skill
#
# SmolLM2 shall turn a sentence into a JSON record. `workshop_utils.records` makes sentences from four templates. Names
# and items of the test never occur in training, and one more template is seen in the test alone.

# %% tags=["nbval-ignore-output"]
from workshop_utils import records

device = "cuda" if torch.cuda.is_available() else "cpu"
model = base.to(device)
test = records.make_records(8 if quick else 100, split="test", seed=1)
new_template = records.make_records(50, split="new_template", seed=1)
sentence, record = test[0]
written = records.generate_answers(model, tokenizer, [text for text, _ in test[:4]])
right = sum(records.parsed(text) == record for text, (_, record) in zip(written, test, strict=False))
print("reads ", repr(records.prompt(sentence)))
print("wanted", repr(records.answer(record)))
print("writes", repr(written[0][:80]))
print(f"exact match before training: {right} of 4")

# %% [markdown]
# A record counts only if it is valid JSON with every key and every value right. The model cannot know which keys we want.
# Now quantise it, and add LoRA. Codes become bfloat16 for the products, which is fast; A and B are float32.
#
# **Predict.** The linear layers in four bits, the embedding left in float32: how many of the 538 MB remain?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # MB
my_guess = 150
### END SOLUTION
guess("MB of the model in four bits", my_guess)

unseen = records.make_records(4 if quick else 48, split="test", seed=2)
before_bytes = held_bytes(model.parameters())
losses = {"before training, float32": records.mean_loss(model, tokenizer, unseen)}
torch.manual_seed(0)
qlora.apply_qlora(model, "all-linear", r=8, lora_alpha=16, compute_dtype=torch.bfloat16)
losses["before training, four bits"] = records.mean_loss(model, tokenizer, unseen)
frozen_bytes = held_bytes(p for p in model.parameters() if not p.requires_grad)
compare_guess("MB of the model in four bits", frozen_bytes / 1e6, "MB")
rest = model.get_input_embeddings().weight.nbytes
trained_bytes = held_bytes(lora.lora_parameters(model))
print(f"float32 {before_bytes / 1e6:.1f} MB, with linear layers in NF4 {frozen_bytes / 1e6:.1f} MB")
print(f"of these, the embedding {rest / 1e6:.0f} MB, the linear layers {(frozen_bytes - rest) / 1e6:.0f} MB")
for name, loss in losses.items():
    print(f"loss on unseen records {name}: {loss:.2f}")
bills["QLoRA"] = {
    "parameters": frozen_bytes + trained_bytes,
    "gradients": trained_bytes,
    "optimizer": 2 * trained_bytes,
}
figure = figures.plot_bills("Training with Adam, activations left out", bills)

# %% [markdown]
# The linear layers went from 425 MB to 55. The embedding stays as it is: it is read row by row, and here it is the
# output layer too. In a 7 B model it has 2 to 4% of the numbers, in this small one 21%. Rounding is not
# free: the loss on our task is higher than before. But then, training comes after rounding, and can make up for it.
#
# Train: 8 sentences a step, AdamW with a rate that falls from 6e-4 to 0, loss on the record alone. On the GPU if you have
# one.
#
# **Predict.** After 40 such steps, 320 sentences: how many unseen records will be right, in percent?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # percent
my_guess = 70
### END SOLUTION
guess("right after 40 steps", my_guess)

began_s = time.perf_counter()
steps = 5 if quick else 40
tuning = records.fine_tune(model, tokenizer, 40, learning_rate=6e-4, seed=0, stop_after=steps)
took_s = time.perf_counter() - began_s
print(f"{steps} steps in {took_s:.0f} s on {device}: loss {tuning.losses[0]:.2f} to {tuning.losses[-1]:.3f}")
merged = qlora.merge_qlora(copy.deepcopy(model), torch.float32)  # writes faster; more on that below
print("now writes", repr(records.generate_answers(merged, tokenizer, [sentence])[0][:80]))
if not quick:
    after = {
        name: records.exact_match(merged, tokenizer, r) for name, r in (("test", test), ("new", new_template))
    }
    print(f"exact match: {after['test']:.0%}; of the template that training never saw: {after['new']:.0%}")

# %% [markdown]
# The quick profile stops when the loss has begun to fall. The recorded runs went on, with the same batches: QLoRA, and LoRA
# on the float32 base, ours and the libraries' (PEFT, bitsandbytes), all from equal A and B.
#
# **Predict.** How many points of exact match do the four bits cost in the end?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # points, LoRA minus QLoRA
my_guess = 5
### END SOLUTION
guess("points lost to four bits", my_guess)


def recording(name):
    """A recorded result that ships with the workshop; its `command` makes it again."""
    return json.loads(resources.files("workshop_utils").joinpath(f"recorded_{name}.json").read_text())


recorded = recording("qlora")
names = {
    "LoRA, ours": "lora seed 0",
    "LoRA, peft": "peft lora seed 0",
    "QLoRA, ours": "qlora seed 0",
    "QLoRA, peft + bnb": "peft bitsandbytes seed 0",
}
runs = {label: recorded["runs"][name] for label, name in names.items()}
print("recorded with", recorded["command"], "on", recorded["machine"])
curves = {label: run["losses"] for label, run in runs.items()}
panels = {
    "LoRA, base in float32": {"ours": curves["LoRA, ours"], "peft": curves["LoRA, peft"]},
    "QLoRA, base in NF4": {"ours": curves["QLoRA, ours"], "peft + bnb": curves["QLoRA, peft + bnb"]},
}
figure = figures.plot_losses("The same batches, ours and the libraries'", panels)

# %% tags=["nbval-ignore-output"]
pairs = {"LoRA": ("LoRA, ours", "LoRA, peft"), "QLoRA": ("QLoRA, ours", "QLoRA, peft + bnb")}
for kind, (ours, theirs) in pairs.items():
    apart = max(abs(a - b) for a, b in zip(curves[ours], curves[theirs], strict=True))
    print(f"{kind}: the losses of ours and theirs differ by at most {apart:.3f}")
apart = max(abs(a - b) for a, b in zip(tuning.losses, curves["QLoRA, ours"], strict=False))
print(f"your {steps} steps and the recorded ones differ by at most {apart:.3f}\n")
print(
    f"{'':27} {'base':>7} {'adapter':>8} {'Adam':>7} {'a step':>7} {'exact match':>12} {'new template':>13}"
)
for label, run in runs.items():
    base_mb, adapter_mb = (run["model_bytes"] - run["adapter_bytes"]) / 1e6, run["adapter_bytes"] / 1e6
    match = run["exact_match"]
    print(
        f"{label:27} {base_mb:4.0f} MB {adapter_mb:5.0f} MB {2 * adapter_mb:4.0f} MB {run['step_s']:5.2f} s"
        f" {match['test']:12.0%} {match['new_template']:13.0%}"
    )
untrained = recorded["base"]["exact_match"]
print(f"{'before training':27} {'':34} {untrained['test']:8.0%} {untrained['new_template']:13.0%}")

# %% tags=["nbval-ignore-output"]
compare_guess("right after 40 steps", 100 * runs["QLoRA, ours"]["exact_match"]["test"], "%")
cost = 100 * (runs["LoRA, ours"]["exact_match"]["test"] - runs["QLoRA, ours"]["exact_match"]["test"])
compare_guess("points lost to four bits", cost, "points")
seeds = [run["exact_match"]["test"] for name, run in recorded["runs"].items() if name[:10] == "qlora seed"]
print("QLoRA, seeds:", ", ".join(f"{match:.0%}" for match in seeds))
high = recorded["runs"]["qlora rate 2e-3 seed 0"]
for name, run in (("6e-4", runs["QLoRA, ours"]), ("2e-3", high)):
    match, loss = run["exact_match"]["test"], run["loss"]["test"]
    print(f"rate {name}: loss on the test {loss:.3f}, exact match {match:.0%}")

# %% [markdown]
# Dashed over broad: two implementations that share no code, and one curve for each method. What is left between them is
# the order of additions, in bfloat16 for QLoRA. First the form is learned, in a handful of steps, then copying the values.
# The columns of exact match say what four bits cost; one of the 48 test records is two points, so do not read more into them than
# that. The last column is the sentence pattern that training never saw: another question, with its own answer.
#
# The frozen base shrank from 538 MB to 168. Do not take the seconds for what four bits cost: QLoRA multiplies in
# bfloat16, this LoRA in float32. Beside LoRA all in bfloat16, a step of QLoRA takes a quarter to a third longer (`make bench`,
# two cores): each weight is dequantised twice. The last line is the same run from more than three times the rate:
# it ends with the same loss on the test and more mistakes. A loss is a mean; a record needs every token right.


# %% [markdown] tags=["instructor"]
# **3 min.**
#
# - *Ask*: four bits over bfloat16, tokens per second? A quarter: each token dequantises every weight.
# - *Ask*: merge and round again: how much of the update is left? Less than a thousandth. Merge into 16 bits or not at
#   all.
# - *Say*: the last table: four ways, and the one that loses the training.

# %% [markdown]
# ## Inference: what is gained, what is lost
#
# Four bits take less memory. Are they faster to write with? One sentence, one token after the other.
#
# **Predict.** Tokens per second: the four bits over the same model in bfloat16?

# %% tags=["nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # a fraction: above 1 is faster
my_guess = 0.5
### END SOLUTION
guess("tokens per second, four bits over bfloat16", my_guess)


def tokens_per_s(model, count):
    """Greedy generation of `count` tokens for one sentence, after a short warm-up."""
    inputs = tokenizer(records.prompt(sentence), return_tensors="pt").to(device)
    for length in (2, count):
        began_s = time.perf_counter()
        model.generate(**inputs, min_new_tokens=length, max_new_tokens=length, do_sample=False)
    return count / (time.perf_counter() - began_s)


kinds = {"float32, merged": merged, "bfloat16, merged": copy.deepcopy(merged).bfloat16(), "NF4 + LoRA": model}
speed = {name: tokens_per_s(kind, 6 if quick else 32) for name, kind in kinds.items()}
for name, kind in kinds.items():
    print(f"{name:17} {held_bytes(kind.parameters()) / 1e6:4.0f} MB, {speed[name]:5.1f} tokens per second")
compare_guess("tokens per second, four bits over bfloat16", speed["NF4 + LoRA"] / speed["bfloat16, merged"])
in_use = recording("inference")
print(f"\nrecorded with {in_use['command']}, {in_use['settings']['sequences']} sentences at once:")
for name, row in in_use["speed"].items():
    print(f"{name:17} {row['model_bytes'] / 1e6:4.0f} MB, {row['tokens_per_s']:5.1f} tokens per second")

# %% [markdown]
# Ours is slower: each token dequantises every weight for one row of x. A kernel that multiplies with the codes directly
# need not be: bitsandbytes has one for GPUs and for some CPUs, and its row shows it. QLoRA's four bits are for *training* on
# little memory. To serve, LoRA was merged (05). Can QLoRA be? $W_4 + \frac{\alpha}{r} BA$ is no matrix of sixteen levels any more.
#
# **Predict.** Round that sum to four bits again: how much of the adapter's update is left, in percent?

# %% tags=["measures", "nbval-ignore-output"]
### BEGIN SOLUTION
# ~ my_guess = None  # percent
my_guess = 50
### END SOLUTION
guess("update that survives rounding", my_guess)

layer = model.model.layers[1].self_attn.q_proj
update, quantized = layer.delta_weight().cpu(), layer.base_layer.quantized().to("cpu")
in_four_bits = quantization.dequantize_nf4(quantized, torch.float32)
again = quantization.quantize_nf4(in_four_bits + update)
moved = quantization.dequantize_nf4(again, torch.float32) - in_four_bits
codes, codes_again = (quantization.unpack_codes(q.packed, update.numel()) for q in (quantized, again))
print(f"the update is {update.norm() / in_four_bits.norm():.2%} of the weight, in length")
print(f"{(codes != codes_again).float().mean():.2%} of the codes change")
left = 100 * ((moved * update).sum() / update.square().sum()).item()
compare_guess("update that survives rounding", left, "%")

# %% [markdown]
# Each weight of $W_4$ sits exactly on a level, and the update is far too small to push it past a midpoint: rounded again, the
# adapter is lost. The same on the task, four ways: loss on unseen records.

# %% tags=["measures", "nbval-ignore-output"]
original = load_language_model(torch.float32, stand_in=True)[0].to(device)
with torch.no_grad():
    for name, layer in lora.lora_layers(model):
        original.get_submodule(name).weight += layer.delta_weight()
ways = {
    "not merged": model,
    "merged into float32": merged,
    "merged into four bits": qlora.merge_qlora(copy.deepcopy(model)),
    "merged into the original weights": original,
}
losses |= {name: records.mean_loss(way, tokenizer, unseen) for name, way in ways.items()}
for name, loss in losses.items():
    print(f"{name:33} loss {loss:.3f}")
print(f"\nrecorded, after {in_use['settings']['steps']} steps:")
for name, row in in_use["merging"].items():
    print(f"{name:44} loss {row['loss']['test']:.3f}, exact match {row['exact_match']['test']:.0%}")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: 8-bit moments pay for full fine-tuning; all adapters' moments are 20 MB to begin with.
# - *Cut*: this section, if you are late.

# %% [markdown]
# The good way is to dequantise, add, and keep the sum in 16 or 32 bits: `merge_qlora(model, dtype)`. Or do not merge: keep the
# codes and the adapter apart. Four bits again give nearly the loss before training. The original weights look tempting,
# and are another base than the one the adapter learned beside: test before you do that.
#
# ## Smaller optimizers
#
# Adam's moments can be kept in 8 bits as well, with blocks and 256 levels like those above
# ([Dettmers et al. 2021](https://arxiv.org/abs/2110.02861)). *Paged* optimizers keep them in memory that a GPU may push
# to the host when it is full: a long sentence then costs time, not the run. Where do they exist, and what do they save?


# %% tags=["measures", "nbval-ignore-output"]
def moments_bytes(optimizer_cls, shape):
    """Bytes of optimizer state for one parameter after a step."""
    parameter = nn.Parameter(torch.randn(shape, device=device))
    optimizer = optimizer_cls([parameter], lr=1e-3)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return held_bytes(t for t in optimizer.state[parameter].values() if torch.is_tensor(t) and t.dim())


for what, shape in (("a whole layer", (1024, 1024)), ("A, r = 8", (8, 576)), ("a small B", (192, 8))):
    plain, small = (moments_bytes(cls, shape) for cls in (torch.optim.AdamW, bnb.optim.AdamW8bit))
    print(f"{what:14} {list(shape)!s:12} AdamW {plain:>9,}, AdamW8bit {small:>9,} bytes")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    moments_bytes(bnb.optim.PagedAdamW8bit, (1024, 1024))
for name, row in in_use["optimizers"].items():
    print(f"recorded, all adapters, {name:22} {row.get('state_bytes', float('nan')) / 1e6:.1f} MB")
print("paged, here:", next((str(w.message) for w in said if "aged" in str(w.message)), "works"))

# %% [markdown]
# A quarter for a whole layer. Adapters gain less, because tensors of up to 4,096 numbers stay in 32 bits, and there is
# little to gain: the moments of all adapters are 20 MB to begin with. So 8 bits pay for full fine-tuning, not for QLoRA.
# Paged ones need CUDA; on a CPU bitsandbytes falls back and says so. The paper used them against the peaks of long texts.

# %% tags=["measures", "key-figures", "nbval-ignore-output"]
print(f"bits per weight: {bits:.4f}; NF4 and bitsandbytes: the same codes")
for name in formats:
    print(f"{name}: squared error {on_normal[name]:.5f} on normal weights, {on_real[name]:.5f} on SmolLM2")
print(f"SmolLM2: {before_bytes / 1e6:.0f} MB in float32, {frozen_bytes / 1e6:.0f} MB with NF4 layers")
print(f"16 layers of 1 MiB: {naive_mib:.1f} MiB with weights saved, {codes_mib:.1f} MiB with codes saved")
for label, run in runs.items():
    match = run["exact_match"]
    print(
        f"{label}: {run['step_s']:.2f} s a step, {match['test']:.0%} right, {match['new_template']:.0%} new"
    )
print(f"tokens per second: {', '.join(f'{name} {rate:.1f}' for name, rate in speed.items())}")
print(f"rounded to four bits again, {left:.1f}% of an update is left")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: what may be quantised, and what not? What is only read; what is trained stays in float32.
# - *Say*: one GPU holds 70 B in 36 GB. Two small ones hold half each, if bytes can be sharded: 08.

# %% [markdown]
# ## Recap
#
# - A frozen weight is only read, so four bits will do: a code of sixteen levels, and a scale for each block of 64.
# - One outlier ruins a tensor; in blocks it ruins 63 neighbours. NF4's levels follow the bell curve of real weights.
# - Packed, and with the scales quantised too, it is 4.127 bits per number: codes equal to bitsandbytes', bit for bit.
# - Autograd would keep every dequantised weight. A function that saves codes keeps one at a time.
# - QLoRA is LoRA on the rounded weight: the same gradients. Merge it into 16 bits or not at all, never into four.
#
# ## What breaks next
#
# One GPU holds a frozen 70 B model in four bits: 36 GB. Two small ones hold half each, if bytes can be sharded without
# becoming noise. What fits on the GPUs that you have? That is [notebook 08](08_fsdp_and_qlora.ipynb).
#
# ## References
#
# - Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, *QLoRA: efficient finetuning of quantized LLMs*,
#   [arXiv:2305.14314](https://arxiv.org/abs/2305.14314)
# - Dettmers, Lewis, Shleifer, Zettlemoyer 2021, *8-bit optimizers via block-wise quantization*,
#   [arXiv:2110.02861](https://arxiv.org/abs/2110.02861)
# - Hu et al. 2021, *LoRA: low-rank adaptation of large language models*, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)
# - Allal et al. 2025, *SmolLM2: when Smol goes big*, [arXiv:2502.02737](https://arxiv.org/abs/2502.02737)
# - [bitsandbytes](https://huggingface.co/docs/bitsandbytes), [PEFT on quantisation](https://huggingface.co/docs/peft/developer_guides/quantization)
