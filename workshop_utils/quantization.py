"""Four bits per weight: absmax integers, blocks, FP4, NF4, packing and double quantisation. Taught in notebook 07.

    scaled = weight / absmax(block)       in -1 ... 1
    code   = index of the nearest level   0 ... 15, two of them to a byte
    weight ~ levels[code] * absmax(block)

NF4's 16 levels are quantiles of the normal distribution, which is what trained weights look like. Dettmers et al. 2023,
"QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314), section 2 (blocks) and section 3 (NF4, double
quantisation). Codes and values are those of the library bitsandbytes.

Shape letters: N numbers in the weight, S numbers in a block (block_size), K = ceil(N / S) blocks. A weight of any shape
is read as the flat row of its N numbers; the last block may be shorter than the others.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from workshop_utils.memory import held_bytes

NF4_ZERO = 7  # the code of the level 0
ABSMAX_BLOCK = 256  # so many absmax values share one scale in double quantisation
_PIECE = 2**17
_OUTERMOST = 0.9677083  # 1 - (1/32 + 1/30) / 2 in seven digits, as bitsandbytes writes it
_SMALLEST_ABSMAX = 1e-38  # a block of zeros is divided by this, not by 0


# ----------------------------------------------------------------------------- whole numbers: absmax


def quantize_absmax(weight: Tensor, bits: int = 8, block_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Round `weight` to whole numbers between -(2**(bits-1) - 1) and 2**(bits-1) - 1.

    Returns (codes int8 of the weight's shape, absmax float32 [K]): code = round(w / absmax * largest), where absmax is
    the largest magnitude in the block. `block_size` None is one block for all, K = 1: then one outlier makes the steps
    coarse for everybody. With 4 bits the codes are -7 ... 7; each is still held in a byte here (see pack_codes).
    Raises ValueError for NaN or infinite weights, bits outside 2 ... 8 or a block_size below 1, and TypeError where the
    weight is no floating-point tensor.
    """
    largest = _largest_code(bits)
    rows, absmax = _rows_and_absmax(weight, _block_size_for(weight, block_size))
    scaled = rows * (1 / absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1)
    codes = (scaled * largest).round_().to(torch.int8)
    return codes.view(-1)[: weight.numel()].view(weight.shape), absmax


def dequantize_absmax(codes: Tensor, absmax: Tensor, bits: int = 8, block_size: int | None = None) -> Tensor:
    """What quantize_absmax kept of the weight, float32, in the shape of `codes`."""
    flat = codes.reshape(-1).float() / _largest_code(bits)
    return _times_absmax_(flat, absmax, _block_size_for(codes, block_size)).view(codes.shape)


# ----------------------------------------------------------------------------- any 16 (or 256) levels


@cache
def _nf4_levels() -> Tensor:
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(_OUTERMOST, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(_OUTERMOST, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return levels / levels.max()


def nf4_levels() -> Tensor:
    """The 16 values of NF4 (4-bit NormalFloat), float32 [16], from -1 to 1 in rising order; number 7 is 0.

    Eight positive and seven negative quantiles of the normal distribution, at equal steps of probability from 0.5 to
    0.9677083, and an exact 0, all divided by the largest (section 3 and appendix E of the paper). Bit for bit those of
    bitsandbytes.
    """
    return _nf4_levels().clone()


def fp4_levels() -> Tensor:
    """The 16 values of bitsandbytes' FP4, float32 [16], in rising order, as shares of the largest; two of them are 0.

    A sign bit, two bits of exponent, one of mantissa: 0, 1/16, 2, 3, 4, 6, 8, 12 and their negatives, over 12.
    bitsandbytes numbers the same values by their bits and not by their order.
    """
    magnitudes = torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12])
    return torch.cat([-magnitudes.flip(0), magnitudes]) / 12


@cache  # for each device: a layer in training asks for them twice a step
def _dynamic_levels(device: torch.device) -> Tensor:
    decades = range(7)
    positive = []
    for decade in decades:  # the i-th has 2**i values, evenly spread between 10**(i-7) and 10**(i-6)
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive += (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), device=device)


def dynamic_levels() -> Tensor:
    """The 256 values that hold the absmax in double quantisation, float32 [256], from -0.99 to 1 in rising order.

    Seven decades, 1e-7 to 1, each with twice the values of the one below: small numbers keep their relative precision,
    large ones are fine-grained. Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning"
    (arXiv:1511.04561); the QLoRA paper says FP8 in this place, bitsandbytes takes these.
    """
    return _dynamic_levels(torch.device("cpu")).clone()


def quantize_blockwise(weight: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Replace each number by the index of the nearest level, after dividing its block by the block's absmax.

    `levels` [L] rise, L at most 256. Returns (codes uint8 [N], absmax float32 [K]). A block of zeros has absmax 0.
    Raises ValueError for NaN or infinite weights or a block_size below 1, TypeError where the weight is no
    floating-point tensor.
    """
    rows, absmax = _rows_and_absmax(weight, block_size)
    levels = levels.to(weight.device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    scaled = rows * (1 / absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1)
    codes = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8).view(-1)
    if codes.numel() > weight.numel():
        codes = codes[: weight.numel()].clone()  # a view would keep the filling in memory
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """levels[code] * absmax of its block, float32 [N], for codes [N] and absmax [K]."""
    values = levels.to(codes.device).index_select(0, codes.reshape(-1).int())
    return _times_absmax_(values, absmax, block_size)


def pack_codes(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte: codes uint8 [N], each 0 ... 15, to uint8 [ceil(N / 2)].

    The first of two stands in the upper half. An odd number of codes is filled up with NF4's code of 0.
    """
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1), value=NF4_ZERO)
    return codes[0::2] << 4 | codes[1::2]


def unpack_codes(packed: Tensor, num_codes: int) -> Tensor:
    """The inverse of pack_codes: uint8 [ceil(N / 2)] to uint8 [N], N = num_codes."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:num_codes]


# ----------------------------------------------------------------------------- NF4


@dataclass(frozen=True)
class NF4Tensor:
    """A weight in NF4: packed codes, and the absmax of each block, itself quantised to 8 bits or not.

    packed        uint8 [ceil(N / 2)]
    absmax        float32 [K]; None with double quantisation, which has these three instead:
    absmax_codes  uint8 [K]
    absmax_scale  float32 [ceil(K / 256)]
    absmax_mean   float32 []
    `shape` and `dtype` are those of the weight.
    """

    packed: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    absmax: Tensor | None = None
    absmax_codes: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_mean: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that are held."""
        return held_bytes(self.tensors().values())

    @property
    def bits_per_parameter(self) -> float:
        """8 * nbytes / N, measured: about 4.127 with blocks of 64 and double quantisation, 4.5 without."""
        return 8 * self.nbytes / self.shape.numel()

    def absmax_of_blocks(self) -> Tensor:
        """The absmax of each block, float32 [K], made from its 8-bit codes where it is quantised."""
        if self.absmax is not None:
            return self.absmax
        return dequantize_absmax_codes(self.absmax_codes, self.absmax_scale, self.absmax_mean)

    def to(self, device: torch.device | str) -> "NF4Tensor":
        """The same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """`weight`, floating point and of any shape, in NF4 with one absmax for each `block_size` numbers.

    `double_quant` holds the absmax in 8 bits instead of 32: 4.127 bits per parameter instead of 4.5 (section 3).
    Raises ValueError for NaN or infinite weights or a block_size below 1, TypeError where the weight is no
    floating-point tensor.
    """
    codes, absmax = quantize_blockwise(weight, _nf4_levels(), block_size)
    held = {"packed": pack_codes(codes), "absmax": absmax}
    if double_quant:
        held["absmax_codes"], held["absmax_scale"], held["absmax_mean"] = quantize_absmax_again(absmax)
        held["absmax"] = None
    return NF4Tensor(shape=weight.shape, dtype=weight.dtype, block_size=block_size, **held)


def dequantize_nf4(quantized: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What NF4 kept of the weight, in its shape and, unless `dtype` is given, its dtype. Computed in float32.

    A byte is looked up whole: a table of 256 pairs of levels, each pair read as one int64, takes half the look-ups and
    no splitting of bytes. Pieces of 2**17 numbers stay in the cache, and no dtype needs a float32 copy of it all.
    """
    dtype, block_size = dtype or quantized.dtype, quantized.block_size
    pairs = _pairs_of_levels(quantized.packed.device)
    result = torch.empty(2 * len(quantized.packed), dtype=dtype, device=quantized.packed.device)
    blocks = 2 * max(1, _PIECE // (2 * block_size))  # an even number of whole blocks
    pieces = zip(
        result.split(blocks * block_size),
        quantized.packed.split(blocks * block_size // 2),
        quantized.absmax_of_blocks().split(blocks),
    )
    for piece, packed, absmax in pieces:
        values = piece if dtype == torch.float32 else torch.empty_like(piece, dtype=torch.float32)
        torch.index_select(pairs, 0, packed.int(), out=values.view(torch.int64))
        _times_absmax_(values, absmax, block_size)
        if values is not piece:
            piece.copy_(values)
    return result[: quantized.shape.numel()].view(quantized.shape)


def quantize_absmax_again(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: absmax float32 [K] to (codes uint8 [K], scale float32 [ceil(K / 256)], mean float32 []).

    absmax values are all positive and much alike: without their mean, they spread around 0. The rest is quantised in
    blocks of 256 with `dynamic_levels`.
    """
    mean = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, scale = quantize_blockwise(absmax - mean, _dynamic_levels(absmax.device), ABSMAX_BLOCK)
    return codes, scale, mean


def dequantize_absmax_codes(codes: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """The inverse of quantize_absmax_again, float32 [K]."""
    return dequantize_blockwise(codes, scale, _dynamic_levels(codes.device), ABSMAX_BLOCK).add_(mean)


@cache
def _pairs_of_levels(device: torch.device) -> Tensor:
    """int64 [256]: entry b is the two float32 levels of the byte b, side by side."""
    levels, byte = _nf4_levels(), torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).view(torch.int64).view(256).to(device)


def _rows_and_absmax(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(float32 [K, S], the end filled with zeros, and the largest magnitude of each row [K])."""
    if not weight.is_floating_point():
        raise TypeError(f"only floating-point tensors can be quantised, this one is {weight.dtype}")
    if block_size < 1:
        raise ValueError(f"block_size must be 1 or more, got {block_size}")
    flat = weight.detach().reshape(-1).float()
    if missing := -flat.numel() % block_size:
        flat = F.pad(flat, (0, missing))
    rows = flat.view(-1, block_size)
    absmax = rows.abs().amax(dim=1)
    if not absmax.isfinite().all():
        bad = ~flat.isfinite()
        raise ValueError(
            f"the weight holds {int(bad.sum())} numbers that are NaN or infinite, the first at index "
            f"{int(bad.nonzero()[0])} of the flat weight: a block that holds one has no scale"
        )
    return rows, absmax


def _times_absmax_(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Multiply float32 values [N] by the absmax [K] of their blocks, in place. What is too long counts to the last."""
    blocks = min(values.numel() // block_size, len(absmax))
    whole = blocks * block_size
    values[:whole].view(-1, block_size).mul_(absmax[:blocks].unsqueeze(1))
    if whole < values.numel():
        values[whole:].mul_(absmax[-1])
    return values


def _largest_code(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    return 2 ** (bits - 1) - 1


def _block_size_for(tensor: Tensor, block_size: int | None) -> int:
    return max(1, tensor.numel()) if block_size is None else block_size
