"""What runs on a GPU runs on another device than the CPU; what runs on ranks stays on the CPU. No GPU is needed."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import second_device
from workshop_utils import (
    fine_tuning,
    lora,
    memory,
    projections,
    qlora,
    quantization,
    subspace,
    train,
    train_tasks,
)
from workshop_utils.data import MNIST
from workshop_utils.intrinsic_dimension import measure_intrinsic_dimension
from workshop_utils.models import MLP

ROOT = Path(__file__).resolve().parents[1]
DEVICE = second_device.DEVICE


@pytest.fixture(autouse=True)
def _second_device():
    second_device.start()


@pytest.fixture
def plain_adam(monkeypatch):
    """The second device has no fused optimizers."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr=1e-3, fused=None: adam(parameters, lr))


def images() -> MNIST:
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    return MNIST(torch.rand(200, 784), labels, torch.rand(100, 784), labels[:100], "noise")


def close(there: torch.Tensor, here: torch.Tensor, **tolerance) -> bool:
    assert there.device.type == DEVICE
    return torch.allclose(there.cpu(), here, **({"atol": 1e-5} | tolerance))


def test_the_second_device_refuses_what_cuda_refuses():
    x = torch.randn(4, 3).to(DEVICE)
    for mistake in (lambda: x + torch.randn(4, 3), lambda: x.split(2)[0] @ torch.randn(3, 2), x.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            mistake()
    assert [len(part) for part in x.split(3)] == [3, 1] and len(x.unbind()) == 4
    assert torch.equal(torch.cat(x.split([1, 2], dim=1), dim=1).cpu(), x.cpu())


# ----------------------------------------------------------------------------- the classes of notebooks 05 to 07


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4(double_quant):
    weight = torch.randn(30, 40)
    here = quantization.quantize_nf4(weight, 64, double_quant)
    there = quantization.quantize_nf4(weight.to(DEVICE), 64, double_quant)
    for name, tensor in there.tensors().items():
        assert close(tensor, here.tensors()[name]), name
    for dtype in (torch.float32, torch.bfloat16):
        expected = quantization.dequantize_nf4(here, dtype)
        assert close(quantization.dequantize_nf4(there, dtype), expected)
        assert close(quantization.dequantize_nf4(here.to(DEVICE), dtype), expected)


def test_lora_linear():
    here = lora.LoRALinear(nn.Linear(7, 5), 3, 6)
    nn.init.normal_(here.lora_B.weight)
    there, x = copy.deepcopy(here).to(DEVICE), torch.randn(2, 7)
    for layer, x_there in ((here, x), (there, x.to(DEVICE))):
        layer(x_there).square().sum().backward()
    assert close(there.lora_A.weight.grad, here.lora_A.weight.grad)
    there.merge(keep_copy=True)
    assert close(there(x.to(DEVICE)), here(x))
    there.unmerge()
    made_there = lora.LoRALinear(copy.deepcopy(here.base_layer).to(DEVICE), 3, 6, lora_dropout=0.1)
    assert made_there(x.to(DEVICE)).device.type == DEVICE
    assert 0 <= lora.subspace_similarity(there.lora_A.weight, made_there.lora_A.weight, 1, 2) <= 1


def test_qlora_linear():
    here = qlora.QLoRALinear(nn.Linear(64, 32), 3, 6)
    nn.init.normal_(here.lora_B.weight)
    there, x = copy.deepcopy(here).to(DEVICE), torch.randn(2, 64)
    for layer, x_there in ((here, x), (there, x.to(DEVICE))):
        x_there.requires_grad_()
        layer(x_there).square().sum().backward()
        layer.x_grad = x_there.grad
    assert close(there.x_grad, here.x_grad, rtol=1e-4)
    assert close(there.lora_A.weight.grad, here.lora_A.weight.grad, rtol=1e-4)
    assert close(there.merged_linear(torch.float32).weight, here.merged_linear(torch.float32).weight)
    assert there.merged_nf4()(x.detach().to(DEVICE)).device.type == DEVICE


@pytest.mark.parametrize("kind", projections.KINDS)
def test_random_subspace(kind, tmp_path):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    here = subspace.RandomSubspace(copy.deepcopy(net), 20, projection=kind)
    there = subspace.RandomSubspace(copy.deepcopy(net).to(DEVICE), 20, projection=kind)
    x = torch.randn(8, 6)
    for model, x_there in ((here, x), (there, x.to(DEVICE))):
        model(x_there).square().mean().backward()
    assert close(there.theta_d.grad, here.theta_d.grad)
    assert there.base_sha256() == here.base_sha256() and close(there.P.as_matrix(), here.P.as_matrix())
    subspace.save_subspace(there, tmp_path / "file")
    again = subspace.load_subspace(tmp_path / "file", lambda: copy.deepcopy(net).to(DEVICE))
    assert close(again(x.to(DEVICE)), here(x))


# ----------------------------------------------------------------------------- training


def test_fine_tuning_where_the_data_is(plain_adam):
    data = images().to(DEVICE)
    base = fine_tuning.pretrain_base(data, steps=2, batch_size=32)
    model = lora.apply_lora(copy.deepcopy(base), "all-linear", 2, 4)
    seen = fine_tuning.fine_tune(model, fine_tuning.even_or_odd(data), steps=2, learning_rate=1e-3)
    assert len(seen.losses) == 2 and 0 <= fine_tuning.old_digits_accuracy(model, data) <= 1
    report = memory.measure_memory(model, seen.optimizer)
    assert report.gradients_bytes > 0 and report.optimizer_bytes >= 2 * report.gradients_bytes


def test_a_model_is_fine_tuned_on_its_device_with_the_data_elsewhere(plain_adam):
    task, found = fine_tuning.even_or_odd(images()), {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = lora.apply_lora(MLP(), "all-linear", 2, 4).to(device)
        found[device] = fine_tuning.fine_tune(model, task, steps=3, learning_rate=1e-3, evaluate_every=3)
        assert {p.device.type for p in model.parameters()} == {device}
    assert found[DEVICE].losses == pytest.approx(found["cpu"].losses, rel=1e-5)
    assert found[DEVICE].curve == found["cpu"].curve


def test_a_sweep_where_the_data_is(plain_adam, tmp_path):
    found = measure_intrinsic_dimension(MLP, images().to(DEVICE), [10], seeds=(0,), epochs=1, folder=tmp_path)
    assert found.accuracy.shape == (1, 1)


def test_the_script_trains_on_its_device(monkeypatch):
    monkeypatch.setattr(train_tasks, "load_mnist", images)
    options = train.parse(["--steps", "2", "--batch-size", "16"])
    losses = []
    for device in ("cpu", DEVICE):
        run, model, task = train.train(options, torch.device(device))
        assert next(model.parameters()).device.type == device
        assert 0 <= train.accuracy(model, task) <= 1 and len(train.weights_sha256(model)) == 64
        losses.append(run.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ----------------------------------------------------------------------------- who computes where


@pytest.mark.parametrize(
    ("gpus", "local_rank", "local_world_size", "device"),
    [
        (0, 0, 1, "cpu"),
        (1, 0, 1, "cuda:0"),
        (1, 1, 2, "cpu"),  # nccl refuses two ranks on one GPU
        (2, 1, 2, "cuda:1"),
        (3, 3, 4, "cpu"),
        (8, 3, 4, "cuda:3"),
    ],
)
def test_a_rank_of_the_script_takes_its_gpu_or_the_cpu(
    monkeypatch, gpus, local_rank, local_world_size, device
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(train.choose_device(local_rank, local_world_size)) == device


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (1, "gloo"), (2, "nccl")])
def test_the_backend_goes_with_the_device(monkeypatch, gpus, backend):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    taken, joined = [], []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(train.dist, "rendezvous", lambda *_, **__: iter([(train.dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, **_: joined.append(backend))
    device = train.join_group(train.parse(["--strategy", "ddp"]))
    assert joined == [backend] and taken == ([device] if backend == "nccl" else [])
    assert os.environ["NCCL_SOCKET_IFNAME"].startswith("lo")


def test_ranks_see_no_gpu(ranks5):
    def seen():
        return os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.is_available(), torch.cuda.device_count()

    assert set(ranks5.run(seen)) == {("", False, 0)}


def test_every_fully_shard_names_its_mesh():
    """Without one, torch takes the machine's accelerator, and gloo's ranks have none: CUDA, or mps on a Mac."""
    found = 0
    for folder in ("notebooks/src", "workshop_utils", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line in path.read_text(encoding="utf-8").splitlines():
                for call in re.findall(r"(?<![\w`])fully_shard\((.*)\)", line):
                    found += 1
                    assert re.search(r"mesh=|\*\*options", call), f"{path}: {line.strip()}"
    assert found > 8
