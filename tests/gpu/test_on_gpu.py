"""On a GPU as on the CPU: our classes, NF4 beside bitsandbytes, QLoRA, FSDP, the script, the planner. `make test-gpu`."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import on_gpu
import pytest
import torch
from torch import nn

from workshop_utils import lora, projections, qlora, quantization, records, subspace
from workshop_utils.memory import plan_memory
from workshop_utils.stand_in import tiny_language_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPUS = torch.cuda.device_count()
SCRIPT = Path(__file__).parent / "train_small.py"
SHAPE = "smollm2"
PLAN = 0.25  # how far off a plan may be: allocator blocks and cuBLAS' work space are not in it


def on_both(module: nn.Module, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Output, gradient of x, and gradients of what is trained: of a copy on the CPU, and of one on the GPU."""
    seen = []
    for device in ("cpu", on_gpu.DEVICE):
        model, x_there = copy.deepcopy(module).to(device), x.to(device).requires_grad_()
        y = model(x_there)
        y.square().mean().backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        seen.append({"y": y.detach().cpu(), "x": x_there.grad.cpu()} | grads)
    return seen


def assert_same(module: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    here, there = on_both(module, x)
    for name, tensor in here.items():
        assert (tensor - there[name]).abs().max() <= tolerance * tensor.abs().max(), name


# ----------------------------------------------------------------------------- the classes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_lora_linear(dtype, tolerance):
    layer = lora.LoRALinear(nn.Linear(70, 50, dtype=dtype), 3, 6)
    nn.init.normal_(layer.lora_B.weight)
    assert_same(layer, torch.randn(20, 70, dtype=dtype), tolerance)


@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_linear(double_quant):
    layer = qlora.QLoRALinear(nn.Linear(128, 64), 3, 6, double_quant=double_quant)
    nn.init.normal_(layer.lora_B.weight)
    assert_same(layer, torch.randn(20, 128), 1e-5)


@pytest.mark.parametrize("kind", projections.KINDS)
def test_random_subspace(kind):
    net = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10))
    model = subspace.RandomSubspace(net, 200, projection=kind)
    nn.init.normal_(model.theta_d)
    assert_same(model, torch.randn(20, 60), 1e-4)


def test_a_subspace_made_on_the_gpu_is_the_cpus(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10))

    there = subspace.RandomSubspace(net().to(on_gpu.DEVICE), 200)
    assert {tensor.device.type for tensor in there.state_dict().values()} == {on_gpu.DEVICE}
    nn.init.normal_(there.theta_d)
    subspace.save_subspace(there, tmp_path / "file")
    here = subspace.load_subspace(tmp_path / "file", net)
    assert torch.allclose(here.theta(), there.theta().cpu(), atol=1e-6)


def test_an_adapter_goes_through_peft_format(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10)).to(on_gpu.DEVICE)

    model, x = lora.apply_lora(net(), ["0", "2"], 2, 4), torch.randn(5, 60, device=on_gpu.DEVICE)
    for _, layer in lora.lora_layers(model):
        nn.init.normal_(layer.lora_B.weight)
    lora.save_peft_adapter(model, tmp_path, base_model_name_or_path="net")
    assert torch.equal(lora.load_peft_adapter(net(), tmp_path)(x), model(x))


# ----------------------------------------------------------------------------- four bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_is_the_cpus(double_quant, dtype):
    weight = torch.randn(1001, 130, dtype=dtype)
    here = quantization.quantize_nf4(weight, 64, double_quant)
    there = quantization.quantize_nf4(weight.to(on_gpu.DEVICE), 64, double_quant).to("cpu")
    codes = [quantization.unpack_codes(q.packed, weight.numel()) for q in (here, there)]
    assert (codes[0] != codes[1]).float().mean() < 1e-4  # on a midpoint the last bit of a product decides
    moved = quantization.dequantize_nf4(here.to(on_gpu.DEVICE))
    assert torch.allclose(moved.cpu(), quantization.dequantize_nf4(here), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_beside_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    weight = torch.randn(1024, 512, dtype=dtype, device=on_gpu.DEVICE)
    ours = quantization.quantize_nf4(weight, 64, double_quant=False)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    assert (ours.packed != packed.view(-1)).float().mean() < 1e-4
    theirs = functional.dequantize_4bit(packed, state)
    far = (quantization.dequantize_nf4(ours) - theirs).abs() > 1e-2 * theirs.abs().clamp(min=1e-3)
    assert far.float().mean() < 1e-4


def test_qlora_learns_as_on_the_cpu():
    losses = []
    for device in ("cpu", on_gpu.DEVICE):
        model, tokenizer = tiny_language_model()
        torch.manual_seed(0)
        qlora.apply_qlora(model, "all-linear", 4, 8)
        model.to(device)
        frozen = {name: p.cpu().clone() for name, p in model.named_parameters() if not p.requires_grad}
        losses.append(records.fine_tune(model, tokenizer, 5, batch_size=4, progress=False).losses)
        assert all(torch.equal(dict(model.named_parameters())[name].cpu(), p) for name, p in frozen.items())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[1][-1] < losses[1][0]
    merged = qlora.merge_qlora(model, torch.float32)
    assert len(records.generate_answers(merged, tokenizer, ["one", "and another"])) == 2


# ----------------------------------------------------------------------------- the planner


@pytest.mark.parametrize(
    ("method", "precision", "checkpointing"),
    [
        ("full", "fp32", False),
        ("full", "bf16", True),
        ("lora", "bf16", False),
        ("qlora", "bf16-mixed", True),
    ],
)
def test_the_fullest_moment_is_about_the_planners(method, precision, checkpointing):
    on_gpu.empty()
    before = torch.cuda.memory_allocated()
    model = on_gpu.prepared(SHAPE, method, precision, checkpointing)
    measured = on_gpu.measured_step(model, on_gpu.tokens(SHAPE, 4, 256))["peak_bytes"] - before
    settings = {"method": method, "precision": precision, "checkpointing": checkpointing}
    plan = plan_memory(SHAPE, batch_size=4, length=256, **settings)
    print(f"measured {measured / 1e6:,.0f} MB, planned {plan.total_bytes / 1e6:,.0f} MB")
    assert plan.total_bytes == pytest.approx(measured, rel=PLAN)


# ----------------------------------------------------------------------------- FSDP on one GPU


@pytest.mark.parametrize("change", on_gpu.SHARDED.values(), ids=on_gpu.SHARDED)
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_fully_shard_trains_as_the_plain_model(lone_group, method, change):
    batch, losses = on_gpu.tokens(SHAPE, 2, 64), []
    for what in (None, change):
        on_gpu.empty()
        step = on_gpu.step_of(on_gpu.sharded(SHAPE, method, what), batch)
        losses.append([step().item() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[1][-1] < losses[1][0]


def test_our_own_fully_sharded_trains_as_the_plain_model(lone_group):
    from workshop_utils.fully_sharded import FullyShardedDataParallel

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10)).to(on_gpu.DEVICE)
    ours = FullyShardedDataParallel(copy.deepcopy(plain))
    x, losses = torch.randn(20, 60, device=on_gpu.DEVICE), {}
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if model is ours:
                model.finish_gradient_sync()
            optimizer.step()
            losses.setdefault(model, []).append(loss.item())
    assert losses[ours] == pytest.approx(losses[plain], rel=1e-5)


# ----------------------------------------------------------------------------- the script


def run_script(tmp_path, processes: int, *options) -> dict:
    """The report of workshop_utils.train under torchrun, or alone where `processes` is 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    report = tmp_path / f"{processes}_{'_'.join(map(str, options[:4])).replace('/', '')}.json"
    command = [sys.executable, *(launcher if processes else []), SCRIPT, "--report", report, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


COUNTS = [1] if GPUS < 2 else [1, GPUS]
TASKS = {
    "digits": ("--model", "mlp", "--steps", 4, "--batch-size", 33),
    "records": ("--model", "smollm2", "--steps", 2, "--lora-r", 2, "--quantize", "nf4"),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_script_on_gpus_trains_as_alone(tmp_path, task):
    alone = run_script(tmp_path, 0, *TASKS[task])
    assert alone["backend"] is None
    for processes in COUNTS:
        for strategy in ("ddp", "fsdp"):
            report = run_script(tmp_path, processes, "--strategy", strategy, *TASKS[task])
            assert (report["backend"], report["world_size"]) == ("nccl", processes)
            assert report["losses"] == pytest.approx(alone["losses"], rel=1e-3)
            assert set(report["bytes_sent"]) == {None}


def test_the_script_goes_on_from_a_checkpoint(tmp_path):
    options = ("--strategy", "fsdp", "--checkpoint-dir", tmp_path / "kept", "--batch-size", 32)
    run_script(tmp_path, 1, *options, "--steps", 2)
    again = run_script(tmp_path, 1, *options, "--steps", 4)
    whole = run_script(tmp_path, 1, "--strategy", "fsdp", "--batch-size", 32, "--steps", 4)
    assert again["resumed_at"] == 2
    assert again["losses"] == pytest.approx(whole["losses"][2:], rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_more_ranks_than_gpus_meet_on_the_cpu(tmp_path, strategy):
    report = run_script(tmp_path, GPUS + 1, "--strategy", strategy, *TASKS["digits"])
    assert report["backend"] == "gloo"
