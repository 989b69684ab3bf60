"""Checks of notebook 07, QLoRA.

The sixteen levels are compared with the paper's table (Dettmers et al. 2023, appendix E). What a layer holds between
forward and backward is looked up in the graph that autograd built.

Shape letters: n weights of a tensor, cut into b blocks; W is [out, in].
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from workshop_utils.checks import Wrong, exercise, expect_close, expect_number, expect_unchanged
from workshop_utils.checks.quantized import (
    NF4_OF_THE_PAPER,
    Watched,
    absmax_of,
    expect_codes,
    in_blocks,
    weight_cases,
)
from workshop_utils.memory import held_bytes


@exercise("7.1")
def check_nf4_levels(answer):
    """`answer()` is a float32 tensor [16], ascending: the levels of NF4."""
    got = answer()
    if isinstance(got, torch.Tensor) and got.dim() == 1 and got.dtype == torch.float32:
        _explain_levels(got)
    expect_close(got, torch.tensor(NF4_OF_THE_PAPER), name="levels", rtol=0, atol=1e-6)
    return "the sixteen levels are those of the paper's table, to 1e-6"


@exercise("7.2")
def check_quantize_blocks(answer):
    """`answer(weight, levels, block_size)` is (codes uint8 [n], absmax float32 [b])."""
    for case, weight, levels, block_size in weight_cases():
        before = weight.clone()
        got = answer(weight, levels, block_size)
        expect_unchanged(weight, before, name=f"{case}: the weight")
        if not isinstance(got, tuple) or len(got) != 2:
            raise Wrong(f"{case}: you returned {type(got).__name__}, expected two tensors: codes, absmax")
        rows = in_blocks(before, block_size)
        _expect_absmax(case, got[1], rows, before.flatten().float())
        expect_codes(case, got[0], before.flatten().float(), levels, got[1], block_size)
    return "every code is a nearest level, odd ends and blocks of zeros included"


@exercise("7.3")
def check_nibbles(answer):
    """`answer(codes)` holds uint8 codes [n] of 0..15 as `.packed` uint8 [ceil(n / 2)]; `.unpack()` gives them back."""
    every_pair = torch.cartesian_prod(torch.arange(16), torch.arange(16)).flatten()
    generator = torch.Generator().manual_seed(7)
    odd = torch.randint(16, (13,), generator=generator)
    for codes in (torch.tensor([1, 2]), torch.tensor([1, 2, 3]), odd, every_pair, torch.tensor([15])):
        codes = codes.to(torch.uint8)
        case = f"codes {codes.tolist()}" if len(codes) < 8 else f"{len(codes)} codes"
        kept = codes.clone()
        nibbles = answer(codes)
        expect_unchanged(codes, kept, name=f"{case}: what you were given")
        packed = getattr(nibbles, "packed", None)
        if packed is None:
            raise Wrong(f"{case}: there is no .packed; keep the bytes in self.packed")
        _explain_packed(case, packed, kept)
        expect_close(packed, _packed(kept), name=f"{case}: packed")
        _expect_little_held(case, nibbles, -(-len(kept) // 2))
        codes.fill_(9)  # an object that kept a view of what it was given would show it
        unpacked = nibbles.unpack()
        if isinstance(unpacked, torch.Tensor) and unpacked.shape == (len(kept) + 1,) and len(kept) % 2:
            raise Wrong(
                f"{case}: unpack() gives {len(unpacked)} codes, expected {len(kept)}: drop the filler"
            )
        expect_close(unpacked, kept, name=f"{case}: unpack()")
    return "half a byte per code, the first one in the upper half, and all of them come back"


@exercise("7.4")
def check_double_quantize(answer):
    """`answer(absmax, levels, block_size)` is (codes uint8 [b], scales float32 [b / block_size, up], mean)."""
    positive = torch.linspace(0, 1, 129).square()[1:]
    levels = torch.cat([-positive.flip(0)[:127], torch.zeros(1), positive])
    for blocks, block_size in ((700, 256), (256, 256), (5, 4)):
        generator = torch.Generator().manual_seed(blocks)
        absmax = 2.4 + 0.35 * torch.randn(blocks, generator=generator).clamp(-3, 3)
        case = f"{blocks} scales in blocks of {block_size}"
        before = absmax.clone()
        got = answer(absmax, levels, block_size)
        expect_unchanged(absmax, before, name=f"{case}: absmax")
        if not isinstance(got, tuple) or len(got) != 3:
            raise Wrong(f"{case}: you returned {type(got).__name__}, expected three: codes, scales, mean")
        codes, scales, mean = got
        _expect_mean(case, mean, before)
        centred = before - before.mean()
        _explain_scales(case, scales, before, centred, block_size)
        expect_close(scales, absmax_of(in_blocks(centred, block_size)), name=f"{case}: scales", rtol=1e-4)
        expect_codes(case, codes, centred, levels, scales, block_size, atol=1e-4)
    return "the mean is taken off first, so 8 bits are spent on what differs from block to block"


@exercise("7.5")
def check_codes_linear(answer):
    """`answer.apply(x, packed, dequantize)` is x W^T with W = dequantize(packed), which no graph holds."""
    if not (isinstance(answer, type) and issubclass(answer, torch.autograd.Function)):
        raise Wrong(
            f"CodesLinear is {type(answer).__name__} {getattr(answer, '__name__', '')}, expected a class derived from "
            "torch.autograd.Function"
        )
    for shape, out, dtype in (((4, 6), 5, torch.float32), ((2, 3, 4), 4, torch.float64)):
        layer = Watched(shape, out, dtype)
        y = answer.apply(layer.x, layer.packed, layer.dequantize)
        expect_close(y, layer.y, name=f"{layer}: y")
        _expect_only_codes_held(layer, y)
        _expect_backward(layer, y)
    return "codes in, codes kept: the weight exists twice for a moment, and never in between"


# Exercise 7.1


def _explain_levels(got):
    """Name what the levels are, where they are a known wrong list."""
    expected = torch.tensor(NF4_OF_THE_PAPER)
    if not torch.isfinite(got).all():
        index = int((~torch.isfinite(got)).nonzero()[0])
        raise Wrong(
            f"levels[{index}] is {got[index]:g}. The quantile of 1 is infinite: begin at the offset, not at 1"
        )
    zeros = int((got == 0).sum())
    if zeros == 0:
        raise Wrong(
            f"0 is not among your {len(got)} levels, so a weight of 0 would not come back as 0. "
            "Expected 7 negative ones, 0, and 8 positive ones"
        )
    if zeros > 1:
        raise Wrong(f"0 is there {zeros} times: the last probability, 0.5, is the quantile 0. Leave it out")
    if got.shape != expected.shape:
        raise Wrong(f"levels has shape {list(got.shape)}, expected [16]: four bits have sixteen codes")
    if not (got[1:] > got[:-1]).all():
        index = int((got[1:] <= got[:-1]).nonzero()[0])
        raise Wrong(
            f"levels[{index}] is {got[index]:.4f} and levels[{index + 1}] is {got[index + 1]:.4f}: sort them"
        )
    if abs(got[-1] - 1) > 1e-6:
        raise Wrong(
            f"levels[15] is {got[-1]:.6f}, expected 1: divide by the largest, so that absmax is a level"
        )
    if torch.allclose(got, -expected.flip(0), atol=1e-5):
        raise Wrong(
            f"levels[7] is {got[7]:.6f}, expected 0: you have 8 negative and 7 positive levels, NF4 has it the other "
            "way round"
        )
    steps = got[1:] - got[:-1]
    if steps.max() - steps.min() < 1e-3 or torch.allclose(got[1:], torch.arange(-7, 8) / 7, atol=1e-5):
        raise Wrong(
            f"levels[1] is {got[1]:.6f}, expected {expected[1]:.6f}: evenly spaced levels are those of int4"
        )
    if (got - expected).abs().max() < 0.05 and (got - expected).abs().max() > 1e-6:
        index = int((got - expected).abs().argmax())
        raise Wrong(
            f"levels[{index}] is {got[index]:.6f}, expected {expected[index]:.6f}: nearly. The offset is the mean of "
            "1 - 1/32 and 1 - 1/30, with 9 probabilities on the positive side and 8 on the negative one"
        )


# Exercises 7.2 and 7.4: codes and scales


def _expect_absmax(case, got, rows, flat):
    expected = absmax_of(rows)
    if isinstance(got, torch.Tensor) and got.dtype == torch.float32 and got.shape == expected.shape:
        known = [
            (rows.amax(dim=1), "that is the largest value of the block, take the largest absolute value"),
            (expected**-1, "that is one over it"),
            (torch.full_like(expected, float(flat.abs().max())), "that is the tensor's, each block has its own"),
            (rows.abs().mean(dim=1), "that is the mean"),
        ]  # fmt: skip
        for other, why in known:
            index = int((got - expected).abs().nan_to_num(9e9).argmax())
            if torch.allclose(got, other) and not torch.allclose(got, expected):
                raise Wrong(f"{case}: absmax[{index}] is {got[index]:g}, expected {expected[index]:g}: {why}")
    elif isinstance(got, torch.Tensor) and got.numel() == flat.numel() // rows.shape[1] < len(expected):
        raise Wrong(
            f"{case}: {got.numel()} scales, expected {len(expected)}: the last {flat.numel() % rows.shape[1]} weights "
            "are a block too. Fill up with zeros"
        )
    expect_close(got, expected, name=f"{case}: absmax", rtol=1e-6, atol=0)


# Exercise 7.3


def _packed(codes):
    """Two codes to a byte, the first in the upper four bits, an odd end filled up with 7, the code of 0."""
    pairs = torch.cat([codes, torch.full((len(codes) % 2,), 7, dtype=torch.uint8)]).view(-1, 2)
    return pairs[:, 0] * 16 + pairs[:, 1]


def _explain_packed(case, packed, codes):
    expected = _packed(codes)
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.uint8:
        return
    if packed.shape == codes.shape != expected.shape:
        raise Wrong(
            f"{case}: packed has {packed.nbytes} bytes, expected {expected.nbytes}: two codes to a byte"
        )
    if packed.shape == (len(codes) // 2,) != expected.shape:
        raise Wrong(
            f"{case}: packed has {packed.nbytes} bytes, expected {expected.nbytes}: the last code is lost"
        )
    if packed.shape != expected.shape or torch.equal(packed, expected):
        return
    index = int((packed != expected).nonzero()[0])
    where = f"{case}: packed[{index}] is {int(packed[index])}, expected {int(expected[index])}"
    if torch.equal(packed, expected % 16 * 16 + expected // 16):
        raise Wrong(f"{where}: the halves are swapped, the first code belongs into the upper four bits")
    if len(codes) % 2 and index == len(packed) - 1 and packed[index] // 16 == expected[index] // 16:
        raise Wrong(
            f"{where}: fill an odd end up with 7, the code of 0; {int(packed[index]) % 16} is a weight"
        )
    half = len(expected)
    filled = torch.cat([codes, torch.full((len(codes) % 2,), 7, dtype=torch.uint8)])
    if torch.equal(packed, filled[:half] * 16 + filled[half:]):
        raise Wrong(f"{where}: you paired the first half with the second; pair neighbours, codes 0 and 1")
    first, second = int(expected[index]) // 16, int(expected[index]) % 16
    raise Wrong(f"{where} = {first} * 16 + {second}")


def _expect_little_held(case, nibbles, budget):
    """The object holds `budget` bytes of tensors, whole storages counted, and no codes in lists."""
    attributes = dict(vars(nibbles)) if hasattr(nibbles, "__dict__") else {}
    tensors = [value for value in attributes.values() if isinstance(value, torch.Tensor)]
    held = held_bytes([*tensors, nibbles.packed])
    for name, value in attributes.items():
        if isinstance(value, (list, tuple, bytes, bytearray)) and len(value) > 4:
            raise Wrong(f"{case}: self.{name} keeps {len(value)} codes beside the bytes")
    if held > budget:
        raise Wrong(
            f"{case}: your object holds {held} bytes in {', '.join(sorted(attributes))}, the budget is {budget}. Keep "
            "the bytes and the number of codes, and no view of something larger"
        )


# Exercise 7.4


def _expect_mean(case, got, absmax):
    mean = float(absmax.mean())
    if isinstance(got, torch.Tensor) and got.numel() != 1:
        raise Wrong(f"{case}: mean has shape {list(got.shape)}, expected one number for all blocks")
    if isinstance(got, (torch.Tensor, float, int)) and float(got) == 0:
        raise Wrong(
            f"{case}: mean is 0, expected {mean:.6f}: all scales are positive, so half of the levels go unused"
        )
    expect_number(got, mean, name=f"{case}: mean", rtol=1e-5)


def _explain_scales(case, scales, absmax, centred, block_size):
    expected = absmax_of(in_blocks(centred, block_size))
    if not isinstance(scales, torch.Tensor) or scales.shape != expected.shape:
        return
    if torch.allclose(scales, absmax_of(in_blocks(absmax, block_size))):
        raise Wrong(
            f"{case}: scales[0] is {scales[0]:.6f}, expected {expected[0]:.6f}: that is the largest absmax itself. The "
            "mean was forgotten: quantise absmax - mean"
        )
    if torch.allclose(scales, in_blocks(centred, block_size).amax(dim=1)) and not torch.allclose(
        scales, expected
    ):
        index = int((scales - expected).abs().argmax())
        raise Wrong(
            f"{case}: scales[{index}] is {scales[index]:.6f}, expected {expected[index]:.6f}: absmax - mean has "
            "negative values, too"
        )


# Exercise 7.5


def _expect_only_codes_held(layer, y):
    weight_bytes = layer.weight.nbytes
    if y.grad_fn is None:
        raise Wrong(f"{layer}: y has no graph, although x requires a gradient")
    attributes = vars(y.grad_fn) if hasattr(y.grad_fn, "__dict__") else {}
    saved = [t for t in (*y.grad_fn.saved_tensors, *attributes.values()) if isinstance(t, torch.Tensor)]
    if any(t.data_ptr() == layer.x.data_ptr() for t in saved):
        raise Wrong(
            f"{layer}: x is saved, {layer.x.nbytes} bytes. It is needed for the gradient of W alone, and W is frozen"
        )
    own = {layer.packed.data_ptr()}
    held = sum(t.nbytes for t in saved if t.data_ptr() not in own)
    if layer.alive() or held:
        what = "the weight is" if layer.alive() or held >= weight_bytes else "more than the codes is"
        raise Wrong(
            f"{layer}: after the forward {what} still held, {max(held, weight_bytes * layer.alive())} bytes, expected "
            f"the {layer.packed.nbytes} bytes of packed and nothing else. Dequantise again in backward"
        )


def _expect_backward(layer, y):
    made = len(layer.made)
    try:
        with FlopCounterMode(display=False) as counter:
            y.backward(layer.grad_y)
    except RuntimeError as error:
        if "number of gradients" not in str(error):
            raise
        raise Wrong(f"{layer}: backward must return one value for each of x, packed, dequantize") from None
    grad = layer.x.grad
    if grad is None:
        raise Wrong(f"{layer}: x.grad is None after backward: the gradient of x is grad_y W")
    square = layer.shape[0] == layer.shape[1]
    if square and torch.allclose(grad, layer.grad_y @ layer.weight.T):
        raise Wrong(f"{layer}: x.grad is grad_y W^T. The forward has W^T, so the backward has W")
    expect_close(grad, layer.grad_x, name=f"{layer}: x.grad")
    flops, budget = counter.get_total_flops(), 2 * layer.macs
    if flops > budget:
        raise Wrong(
            f"{layer}: the backward does {flops} FLOPs, the budget is {budget}: grad_y W is enough, the frozen base "
            "needs no gradient"
        )
    if (made, len(layer.made)) != (1, 2):
        raise Wrong(
            f"{layer}: dequantize was called {made} times in forward and {len(layer.made) - made} times in backward, "
            "expected once in each"
        )
