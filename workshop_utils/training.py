"""One training step, a loop of them, and the accuracy afterwards. Notebook 01 writes the step as an exercise.

Shape letters: N images in the data set, B in the batch, D = 784 pixels.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workshop_utils.showing import in_notebook


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """One step on a batch: images [B, D], labels [B]. Returns the mean loss before the update, detached."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def draw_batches(num_samples: int, batch_size: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """`steps` index tensors [B]: the data set in a new random order each epoch, the short last batch dropped.

    Batches of the whole set where it is smaller than `batch_size`. The order depends on `seed` alone.
    """
    if num_samples < 1:
        raise ValueError("there are no samples to draw batches from")
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, num_samples)
    drawn = 0
    while drawn < steps:
        order = torch.randperm(num_samples, generator=generator)
        for batch in order[: num_samples // batch_size * batch_size].split(batch_size)[: steps - drawn]:
            drawn += 1
            yield batch


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int = 256,
    seed: int = 0,
    step: Callable = train_step,
) -> list[float]:
    """Run `steps` steps on images [N, D] and labels [N] with a progress bar; return the loss of each.

    The learning rate falls linearly from the optimizer's own to 0 and is put back at the end.
    `step(model, optimizer, images, labels)` does one step: the reader's own, for instance.
    """
    model.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    losses, progress = [], _Progress(steps)
    batches = draw_batches(len(images), batch_size, steps, seed)
    try:
        for done, batch in enumerate(batches):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - done / steps)
            losses.append(float(step(model, optimizer, images[batch], labels[batch])))
            progress.show(done + 1)
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> float:
    """The share of images [N, D] whose largest score is at the right label [N], between 0 and 1."""
    if len(images) == 0:
        raise ValueError("there are no images to evaluate on")
    was_training = model.training
    model.eval()
    try:
        parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        right = sum(int((model(part).argmax(dim=1) == wanted).sum()) for part, wanted in parts)
    finally:
        model.train(was_training)
    return right / len(images)


class _Progress:
    """A bar in the notebook, for work of more than half a second. Saved outputs keep its last state only."""

    def __init__(self, total: int):
        self.total = total
        self.handle = None
        self.next_s = time.monotonic() + 0.5 if in_notebook() else float("inf")

    def show(self, done: int) -> None:
        if not (time.monotonic() >= self.next_s or (self.handle and done == self.total)):
            return
        from IPython.display import display

        self.next_s = time.monotonic() + 0.3
        text = f"{done:,} of {self.total:,} steps"
        bar = f"<progress value='{done}' max='{self.total}'></progress> {text}"
        bundle = {"text/plain": text, "text/html": bar}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)
