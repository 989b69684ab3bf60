"""Checks of notebook 01, one device.

All gradients are compared in float64 to 1e-6 of their largest entry: whoever sums in another order passes,
whoever sums something else does not. Expected values come from torch.autograd.grad on the check's own copy.

Shape letters: B images in the batch, D inputs, C classes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from workshop_utils.checks import Wrong, exercise, expect_close, expect_number
from workshop_utils.models import MLP

RELATIVE_TOLERANCE = 1e-6
LEARNING_RATE = 0.3


@exercise("1.1")
def check_train_step(answer):
    """`answer(model, optimizer, images, labels)` does one step and returns the loss before the update."""
    model, images, labels = _problem(num_images=24)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    expected, earlier_grads = copy.deepcopy(model), None
    for step in (1, 2, 3):
        part = slice(8 * step - 8, 8 * step)
        loss, grads = _loss_and_gradients(expected, images[part], labels[part])
        with_softmax = nn.Sequential(expected, nn.Softmax(1))
        softmax_grads = _loss_and_gradients(with_softmax, images[part], labels[part])[1]
        start = [p.detach().clone() for p in model.parameters()]
        _descend_(expected, grads)
        returned = answer(model, optimizer, images[part], labels[part])
        moves = [(old - new.detach()) / LEARNING_RATE for old, new in zip(start, model.parameters())]
        _explain_moves(step, model, moves, grads, earlier_grads)
        _expect_scores(step, moves, softmax_grads)
        for (name, got), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
            _expect_near(got, wanted, f"step {step}: after it {name}")
        _expect_loss(step, returned, loss, _loss_and_gradients(expected, images[part], labels[part])[0])
        earlier_grads = grads if step == 1 else None
    return "three steps, each from its own batch alone; the parameters and the loss are right"


@exercise("1.2")
def check_bytes_by_kind(answer):
    """`answer(model, optimizer)` is {"parameters": bytes, "gradients": bytes, "optimizer": bytes}."""
    for case, model, optimizer, expected in _memory_cases():
        got = answer(model, optimizer)
        if not isinstance(got, dict) or set(got) != set(expected):
            raise Wrong(f"you returned {got!r:.80}, expected a dict with the keys {', '.join(expected)}")
        for kind, wanted in expected.items():
            _expect_bytes(f"{case}: {kind}", got[kind], wanted, _element_count(model, optimizer, kind))
        counters = _count_bytes(t for t in _state_tensors(optimizer) if t.dim() == 0)
        extra = _as_number(got["optimizer"]) - expected["optimizer"]
        if extra not in (0, counters):
            raise Wrong(f"{case}: optimizer is {got['optimizer']:,}, expected {expected['optimizer']:,}")
    return "float32, bfloat16, a frozen layer, Adam and SGD with momentum: right to the byte"


@exercise("1.3")
def check_accumulate_gradients(answer):
    """`answer(model, images, labels, parts)` leaves the big batch's mean gradient in `.grad`, part by part."""
    for parts in (1, 2, 3, 6):
        model, images, labels = _problem(num_images=12)
        case = f"{parts} part{'s' if parts > 1 else ''} of {12 // parts} images"
        seen = _run_accumulation(case, model, images, labels, [12 // parts] * parts, answer, parts)
        if max(seen) > 12 // parts:
            raise Wrong(f"{case}: one forward saw {max(seen)} images, the budget is {12 // parts}")
    return "the average of the parts' gradients is the big batch's gradient, one part in memory at a time"


@exercise("1.4")
def check_accumulate_uneven(answer):
    """`answer(model, images, labels, sizes)`: the same where part i has sizes[i] images, 0 allowed."""
    for sizes in ([4, 4, 4], [7, 5], [9, 2, 1], [1, 0, 6, 5]):
        model, images, labels = _problem(num_images=12)
        case = f"sizes {sizes}"
        seen = _run_accumulation(case, model, images, labels, sizes, answer, list(sizes))
        if sorted(n for n in seen if n) != sorted(n for n in sizes if n):
            raise Wrong(f"{case}: the forwards saw {seen} images, expected {sizes}")
    return "each part weighs as much as it has images, and an empty part weighs nothing"


# Exercise 1.1


def _explain_moves(step, model, moves, grads, earlier_grads):
    """Name the mistake behind a wrong step. `moves`: what was subtracted, divided by the learning rate."""
    wanted = _flat(grads)
    got = _flat(moves)
    if not got.any():
        if all(p.grad is None or not p.grad.any() for p in model.parameters()):
            raise Wrong(
                f"step {step}: no parameter moved, and .grad is empty afterwards. Does loss.backward() run,"
                " and does zero_grad() come before it?"
            )
        raise Wrong(
            f"step {step}: no parameter moved, though .grad is filled afterwards. Does optimizer.step() run,"
            " after loss.backward()?"
        )
    if earlier_grads is not None and _is_near(got, wanted + _flat(earlier_grads)):
        raise Wrong(
            f"step {step} moved by the gradients of steps 1 and 2 added up, expected step 2's alone:"
            " backward() adds to .grad, so clear it for each batch"
        )
    if earlier_grads is not None and _is_near(got, _flat(earlier_grads)):
        raise Wrong(
            f"step {step} moved by step 1's gradient, expected step 2's: is step() before backward()?"
        )
    if _is_near(got, 8 * wanted):
        raise Wrong(f"step {step} moved 8 times too far, and the batch has 8 images: average the loss")
    if _is_near(got, -wanted):
        raise Wrong(f"step {step} moved up the gradient, expected down")


def _expect_scores(step, moves, softmax_grads):
    if _is_near(_flat(moves), _flat(softmax_grads)):
        raise Wrong(
            f"step {step} moved as if the scores had gone through softmax before the loss: F.cross_entropy does "
            "that itself, so give it the model's scores"
        )


def _expect_loss(step, returned, before, after):
    name = f"step {step}: the loss you returned"
    number = _as_number(returned)
    if number is not None and abs(number - after) <= RELATIVE_TOLERANCE * after:
        raise Wrong(
            f"{name} is {number:.6g}, the loss after the update; expected the one before, {before:.6g}"
        )
    expect_number(returned if number is None else number, before, name=name)


def _descend_(model, grads):
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter -= LEARNING_RATE * grad


# Exercise 1.2


def _memory_cases() -> Iterator[tuple]:
    """(name, model, optimizer, expected bytes of the moments alone and of the rest)."""
    model = MLP()
    optimizer = torch.optim.Adam(model.parameters())
    P = 199_210
    yield "before any step", model, optimizer, _expected(4 * P, 0, 0)
    _one_step(model, optimizer, torch.rand(4, 784))
    yield "the MLP after a step of Adam", model, optimizer, _expected(4 * P, 4 * P, 8 * P)

    model = MLP().to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    _one_step(model, optimizer, torch.rand(4, 784, dtype=torch.bfloat16))
    yield "the MLP in bfloat16", model, optimizer, _expected(2 * P, 2 * P, 4 * P)

    model = nn.Sequential(nn.Linear(784, 50), nn.BatchNorm1d(50), nn.Linear(50, 10))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _one_step(model, optimizer, torch.rand(4, 784))
    trained = 4 * (50 + 50 + 500 + 10)
    case = "a frozen layer, a batch norm (its running statistics are buffers), SGD with momentum"
    yield case, model, optimizer, _expected(4 * 39_250 + trained, trained, trained)


def _expected(parameters, gradients, optimizer):
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def _one_step(model, optimizer, images):
    F.cross_entropy(model(images), torch.arange(len(images))).backward()
    optimizer.step()


def _expect_bytes(name, got, wanted, elements):
    number = _as_number(got)
    if number is None:
        raise Wrong(f"{name} is {got!r:.60}, expected the number {wanted:,}")
    if number == elements != wanted:
        raise Wrong(f"{name} is {number:,.0f}, the number of elements; expected {wanted:,} bytes")
    if name.endswith("optimizer"):
        if wanted and number * 2 == wanted and "Adam" in name:
            raise Wrong(f"{name} is {number:,.0f}, one moment; expected {wanted:,}: Adam keeps two")
        return  # Adam's step counters may be counted or not: the caller looks
    if number != wanted:
        raise Wrong(f"{name} is {number:,.0f}, expected {wanted:,}")


def _element_count(model, optimizer, kind):
    if kind == "optimizer":
        return sum(t.numel() for t in _state_tensors(optimizer) if t.dim() > 0)
    tensors = model.parameters() if kind == "parameters" else (p.grad for p in model.parameters())
    return sum(t.numel() for t in tensors if t is not None)


def _state_tensors(optimizer):
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]


def _count_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# Exercises 1.3 and 1.4


def _run_accumulation(case, model, images, labels, sizes, answer, argument):
    """Judge what the answer leaves in `.grad`, stale before; return the batch sizes that the model saw."""
    wanted = _loss_and_gradients(model, images, labels)[1]
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    with _seen_batches(model) as seen:
        answer(model, images, labels, argument)
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        if not parameter.detach().equal(old):
            raise Wrong(f"{case}: {name} was changed, expected gradients only: no step belongs here")
        if parameter.grad is None:
            raise Wrong(f"{case}: {name}.grad is None. Does backward() run, after the clearing?")
    got = _flat([p.grad for p in model.parameters()])
    if sorted(n for n in seen if n) == sorted(_wrongly_split(images, sizes)):
        raise Wrong(
            f"{case}: the forwards saw {seen} images. images.split(k) cuts into pieces of k images, "
            "images.chunk(k) into k pieces"
        )
    _explain_gradient(case, model, images, labels, sizes, got, _flat(wanted))
    for (name, parameter), expected in zip(model.named_parameters(), wanted, strict=True):
        _expect_near(parameter.grad, expected, f"{case}: {name}.grad")
    return seen


def _wrongly_split(images, sizes):
    """The sizes that `images.split(parts)` gives, where they differ from those of `images.chunk(parts)`."""
    parts = len(sizes)
    got = [len(piece) for piece in images.split(parts)]
    return got if len(set(sizes)) == 1 and got != list(sizes) else []


def _explain_gradient(case, model, images, labels, sizes, got, wanted):
    """Name the mistake behind a wrong accumulated gradient, if it is one that people make."""
    total, count = sum(sizes), len(sizes)
    pieces = zip(sizes, images.split(sizes), labels.split(sizes), strict=True)
    means = [_flat(_loss_and_gradients(model, x, y)[1]) if n else torch.zeros_like(got) for n, x, y in pieces]
    sums = [n * mean for n, mean in zip(sizes, means, strict=True)]
    full = [n for n in sizes if n]
    if _is_near(got, wanted + 0.5):
        raise Wrong(f"{case}: the gradient is too large by 0.5, which .grad held before the call: clear it")
    if _is_near(got, wanted):
        return
    known = [
        (
            wanted * total,
            f"{total} times too large, and there are {total} images: sum the losses, then divide",
        ),
        (wanted * count, f"{count} times too large, and there are {count} parts: average, do not add"),
        (wanted / count, f"{count} times too small: is it divided twice?"),
        (sum(means), "the sum of the parts' averages, expected their average weighted by size"),
        (sum(means) / count, "the plain mean of the parts' averages: a small part must weigh less"),
        (sum(means) / len(full), "the plain mean of the parts' averages: a small part must weigh less"),
        (sum(sums) / count, f"the images' sum divided by {count} parts, expected by {total} images"),
    ]
    for last in {next(i for i in reversed(range(count)) if sizes[i]), count - 1}:
        for scale in {1.0, 1 / count, sizes[last] / total, float(sizes[last])}:
            known.append((means[last] * scale, "the last part's alone: is .grad cleared inside the loop?"))
    for candidate, explanation in known:
        if count > 1 and _is_near(got, candidate):
            raise Wrong(f"{case}: the gradient is {explanation}")
    if count == 1 and _is_near(got, wanted * total):
        raise Wrong(f"{case}: the gradient is {known[0][1]}")


@contextmanager
def _seen_batches(model):
    """Sizes of the batches that went through `model`, in order."""
    seen = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        handle.remove()


# What several checks need


def _problem(num_images):
    """A small classifier in float64 with images [B, 6] and labels [B]; the same each time."""
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    images = torch.randn(num_images, 6, generator=generator, dtype=torch.float64)
    return model, images, torch.randint(3, (num_images,), generator=generator)


def _loss_and_gradients(model, images, labels):
    """(mean loss, gradients in parameter order). `.grad` stays as it is."""
    loss = F.cross_entropy(model(images), labels)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def _expect_near(got, wanted, name):
    wanted = wanted.detach()
    expect_close(got, wanted, name=name, rtol=0, atol=RELATIVE_TOLERANCE * wanted.abs().max().item())


def _is_near(got, wanted):
    return bool((got - wanted).abs().max() <= RELATIVE_TOLERANCE * wanted.abs().max())


def _flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _as_number(value):
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        return None
