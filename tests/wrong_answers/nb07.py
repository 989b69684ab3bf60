"""Notebook 07: wrong answers and the complaint each must provoke; right ones written differently."""

import math
from statistics import NormalDist

import torch
from torch.nn import functional as F

OFFSET = 1 - (1 / 32 + 1 / 30) / 2

# 7.1: the levels of NF4


def quantiles(start, count, leave_out=1):
    probabilities = torch.linspace(start, 0.5, count)[: count - leave_out]
    return [NormalDist().inv_cdf(float(p)) for p in probabilities]


def levels(positive=9, negative=9 - 1, *, offset=OFFSET, zero=True, divide=True, sort=True, leave_out=1):
    values = quantiles(offset, positive, leave_out)
    values += [-value for value in quantiles(offset, negative, leave_out)] + [0.0] * zero
    tensor = torch.tensor(sorted(values) if sort else values)
    return tensor / tensor.max() if divide else tensor


def levels_without_zero():
    return levels(9, 9, zero=False)


def levels_with_two_zeros():
    return levels(9, 8, leave_out=0)[:16]


def levels_from_one():
    values = [math.inf, *quantiles(OFFSET, 9)[1:]] + [-v for v in quantiles(OFFSET, 8)] + [0.0]
    return torch.tensor(sorted(values))


def levels_turned_round():
    return levels(8, 9)


def levels_not_divided():
    return levels(divide=False)


def levels_not_sorted():
    return levels(sort=False)


def levels_of_int4():
    return torch.linspace(-1, 1, 16)


def levels_of_int4_with_zero():
    return torch.cat([torch.tensor([-1.0]), torch.arange(-7, 8) / 7])


def levels_with_another_offset():
    return levels(offset=1 - 1 / 32)


def levels_seventeen():
    return levels(9, 9)


def levels_in_float64():
    return levels().double()


def levels_as_a_list():
    return levels().tolist()


def levels_equal_shares():
    return torch.tensor([NormalDist().inv_cdf((k + 0.5) / 16) for k in range(16)])


def right_levels_from_erfinv():
    def ppf(start, count):
        p = torch.linspace(start, 0.5, count, dtype=torch.float64)[:-1]
        return math.sqrt(2) * torch.erfinv(2 * p - 1)

    values = torch.cat([ppf(OFFSET, 9), -ppf(OFFSET, 8), torch.zeros(1, dtype=torch.float64)])
    return (values.sort().values / values.max()).float()


def right_levels_from_below():
    low = [NormalDist().inv_cdf(float(p)) for p in torch.linspace(1 - OFFSET, 0.5, 8)]
    high = [NormalDist().inv_cdf(float(p)) for p in torch.linspace(0.5, OFFSET, 9)]
    return torch.tensor([*low[:-1], 0.0, *high[1:]]) / max(high)


# 7.2: quantise in blocks


def blocks(flat, size, fill=0.0):
    return F.pad(flat, (0, -len(flat) % size), value=fill).view(-1, size)


def quantize(weight, levels, block_size, *, scale=None, code=None, fill=0.0, tiny=1e-38):
    flat = weight.flatten().float()
    rows = blocks(flat, block_size, fill)
    absmax = rows.abs().amax(dim=1) if scale is None else scale(rows)
    scaled = rows / absmax.clamp(min=tiny)[:, None]
    if code is None:
        codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    else:
        codes = code(scaled, levels)
    return codes.flatten()[: len(flat)].to(torch.uint8), absmax


def absmax_without_abs(weight, levels, block_size):
    return quantize(weight, levels, block_size, scale=lambda rows: rows.amax(dim=1))


def one_absmax_for_all(weight, levels, block_size):
    largest = weight.float().abs().max()
    return quantize(weight, levels, block_size, scale=lambda rows: largest.expand(len(rows)).clone())


def mean_instead_of_max(weight, levels, block_size):
    return quantize(weight, levels, block_size, scale=lambda rows: rows.abs().mean(dim=1))


def divides_by_zero(weight, levels, block_size):
    flat = weight.flatten().float()
    rows = blocks(flat, block_size)
    absmax = rows.abs().amax(dim=1)
    distance = (rows / absmax[:, None])[..., None] - levels
    return distance.abs().argmin(dim=-1).flatten()[: len(flat)].to(torch.uint8), absmax


def divides_by_zero_and_bucketizes(weight, levels, block_size):
    flat = weight.flatten().float()
    rows = blocks(flat, block_size)
    absmax = rows.abs().amax(dim=1)
    codes = torch.bucketize(rows / absmax[:, None], (levels[1:] + levels[:-1]) / 2)
    return codes.flatten()[: len(flat)].to(torch.uint8), absmax


def bucketizes_by_the_levels(weight, levels, block_size):
    return quantize(weight, levels, block_size, code=lambda scaled, levels: torch.bucketize(scaled, levels))


def rounds_down(weight, levels, block_size):
    def down(scaled, levels):
        return (torch.bucketize(scaled, levels, right=True) - 1).clamp(min=0)

    return quantize(weight, levels, block_size, code=down)


def believes_in_even_levels(weight, levels, block_size):
    def even(scaled, levels):
        return ((scaled + 1) / 2 * (len(levels) - 1)).round().long()

    return quantize(weight, levels, block_size, code=even)


def forgets_to_divide(weight, levels, block_size):
    codes, _ = quantize(weight, levels, block_size, scale=lambda rows: torch.ones(len(rows)))
    return codes, blocks(weight.flatten().float(), block_size).abs().amax(dim=1)


def keeps_the_filler(weight, levels, block_size):
    flat = blocks(weight.flatten().float(), block_size).flatten()
    return quantize(flat, levels, block_size)


def loses_the_end(weight, levels, block_size):
    flat = weight.flatten().float()
    whole = flat[: len(flat) // block_size * block_size]
    codes, absmax = quantize(whole, levels, block_size)
    return F.pad(codes, (0, len(flat) - len(whole))), absmax


def cuts_columns(weight, levels, block_size):
    return quantize(weight.T, levels, block_size)


def returns_values(weight, levels, block_size):
    codes, absmax = quantize(weight, levels, block_size)
    return levels[codes.int()], absmax


def returns_long_codes(weight, levels, block_size):
    codes, absmax = quantize(weight, levels, block_size)
    return codes.long(), absmax


def returns_one_over_absmax(weight, levels, block_size):
    codes, absmax = quantize(weight, levels, block_size)
    return codes, 1 / absmax


def returns_codes_alone(weight, levels, block_size):
    return quantize(weight, levels, block_size)[0]


def scales_in_bfloat16(weight, levels, block_size):
    codes, absmax = quantize(weight, levels, block_size)
    return codes, absmax.bfloat16()


def works_in_place(weight, levels, block_size):
    result = quantize(weight, levels, block_size)
    weight.zero_()
    return result


def codes_from_one_on(weight, levels, block_size):
    codes, absmax = quantize(weight, levels, block_size)
    return codes + 1, absmax


def right_by_distance(weight, levels, block_size):
    flat = weight.reshape(-1).to(torch.float32)
    codes, scales = [], []
    for block in flat.split(block_size):
        scale = block.abs().max()
        distance = (block[:, None] - scale * levels[None]).abs()
        nearest = (
            distance.argmin(dim=1) if scale > 0 else torch.full((len(block),), (levels == 0).nonzero().item())
        )
        codes.append(nearest)
        scales.append(scale)
    return torch.cat(codes).to(torch.uint8), torch.stack(scales)


def right_with_reciprocals(weight, levels, block_size):
    flat = weight.flatten().float()
    padded = torch.zeros(-(-len(flat) // block_size) * block_size)
    padded[: len(flat)] = flat
    rows = padded.view(-1, block_size)
    absmax = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1)
    scaled = torch.where(absmax[:, None] > 0, rows * (1 / absmax)[:, None], 0.0)
    codes = (scaled[..., None] > (levels[1:] + levels[:-1]) / 2).sum(dim=-1)
    return codes.flatten()[: len(flat)].byte(), absmax


# 7.3: two codes to a byte


class RightNibbles:
    """The frame of the answers below, which change one thing each."""

    filler, first = 7, 0

    def __init__(self, codes):
        self.n = len(codes)
        pairs = F.pad(codes, (0, self.n % 2), value=self.filler).view(-1, 2)
        self.packed = pairs[:, self.first] << 4 | pairs[:, 1 - self.first]

    def unpack(self):
        halves = [self.packed >> 4, self.packed & 15]
        return torch.stack([halves[self.first], halves[1 - self.first]], dim=1).flatten()[: self.n]


class SwappedNibbles(RightNibbles):
    first = 1


class FilledWithZero(RightNibbles):
    filler = 0


class SwappedInUnpackOnly(RightNibbles):
    def unpack(self):
        return torch.stack([self.packed & 15, self.packed >> 4], dim=1).flatten()[: self.n]


class KeepsTheFillerCode(RightNibbles):
    def unpack(self):
        return torch.stack([self.packed >> 4, self.packed & 15], dim=1).flatten()


class DropsTheOddOne(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes[: len(codes) // 2 * 2])
        self.n = len(codes)


class OneToAByte(RightNibbles):
    def __init__(self, codes):
        self.packed = codes.clone()

    def unpack(self):
        return self.packed


class KeepsTheCodes(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes)
        self.codes = codes.clone()

    def unpack(self):
        return self.codes


class KeepsAList(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes)
        self.codes = codes.tolist()


class ViewOfSomethingLarger(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes)
        self.packed = torch.cat([self.packed, self.packed])[: len(self.packed)]


class HalvesInsteadOfNeighbours(RightNibbles):
    def __init__(self, codes):
        self.n = len(codes)
        codes = F.pad(codes, (0, self.n % 2), value=7)
        half = len(codes) // 2
        self.packed = codes[:half] << 4 | codes[half:]


class TimesEight(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes)
        self.packed = (self.packed >> 4) * 8 + (self.packed & 15)


class PacksLong(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes.long())


class UnpacksLong(RightNibbles):
    def unpack(self):
        return super().unpack().long()


class ChangesTheCodes(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes)
        codes[::2] *= 16


class ForgetsReturn(RightNibbles):
    def unpack(self):
        super().unpack()


class ForgetsPacked(RightNibbles):
    def __init__(self, codes):
        super().__init__(codes)
        self.bytes = self.packed
        del self.packed


class RightByArithmetic:
    def __init__(self, codes):
        self.length = codes.numel()
        if self.length % 2:
            codes = torch.cat([codes, torch.tensor([7], dtype=torch.uint8)])
        self.packed = codes[0::2] * 16 + codes[1::2]

    def unpack(self):
        codes = torch.empty(2 * len(self.packed), dtype=torch.uint8)
        codes[0::2] = self.packed // 16
        codes[1::2] = self.packed % 16
        return codes[: self.length].clone()


class RightByTable:
    def __init__(self, codes):
        self.odd = codes.numel() % 2 == 1
        self.packed = torch.zeros((len(codes) + 1) // 2, dtype=torch.uint8)
        for i, code in enumerate(codes.tolist() + [7] * self.odd):
            self.packed[i // 2] += code if i % 2 else code * 16

    def unpack(self):
        pairs = torch.tensor([[byte // 16, byte % 16] for byte in range(256)], dtype=torch.uint8)
        codes = pairs[self.packed.int()].flatten()
        return codes[:-1] if self.odd else codes


# 7.4: double quantisation


def double(absmax, levels, block_size, *, centre=True, scale=None):
    mean = absmax.mean()
    codes, scales = quantize(absmax - mean if centre else absmax, levels, block_size, scale=scale)
    return codes, scales, mean


def forgets_the_mean(absmax, levels, block_size):
    return double(absmax, levels, block_size, centre=False)


def has_no_mean(absmax, levels, block_size):
    return *quantize(absmax, levels, block_size), torch.tensor(0.0)


def returns_no_mean(absmax, levels, block_size):
    return double(absmax, levels, block_size)[:2]


def adds_the_mean(absmax, levels, block_size):
    return *quantize(absmax + absmax.mean(), levels, block_size), absmax.mean()


def one_mean_per_block(absmax, levels, block_size):
    means = torch.stack([part.mean() for part in absmax.split(block_size)])
    centred = absmax - means.repeat_interleave(block_size)[: len(absmax)]
    return *quantize(centred, levels, block_size), means


def median_instead(absmax, levels, block_size):
    middle = absmax.median()
    return *quantize(absmax - middle, levels, block_size), middle


def scale_without_abs(absmax, levels, block_size):
    return double(absmax, levels, block_size, scale=lambda rows: rows.amax(dim=1))


def one_scale_for_all(absmax, levels, block_size):
    codes, _, mean = double(absmax, levels, len(absmax))
    return codes, (absmax - mean).abs().max()[None], mean


def blocks_of_64(absmax, levels, block_size):
    return double(absmax, levels, 64)


def spreads_evenly(absmax, levels, block_size):
    mean = absmax.mean()
    rows = blocks(absmax - mean, block_size)
    scales = rows.abs().amax(dim=1)
    codes = ((rows / scales[:, None] + 1) * 127.5).round().flatten()[: len(absmax)]
    return codes.byte(), scales, mean


def centres_in_place(absmax, levels, block_size):
    mean = absmax.mean()
    absmax -= mean
    return *quantize(absmax, levels, block_size), mean


def right_double_by_distance(absmax, levels, block_size):
    mean = absmax.double().mean().item()
    codes, scales = right_by_distance(absmax - mean, levels, block_size)
    return codes, scales, mean


def right_double_with_a_tensor(absmax, levels, block_size):
    mean = absmax.sum(dim=0, keepdim=True) / len(absmax)
    codes, scales = quantize(absmax - mean, levels, block_size)
    return codes, scales, mean


# 7.5: a linear layer that saves codes


class RightCodesLinear(torch.autograd.Function):
    """The frame of the answers below, which change one thing each."""

    @staticmethod
    def forward(ctx, x, packed, dequantize):
        ctx.save_for_backward(packed)
        ctx.dequantize = dequantize
        return x @ dequantize(packed).T

    @staticmethod
    def backward(ctx, grad_y):
        (packed,) = ctx.saved_tensors
        return grad_y @ ctx.dequantize(packed), None, None


class SavesTheWeight(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        weight = dequantize(packed)
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad_y):
        (weight,) = ctx.saved_tensors
        return grad_y @ weight, None, None


class KeepsTheWeightOnCtx(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        ctx.weight = dequantize(packed)
        return x @ ctx.weight.T

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.weight, None, None


class KeepsTheWeightInALambda(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        weight = dequantize(packed)
        ctx.gradient = lambda grad_y: grad_y @ weight
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad_y):
        return ctx.gradient(grad_y), None, None


class SavesTheTranspose(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        transpose = dequantize(packed).T.contiguous()
        ctx.save_for_backward(transpose)
        return x @ transpose

    @staticmethod
    def backward(ctx, grad_y):
        (transpose,) = ctx.saved_tensors
        return grad_y @ transpose.T, None, None


class SavesTheInput(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        ctx.save_for_backward(x, packed)
        ctx.dequantize = dequantize
        return x @ dequantize(packed).T

    @staticmethod
    def backward(ctx, grad_y):
        _, packed = ctx.saved_tensors
        return grad_y @ ctx.dequantize(packed), None, None


class GradientIntoTheBase(SavesTheInput):
    @staticmethod
    def backward(ctx, grad_y):
        x, packed = ctx.saved_tensors
        grad_weight = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_y @ ctx.dequantize(packed), grad_weight, None


class KeepsTheInputInALambda(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        ctx.save_for_backward(packed)
        ctx.dequantize = dequantize
        ctx.gradient = lambda grad_y: grad_y.flatten(0, -2).T @ x.flatten(0, -2)
        return x @ dequantize(packed).T

    @staticmethod
    def backward(ctx, grad_y):
        (packed,) = ctx.saved_tensors
        return grad_y @ ctx.dequantize(packed), ctx.gradient(grad_y), None


class ComputesMoreThanNeeded(RightCodesLinear):
    @staticmethod
    def backward(ctx, grad_y):
        (packed,) = ctx.saved_tensors
        weight = ctx.dequantize(packed)
        grad_y.flatten(0, -2).T @ grad_y.flatten(0, -2)
        return grad_y @ weight, None, None


class TransposesInBackward(RightCodesLinear):
    @staticmethod
    def backward(ctx, grad_y):
        (packed,) = ctx.saved_tensors
        weight = ctx.dequantize(packed)
        return grad_y @ (weight.T if weight.shape[0] == weight.shape[1] else weight), None, None


class ForgetsTheTranspose(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        ctx.save_for_backward(packed)
        ctx.dequantize = dequantize
        return x @ dequantize(packed)


class ReturnsOneGradient(RightCodesLinear):
    @staticmethod
    def backward(ctx, grad_y):
        (packed,) = ctx.saved_tensors
        return grad_y @ ctx.dequantize(packed)


class ReturnsNoGradient(RightCodesLinear):
    @staticmethod
    def backward(ctx, grad_y):
        return None, None, None


class ReturnsTheOutputGradient(RightCodesLinear):
    @staticmethod
    def backward(ctx, grad_y):
        (packed,) = ctx.saved_tensors
        return 2 * (grad_y @ ctx.dequantize(packed)), None, None


class DequantizesTwice(RightCodesLinear):
    @staticmethod
    def forward(ctx, x, packed, dequantize):
        ctx.save_for_backward(packed)
        ctx.dequantize = dequantize
        dequantize(packed)
        return x @ dequantize(packed).T


class PlainModule(torch.nn.Module):
    def forward(self, x, packed, dequantize):
        return x @ dequantize(packed).T


def plain_autograd(x, packed, dequantize):
    return x @ dequantize(packed).T


class RightWithSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(x, packed, dequantize):
        return F.linear(x, dequantize(packed))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.packed, ctx.make = inputs[1:]

    @staticmethod
    def backward(ctx, grad_y):
        return F.linear(grad_y, ctx.make(ctx.packed).T), None, None


class RightWhereNeeded(RightCodesLinear):
    @staticmethod
    def backward(ctx, grad_y):
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (packed,) = ctx.saved_tensors
        return torch.einsum("...o,oi->...i", grad_y, ctx.dequantize(packed)), None, None


WRONG = {
    "7.1": [
        (levels_without_zero, r"0 is not among your 16 levels"),
        (levels_with_two_zeros, r"0 is there 3 times: the last probability, 0\.5"),
        (levels_from_one, r"levels\[15\] is inf\. The quantile of 1 is infinite"),
        (
            levels_turned_round,
            r"levels\[7\] is -0\.079\d*, expected 0: you have 8 negative and 7 positive",
        ),
        (levels_not_divided, r"levels\[15\] is 1\.84\d*, expected 1: divide by the largest"),
        (levels_not_sorted, r"levels\[0\] is 1\.0000 and levels\[1\] is 0\.7230: sort them"),
        (levels_of_int4, r"0 is not among your 16 levels"),
        (levels_of_int4_with_zero, r"sort them|evenly spaced levels are those of int4"),
        (levels_with_another_offset, r"levels\[\d+\] is 0?-?.*: nearly\. The offset is the mean"),
        (levels_seventeen, r"levels has shape \[17\], expected \[16\]"),
        (levels_in_float64, r"levels has dtype torch\.float64, expected torch\.float32"),
        (levels_as_a_list, r"levels is of type list"),
        (levels_equal_shares, r"0 is not among your 16 levels"),
    ],
    "7.2": [
        (absmax_without_abs, r"absmax\[1\] is -\S+, expected \S+: that is the largest value of the block"),
        (
            one_absmax_for_all,
            r"absmax\[\d\] is .*, expected .*: that is the tensor's, each block has its own",
        ),
        (mean_instead_of_max, r"absmax\[\d\] is .*: that is the mean"),
        (divides_by_zero, r"a row of zeros.*: codes\[16\] is 0, expected 7: this block holds only zeros"),
        (divides_by_zero_and_bucketizes, r"codes\[16\] is 1[45], expected 7: this block holds only zeros"),
        (bucketizes_by_the_levels, r"All wrong codes are one too high: bucketize by the midpoints"),
        (rounds_down, r"All wrong codes are one too low: that rounds down"),
        (believes_in_even_levels, r"codes\[\d+\] is \d+, expected \d+: weight / scale is .*, level"),
        (forgets_to_divide, r"codes\[\d+\] is \d+, expected \d+: weight / scale is"),
        (keeps_the_filler, r"weight \[5, 7\].*: 48 codes, expected 35: cut off what you filled up"),
        (loses_the_end, r"weight \[5, 7\].*: 2 scales, expected 3: the last 3 weights are a block too"),
        (cuts_columns, r"absmax is .*, expected|absmax\[\d\] is"),
        (returns_values, r"codes has dtype torch\.float32, expected torch\.uint8"),
        (returns_long_codes, r"codes has dtype torch\.int64, expected torch\.uint8"),
        (returns_one_over_absmax, r"absmax\[\d\] is .*: that is one over it"),
        (returns_codes_alone, r"you returned Tensor, expected two tensors: codes, absmax"),
        (scales_in_bfloat16, r"absmax has dtype torch\.bfloat16, expected torch\.float32"),
        (works_in_place, r"the weight was changed"),
        (codes_from_one_on, r"codes\[\d+\] is 16, and there are 16 levels, 0 to 15"),
    ],
    "7.3": [
        (SwappedNibbles, r"codes \[1, 2\]: packed\[0\] is 33, expected 18: the halves are swapped"),
        (FilledWithZero, r"codes \[1, 2, 3\]: packed\[1\] is 48, expected 55: fill an odd end up with 7"),
        (SwappedInUnpackOnly, r"codes \[1, 2\]: unpack\(\) is \[2, 1\], expected \[1, 2\]"),
        (KeepsTheFillerCode, r"codes \[1, 2, 3\]: unpack\(\) gives 4 codes, expected 3: drop the filler"),
        (DropsTheOddOne, r"codes \[1, 2, 3\]: packed has 1 bytes, expected 2: the last code is lost"),
        (OneToAByte, r"codes \[1, 2\]: packed has 2 bytes, expected 1: two codes to a byte"),
        (KeepsTheCodes, r"your object holds 3 bytes in codes, n, packed, the budget is 1"),
        (KeepsAList, r"13 codes: self\.codes keeps 13 codes beside the bytes"),
        (
            ViewOfSomethingLarger,
            r"holds 2 bytes in n, packed, the budget is 1\..*no view of something larger",
        ),
        (
            HalvesInsteadOfNeighbours,
            r"codes \[1, 2, 3\]: packed\[0\] is 19, expected 18: you paired",
        ),
        (TimesEight, r"codes \[1, 2\]: packed\[0\] is 10, expected 18 = 1 \* 16 \+ 2"),
        (PacksLong, r"packed has dtype torch\.int64, expected torch\.uint8"),
        (UnpacksLong, r"unpack\(\) has dtype torch\.int64, expected torch\.uint8"),
        (ChangesTheCodes, r"codes \[1, 2\]: what you were given was changed"),
        (ForgetsReturn, r"unpack\(\) is None, expected \[1, 2\]\. Is a `return` missing"),
        (ForgetsPacked, r"there is no \.packed; keep the bytes in self\.packed"),
    ],
    "7.4": [
        (forgets_the_mean, r"scales\[0\] is 3\.\d+, expected 0\.\d+: .* The mean was forgotten"),
        (has_no_mean, r"700 scales in blocks of 256: mean is 0, expected 2\.\d+: all scales are positive"),
        (returns_no_mean, r"you returned tuple, expected three: codes, scales, mean"),
        (adds_the_mean, r"scales\S* is .*, expected"),
        (one_mean_per_block, r"mean has shape \[3\], expected one number for all blocks"),
        (median_instead, r"mean is 2\.\d+, expected 2\.\d+"),
        (scale_without_abs, r"absmax - mean has negative values, too"),
        (one_scale_for_all, r"scales has shape \[1\], expected \[3\]"),
        (blocks_of_64, r"scales has shape \[11\], expected \[3\]"),
        (spreads_evenly, r"codes\[\d+\] is \d+, expected \d+: weight / scale is"),
        (centres_in_place, r"absmax was changed"),
    ],
    "7.5": [
        (
            SavesTheWeight,
            r"x \[4, 6\], W \[5, 6\]: after the forward the weight is still held, 120 bytes, expected the 30",
        ),
        (KeepsTheWeightOnCtx, r"after the forward the weight is still held"),
        (KeepsTheWeightInALambda, r"after the forward the weight is still held"),
        (SavesTheTranspose, r"after the forward the weight is still held"),
        (SavesTheInput, r"x is saved, 96 bytes\. It is needed for the gradient of W alone"),
        (GradientIntoTheBase, r"x is saved, 96 bytes\. It is needed for the gradient of W alone"),
        (
            KeepsTheInputInALambda,
            r"the backward does 480 FLOPs, the budget is 240.*the frozen base needs no gradient",
        ),
        (ComputesMoreThanNeeded, r"the backward does \d+ FLOPs, the budget is 240"),
        (TransposesInBackward, r"x\.grad is grad_y W\^T\. The forward has W\^T, so the backward has W"),
        (ForgetsTheTranspose, r"raised RuntimeError"),
        (ReturnsOneGradient, r"backward must return one value for each of x, packed, dequantize"),
        (ReturnsNoGradient, r"x\.grad is None after backward"),
        (ReturnsTheOutputGradient, r"x\.grad\[0, 0\] is .*, expected"),
        (DequantizesTwice, r"dequantize was called 2 times in forward and 1 times in backward"),
        (
            PlainModule,
            r"CodesLinear is type PlainModule, expected a class derived from torch\.autograd\.Function",
        ),
        (plain_autograd, r"CodesLinear is function plain_autograd, expected a class derived"),
    ],
}
RIGHT = {
    "7.1": [right_levels_from_erfinv, right_levels_from_below],
    "7.2": [right_by_distance, right_with_reciprocals],
    "7.3": [RightByArithmetic, RightByTable],
    "7.4": [right_double_by_distance, right_double_with_a_tensor],
    "7.5": [RightWithSetupContext, RightWhereNeeded],
}
