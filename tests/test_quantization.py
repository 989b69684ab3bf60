"""NF4, FP4 and their relatives beside bitsandbytes, beside each other, and beside what the paper says."""

import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch

from workshop_utils.quantization import (
    NF4_ZERO,
    dequantize_absmax,
    dequantize_blockwise,
    dequantize_nf4,
    dynamic_levels,
    fp4_levels,
    nf4_levels,
    pack_codes,
    quantize_absmax,
    quantize_blockwise,
    quantize_nf4,
    unpack_codes,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _bitsandbytes_compiles_nothing():
    """It compiles its way around odd sizes, which takes half a minute."""
    with torch._dynamo.config.patch(disable=True):
        yield


def weights(num_numbers, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(num_numbers, generator=generator)).to(dtype)


def their_absmax(state):
    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset


def squared_error(values, weight):
    return float((values.float() - weight.float()).square().mean())


# ----------------------------------------------------------------------------- levels


def test_levels_are_those_of_bitsandbytes_bit_for_bit():
    assert torch.equal(nf4_levels(), bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(fp4_levels(), bnb.get_4bit_type("fp4", "cpu").sort().values)
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())
    assert nf4_levels()[NF4_ZERO] == 0


def test_levels_are_the_caller_s_own():
    nf4_levels().zero_()
    dynamic_levels().zero_()
    assert nf4_levels()[-1] == dynamic_levels()[-1] == 1
    assert squared_error(dequantize_nf4(quantize_nf4(weights(64))), weights(64)) > 0


# ----------------------------------------------------------------------------- NF4 and FP4 beside bitsandbytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_and_values_are_those_of_bitsandbytes(block_size, dtype, device):
    for num_numbers in (1, 2, 63, 64, 65, 2 * block_size, 4097, 50_001):
        weight = weights(num_numbers, dtype, seed=num_numbers).to(device)
        weight[block_size : 2 * block_size] = 0
        ours = quantize_nf4(weight, block_size, double_quant=False)
        packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        assert torch.equal(ours.packed, packed.view(-1))
        # a short last block of zeros has an absmax of 1e-38 there
        torch.testing.assert_close(ours.absmax, state.absmax, atol=1e-37, rtol=0)
        values = bnb.dequantize_4bit(packed, state).view(-1)
        assert dequantize_nf4(ours).dtype == dtype
        torch.testing.assert_close(dequantize_nf4(ours), values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(128, 64), (200, 784), (10, 200), (7, 3, 5), (1, 1), (3, 1)])
def test_shapes(shape):
    """bitsandbytes reads a 2-D weight wrongly where a row is no whole number of blocks: it gets the flat one here."""
    weight = weights(torch.Size(shape).numel()).view(shape)
    ours = quantize_nf4(weight, double_quant=False)
    flat = bnb.dequantize_4bit(*bnb.quantize_4bit(weight.view(-1), blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(dequantize_nf4(ours), flat.view(shape), atol=1e-6, rtol=0)
    assert dequantize_nf4(ours).shape == ours.shape == shape


def test_a_weight_that_is_a_view_is_read_in_its_order():
    weight = weights(40 * 24).view(24, 40).T
    torch.testing.assert_close(
        dequantize_nf4(quantize_nf4(weight)), dequantize_nf4(quantize_nf4(weight.clone())), atol=0, rtol=0
    )


@pytest.mark.parametrize("block_size", [64, 4096])
def test_fp4_is_that_of_bitsandbytes(block_size):
    weight = weights(100_000)
    codes, absmax = quantize_blockwise(weight, fp4_levels(), block_size)
    ours = dequantize_blockwise(codes, absmax, fp4_levels(), block_size)
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=block_size, quant_type="fp4"))
    torch.testing.assert_close(ours, theirs.view(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_byte_at_a_time_is_a_code_at_a_time(dtype):
    """The table of pairs, in pieces, beside unpacking; blocks of odd sizes too, which bitsandbytes does not know."""
    for block_size, num_numbers in ((64, 400_001), (63, 300_000), (1, 5), (300_001, 300_002)):
        weight = weights(num_numbers, dtype)
        ours = quantize_nf4(weight, block_size)
        codes = unpack_codes(ours.packed, num_numbers)
        values = dequantize_blockwise(codes, ours.absmax_of_blocks(), nf4_levels(), block_size)
        assert torch.equal(dequantize_nf4(ours), values.to(dtype))


def test_no_code_is_further_away_than_another():
    weight = weights(2_000)
    codes, absmax = quantize_blockwise(weight, nf4_levels(), 50)
    scaled = weight.view(-1, 50) / absmax[:, None]
    distances = (scaled.reshape(-1, 1) - nf4_levels()).abs()
    chosen = distances.gather(1, codes.long()[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, distances.min(dim=1).values, atol=1e-7, rtol=0)


def test_float64_is_quantised_as_float32():
    weight = weights(1000).double()
    ours = quantize_nf4(weight)
    assert torch.equal(ours.packed, quantize_nf4(weight.float()).packed)
    assert (
        dequantize_nf4(ours).dtype == torch.float64
        and dequantize_nf4(ours, torch.bfloat16).dtype == torch.bfloat16
    )


# ----------------------------------------------------------------------------- double quantisation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 512])
def test_absmax_codes_are_nearly_those_of_bitsandbytes_and_no_worse(block_size, dtype):
    """Its CPU kernel takes a neighbour for about two scales in a thousand, and a level two away next to 0."""
    weight = weights(1_000_000, dtype)
    ours = quantize_nf4(weight, block_size)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(ours.packed, packed.view(-1))
    steps = (ours.absmax_codes.int() - state.absmax.int()).abs()
    assert steps.max() <= 2 and (steps > 0).float().mean() < 0.01
    assert torch.equal(ours.absmax_scale, state.state2.absmax) and ours.absmax_mean == state.offset
    same = steps == 0
    torch.testing.assert_close(ours.absmax_of_blocks()[same], their_absmax(state)[same], atol=1e-8, rtol=0)
    exact = quantize_nf4(weight, block_size, double_quant=False).absmax
    error = squared_error(ours.absmax_of_blocks(), exact)
    assert error <= squared_error(their_absmax(state), exact) * (1 + 1e-6)


def test_bits_per_parameter_are_those_of_the_paper():
    weight = weights(576 * 1536).view(576, 1536)
    assert quantize_nf4(weight).bits_per_parameter == pytest.approx(4.127, abs=5e-4)
    assert quantize_nf4(weight, double_quant=False).bits_per_parameter == 4.5
    assert quantize_nf4(weight, 32, double_quant=False).bits_per_parameter == 5
    assert quantize_nf4(weight).nbytes == 576 * 1536 // 2 + 13_824 + 4 * 54 + 4


def test_the_mean_is_worth_its_four_bytes():
    """Without it, all absmax values lie at one end of the levels."""
    exact = quantize_nf4(weights(200_000), double_quant=False).absmax
    codes, scale = quantize_blockwise(exact, dynamic_levels(), 256)
    without = dequantize_blockwise(codes, scale, dynamic_levels(), 256)
    with_mean = quantize_nf4(weights(200_000)).absmax_of_blocks()
    assert squared_error(with_mean, exact) < squared_error(without, exact) / 3


# ----------------------------------------------------------------------------- errors on normal numbers


def test_errors_on_normal_numbers_are_the_known_ones():
    weight = torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    fp4 = dequantize_blockwise(*quantize_blockwise(weight, fp4_levels(), 64), fp4_levels(), 64)
    int4 = dequantize_absmax(*quantize_absmax(weight, 4, 64), 4, 64)
    errors = {
        "nf4": squared_error(dequantize_nf4(quantize_nf4(weight)), weight),
        "nf4 4096": squared_error(dequantize_nf4(quantize_nf4(weight, 4096)), weight),
        "fp4": squared_error(fp4, weight),
    }
    assert errors == pytest.approx({"nf4": 0.00846, "nf4 4096": 0.0121, "fp4": 0.0149}, rel=0.01)
    assert errors["nf4"] < squared_error(int4, weight) < errors["fp4"]


# ----------------------------------------------------------------------------- whole numbers


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [None, 16, 25])
def test_absmax_rounds_to_the_nearest_whole_number(bits, block_size):
    weight = weights(120).view(10, 12)
    codes, absmax = quantize_absmax(weight, bits, block_size)
    largest = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.abs().max() == largest
    values = dequantize_absmax(codes, absmax, bits, block_size)
    size = block_size or 120
    for i, (value, number) in enumerate(zip(values.view(-1), weight.view(-1), strict=True)):
        top = weight.view(-1)[i // size * size : (i // size + 1) * size].abs().max()
        assert absmax[i // size] == top
        assert abs(value - number) <= top / largest / 2 + 1e-8
        assert float(value * largest / top) == pytest.approx(round(float(value * largest / top)), abs=1e-4)


def test_one_outlier_ruins_a_tensor_and_blocks_contain_it():
    weight = weights(4096)
    weight[100] = 10.0
    others = torch.arange(4096) != 100
    whole = dequantize_absmax(*quantize_absmax(weight))
    blocks = dequantize_absmax(*quantize_absmax(weight, 8, 64), 8, 64)
    assert not whole[others].abs().gt(0.08).any() and (whole[others] == 0).float().mean() > 0.9
    assert squared_error(blocks[others], weight[others]) < squared_error(whole[others], weight[others]) / 30


# ----------------------------------------------------------------------------- packing


def test_packing_puts_the_first_code_into_the_upper_half():
    codes = torch.tensor([1, 2, 15, 0, 9], dtype=torch.uint8)
    assert pack_codes(codes).tolist() == [0x12, 0xF0, 0x90 + NF4_ZERO]
    assert torch.equal(unpack_codes(pack_codes(codes), 5), codes)


# ----------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("shape", [(0,), (0, 3), (5, 0)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_with_no_numbers(shape, double_quant):
    ours = quantize_nf4(torch.empty(shape), double_quant=double_quant)
    assert dequantize_nf4(ours).shape == shape
    codes, absmax = quantize_absmax(torch.empty(shape))
    assert dequantize_absmax(codes, absmax).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype):
    zeros = torch.zeros(3, 50, dtype=dtype)
    for double_quant in (True, False):
        assert torch.equal(dequantize_nf4(quantize_nf4(zeros, double_quant=double_quant)), zeros)
    assert torch.equal(dequantize_absmax(*quantize_absmax(zeros)), zeros.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_named(value, dtype):
    weight = weights(300, dtype).view(3, 100)
    weight[2, 5] = value
    for quantise in (quantize_nf4, quantize_absmax):
        with pytest.raises(ValueError, match="1 numbers that are NaN or infinite, the first at index 205"):
            quantise(weight)


def test_other_mistakes_are_named():
    with pytest.raises(TypeError, match=r"floating-point tensors .* torch.int64"):
        quantize_nf4(torch.arange(5))
    with pytest.raises(ValueError, match="block_size must be 1 or more, got 0"):
        quantize_nf4(weights(5), block_size=0)
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 1"):
        quantize_absmax(weights(5), bits=1)


def test_to_moves_all_that_is_held():
    ours = quantize_nf4(weights(100))
    moved = ours.to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert (
        moved.tensors().keys()
        == ours.tensors().keys()
        == {
            "packed",
            "absmax_codes",
            "absmax_scale",
            "absmax_mean",
        }
    )


def test_importing_brings_no_slow_library():
    slow = "transformers", "peft", "bitsandbytes"
    code = f"import sys, workshop_utils.qlora; sys.exit(any(name in sys.modules for name in {slow}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
