"""The step against arithmetic done by hand, the batches, and a network that learns."""

import pytest
import torch
from torch import nn

from workshop_utils.models import MLP
from workshop_utils.training import draw_batches, evaluate, train, train_step


def toy_problem(num_samples=300, seed=0):
    """Three well separated clouds in the plane."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_samples,), generator=generator)
    centres = torch.tensor([[0.0, 4.0], [4.0, -2.0], [-4.0, -2.0]])
    return centres[labels] + torch.randn(num_samples, 2, generator=generator), labels


def test_one_sgd_step_is_the_formula():
    torch.manual_seed(1)
    model = nn.Linear(4, 3).double()
    before = [p.detach().clone() for p in model.parameters()]
    images, labels = torch.rand(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)  # left over: must not count
    loss = train_step(model, torch.optim.SGD(model.parameters(), lr=0.5), images, labels)

    scores = images @ before[0].T + before[1]
    error = (scores.softmax(1) - nn.functional.one_hot(labels, 3)) / len(images)
    torch.testing.assert_close(model.weight.detach(), before[0] - 0.5 * error.T @ images)
    torch.testing.assert_close(model.bias.detach(), before[1] - 0.5 * error.sum(0))
    torch.testing.assert_close(loss, -scores.log_softmax(1)[range(6), labels].mean())
    assert not loss.requires_grad


def test_batches_visit_every_sample_once_per_epoch():
    batches = list(draw_batches(num_samples=12, batch_size=4, steps=6, seed=3))
    assert [len(batch) for batch in batches] == [4] * 6
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "steps"), [(10, 4, 5), (3, 256, 2), (8, 8, 3), (5, 1, 0)]
)
def test_number_and_size_of_batches(num_samples, batch_size, steps):
    batches = list(draw_batches(num_samples, batch_size, steps))
    assert [len(batch) for batch in batches] == [min(batch_size, num_samples)] * steps


def test_same_seed_same_batches():
    first, again, other = (torch.cat(list(draw_batches(50, 8, 9, seed))) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_no_samples_is_said():
    with pytest.raises(ValueError, match="no samples"):
        next(draw_batches(0, 4, 1))
    with pytest.raises(ValueError, match="no images"):
        evaluate(nn.Linear(2, 3), torch.rand(0, 2), torch.zeros(0, dtype=torch.int64))


def test_training_learns_and_puts_the_rate_back():
    torch.manual_seed(0)
    images, labels = toy_problem()
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    seen = []

    def step(*args):
        seen.append(optimizer.param_groups[0]["lr"])
        return train_step(*args)

    losses = train(model, optimizer, images, labels, steps=100, batch_size=32, step=step)
    assert len(losses) == 100 and losses[-1] < losses[0]
    assert evaluate(model, *toy_problem(seed=1)) > 0.97
    assert seen[0] == 0.02 and seen[-1] == pytest.approx(0.0002) and sorted(seen, reverse=True) == seen
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_rate_is_put_back_after_an_error_too():
    model = MLP(hidden=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError):
        train(model, optimizer, torch.rand(8, 9), torch.zeros(8, dtype=torch.int64), steps=5, batch_size=4)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_evaluate_counts_right_answers_and_keeps_the_mode():
    model = nn.Sequential(nn.Dropout(0.99), nn.Identity()).train()
    scores = torch.eye(4).repeat(600, 1)  # [2400, 4]: more than one batch
    labels = torch.tensor([0, 1, 2, 0]).repeat(600)
    assert evaluate(model, scores, labels) == 0.75
    assert model.training
