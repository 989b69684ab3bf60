"""NF4Linear and QLoRALinear beside LoRALinear on the dequantised weight, and beside peft with bitsandbytes."""

import copy
import io

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from workshop_utils.lora import (
    adapter_state_dict,
    apply_lora,
    load_adapter_state_dict,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_peft_adapter,
)
from workshop_utils.memory import measure_memory, record_activations
from workshop_utils.peft_format import read_adapter
from workshop_utils.qlora import NF4Linear, QLoRALinear, apply_qlora, merge_qlora
from workshop_utils.quantization import dequantize_nf4, quantize_nf4

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


class Net(nn.Module):
    """Sizes that are no whole number of blocks, one layer with an odd number of weights and no bias."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(30, 50)
        self.fc2 = nn.Linear(50, 21)
        self.head = nn.Linear(21, 5, bias=False)

    def forward(self, x):
        return self.head(self.fc2(self.fc1(x).tanh()).tanh())


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=96, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    )


def random_adapter(model, std=0.3):
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=std)
    return model


def pair(dtype=torch.float32, device="cpu", **settings):
    """(QLoRA, LoRA on what its codes stand for): the same adapter, which is not zero."""
    torch.manual_seed(0)
    base = Net().to(device, dtype)
    qlora = random_adapter(apply_qlora(copy.deepcopy(base), "all-linear", 4, 8, **settings)).to(dtype)
    for name, layer in lora_layers(qlora):
        base.get_submodule(name).weight.data.copy_(layer.base_layer.dequantize())
    lora = apply_lora(base, "all-linear", 4, 8)
    load_adapter_state_dict(lora, adapter_state_dict(qlora))
    return qlora, lora


def held_bits(model):
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8
    }


def assert_same_bits(model, before):
    after = held_bits(model)
    assert after.keys() == before.keys() and before
    assert all(torch.equal(after[name], before[name]) for name in before)


# ----------------------------------------------------------------------------- the same as LoRA


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("double_quant, block_size", [(True, 64), (False, 64), (True, 32)])
def test_outputs_and_gradients_are_those_of_lora_on_the_dequantised_weight(
    double_quant, block_size, dtype, device
):
    qlora, lora = pair(dtype, device, double_quant=double_quant, block_size=block_size)
    ours = torch.randn(2, 3, 30, dtype=dtype, device=device, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(qlora(ours), lora(theirs), **close)
    for model, x in ((qlora, ours), (lora, theirs)):
        model(x).square().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    for one, other in zip(lora_parameters(qlora), lora_parameters(lora), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **close)
    assert ours.grad.abs().min() > 0


def test_gradcheck():
    torch.manual_seed(0)
    layer = NF4Linear(nn.Linear(6, 5))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_training_is_that_of_lora():
    qlora, lora = pair(torch.float64)
    x, y = torch.randn(40, 30, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    before, losses = held_bits(qlora), []
    for model in (qlora, lora):
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
        for _ in range(10):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:10] == pytest.approx(losses[10:], rel=1e-10) and losses[9] < losses[0]
    assert_same_bits(qlora, before)


def test_equal_seeds_draw_the_adapter_of_lora():
    adapters = []
    for apply in (apply_lora, apply_qlora):
        torch.manual_seed(0)
        adapters.append(adapter_state_dict(apply(Net(), ["fc1", "fc2"], 4, 8)))
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


# ----------------------------------------------------------------------------- what is held, what is saved


def test_autograd_keeps_no_weight():
    layer = QLoRALinear(nn.Linear(256, 256), 2, 4)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    full = [tensor for tensor in kept if tensor.numel() * tensor.element_size() >= 256 * 256]
    assert not full and any(tensor.dtype == torch.uint8 for tensor in kept)
    with record_activations(layer) as saved:
        layer(x)
    assert saved.total_bytes == 4 * (3 * 256 + 3 * 2)  # x for A, A x for B: nothing for the base
    plain = nn.Linear(256, 256).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nn.functional.linear(x, plain.weight * 1.0)
    assert kept[-1].numel() == 256 * 256  # what it looks like where a full weight is kept


def test_the_base_takes_a_seventh_and_gets_no_gradient():
    layer = QLoRALinear(nn.Linear(576, 1536, bias=False), 8, 16)
    optimizer = torch.optim.AdamW(lora_parameters(layer))
    layer(torch.randn(2, 576)).sum().backward()
    optimizer.step()
    base, adapter = measure_memory(layer.base_layer), 4 * 8 * (576 + 1536)
    assert 8 * base.total_bytes / (576 * 1536) == pytest.approx(4.127, abs=5e-4)
    report = measure_memory(layer, optimizer)
    assert report.gradients_bytes == adapter and report.optimizer_bytes == 2 * adapter + 8
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())
    assert not any(parameter.requires_grad for parameter in layer.base_layer.parameters())


def test_quantized_is_what_quantize_nf4_gives():
    linear = nn.Linear(30, 7, dtype=torch.bfloat16)
    for double_quant in (True, False):
        expected = quantize_nf4(linear.weight, 32, double_quant)
        layer = NF4Linear(linear, block_size=32, double_quant=double_quant)
        for name, tensor in expected.tensors().items():
            assert torch.equal(getattr(layer.quantized(), name), tensor)
        assert torch.equal(layer.dequantize(), dequantize_nf4(expected))
        assert layer.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_changes_no_bit_of_the_base(dtype):
    model = random_adapter(apply_qlora(Net(), "all-linear", 4, 8))
    before = held_bits(model)
    assert_same_bits(model.to(dtype), before)
    assert_same_bits(copy.deepcopy(model).half().float(), before)
    assert all(parameter.dtype == dtype for parameter in lora_parameters(model))
    assert model(torch.randn(2, 30, dtype=dtype)).dtype == dtype


def test_state_dict_round_trip():
    model = random_adapter(apply_qlora(Net(), "all-linear", 4, 8))
    x, buffer = torch.randn(2, 30), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(9)
    other = apply_qlora(Net(), "all-linear", 4, 8)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))
    other.load_state_dict({name: tensor for name, tensor in model.state_dict().items()}, assign=True)
    assert torch.equal(other(x), model(x))


def test_a_copy_is_its_own():
    model = random_adapter(apply_qlora(Net(), "all-linear", 4, 8))
    twin, x = copy.deepcopy(model), torch.randn(2, 30)
    assert torch.equal(twin(x), model(x))
    twin.fc1.base_layer.packed.data.zero_()
    assert not torch.equal(twin(x), model(x)) and model.fc1.base_layer.packed.any()


# ----------------------------------------------------------------------------- dtypes


def test_computes_in_compute_dtype_and_answers_in_that_of_x():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    layer = NF4Linear(linear, compute_dtype=torch.bfloat16)
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = layer(x)
    weight, bias = layer.dequantize().bfloat16(), linear.bias.bfloat16()
    assert y.dtype == torch.float32
    assert torch.equal(y, nn.functional.linear(x.bfloat16(), weight, bias).float())
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    expected = torch.ones(2, 3, 48, dtype=torch.bfloat16) @ weight
    assert torch.equal(x.grad, expected.float())


def test_a_bfloat16_model_has_float32_adapters():
    model = apply_qlora(Net().bfloat16(), "all-linear", 4, 8)
    random_adapter(model)
    x = torch.randn(3, 30, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in lora_parameters(model))


def test_autocast():
    model = random_adapter(apply_qlora(Net(), "all-linear", 4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(3, 30, requires_grad=True)).square().sum()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in lora_parameters(model))


def test_activation_checkpointing():
    """It runs each forward twice, and lets backward read what was saved once."""
    gradients = []
    for use_reentrant in (None, False, True):
        qlora, _ = pair()
        x = torch.randn(3, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if use_reentrant is None:
            y = qlora(x)
        else:
            y = torch.utils.checkpoint.checkpoint(qlora, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in lora_parameters(qlora))])
    for plain, once, again in zip(*gradients, strict=True):
        assert torch.equal(plain, once) and torch.equal(plain, again)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_bytes_held_as_other_numbers_are_the_same_bytes(storage, double_quant):
    linear = nn.Linear(7, 9)  # 63 codes, 32 bytes; one block, so that absmax and mean need filling up
    layer = NF4Linear(linear, double_quant=double_quant)
    disguised = NF4Linear(linear, double_quant=double_quant, quant_storage=storage)
    for name, tensor in layer.quantized().tensors().items():
        assert getattr(disguised, name).dtype == storage
        assert torch.equal(disguised.quantized().tensors()[name], tensor)
    x, results = torch.randn(3, 7), []
    for which in (layer, disguised):
        given = x.clone().requires_grad_()
        y = which(given)
        y.square().sum().backward()
        results.append((y, given.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_bytes_that_were_cast_to_a_smaller_float_are_refused():
    layer = NF4Linear(nn.Linear(64, 64), quant_storage=torch.float32).to(torch.bfloat16)
    with pytest.raises(
        RuntimeError, match="1024 bytes of a 4-bit layer have arrived as torch.bfloat16, and it has 2048"
    ):
        layer(torch.randn(2, 64))


def test_the_storage_stays_through_merging_and_stands_in_the_text():
    layer = random_adapter(QLoRALinear(nn.Linear(64, 64), 2, 4, quant_storage=torch.bfloat16))
    merged = merge_qlora(layer)
    assert merged.packed.dtype == torch.bfloat16 and "quant_storage=torch.bfloat16" in repr(merged)


# ----------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_into_plain_layers_it_computes_the_same(dtype):
    qlora, lora = pair()
    x = torch.randn(4, 30)
    merged = merge_qlora(copy.deepcopy(qlora), dtype)
    merge_lora(lora)
    for name, layer in lora_layers(lora):
        plain = merged.get_submodule(name)
        assert type(plain) is nn.Linear and plain.weight.dtype == dtype
        torch.testing.assert_close(plain.weight, layer.base_layer.weight.to(dtype), atol=1e-6, rtol=0.01)
        assert (plain.bias is None) == (layer.base_layer.bias is None)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(merged(x.to(dtype)).float(), qlora(x), atol=tolerance, rtol=tolerance)


def test_merged_into_four_bits_it_is_quantised_again_and_worse():
    qlora, lora = pair()
    merged = merge_qlora(copy.deepcopy(qlora))
    merge_lora(lora)
    for name, layer in lora_layers(lora):
        assert torch.equal(
            merged.get_submodule(name).packed,
            quantize_nf4(layer.base_layer.weight).packed,
        )
    assert not lora_parameters_left(merged)
    x = torch.randn(50, 30)
    plain = merge_qlora(copy.deepcopy(qlora), torch.float32)
    assert (merged(x) - qlora(x)).abs().mean() > 100 * (plain(x) - qlora(x)).abs().mean()


def lora_parameters_left(model):
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def test_a_lone_layer_is_returned_merged():
    layer = random_adapter(QLoRALinear(nn.Linear(8, 6), 2, 4).eval())
    x = torch.randn(3, 8)
    plain = merge_qlora(layer, torch.float32)
    torch.testing.assert_close(plain(x), layer(x))
    assert not plain.training and isinstance(merge_qlora(layer), NF4Linear)


def test_merging_in_place_says_what_to_call_instead():
    model = apply_qlora(Net(), "all-linear", 4, 8)
    with pytest.raises(AttributeError, match="merge_qlora"):
        merge_lora(model)
    with pytest.raises(RuntimeError, match="merge_qlora"):
        model.fc1.merge()
    with pytest.raises(ValueError, match=r"fc1, .* not quantised: use merge_lora"):
        merge_qlora(apply_lora(Net(), "all-linear", 4, 8))


# ----------------------------------------------------------------------------- adapters and their files


def test_several_adapters_take_turns_on_one_base():
    model, x = random_adapter(apply_qlora(Net(), "all-linear", 4, 8)), torch.randn(2, 30)
    first, y_first = adapter_state_dict(model), model(x)
    random_adapter(model)
    second, y_second = adapter_state_dict(model), model(x)
    load_adapter_state_dict(model, first)
    assert torch.equal(model(x), y_first)
    load_adapter_state_dict(model, second)
    assert torch.equal(model(x), y_second) and not torch.equal(y_first, y_second)


def test_an_adapter_goes_into_peft_s_files_and_back(tmp_path):
    import peft

    qlora, lora = pair()
    save_peft_adapter(qlora, tmp_path, base_model_name_or_path=None)
    settings, tensors = read_adapter(tmp_path)
    torch.manual_seed(0)
    again = apply_qlora(Net(), **settings)  # the same base, quantised once more
    load_adapter_state_dict(again, tensors)
    x = torch.randn(2, 30)
    assert torch.equal(again(x), qlora(x))
    for layer in (base := Net()).children():
        layer.weight.data.zero_()
    for name, layer in lora_layers(lora):
        base.get_submodule(name).load_state_dict(layer.base_layer.state_dict())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(x), qlora(x), atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------- peft and bitsandbytes


def test_losses_are_those_of_peft_and_bitsandbytes():
    import bitsandbytes
    import peft

    base = small_llama()
    theirs = copy.deepcopy(base)
    for name in [
        name for name, module in base.named_modules() if type(module) is nn.Linear and name != "lm_head"
    ]:
        linear = base.get_submodule(name)
        layer = bitsandbytes.nn.Linear4bit(
            *(linear.in_features, linear.out_features, False),
            compute_dtype=torch.float32,
            quant_type="nf4",
            compress_statistics=True,
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        theirs.set_submodule(name, layer.to("cpu"))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(theirs, config)
    ours = apply_qlora(base, "all-linear", 4, 8)
    paths = [name for name, _ in lora_layers(ours)]
    assert paths == [
        name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")
    ]
    for name, layer in lora_layers(ours):
        there = theirs.base_model.model.get_submodule(name)
        there.lora_A["default"].weight.data.copy_(layer.lora_A.weight)
        packed = there.base_layer.weight
        assert torch.equal(packed.view(-1), layer.base_layer.packed)
    ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (ours, theirs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:6] == pytest.approx(losses[6:], abs=1e-4) and losses[5] < losses[0] - 0.1


# ----------------------------------------------------------------------------- which layers, and what is refused


def test_all_linear_leaves_the_output_layer_out():
    model = apply_qlora(small_llama(), "all-linear", 4, 8)
    assert type(model.lm_head) is nn.Linear and len(lora_layers(model)) == 14
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{letter}.weight" for name, _ in lora_layers(model) for letter in "AB"
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generate(torch.zeros(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False).shape == (
        1,
        5,
    )


def test_a_model_in_eval_mode_stays_in_it():
    model = apply_qlora(Net().eval(), "all-linear", 2, 4, lora_dropout=0.5, use_rslora=True)
    assert not any(module.training for module in model.modules())
    assert model.fc1.scaling == 4 / 2**0.5


@pytest.mark.parametrize(
    "target_modules, settings, complaint",
    [
        (["fc3"], {}, "'fc3' matches no module"),
        ("all-linear", {"r": 0}, "r must be a whole number"),
        ("all-linear", {"lora_alpha": 0}, "lora_alpha must be above 0"),
        ("all-linear", {"lora_dropout": 1.0}, "lora_dropout must be at least 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_changed(target_modules, settings, complaint):
    model = Net()
    with pytest.raises(ValueError, match=complaint):
        apply_qlora(model, target_modules, **{"r": 4, "lora_alpha": 8, **settings})
    assert all(type(layer) is nn.Linear for layer in model.children())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="holds LoRA layers already"):
        apply_qlora(apply_qlora(Net(), ["fc1"], 4, 8), ["fc2"], 4, 8)
    with pytest.raises(TypeError, match="nn.Linear, got NF4Linear"):
        QLoRALinear(NF4Linear(nn.Linear(3, 3)), 1, 1)
    with pytest.raises(TypeError, match="nn.Linear, got ReLU"):
        NF4Linear(nn.ReLU())
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        apply_qlora(small_llama(), ["lm_head"], 4, 8)
    broken = Net()
    broken.fc2.weight.data[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"fc2: .* NaN or infinite, the first at index 151"):
        apply_qlora(broken, "all-linear", 4, 8)
