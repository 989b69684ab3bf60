"""Adapters in PEFT's files: ours read by PEFT, PEFT's read by us, and what neither should read."""

import copy
import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from workshop_utils import lora, peft_format
from workshop_utils.lora import (
    apply_lora,
    load_peft_adapter,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_peft_adapter,
)
from workshop_utils.models import MLP
from workshop_utils.peft_format import CONFIG_FILE, WEIGHTS_FILE


def mlp():
    torch.manual_seed(0)
    return MLP(hidden=20), (torch.rand(5, 784),)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
    )
    return LlamaForCausalLM(config), (torch.randint(60, (2, 7)),)


MODELS = {
    "MLP": (mlp, ["fc1", "fc3"]),
    "Llama": (llama, "all-linear"),
    "Llama, two": (llama, ["q_proj", "v_proj"]),
}


def output(model, inputs):
    with torch.no_grad():
        out = model.eval()(*inputs)
    return getattr(out, "logits", out)


def random_adapter(parameters):
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter of the MLP as PEFT saves it."""
    model = peft.get_peft_model(
        mlp()[0], peft.LoraConfig(target_modules=["fc1", "fc3"], r=2, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_loads_what_we_save(kind, use_rslora, tmp_path):
    make, target_modules = MODELS[kind]
    base, inputs = make()
    without = output(base, inputs)
    ours = apply_lora(copy.deepcopy(base), target_modules, 4, 6, use_rslora=use_rslora)
    random_adapter(lora_parameters(ours))
    save_peft_adapter(ours, tmp_path, base_model_name_or_path=None)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(output(theirs, inputs), output(ours, inputs), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(output(ours, inputs), without, atol=1e-3)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_we_load_what_peft_saves(kind, use_rslora, tmp_path):
    make, target_modules = MODELS[kind]
    base, inputs = make()
    config = peft.LoraConfig(
        target_modules=target_modules,
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora=use_rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM" if "Llama" in kind else None,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    ours = load_peft_adapter(base, tmp_path)
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=1e-6, rtol=1e-6)
    _, layer = lora_layers(ours)[0]
    assert (layer.r, layer.lora_alpha, layer.use_rslora, layer.lora_dropout.p) == (4, 6, use_rslora, 0.1)


def test_the_files_are_peft_s(folder, tmp_path):
    """Read by PEFT and saved again by us: the same tensors, and no value that PEFT would not have written."""
    ours = load_peft_adapter(mlp()[0], folder)
    save_peft_adapter(ours, tmp_path / "again", base_model_name_or_path=None)
    before, after = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert "base_model.model.fc1.lora_A.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs, written = (json.loads((path / CONFIG_FILE).read_text()) for path in (folder, tmp_path / "again"))
    theirs["target_modules"] = sorted(theirs["target_modules"])
    theirs["init_lora_weights"] = True
    assert written == {name: theirs[name] for name in written}


def test_our_settings_are_the_ones_peft_reads(tmp_path):
    model = apply_lora(mlp()[0], ["fc2"], 3, 7.5, lora_dropout=0.25, use_rslora=True)
    save_peft_adapter(model, tmp_path, base_model_name_or_path="someone/mlp")
    config = peft.PeftConfig.from_pretrained(tmp_path)
    expected = peft.LoraConfig(
        r=3, lora_alpha=7.5, lora_dropout=0.25, use_rslora=True, target_modules=["fc2"]
    )
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "bias", "peft_type"):
        assert getattr(config, name) == getattr(expected, name), name
    assert config.base_model_name_or_path == "someone/mlp"


def test_settings_that_are_not_there_have_peft_s_defaults(tmp_path):
    base, inputs = mlp()
    config = peft.LoraConfig(target_modules=["fc2"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA", "target_modules": ["fc2"]}')
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ours = load_peft_adapter(base, tmp_path)
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=1e-6, rtol=1e-6)


def test_only_the_modules_that_were_changed_are_matched_again(tmp_path):
    """'fc' is also the end of 'inner.fc': a list would match both."""

    def make():
        return nn.ModuleDict({"fc": nn.Linear(3, 3), "inner": nn.ModuleDict({"fc": nn.Linear(3, 3)})})

    save_peft_adapter(apply_lora(make(), "fc", 1, 1), tmp_path, base_model_name_or_path=None)
    assert [name for name, _ in lora_layers(load_peft_adapter(make(), tmp_path))] == ["fc"]
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert {name for name, _ in theirs.named_parameters() if "lora_A" in name} == {
        "base_model.model.fc.lora_A.default.weight"
    }


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float64, 1e-12)])
def test_other_dtypes(dtype, tolerance, tmp_path):
    """PEFT keeps the adapter of a bfloat16 base in float32; ours has the base's dtype, so it is rounded here."""
    base, (x,) = mlp()
    base, inputs = base.to(dtype), (x.to(dtype),)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["fc2"], r=2))
    random_adapter(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = load_peft_adapter(base, tmp_path)
    assert all(p.dtype == dtype for p in lora_parameters(ours))
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=tolerance, rtol=tolerance)
    save_peft_adapter(ours, tmp_path, base_model_name_or_path=None)
    again = peft.PeftModel.from_pretrained(mlp()[0].to(dtype), tmp_path)
    torch.testing.assert_close(output(ours, inputs), output(again, inputs), atol=tolerance, rtol=tolerance)


def test_what_is_saved_does_not_depend_on_merging(tmp_path):
    model = apply_lora(mlp()[0], ["fc1"], 2, 4)
    random_adapter(lora_parameters(model))
    save_peft_adapter(model, tmp_path / "a", base_model_name_or_path=None)
    merge_lora(model)
    save_peft_adapter(model, tmp_path / "b", base_model_name_or_path=None)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


UNSUPPORTED = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["fc3"],
    "rank_pattern": {"fc1": 4},
    "alpha_pattern": {"fc1": 4},
    "fan_in_fan_out": True,
    "lora_bias": True,
    "layers_to_transform": 0,
    "exclude_modules": ["fc2"],
    "layer_replication": [[0, 2]],
    "init_lora_weights": "pissa",
    "target_parameters": ["fc1.weight"],
    "trainable_token_indices": [1],
    "use_qalora": True,
    "a_setting_of_next_year": "on",
}


@pytest.mark.parametrize("setting", UNSUPPORTED)
def test_unsupported_settings_are_refused_by_name(setting, folder):
    edit_config(folder, **{setting: UNSUPPORTED[setting]})
    refused(folder, ValueError, rf"{setting} = .* is not supported here\. Load this adapter with peft")


def refused(folder, kind, message):
    """One clear line, and the model is what it was."""
    model = mlp()[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message) as caught:
        load_peft_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "damage, kind, message",
    [
        (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, r"no adapter_config\.json in"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), FileNotFoundError, r"no adapter_model\.safetensors in"),
        (
            lambda f: (f / WEIGHTS_FILE).rename(f / "adapter_model.bin"),
            FileNotFoundError,
            r"adapter_model\.bin is a pickle",
        ),
        (lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "LO'), ValueError, r"config\.json is damaged"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), ValueError, r"does not describe LoRA"),
        (lambda f: edit_config(f, peft_type="LOHA"), ValueError, r"peft_type must be LORA"),
        (lambda f: edit_config(f, target_modules=None), ValueError, r"has no target_modules"),
        (
            lambda f: edit_config(f, target_modules=["fc8"]),
            ValueError,
            r"'fc8' matches no module.*fc1, fc2, fc3",
        ),
        (lambda f: edit_config(f, target_modules=["fc1"]), ValueError, r"fc3\.lora_A\.weight.* is too many"),
        (
            lambda f: edit_config(f, target_modules=["fc1", "fc2", "fc3"]),
            ValueError,
            r"fc2\.lora_A.* is missing",
        ),
        (lambda f: edit_config(f, r=3), ValueError, r"fc1\.lora_A\.weight is \[2, 784\] .* needs \[3, 784\]"),
        (lambda f: edit_config(f, lora_alpha=0), ValueError, r"lora_alpha must be above 0"),
        (
            lambda f: edit_weights(f, lambda t: t.update({"fc1.lora_A.weight": torch.zeros(1)})),
            ValueError,
            r"do not begin with base_model\.model\.: fc1",
        ),
        (
            lambda f: edit_weights(f, lambda t: t.pop("base_model.model.fc1.lora_B.weight")),
            ValueError,
            r"fc1\.lora_B\.weight is missing",
        ),
    ],
)
def test_damage_is_named(damage, kind, message, folder):
    damage(folder)
    refused(folder, kind, message)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_truncated_weights_are_refused(kept, folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:kept])
    refused(folder, ValueError, r"cannot be read, it is damaged or incomplete")


def test_no_second_adapter_on_top(folder):
    model = load_peft_adapter(mlp()[0], folder)
    with pytest.raises(ValueError, match="holds LoRA layers already: fc1, fc3"):
        load_peft_adapter(model, folder)


def test_layers_that_differ_are_not_saved(tmp_path):
    model = apply_lora(mlp()[0], ["fc1"], 2, 4)
    model.fc3 = lora.LoRALinear(model.fc3, 3, 4)
    with pytest.raises(ValueError, match="r is 2 in fc1 and 3 in fc3"):
        save_peft_adapter(model, tmp_path / "x", base_model_name_or_path=None)
    assert os.listdir(tmp_path) == []


def test_a_lone_layer_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="one LoRA layer and nothing around it"):
        save_peft_adapter(lora.LoRALinear(nn.Linear(2, 2), 1, 1), tmp_path, base_model_name_or_path=None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_disk_leaves_the_old_adapter_or_none(existing, tmp_path, monkeypatch):
    model, inputs = mlp()
    base = copy.deepcopy(model)
    apply_lora(model, ["fc1"], 2, 4)
    random_adapter(lora_parameters(model))
    folder = tmp_path / "adapter"
    if existing:
        save_peft_adapter(model, folder, base_model_name_or_path=None)
    before = output(model, inputs)
    random_adapter(lora_parameters(model))

    def half_written(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_format, "save_file", half_written)
    with pytest.raises(OSError, match="No space left"):
        save_peft_adapter(model, folder, base_model_name_or_path=None)
    assert os.listdir(tmp_path) == ["adapter"]
    if existing:
        assert torch.equal(output(load_peft_adapter(base, folder), inputs), before)
    else:
        assert os.listdir(folder) == []


@pytest.mark.parametrize("after", range(3))
def test_an_interrupt_leaves_no_mixture(after, tmp_path, monkeypatch):
    """Saving a second adapter over a first, cut off after `after` of the three steps that touch the first."""
    base, _ = mlp()
    first, second = (apply_lora(copy.deepcopy(base), ["fc1"], 2, 4) for _ in range(2))
    random_adapter([*lora_parameters(first), *lora_parameters(second)])
    save_peft_adapter(first, tmp_path, base_model_name_or_path=None)
    steps = [0]

    def cut_off(step):
        def run(*args, **kwargs):
            if steps[0] == after:
                raise KeyboardInterrupt
            steps[0] += 1
            return step(*args, **kwargs)

        return run

    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, cut_off(getattr(Path, name)))
    with pytest.raises(KeyboardInterrupt):
        save_peft_adapter(second, tmp_path, base_model_name_or_path=None)
    monkeypatch.undo()
    if after == 0:
        found = load_peft_adapter(copy.deepcopy(base), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(lora_parameters(found), lora_parameters(first)))
    else:
        with pytest.raises(FileNotFoundError, match="no adapter_config.json .* saving it was cut off"):
            load_peft_adapter(base, tmp_path)
    save_peft_adapter(second, tmp_path, base_model_name_or_path=None)
    loaded = load_peft_adapter(base, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(loaded), lora_parameters(second)))
