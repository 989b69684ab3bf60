"""`workshop_utils.train --model smollm2`: the same losses on one process and on many, an adapter that goes on, refusals.

A tiny random Llama with a byte tokenizer lies in the cache in SmolLM2's place.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from workshop_utils import language_model, train_tasks
from workshop_utils import train as script
from workshop_utils.language_model import MANIFEST_FILE, sha256_of
from workshop_utils.quantization import quantize_nf4
from workshop_utils.stand_in import tiny_language_model

pytestmark = pytest.mark.timeout(240)
LIMIT_S = 120
QLORA = ("--model", "smollm2", "--lora-r", 4, "--quantize", "nf4", "--batch-size", 5)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder whose cache holds the tiny model, with the settings that make subprocesses use it."""
    folder = tmp_path_factory.mktemp("home")
    model, tokenizer = tiny_language_model(torch.bfloat16)
    paths = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in paths.items():
            patched.setenv(name, value)
        target = language_model.model_folder()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in target.iterdir()
    }
    (target / MANIFEST_FILE).write_text(json.dumps({"files": files}))
    return paths


@pytest.fixture
def tiny_model_cached(home, monkeypatch):
    """This process finds the tiny model too."""
    for name, value in home.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def task(tiny_model_cached):
    return train_tasks.Records(script.parse([str(argument) for argument in QLORA]), torch.device("cpu"))


@pytest.fixture
def one_process(tiny_model_cached, train_here):
    return train_here


@pytest.fixture
def torchrun(home):
    """Run the script under torchrun; returns what it printed."""

    def run(processes, *arguments):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc-per-node={processes}", "-m", "workshop_utils.train"),
                *map(str, arguments),
            ],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env=os.environ | home | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def read(report) -> dict:
    return json.loads(report.read_text())


def in_checkpoint(folder) -> dict:
    return torch.load(max(folder.glob("step_*.pt")), weights_only=True)


# ----------------------------------------------------------------------------- one process and many


@pytest.mark.slow
def test_sharded_nf4_goes_on_where_one_process_stopped_and_back(tmp_path, one_process, torchrun):
    folder = ("--checkpoint-dir", tmp_path / "c")
    one_process("--steps", 4, "--report", tmp_path / "one.json", *QLORA)
    one_process("--steps", 2, "--report", tmp_path / "begun.json", *QLORA, *folder)
    sharded = ("--strategy", "fsdp", "--steps", 4, *QLORA, *folder)
    torchrun(2, "--report", tmp_path / "two.json", *sharded)  # 3 records and 2
    one, begun, two = (read(tmp_path / f"{name}.json") for name in ("one", "begun", "two"))
    assert two["resumed_at"] == 2 and two["world_size"] == 2
    assert begun["losses"] + two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert one["losses"][3] < one["losses"][0]
    content = in_checkpoint(tmp_path / "c")
    assert content["step"] == 4 and adapter_only(content)
    one_process("--steps", 4, "--report", tmp_path / "back.json", *QLORA, *folder)
    assert read(tmp_path / "back.json")["weights_sha256"] == two["weights_sha256"]


@pytest.mark.slow
def test_ddp_trains_as_one_process_with_an_adapter_on_full_weights(tmp_path, one_process, torchrun):
    lora = ("--model", "smollm2", "--lora-r", 4, "--batch-size", 5, "--steps", 3)
    one_process("--report", tmp_path / "one.json", *lora)
    folder = ("--checkpoint-dir", tmp_path / "c")
    one_process(*lora, *folder, "--steps", 1)
    torchrun(2, "--strategy", "ddp", "--report", tmp_path / "two.json", *lora, *folder)
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert two["losses"] == pytest.approx(one["losses"][1:], rel=1e-4)
    if sys.platform == "linux":
        adapter_bytes = 4 * sum(4 * (a + b) for a, b in layer_sizes()) * 2
        assert all(sent < 1.5 * adapter_bytes * 2 for sent in two["bytes_sent"])
    assert adapter_only(in_checkpoint(tmp_path / "c"))
    one_process(*lora, *folder, "--report", tmp_path / "back.json")
    back = read(tmp_path / "back.json")
    assert back["resumed_at"] == 3 and back["weights_sha256"] == two["weights_sha256"]


def adapter_only(content: dict) -> bool:
    names = content["model"].keys()
    return (
        len(names) == 2 * 14
        and all(".lora_" in name and not name.startswith("module.") for name in names)
        and names == content["optimizer"]["state"].keys()
    )


def layer_sizes() -> list[tuple[int, int]]:
    """(in, out) of the linear layers of one of the tiny model's two decoder layers."""
    return [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]


# ----------------------------------------------------------------------------- one process


def test_a_run_in_two_parts_ends_with_the_weights_of_one_in_one_piece(tmp_path, one_process):
    common = (*QLORA, "--checkpoint-every", 2)
    one_process("--steps", 5, "--report", tmp_path / "whole.json", *common)
    one_process("--steps", 3, "--checkpoint-dir", tmp_path / "c", *common)
    _, said = one_process(
        "--steps", 5, "--checkpoint-dir", tmp_path / "c", "--report", tmp_path / "parts.json", *common
    )
    whole, parts = read(tmp_path / "whole.json"), read(tmp_path / "parts.json")
    assert "from 3 on" in said and parts["losses"] == whole["losses"][3:]
    assert parts["weights_sha256"] == whole["weights_sha256"]


def test_the_loss_is_that_of_transformers_on_the_whole_batch(tmp_path, one_process):
    one_process("--model", "smollm2", "--steps", 1, "--batch-size", 5, "--report", tmp_path / "one.json")
    from workshop_utils.records import training_batches

    model, tokenizer = language_model.load_language_model()
    batch = next(training_batches(1, 5, tokenizer, seed=0))
    assert read(tmp_path / "one.json")["losses"] == pytest.approx([model(**batch).loss.item()], rel=1e-5)


@torch.no_grad()
def test_shares_add_up_to_the_batch(task):
    (batch,) = task.batches(1)
    whole, tokens = task.loss_sum(task.model, batch, 0, 1)
    shares = [task.loss_sum(task.model, batch, rank, 3) for rank in range(3)]
    assert sum(float(total) for total, _ in shares) == pytest.approx(float(whole), rel=1e-5)
    assert {count for _, count in shares} == {tokens}


def test_accuracy_counts_answers_that_greedy_decoding_writes(task):
    """A model that knows the answers, but for one token in every fourth record."""
    seen = 0

    def knows(input_ids, attention_mask, use_cache):
        nonlocal seen
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), len(task.tokenizer)).float()
        for row in range(len(input_ids)):
            if seen % 4 == 0:
                last = int(attention_mask[row].sum()) - 1
                logits[row, last - 3] = 0
            seen += 1
        return type("Output", (), {"logits": logits})

    assert [int(number) for number in task.num_right(knows, 0, 1)] == [48, 64]
    seen = 1
    for rank in range(3):
        _, count = task.num_right(knows, rank, 3)
    assert seen == 1 + count  # each rank its own records, all of them once


def test_the_checkpoint_holds_the_adapter_and_its_optimizer_state_only(tmp_path, one_process):
    one_process(*QLORA, "--steps", 1, "--checkpoint-dir", tmp_path)
    content = in_checkpoint(tmp_path)
    numbers = sum(tensor.numel() for tensor in content["model"].values())
    assert numbers == 2 * sum(4 * (a + b) for a, b in layer_sizes())
    assert max(tmp_path.glob("*.pt")).stat().st_size < 3 * 4 * numbers + 100_000


def test_without_lora_all_weights_are_trained_and_saved(tmp_path, one_process):
    status, _ = one_process("--model", "smollm2", "--steps", 2, "--checkpoint-dir", tmp_path)
    assert status == 0 and "model.embed_tokens.weight" in in_checkpoint(tmp_path)["model"]


def test_quantised_layers_hold_what_quantize_nf4_gives(task):
    model, _ = language_model.load_language_model()
    name = "model.layers.1.mlp.down_proj"
    base = task.model.get_submodule(name).base_layer
    assert torch.equal(base.packed, quantize_nf4(model.get_submodule(name).weight).packed)


# ----------------------------------------------------------------------------- what cannot run


@pytest.mark.parametrize(
    "other, named",
    [
        (("--lora-r", 2), "lora_r 4, not 2"),
        (("--quantize", "none"), "quantize nf4, not none"),
        (("--seed", 3), "seed 0, not 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(other, named, tmp_path, one_process):
    arguments = (*QLORA, "--steps", 1, "--checkpoint-dir", tmp_path)
    one_process(*arguments)
    status, said = one_process(*arguments, *other)
    assert status == 2 and named in said and said.strip().count("\n") == 0


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--lora-r", 8), "--lora-r is for --model smollm2"),
        (("--quantize", "nf4"), "--quantize is for --model smollm2"),
        (("--model", "vit", "--lora-r", 8), "--lora-r is for --model smollm2: vit is small"),
        (("--model", "smollm2", "--quantize", "nf4"), "give --lora-r too, for instance --lora-r 8"),
        (("--model", "smollm2", "--lora-r", 0), "0 is below 1"),
        (("--model", "smollm2", "--quantize", "int4"), "invalid choice: 'int4'"),
        (("--model", "smollm2", "--strategy", "fsdp"), "needs torchrun"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, complaint, one_process):
    status, said = one_process(*arguments)
    assert status == 2 and complaint in said.splitlines()[-1] and "Traceback" not in said


def test_a_model_that_is_not_fetched_gets_one_line_with_the_command(one_process, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, said = one_process("--model", "smollm2")
    assert status == 2 and "python -m workshop_utils fetch" in said and said.strip().count("\n") == 0


def test_a_damaged_model_is_refused_in_one_line(one_process):
    weights = language_model.model_folder() / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        status, said = one_process("--model", "smollm2", "--steps", 1)
    finally:
        weights.write_bytes(content)
    assert status == 2 and "SHA-256" in said and "fetch" in said and said.strip().count("\n") == 0
