"""LoRA by hand beside PEFT's, and beside the arithmetic written out."""

import copy
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workshop_utils.lora import (
    LoRALinear,
    adapter_state_dict,
    apply_lora,
    load_adapter_state_dict,
    lora_layers,
    lora_parameters,
    merge_lora,
    subspace_similarity,
    unmerge_lora,
)
from workshop_utils.memory import measure_memory
from workshop_utils.models import MLP, SmallViT
from workshop_utils.peft_format import target_module_names

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)
        self.up_fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.up_fc(self.fc(self.norm(x)).tanh())


class Net(nn.Module):
    """Modules whose names are ends of each other's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.fc = nn.Linear(6, 5)
        self.fc_tail = nn.Sequential(nn.ReLU(), nn.Linear(5, 4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.fc_tail(self.fc(x))


def pair(target_modules, dtype=torch.float64, **settings):
    """(ours, PEFT's): the same base, the same A, the same B, which is not zero."""
    torch.manual_seed(0)
    base = Net().to(dtype)
    config = peft.LoraConfig(target_modules=target_modules, **settings)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    ours = apply_lora(base, target_modules, **settings)
    for name, layer in lora_layers(ours):
        nn.init.normal_(layer.lora_B.weight, std=0.3)
        there = theirs.base_model.model.get_submodule(name)
        there.lora_A["default"].weight.data.copy_(layer.lora_A.weight)
        there.lora_B["default"].weight.data.copy_(layer.lora_B.weight)
    return ours, theirs


def random_adapter(model):
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def written_out(layer: LoRALinear, x, scaling):
    """The formula of the paper, with no module."""
    W, A, B = layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight
    return x @ W.T + layer.base_layer.bias + scaling * (x @ A.T @ B.T)


def their_names(name):
    return name.removeprefix("base_model.model.").replace(".default", "")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("use_rslora, scaling", [(False, 12 / 4), (True, 12 / 2)])
def test_layer_is_the_formula(dtype, tolerance, use_rslora, scaling, device):
    torch.manual_seed(1)
    base = nn.Linear(7, 5, device=device, dtype=dtype)
    layer = LoRALinear(base, 4, 12, use_rslora=use_rslora)
    x = torch.randn(2, 3, 7, device=device, dtype=dtype)
    assert torch.equal(layer(x), base(x))  # B is zero
    random_adapter(layer)
    assert layer.scaling == scaling
    assert all(p.dtype == dtype and p.device == base.weight.device for p in lora_parameters(layer))
    torch.testing.assert_close(layer(x), written_out(layer, x, scaling), atol=tolerance, rtol=tolerance)


def test_first_values_are_loralib_s():
    """kaiming_uniform(a = sqrt 5) is uniform within 1 / sqrt(in)."""
    layer = LoRALinear(nn.Linear(400, 30), 50, 1)
    bound = 400**-0.5
    assert 0.99 * bound < layer.lora_A.weight.abs().max() <= bound
    assert layer.lora_A.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not layer.lora_B.weight.any()


def test_a_model_in_eval_mode_stays_in_it():
    model = apply_lora(Net().eval(), ["fc"], 2, 4, lora_dropout=0.5)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_gradients_and_merged_weights_are_peft_s(use_rslora):
    ours, theirs = pair(["fc", "fc_tail.1"], r=3, lora_alpha=5, use_rslora=use_rslora)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = {their_names(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-12, rtol=0)
    merge_lora(ours)
    merged = theirs.merge_and_unload()
    for name, layer in lora_layers(ours):
        torch.testing.assert_close(
            layer.base_layer.weight, merged.get_submodule(name).weight, atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_training_gives_peft_s_losses(optimizer_class, lora_dropout):
    ours, theirs = pair("all-linear", r=2, lora_alpha=4, lora_dropout=lora_dropout)
    x, labels = torch.randn(16, 6, dtype=torch.float64), torch.randint(4, (16,))
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(5)  # the same dropout masks
        model.train()
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    assert losses[0][-1] < losses[0][0] - 0.01


@pytest.mark.parametrize(
    "target_modules",
    [
        ["fc"],
        ["layers.1.fc"],
        ["fc_tail.1", "up_fc"],
        ["layers.0.up_fc", "fc"],
        r"layers\.\d\.(up_)?fc",
        "fc",
        "all-linear",
        "ALL-LINEAR",
    ],
)
def test_targets_and_trainable_parameters_are_peft_s(target_modules):
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=target_modules, r=2))
    ours = apply_lora(Net(), target_modules, 2, 8)
    trainable = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trainable == {their_names(name) for name, p in theirs.named_parameters() if p.requires_grad}
    assert {p for p in lora_parameters(ours)} == {p for p in ours.parameters() if p.requires_grad}


def test_counts_of_the_mlp():
    model = apply_lora(MLP(), "all-linear", 1, 1)
    by_layer = {name: sum(p.numel() for p in lora_parameters(layer)) for name, layer in lora_layers(model)}
    assert by_layer == {"fc1": 984, "fc2": 400, "fc3": 210}
    model(torch.rand(3, 784)).sum().backward()
    assert measure_memory(model).gradients_bytes == 1_594 * 4


def test_multiply_adds_of_a_step():
    tokens, n, r = 8, 64, 4
    layer, x = LoRALinear(nn.Linear(n, n), r, r), torch.randn(tokens, n, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * tokens * (2 * n * n + 6 * n * r)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: apply_lora(Net(), ["fc", "fc9"], 2, 8),
            r"'fc9' matches no module.*layers\.0\.fc,.*fc_tail\.1",
        ),
        (lambda: apply_lora(Net(), ["norm"], 2, 8), r"'layers\..\.norm' is a LayerNorm.*layers\.0\.fc"),
        (lambda: apply_lora(Net(), [], 2, 8), r"matches no module"),
        (lambda: apply_lora(nn.ReLU(), "all-linear", 2, 8), r"'all-linear' matches no module.*ReLU: none"),
        (lambda: apply_lora(Net(), "(fc", 2, 8), r"'\(fc' is no regular expression"),
        (
            lambda: apply_lora(apply_lora(Net(), ["fc"], 2, 8), ["fc_tail.1"], 2, 8),
            r"holds LoRA layers already: .*fc",
        ),
        (lambda: apply_lora(Net(), ["fc"], 0, 8), r"r must be .* got 0"),
        (lambda: apply_lora(Net(), ["fc"], 2.0, 8), r"r must be a whole number"),
        (lambda: apply_lora(Net(), ["fc"], 2, 0), r"lora_alpha must be above 0"),
        (lambda: LoRALinear(nn.Linear(2, 2), 2, float("nan")), r"lora_alpha must be above 0, got nan"),
        (lambda: apply_lora(Net(), ["fc"], 2, 8, lora_dropout=1.0), r"lora_dropout must be"),
        (lambda: apply_lora(SmallViT(1), ["out_proj"], 2, 8), r"output of torch's MultiheadAttention"),
        (lambda: merge_lora(Net()), r"Net holds no LoRA layers"),
        (lambda: adapter_state_dict(Net()), r"Net holds no LoRA layers"),
    ],
)
def test_refusals_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_layer_refuses_what_is_not_linear():
    with pytest.raises(TypeError, match="must be an nn.Linear, got LoRALinear"):
        LoRALinear(LoRALinear(nn.Linear(2, 2), 1, 1), 1, 1)


def test_a_refusal_changes_nothing():
    model = Net()
    with pytest.raises(ValueError):
        apply_lora(model, ["fc", "norm"], 2, 8)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_one_module_in_two_places_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    with pytest.raises(ValueError, match="'0' stands in 2 places"):
        apply_lora(model, ["0"], 1, 1)


def test_all_linear_leaves_out_attention_s_own_output():
    assert not [name for name in target_module_names(SmallViT(1), "all-linear") if "out_proj" in name]


def test_merge_keeps_outputs_and_unmerge_weights():
    model = random_adapter(apply_lora(MLP(), "all-linear", 4, 8))
    x = torch.rand(16, 784)
    with torch.no_grad():
        before, weights = model(x), [layer.base_layer.weight.clone() for _, layer in lora_layers(model)]
        merge_lora(model)
        assert not torch.equal(model.fc1.base_layer.weight, weights[0])
        torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)
        for parameter in lora_parameters(model):
            parameter.requires_grad_(False)
        unmerge_lora(model)
        torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)
    for weight, (_, layer) in zip(weights, lora_layers(model)):
        torch.testing.assert_close(layer.base_layer.weight, weight, atol=1e-6, rtol=0)


def test_a_merged_layer_costs_what_its_base_costs():
    layer, x = random_adapter(LoRALinear(nn.Linear(64, 64), 4, 8)), torch.randn(8, 64)
    layer.merge()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 8 * 64 * 64


@pytest.mark.parametrize("keep_copy", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.2)])
def test_drift_over_100_cycles(dtype, bound, keep_copy):
    """One adapter: what the first cycle left stays. Two that take turns: it adds up. From a copy: nothing."""
    torch.manual_seed(2)
    layer = random_adapter(LoRALinear(nn.Linear(50, 40, dtype=dtype), 4, 8))
    first, second = (adapter_state_dict(random_adapter(layer)) for _ in range(2))
    weight = layer.base_layer.weight.clone()
    after = {}
    for name, states in {"one": [first], "two": [first, second]}.items():
        layer.base_layer.weight.copy_(weight)
        after[name] = []
        for cycle in range(100):
            load_adapter_state_dict(layer, states[cycle % len(states)])
            layer.merge(keep_copy)
            layer.unmerge()
            after[name].append((layer.base_layer.weight - weight).abs().max().item())
    if keep_copy:
        assert not any(after["one"] + after["two"])
    else:
        assert 0 < after["one"][0] == after["one"][-1] < bound
        assert 5 * after["two"][1] < after["two"][-1] < bound


def test_bytes_of_the_kept_copy_are_seen():
    model = random_adapter(apply_lora(MLP(), ["fc1"], 2, 4))
    keys = model.state_dict().keys()
    merge_lora(model, keep_copy=True)
    assert measure_memory(model).buffers_bytes == 784 * 200 * 4
    assert model.state_dict().keys() == keys
    unmerge_lora(model)
    assert measure_memory(model).buffers_bytes == 0


def test_bfloat16_is_merged_with_one_rounding():
    torch.manual_seed(3)
    layer = random_adapter(LoRALinear(nn.Linear(30, 20, dtype=torch.bfloat16), 4, 8))
    weight, A, B = (t.double() for t in (layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    layer.merge()
    assert torch.equal(layer.base_layer.weight, (weight + 2 * B @ A).to(torch.bfloat16))


def test_merging_twice_and_unmerging_nothing_are_refused():
    model = random_adapter(apply_lora(Net(), ["fc"], 2, 4))
    with pytest.raises(RuntimeError, match="not merged"):
        unmerge_lora(model)
    model.fc.merge()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="fc is merged already"):
        merge_lora(model)
    with pytest.raises(RuntimeError, match="merged already|already merged"):
        model.fc.merge()
    with pytest.raises(RuntimeError, match="is not merged"):
        unmerge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_tied_weight_is_not_merged():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    apply_lora(model, ["1"], 2, 4)
    with pytest.raises(RuntimeError, match=r"1\.base_layer\.weight is tied to 0\.weight"):
        merge_lora(model)


def test_adapters_are_switched_on_one_base():
    model, x = apply_lora(Net(), ["fc"], 2, 4), torch.randn(3, 6)
    outputs, adapters = [], []
    for _ in range(2):
        random_adapter(model)
        outputs.append(model(x))
        adapters.append(adapter_state_dict(model))
    for which in (0, 1, 0):
        load_adapter_state_dict(model, adapters[which])
        assert torch.equal(model(x), outputs[which])
    assert not torch.equal(outputs[0], outputs[1])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters[0].keys()


def test_the_adapter_of_a_lone_layer():
    assert list(adapter_state_dict(LoRALinear(nn.Linear(2, 2), 1, 1))) == ["lora_A.weight", "lora_B.weight"]


def test_an_adapter_state_stays_what_it_was():
    model = random_adapter(apply_lora(Net(), ["fc_tail.1"], 2, 4))
    state = adapter_state_dict(model)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    random_adapter(model)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda state: state.pop("fc.lora_A.weight"), r"fc\.lora_A\.weight is missing"),
        (
            lambda state: state.update({"fc7.lora_A.weight": torch.zeros(2)}),
            r"fc7\.lora_A\.weight is too many",
        ),
        (
            lambda state: state.update({"fc.lora_B.weight": torch.zeros(5, 3)}),
            r"fc\.lora_B\.weight is \[5, 3\] in the adapter, the model needs \[5, 2\]",
        ),
    ],
)
def test_another_model_s_adapter_is_refused_by_name(damage, message):
    model = random_adapter(apply_lora(Net(), ["layers.0.fc", "fc_tail.1", "fc"], 2, 4))
    before = adapter_state_dict(model)
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    damage(state)
    with pytest.raises(ValueError, match=message):
        load_adapter_state_dict(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(model).items())


def test_no_switch_while_merged():
    model = random_adapter(apply_lora(Net(), ["fc"], 2, 4))
    state = adapter_state_dict(model)
    merge_lora(model)
    with pytest.raises(RuntimeError, match=r"fc is merged: unmerge_lora\(model\) first"):
        load_adapter_state_dict(model, state)


@pytest.mark.parametrize("i, j", [(1, 1), (2, 5), (4, 3), (4, 8)])
def test_subspace_similarity_is_the_product_of_the_projectors(i, j):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 20)), rng.normal(size=(8, 20))
    projectors = []
    for matrix, count in ((first, i), (second, j)):
        _, vectors = np.linalg.eigh(matrix.T @ matrix)  # ascending
        top = vectors[:, -count:]
        projectors.append(top @ top.T)
    expected = np.trace(projectors[0] @ projectors[1]) / min(i, j)
    assert subspace_similarity(torch.tensor(first), torch.tensor(second), i, j) == pytest.approx(
        expected, abs=1e-10
    )


def test_subspace_similarity_at_its_ends():
    eye = torch.eye(6)
    assert subspace_similarity(eye[:2], eye[:4], 2, 4) == pytest.approx(1)
    assert subspace_similarity(eye[:2], eye[2:5], 2, 3) == pytest.approx(0)
    assert subspace_similarity(eye[:2].bfloat16(), eye[1:3].bfloat16(), 2, 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="i must be 1 to 2, got 3"):
        subspace_similarity(eye[:2], eye[:4], 3, 4)


def test_importing_the_modules_imports_neither_peft_nor_transformers():
    code = (
        "import sys, workshop_utils.lora, workshop_utils.hub; "
        "sys.exit(', '.join({'peft', 'transformers'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
