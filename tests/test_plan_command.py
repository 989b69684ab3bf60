"""Model shapes, the plan's arithmetic, the published table and `python -m workshop_utils plan`."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from workshop_utils.__main__ import main
from workshop_utils.memory import plan_memory, zero_bytes
from workshop_utils.memory_plan import KINDS, RESERVE_BYTES
from workshop_utils.model_specs import ModelSpec
from workshop_utils.network import Link
from workshop_utils.published_memory import predicted_against_published

GIB = 2**30


# ----------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "count"),
    [  # as the models' cards and transformers' num_parameters() give them
        ("smollm2", 134_515_008),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("llama-2-7b", 6_738_415_616),
        ("llama-1-65b", 65_285_660_672),
        ("vit-b", 86_567_656),
        ("vit-l", 304_326_632),
        ("vit-h", 632_045_800),
    ],
)
def test_parameters(name, count):
    spec = ModelSpec.from_name(name)
    assert spec.num_parameters == count
    assert spec.linear_parameters == spec.num_blocks * spec.block_linear_parameters
    assert spec.fixed_length == {"vit-b": 197, "vit-l": 197, "vit-h": 257}.get(name)
    if spec.is_causal_lm:  # counted by hand: embedding and head V h, two norms a block and a last one
        assert spec.embedding_parameters == spec.num_scores * spec.hidden
        assert spec.head_parameters == (0 if spec.is_tied else spec.num_scores * spec.hidden)
        assert spec.norm_parameters == (2 * spec.num_blocks + 1) * spec.hidden


CONFIG = {
    "model_type": "qwen2",  # biases, and nothing that this package names
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def test_any_config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    spec = ModelSpec.from_config(file)
    blocks = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert spec.parameters_by_kind() == {
        "embedding": 6400,
        "linear": blocks,
        "head": 0,
        "norm": 3 * (64 + 2 * 32 + 2 * 64) + 64,
    }
    assert ModelSpec.from_config(tmp_path).num_parameters == spec.num_parameters
    assert plan_memory(spec, precision="fp32").parameters_bytes == 4 * spec.num_parameters


def test_configs_that_give_no_plan(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match="no file .*config.json: give a model's name"):
        ModelSpec.from_config(file)
    for text in ("{", "[1]", "{}", '{"model_type": "no_such_model"}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="is no transformers config that this version can read"):
            ModelSpec.from_config(file)
    experts = {**CONFIG, "model_type": "mixtral", "num_local_experts": 2}
    for fields, complaint in (
        (experts, "'mixtral' differ, or hold experts"),
        (
            {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2},
            "'gpt2' hold matrices that are no nn.Linear",
        ),
    ):
        file.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=complaint):
            ModelSpec.from_config(file)


# ----------------------------------------------------------------------------- arithmetic


def test_mixed_precision_is_zeros_bill():
    """Notebook 04's 16 bytes, divided; FSDP keeps the master as its shard, so its kinds differ, its sum does not."""
    spec = ModelSpec.from_name("llama-8b")
    for stage, strategy in enumerate(("ddp", "zero1", "zero2", "fsdp")):
        plan = plan_memory(spec, strategy, 8)
        bill = zero_bytes(stage, spec.num_parameters, 8)
        held = {kind: plan.by_kind()[kind] for kind in bill}
        assert sum(held.values()) == pytest.approx(sum(bill.values()))
        if strategy != "fsdp":
            assert held == pytest.approx(bill)


def test_nf4_takes_4_127_bits():
    spec = ModelSpec.from_name("llama-8b")
    rest = 2 * (spec.num_parameters - spec.linear_parameters)
    for double_quant, bits in ((True, 4.127), (False, 4.5)):
        plan = plan_memory(spec, method="qlora", precision="bf16", double_quant=double_quant)
        base = plan.parameters_bytes - rest - 2 * plan.trainable_parameters
        assert 8 * base / spec.linear_parameters == pytest.approx(bits, abs=1e-4)


def test_scales_that_fsdp_does_not_see():
    whole, divided = (
        plan_memory("llama-8b", "fsdp", 4, method="qlora", shard_scales=shard) for shard in (False, True)
    )
    scales = ModelSpec.from_name("llama-8b").linear_parameters * (0.125 + 32 / (64 * 256)) / 8
    assert whole.parameters_bytes - divided.parameters_bytes == pytest.approx(scales * 3 / 4, rel=1e-6)
    offloaded = plan_memory("llama-8b", "fsdp", 4, method="qlora", shard_scales=False, offload=True)
    assert offloaded.parameters_bytes == pytest.approx(scales, rel=1e-6)


def test_offload_moves_the_states_to_the_host():
    plan, offloaded = (
        plan_memory("llama-8b", "fsdp", 2, method="qlora", offload=offload) for offload in (False, True)
    )
    states = plan.parameters_bytes + plan.gradients_bytes + plan.optimizer_bytes
    assert offloaded.host_bytes == pytest.approx(2 * states)
    assert [offloaded.by_kind()[kind] for kind in KINDS[:3]] == [0, 0, 0]
    assert plan.host_bytes == plan.host_traffic_bytes == 0 < offloaded.host_traffic_bytes
    assert offloaded.communication_s > plan.communication_s


def test_traffic_by_hand():
    spec = ModelSpec.from_name("llama-2-7b")
    P, n = spec.num_parameters, 4
    for strategy, precision, elements in (("ddp", "bf16", 2), ("zero1", "bf16", 2), ("zero2", "bf16", 2)):
        plan = plan_memory(spec, strategy, n, precision=precision)
        assert plan.traffic_bytes == pytest.approx(elements * 2 * P * (n - 1) / n)
    root = spec.embedding_parameters + spec.head_parameters + spec.hidden
    fsdp = plan_memory(spec, "fsdp", n, precision="bf16")
    assert fsdp.traffic_bytes == pytest.approx(2 * (3 * P - root) * (n - 1) / n)  # the root is gathered once
    mixed = plan_memory(spec, "fsdp", n)  # gathers in bf16, gradients in float32
    assert mixed.traffic_bytes == pytest.approx((2 * (2 * P - root) + 4 * P) * (n - 1) / n)
    assert plan_memory(spec, "ddp", n, method="lora").traffic_bytes < 0.02 * fsdp.traffic_bytes
    assert plan_memory(spec, "single").traffic_bytes == 0


def test_seconds_by_hand():
    spec, link = ModelSpec.from_name("llama-2-7b"), Link(1e-3, 1e9)
    plan = plan_memory(spec, "ddp", 2, method="full", precision="bf16", link=link, flops_per_s=1e12)
    assert plan.communication_s == pytest.approx(2 * (1e-3 + spec.num_parameters / 1e9))
    assert plan.step_s == max(plan.compute_s, plan.communication_s)
    assert plan.serial_step_s == plan.compute_s + plan.communication_s
    again = plan_memory(spec, "ddp", 2, precision="bf16", link=link, flops_per_s=2e12)
    assert again.compute_s == plan.compute_s / 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_operations_as_torch_counts_them(method, checkpointing):
    """torch's own counter, with attention as matrix products over all pairs: the plan has half of them. Of the first of
    6 blocks LoRA needs no gradient by its input."""
    from torch.utils.checkpoint import set_checkpoint_early_stop
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from workshop_utils.lora import apply_lora

    shapes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "vocab_size": 200}
    config = LlamaConfig(**shapes, num_attention_heads=4, num_key_value_heads=4, attn_implementation="eager")
    model = LlamaForCausalLM(config).train()
    spec = ModelSpec.from_model(model, "small")
    if method == "lora":
        apply_lora(model, "all-linear", 8, 16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(0, 200, (2, 64))
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    plan = plan_memory(
        spec, method=method, batch_size=2, length=64, checkpointing=checkpointing, flops_per_s=1.0
    )
    forward_pairs = 4 * 64 * 128 * 6 * (2 * 64) / 2  # what a causal mask hides
    passes = 3 + checkpointing
    assert plan.compute_s + passes * forward_pairs == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_what_fits():
    plan = plan_memory("llama-8b", "fsdp", 2, method="qlora", checkpointing=True)
    assert plan.total_bytes == sum(plan.by_kind().values())
    assert plan.fits(plan.total_bytes + RESERVE_BYTES)
    assert not plan.fits(plan.total_bytes + RESERVE_BYTES - 1)
    assert plan.fits(plan.total_bytes, reserve_bytes=0)
    assert plan.smallest_card_gib() == 8
    assert plan_memory("llama-70b").smallest_card_gib() is None


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"model_spec": "llama-9b"},
            "unknown model 'llama-9b': choose one of smollm2, .* path of a config.json",
        ),
        ({"strategy": "zero3"}, "unknown strategy 'zero3': choose one of single, ddp, zero1, zero2, fsdp"),
        ({"method": "dora"}, "unknown method 'dora': choose one of full, lora, qlora"),
        ({"precision": "fp16"}, "unknown precision 'fp16': choose one of fp32, bf16-mixed, bf16"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd': choose one of adamw, adamw-32bit, adamw-8bit"),
        ({"world_size": 0, "strategy": "ddp"}, "world_size must be a whole number, 1 or more, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, 1 or more, got 1.5"),
        ({"length": True}, "length must be a whole number, 1 or more, got True"),
        ({"r": -1}, "r must be a whole number"),
        ({"world_size": 2}, "strategy single has 1 GPU, got 2: choose one of ddp, zero1, zero2, fsdp"),
        ({"strategy": "ddp", "world_size": 2, "offload": True}, "offload is FSDP's: choose strategy fsdp"),
        ({"model_spec": "vit-b", "length": 512}, "vit-b has 197 tokens an image: leave out length, got 512"),
        (
            {"method": "lora", "target_modules": ["qproj"]},
            "target_modules qproj: choose all-linear, or some of q_proj",
        ),
        ({"method": "lora", "target_modules": []}, "target_modules are empty"),
    ],
)
def test_settings_that_do_not_go_together(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        plan_memory(**{"model_spec": "smollm2"} | settings)


# ----------------------------------------------------------------------------- published figures


def test_beside_published_figures():
    rows = {row.name: row for row in predicted_against_published()}
    published = [row.published for row in rows.values()]
    for figure in (6.9, 11.3, 24.7, 45.0, 14.92, 4.98, 10.24, 8.28, 19.6, 35.6, 107, 120, 31.4, 16.6, 1.9):
        assert any(figure == pytest.approx(value) for value in published), figure
    for row in rows.values():
        assert row.why.endswith(".")
        assert row.source
        assert row.reliability in ("primary", "reported")
        assert row.error == pytest.approx(row.predicted / row.published - 1)
        if abs(row.error) > 0.15:  # a figure of another quantity, and the sentence says which
            assert any(word in row.why for word in ("reserved", "loading", "process")), row
            assert row.error < 0, row  # what is not predicted can only be missing
    close = [row for row in rows.values() if "in use" in row.name or row.source.startswith("Rajbhandari")]
    assert len(close) == 6
    assert all(abs(row.error) < 0.02 for row in close)
    assert all(abs(row.error) < 0.15 for row in rows.values() if row.source.startswith("Dettmers"))


# ----------------------------------------------------------------------------- the command


def run(capsys, *arguments):
    status = main(["plan", *arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_one_plan_in_full(capsys):
    status, out, _ = run(
        capsys, "llama-8b", "--method", "qlora", "--strategy", "fsdp", "--gpus", "2", "--checkpointing"
    )
    plan = plan_memory("llama-8b", "fsdp", 2, method="qlora", checkpointing=True)
    assert status == 0
    for kind, size in plan.by_kind().items():
        assert f"{kind:<14}{size / GIB:>9.2f}" in out
    assert f"{plan.traffic_bytes / 1e9:.2f} GB sent by each GPU" in out
    assert "8 GB yes" in out
    assert "--offload" in out
    assert max(map(len, out.splitlines())) <= 120


def test_side_by_side(capsys):
    status, out, _ = run(capsys, "llama-8b", "--gpus", "2")
    assert status == 0
    for method in ("full", "lora", "qlora"):
        for strategy in ("ddp", "zero1", "zero2", "fsdp"):
            assert f"\n{method}, {strategy} " in out
    assert "single" not in out
    _, out, _ = run(capsys, "smollm2", "--method", "lora")
    assert "on each GPU" in out  # one plan is left: in full
    _, out, _ = run(capsys, "llama-70b", "--gpus", "2", "--offload")
    assert "host" in out
    assert "qlora, fsdp" in out
    assert "ddp" not in out


def test_a_config_file_and_a_figure(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    picture = tmp_path / "plan.png"
    status, out, _ = run(capsys, str(tmp_path / "config.json"), "--figure", str(picture))
    assert status == 0
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["llama-9b"], "unknown model 'llama-9b': choose one of smollm2"),
        (["smollm2", "--method", "dora"], "unknown method 'dora': choose one of full, lora, qlora"),
        (["smollm2", "--link", "wifi"], "unknown link 'wifi': choose one of 100 Mb/s Ethernet"),
        (["smollm2", "--gpu", "B9000"], "unknown gpu 'B9000': choose one of T4"),
        (["smollm2", "--utilisation", "40"], "utilisation must be above 0 and at most 1, got 40"),
        (["smollm2", "--targets", "wq,wk"], "target_modules wq, wk: choose all-linear"),
        (["nowhere/config.json"], "no file nowhere/config.json"),
        (["smollm2", "--figure", "/nowhere/plan.png"], "No such file or directory"),
    ],
)
def test_bad_input_gets_one_line(capsys, arguments, complaint):
    if "wq,wk" in arguments:
        arguments = [*arguments, "--method", "lora"]
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert complaint in err
    assert err.startswith("plan: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["smollm2", "--gpus", "two"], ["smollm2", "--fast"]])
def test_bad_options_get_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("plan: ")
    assert err.count("\n") == 1


def test_alone_it_teaches(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    for word in ("llama-8b --gpus 2", "qlora", "NVLink 3", "--published", "config.json"):
        assert word in out
    status, out, _ = run(capsys, "--published")
    assert status == 0
    assert "QLoRA 7B, 1 GPU" in out
    assert "(reported)" in out


def test_doctor_needs_no_torch_for_the_plan():
    """The command's module is imported when it is asked for."""
    code = "import sys, workshop_utils.__main__; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "transformers" not in done.stdout


def test_states_without_a_model():
    """Any spec will do: ZeRO's 7.5 billion parameters."""
    spec = replace(ModelSpec.from_name("llama-2-7b"), linear_parameters=0, norm_parameters=0)
    assert plan_memory(spec, precision="fp32").parameters_bytes == 4 * 2 * 32000 * 4096


def test_what_fsdp_holds_whole_by_hand():
    """Llama 2 7B, LoRA in bf16: embedding, head and last norm, two blocks, a block's gradient twice (it and its copy)."""
    spec = ModelSpec.from_name("llama-2-7b")
    plan = plan_memory(spec, "fsdp", 2, method="lora", precision="bf16", length=8, checkpointing=True)
    root = 2 * (2 * 32000 * 4096 + 4096)
    adapters = 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    block = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 + adapters)
    assert plan.peak == "backward"
    assert plan.temporary_bytes == root + 2 * block + 2 * 2 * adapters
