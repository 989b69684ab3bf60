"""A base that knows eight digits, two questions that it never saw, and the loop that adapts it. Notebooks 05 and 06.

The base is the MLP, pre-trained on the digits 0 to 7. Both questions have two answers, read from the scores 8 and 9,
which the base has never used. So nothing is added to the network, and the digits 0 to 7 are still read from the scores
0 to 7: what the base forgets can be measured.

Shape letters: N images in the data set, B in the batch, D = 784 pixels, C = 10 classes.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workshop_utils.data import MNIST
from workshop_utils.models import MLP
from workshop_utils.training import draw_batches

NUM_OLD_DIGITS = 8  # the base is pre-trained on 0 to 7


@dataclass(frozen=True)
class Task:
    """A question with two answers: images [N, D], labels [N] int64, 0 (read from score 8) or 1 (from score 9)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class FineTuning:
    """What `fine_tune` saw. `curve` holds (steps done, accuracy) pairs; `step_s` is the median time of one step."""

    losses: list[float]
    accuracy: float
    curve: list[tuple[int, float]]
    step_s: float
    optimizer: torch.optim.Optimizer

    def steps_to(self, accuracy: float) -> int | None:
        """The first step of `curve` with at least this accuracy, None if there is none."""
        return next((step for step, reached in self.curve if reached >= accuracy), None)


def pretrain_base(data: MNIST, *, steps: int = 400, batch_size: int = 128, seed: int = 0) -> MLP:
    """The MLP after `steps` steps of Adam on the digits 0 to 7, all ten scores in the cross-entropy. Seconds.

    It is made on the CPU, so that its first weights depend on the seed alone, and trained where the data is.
    """
    torch.manual_seed(seed)
    model, known = MLP().to(data.train_images.device), data.train_labels < NUM_OLD_DIGITS
    images, labels = data.train_images[known], data.train_labels[known]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for done, batch in enumerate(draw_batches(len(images), batch_size, steps, seed)):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - done / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model


def eight_or_nine(data: MNIST) -> Task:
    """The two digits that the base was not trained on: label 0 is an 8, label 1 is a 9."""
    train, test = data.train_labels >= NUM_OLD_DIGITS, data.test_labels >= NUM_OLD_DIGITS
    return Task(
        "8 or 9",
        data.train_images[train],
        data.train_labels[train] - NUM_OLD_DIGITS,
        data.test_images[test],
        data.test_labels[test] - NUM_OLD_DIGITS,
    )


def even_or_odd(data: MNIST) -> Task:
    """All ten digits: label 0 is even, label 1 is odd."""
    labels = data.train_labels % 2, data.test_labels % 2
    return Task("even or odd", data.train_images, labels[0], data.test_images, labels[1])


def binary_loss(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy of the scores 8 and 9 alone; the other scores get no gradient."""
    return F.cross_entropy(scores_BC[:, NUM_OLD_DIGITS:], labels_B)


@torch.no_grad()
def binary_accuracy(model: nn.Module, task: Task) -> float:
    """The share of the task's test images where the larger of the scores 8 and 9 is the right one, 0 to 1."""
    return _share(model, task.test_images, task.test_labels, slice(NUM_OLD_DIGITS, None))


@torch.no_grad()
def old_digits_accuracy(model: nn.Module, data: MNIST) -> float:
    """The share of the test images of 0 to 7 that are still read right from the scores 0 to 7, 0 to 1."""
    old = data.test_labels < NUM_OLD_DIGITS
    return _share(model, data.test_images[old], data.test_labels[old], slice(NUM_OLD_DIGITS))


def fine_tune(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
    evaluate_every: int = 0,
) -> FineTuning:
    """Train whatever parameters of `model` require a gradient, in place, with Adam; the rate falls linearly to 0.

    `seed` decides the order of the images and, where the model has dropout, its draws. The accuracy on the test images
    is noted every `evaluate_every` steps (0: at the end only), outside the timed part. The images may be on another
    device than the model: each batch goes to the model's. ValueError if nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    optimizer = torch.optim.Adam(
        trainable, lr=learning_rate, fused=True
    )  # fused: a third of the step is saved
    device = trainable[0].device
    torch.manual_seed(seed)
    losses, curve, times_s = [], [], []
    model.train()
    for done, batch in enumerate(draw_batches(len(task.train_images), batch_size, steps, seed)):
        images, labels = task.train_images[batch].to(device), task.train_labels[batch].to(device)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - done / steps)
        began_s = time.perf_counter()
        optimizer.zero_grad()
        loss = binary_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # a GPU has finished the step only now
        times_s.append(time.perf_counter() - began_s)
        if evaluate_every and (done + 1) % evaluate_every == 0:
            curve.append((done + 1, binary_accuracy(model, task)))
    accuracy = curve[-1][1] if curve and curve[-1][0] == steps else binary_accuracy(model, task)
    return FineTuning(losses, accuracy, curve, statistics.median(times_s), optimizer)


def _share(model: nn.Module, images: Tensor, labels: Tensor, scores: slice) -> float:
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        parts = zip(images.split(1000), labels.split(1000), strict=True)
        right = sum(
            int((model(part.to(device))[:, scores].argmax(1) == wanted.to(device)).sum())
            for part, wanted in parts
        )
    finally:
        model.train(was_training)
    return right / len(images)
