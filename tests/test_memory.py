"""Bytes by kind, on models whose bytes can be counted by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from workshop_utils.memory import held_bytes, measure_memory, record_activations
from workshop_utils.models import MLP
from workshop_utils.training import train_step

P = 199_210


def test_mlp_with_adam_holds_sixteen_bytes_per_parameter():
    model = MLP()
    optimizer = torch.optim.Adam(model.parameters())
    empty = measure_memory(model, optimizer)
    assert empty.by_kind() == {
        "parameters": 4 * P,
        "buffers": 0,
        "activations": 0,
        "gradients": 0,
        "optimizer": 0,
    }
    train_step(model, optimizer, torch.rand(8, 784), torch.zeros(8, dtype=torch.int64))
    report = measure_memory(model, optimizer)
    assert (report.parameters_bytes, report.gradients_bytes) == (4 * P, 4 * P)
    assert report.optimizer_bytes == 8 * P + 6 * 4  # two moments, and one step counter per parameter
    assert report.total_bytes == 16 * P + 24
    assert f"{16 * P + 24:,}" in str(report)


def test_activations_are_the_formula_to_the_byte():
    model, batch = MLP(), 32
    images, labels = torch.rand(batch, 784), torch.zeros(batch, dtype=torch.int64)
    with record_activations(model) as saved:
        F.cross_entropy(model(images), labels)
    formula = (
        4 * batch * (784 + 200 + 200 + 10) + 8 * batch + 4
    )  # inputs, log-probabilities; labels; a weight
    assert saved.total_bytes == formula
    assert measure_memory(model, activations=saved).activations_bytes == formula


def test_a_slice_of_the_data_set_counts_its_own_bytes():
    model, data = nn.Linear(4, 2), torch.rand(1000, 4)
    with record_activations(model) as saved:
        model(data[10:15]).sum()
    assert saved.total_bytes == 5 * 4 * 4


def test_overlapping_and_transposed_views_count_once():
    x = torch.rand(6, 4, requires_grad=True)
    base = x * 1.0
    with record_activations(nn.Linear(1, 1)) as saved:
        (base[:4] * base[2:]).sum()
        base.T @ base
    assert saved.total_bytes == 6 * 4 * 4
    assert len(saved.tensors) == 4


def test_nothing_is_saved_without_gradients():
    model = MLP(hidden=4)
    with torch.no_grad(), record_activations(model) as saved:
        model(torch.rand(3, 784))
    assert saved.total_bytes == 0 and saved.tensors == []


def test_backward_gives_the_same_gradients_while_recording():
    torch.manual_seed(0)
    model, images = MLP(hidden=8).double(), torch.rand(5, 784, dtype=torch.float64)
    with record_activations(model):
        model(images).square().sum().backward()
    recorded = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images).square().sum().backward()
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), recorded, strict=True))


def test_the_record_keeps_no_tensor_alive():
    import gc
    import weakref

    model = nn.Linear(4, 4)
    with record_activations(model) as saved:
        hidden = model(torch.rand(2, 4)).exp()
        seen = weakref.ref(hidden)
        del hidden
    gc.disable()
    try:
        assert saved.total_bytes > 0 and seen() is None
    finally:
        gc.enable()


def test_tied_weights_frozen_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    model[1].requires_grad_(False)
    model(torch.rand(4, 3)).sum().backward()
    report = measure_memory(model)
    assert report.parameters_bytes == (9 + 3 + 3) * 4
    assert report.gradients_bytes == 9 * 4
    assert report.buffers_bytes == (3 + 3) * 4 + 8  # running mean, running variance, an int64 counter


def test_other_dtypes_and_momentum():
    model = nn.Linear(10, 10).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 10, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    report = measure_memory(model, optimizer)
    assert report.parameters_bytes == report.gradients_bytes == report.optimizer_bytes == 110 * 2


def test_views_of_one_flat_buffer_count_the_buffer_once():
    flat = torch.zeros(100)
    assert held_bytes([flat[:10], flat[10:], flat.view(10, 10).T]) == 400
    flat.untyped_storage().resize_(0)  # how a sharded model frees a full parameter
    assert held_bytes([flat]) == 0
