"""What the checks of notebook 05 are tried on: models, layers of whole numbers, a real step of Adam, PEFT itself.

And what merging (5.4) and the files for PEFT (5.5) are held against.

Shape letters: W is [out, in], A is [r, in], B is [out, r].
"""

import copy
import json
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workshop_utils.checks import Wrong, expect_at_most, expect_close, tensors_for_ranks
from workshop_utils.lora import apply_lora
from workshop_utils.models import MLP


def whole_numbers_linear(n_in, n_out, bias):
    layer = nn.Linear(n_in, n_out, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(tensors_for_ranks(1, (n_out, n_in), seed=1)[0])
        if bias:
            layer.bias.copy_(tensors_for_ranks(1, (n_out,), seed=2)[0])
    return layer


@torch.no_grad()
def set_factors_(A, B, seed=0, scale=1.0):
    A.copy_(scale * tensors_for_ranks(1, A.shape, seed=4 + seed)[0])
    B.copy_(scale * tensors_for_ranks(1, B.shape, seed=6 + seed)[0])


class Marked(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = (
            nn.Linear(layer.in_features, 1, bias=False),
            nn.Linear(1, layer.out_features, bias=False),
        )

    def forward(self, x):
        return self.base_layer(x)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q_proj, self.v_proj = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.v_proj(self.q_proj(self.norm(x)))


def insertion_cases():
    """(case, model, targets, names expected in order)."""
    yield "an MLP, ['fc1', 'fc3']", MLP(hidden=4), ["fc1", "fc3"], ["fc1", "fc3"]
    yield "12 blocks, ['q_proj']", _twelve_blocks(), ["q_proj"], [f"{i}.q_proj" for i in range(12)]
    case = "12 blocks, ['1.v_proj', '3.q_proj']"
    yield case, _twelve_blocks(), ["1.v_proj", "3.q_proj"], ["1.v_proj", "3.q_proj"]
    nested = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    yield "a Sequential in a Sequential, ['2.1']", nested, ["2.1"], ["2.1"]


def _twelve_blocks():
    return nn.Sequential(*[_Block() for _ in range(12)])


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(784, 784, bias=False), nn.Linear(784, 784)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def bill_cases():
    yield "the MLP, all of it", MLP()
    last = MLP().requires_grad_(False)
    last.fc3.requires_grad_(True)
    yield "the MLP, fc3 alone", last
    yield "LoRA on the MLP, r = 1", apply_lora(MLP(), "all-linear", r=1, lora_alpha=1)
    yield "LoRA in float64", apply_lora(MLP().double(), ["fc1"], r=4, lora_alpha=4)
    yield "two layers that share a weight", _Tied()
    yield "everything frozen", MLP().requires_grad_(False)


def measured_bill(model):
    """What a real step of Adam on a copy of the model holds; step counters left out."""
    model = copy.deepcopy(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        return {"trainable": 0, "gradients": 0, "adam": 0}
    optimizer = torch.optim.Adam(trainable)
    model(torch.rand(2, 784, dtype=trainable[0].dtype)).square().sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    return {
        "trainable": sum(p.grad.numel() for p in trainable),
        "gradients": sum(p.grad.nbytes for p in trainable),
        "adam": sum(t.nbytes for t in moments),
    }


def output_with_peft(base, config, tensors):
    """What PEFT computes for ones, from files that it reads."""
    # PEFT imports it, and on some processors it suggests a package that we do not need
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import PeftModel
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Path(folder, "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(
            {key: t.detach().contiguous() for key, t in tensors.items()},
            Path(folder, "adapter_model.safetensors"),
        )
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        return loaded(torch.ones(2, 6)).detach()


# Exercise 5.4


def expect_state(where, layer, merged, parameter):
    if layer.merged is not merged:
        raise Wrong(f"{where}: layer.merged is {layer.merged}, expected {merged}")
    weight = layer.base_layer.weight
    if not weight.is_leaf:
        raise Wrong(f"{where}: base_layer.weight has a graph behind it now: work under torch.no_grad()")
    if weight is not parameter:
        raise Wrong(f"{where}: base_layer.weight is another Parameter, expected the old one changed in place")
    if weight.requires_grad:
        raise Wrong(f"{where}: base_layer.weight requires a gradient, expected it frozen")


def explain_merge(where, change, product, scaling, wanted):
    if is_near(change, wanted * product):
        return
    known = [
        (0.0, "unchanged"),
        (1.0, "changed by B A, not scaled"),
        (-scaling, "changed by minus the update"),
        (2 * scaling, "changed by the update twice"),
        (scaling**2, "changed by B A scaled twice"),
        (scaling, "still changed by the update"),
    ]
    for factor, words in known:
        if is_near(change, factor * product):
            expected = f"W + {scaling:g} B A" if wanted else "W as it was"
            raise Wrong(f"{where}: base_layer.weight is {words}, expected {expected}")


def expect_output(where, layer, x, y, merged):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        expect_close(layer(x), y, name=f"{where}: the output")
    rows, out = y.shape
    if merged:
        budget = 2 * rows * out * x.shape[1]
        expect_at_most(counter.get_total_flops(), budget, name=f"{where}: the forward", unit="FLOPs")


# Exercise 5.5


def expect_tensors(tensors, layers):
    wanted = {}
    for path, layer in layers.items():
        for name, factor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            wanted[f"base_model.model.{path}.{name}.weight"] = factor.weight.detach().clone()
    for key in sorted(wanted.keys() - tensors.keys()):
        raise Wrong(f"tensors has no {key!r}; it has {sorted(map(str, tensors))[:4]}")
    for key in sorted(tensors.keys() - wanted.keys()):
        raise Wrong(f"tensors has {key!r}, which is no part of the adapter: A and B alone are saved")
    for key, value in wanted.items():
        expect_close(tensors[key], value, name=key)


def expect_config(config, names):
    needed = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "base_model_name_or_path": "my-base",
        "bias": "none",
    }
    for key, value in needed.items():
        if config.get(key) != value:
            raise Wrong(f"config[{key!r}] is {config.get(key)!r:.60}, expected {value!r}")
    targets = config.get("target_modules")
    if not isinstance(targets, (list, tuple)) or sorted(targets) != sorted(names):
        raise Wrong(f"config['target_modules'] is {targets!r:.80}, expected {names}")
    try:
        json.dumps(config)
    except TypeError as error:
        raise Wrong(f"config cannot be written as JSON: {error}") from None


# What several checks need


def is_near(got, wanted):
    return torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
