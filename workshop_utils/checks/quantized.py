"""What the checks of notebook 07 are tried on: weights, and a layer that is watched; how codes are judged.

Which code is right is decided by distance: any level that is nearest to the weight, to rounding, passes.

Shape letters: n weights of a tensor, cut into b blocks; W is [out, in].
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from workshop_utils.checks import Wrong, expect_close

NF4_OF_THE_PAPER = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def weight_cases():
    """(case, weight, levels, block_size): levels of more than one kind, blocks of zeros, an end that fills no block."""
    nf4, int4 = torch.tensor(NF4_OF_THE_PAPER), torch.arange(-7, 8) / 7
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 16, generator=generator)
    weight[1] = -weight[1].abs()  # the largest is negative
    yield "weight [6, 16], blocks of 16", weight, nf4, 16
    yield "weight [6, 16], blocks of 32, levels of int4", weight, int4, 32
    yield "weight [5, 7], blocks of 16", torch.randn(5, 7, generator=generator), nf4, 16
    with_zeros = torch.randn(4, 8, generator=generator)
    with_zeros[2] = 0
    yield "weight [4, 8] with a row of zeros, blocks of 8", with_zeros, nf4, 8
    yield "weight [3] in one block of 64", torch.tensor([0.5, -2.0, 0.1]), nf4, 64
    yield (
        "a bfloat16 weight [2, 64], blocks of 64",
        torch.randn(2, 64, generator=generator).bfloat16(),
        nf4,
        64,
    )


def in_blocks(flat, block_size):
    """[b, block_size] in float32, the end filled up with zeros."""
    flat = flat.flatten().float()
    return F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)


def absmax_of(rows):
    return rows.abs().amax(dim=1)


def expect_codes(case, codes, flat, levels, scales, block_size, atol=2e-6):
    """Each code is that of a level nearest to its weight; a weight 0 in a block of zeros has the level 0."""
    if isinstance(codes, torch.Tensor) and codes.dtype == torch.uint8 and codes.numel() > flat.numel():
        raise Wrong(f"{case}: {codes.numel()} codes, expected {flat.numel()}: cut off what you filled up")
    if not isinstance(codes, torch.Tensor) or codes.dtype != torch.uint8 or codes.shape != flat.shape:
        expect_close(codes, torch.zeros(flat.shape, dtype=torch.uint8), name=f"{case}: codes")
    if int(codes.max()) >= len(levels):
        index = int(codes.int().argmax())
        raise Wrong(
            f"{case}: codes[{index}] is {codes[index]}, and there are {len(levels)} levels, 0 to {len(levels) - 1}"
        )
    scale = scales.repeat_interleave(block_size)[: len(flat)]
    scaled = flat / scale.clamp(min=1e-38)
    distance = (levels[codes.int()] - scaled).abs()
    least, right = (levels[None] - scaled[:, None]).abs().min(dim=1)
    far = distance > least + atol
    if not far.any():
        return
    index = int(far.nonzero()[0])
    got, wanted = int(codes[index]), int(right[index])
    where = f"{case}: codes[{index}] is {got}, expected {wanted}"
    if scale[index] == 0:
        raise Wrong(
            f"{where}: this block holds only zeros, and code {got} means {levels[got]:.3g}. 0 / 0 is NaN, which no "
            "level is near to: keep the divisor above 0"
        )
    all_up, all_down = (codes >= right)[far].all(), (codes <= right)[far].all()
    why = ""
    if all_up and (codes.int() - right)[far].max() <= 1:
        why = (
            " All wrong codes are one too high: bucketize by the midpoints between levels, not by the levels"
        )
    elif all_down and (codes.int() - right)[far].min() >= -1:
        why = " All wrong codes are one too low: that rounds down, not to the nearest"
    raise Wrong(
        f"{where}: weight / scale is {scaled[index]:.4f}, level {got} is {levels[got]:.4f} and level {wanted} is "
        f"{levels[wanted]:.4f} ({int(far.sum())} of {len(flat)} codes are wrong).{why}"
    )


class Watched:
    """A layer of whole numbers that counts how often its weight is made, and knows which of them are still alive."""

    def __init__(self, shape, out, dtype):
        generator = torch.Generator().manual_seed(out)
        n_in = shape[-1]
        self.shape, self.dtype = (out, n_in), dtype
        self.packed = torch.randint(1, 256, (out * n_in,), generator=generator, dtype=torch.uint8)
        self.weight = self._made(self.packed).clone()
        self.x = torch.randint(-4, 5, shape, generator=generator).to(dtype).requires_grad_()
        self.grad_y = torch.randint(-4, 5, (*shape[:-1], out), generator=generator).to(dtype)
        self.y, self.grad_x = self.x.detach() @ self.weight.T, self.grad_y @ self.weight
        self.macs = self.x.numel() * out
        self.made = []

    def _made(self, packed):
        return (packed.to(self.dtype) - 128).view(self.shape) / 8

    def dequantize(self, packed):
        weight = self._made(packed)
        self.made.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    def alive(self):
        return sum(not ref.expired() for ref in self.made)

    def __str__(self):
        return f"x {list(self.x.shape)}, W {list(self.shape)}"
