"""Notebook 01: wrong answers and the complaint each must provoke; right ones written differently."""

import torch
from torch import nn
from torch.nn import functional as F

# 1.1: a training step


def forgets_to_clear(model, optimizer, images, labels):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss


def steps_before_backward(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    optimizer.step()
    loss.backward()
    return loss


def steps_before_backward_with_the_last_gradient(model, optimizer, images, labels):
    loss = F.cross_entropy(model(images), labels)
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    return loss


def clears_after_backward(model, optimizer, images, labels):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss


def never_steps(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def never_goes_backward(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    optimizer.step()
    return loss


def sums_the_loss(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    loss.backward()
    optimizer.step()
    return loss / len(images)


def applies_softmax_first(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images).softmax(dim=1), labels)
    loss.backward()
    optimizer.step()
    return loss


def returns_nothing(model, optimizer, images, labels):
    right_step(model, optimizer, images, labels)


def returns_the_later_loss(model, optimizer, images, labels):
    right_step(model, optimizer, images, labels)
    return F.cross_entropy(model(images), labels)


def climbs(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    (-loss).backward()
    optimizer.step()
    return loss


def transposes_the_images(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images.T), labels)
    loss.backward()
    optimizer.step()
    return loss


def right_step(model, optimizer, images, labels):
    model.zero_grad(set_to_none=False)
    log_probabilities = model(images).log_softmax(dim=1)
    loss = -log_probabilities[torch.arange(len(labels)), labels].mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def right_step_that_clears_at_the_end(model, optimizer, images, labels):
    loss = nn.CrossEntropyLoss(reduction="sum")(model(images), labels) / len(images)
    for parameter, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        parameter.grad = grad
    optimizer.step()
    optimizer.zero_grad()
    return loss


# 1.2: bytes by kind


def by_kind(parameters, gradients, optimizer):
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def gradients_of(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def state_of(optimizer):
    return [t for state in optimizer.state.values() for t in state.values()]


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def counts_elements(model, optimizer):
    kinds = (list(model.parameters()), gradients_of(model), state_of(optimizer))
    return by_kind(*(sum(t.numel() for t in tensors) for tensors in kinds))


def believes_in_four_bytes(model, optimizer):
    return {kind: 4 * count for kind, count in counts_elements(model, optimizer).items()}


def forgets_the_moments(model, optimizer):
    return by_kind(nbytes(model.parameters()), nbytes(gradients_of(model)), 0)


def counts_one_moment(model, optimizer):
    one = nbytes(state["exp_avg"] for state in optimizer.state.values())
    return by_kind(nbytes(model.parameters()), nbytes(gradients_of(model)), one)


def counts_buffers(model, optimizer):
    everything = model.state_dict().values()
    return by_kind(nbytes(everything), nbytes(gradients_of(model)), nbytes(state_of(optimizer)))


def believes_that_all_have_gradients(model, optimizer):
    size = nbytes(model.parameters())
    return by_kind(size, size, nbytes(state_of(optimizer)))


def applies_the_formula(model, optimizer):
    size = nbytes(model.parameters())
    stepped = bool(gradients_of(model))
    return by_kind(size, size * stepped, 2 * size * stepped)


def trips_over_missing_gradients(model, optimizer):
    gradients = [p.grad for p in model.parameters()]
    return by_kind(nbytes(model.parameters()), nbytes(gradients), nbytes(state_of(optimizer)))


def returns_a_tuple(model, optimizer):
    return tuple(right_bytes(model, optimizer).values())


def mistypes_a_key(model, optimizer):
    right = right_bytes(model, optimizer)
    return {"params": right["parameters"], "gradients": right["gradients"], "optimizer": right["optimizer"]}


def returns_kib(model, optimizer):
    return {kind: count / 1024 for kind, count in right_bytes(model, optimizer).items()}


def right_bytes(model, optimizer):
    return by_kind(nbytes(model.parameters()), nbytes(gradients_of(model)), nbytes(state_of(optimizer)))


def right_bytes_without_step_counters(model, optimizer):
    parameters = gradients = moments = 0
    for parameter in model.parameters():
        parameters += parameter.nbytes
        gradients += 0 if parameter.grad is None else parameter.grad.nbytes
        for tensor in optimizer.state.get(parameter, {}).values():
            moments += tensor.nbytes if tensor.shape == parameter.shape else 0
    return {"optimizer": moments, "parameters": parameters, "gradients": gradients}


# 1.3: accumulation


def accumulate(model, images, labels, parts, *, scale, clear_inside=False, clear=True):
    if clear:
        model.zero_grad()
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        if clear_inside:
            model.zero_grad()
        (F.cross_entropy(model(x), y) * scale).backward()


def adds_the_means(model, images, labels, parts):
    accumulate(model, images, labels, parts, scale=1)


def divides_twice(model, images, labels, parts):
    accumulate(model, images, labels, parts, scale=1 / parts**2)


def clears_inside_the_loop(model, images, labels, parts):
    accumulate(model, images, labels, parts, scale=1 / parts, clear_inside=True)


def keeps_what_was_there(model, images, labels, parts):
    accumulate(model, images, labels, parts, scale=1 / parts, clear=False)


def takes_all_at_once(model, images, labels, parts):
    accumulate(model, images, labels, 1, scale=1)


def holds_all_graphs_of_the_whole_batch(model, images, labels, parts):
    model.zero_grad()
    scores = model(images)
    for s, y in zip(scores.chunk(parts), labels.chunk(parts), strict=True):
        (F.cross_entropy(s, y) / parts).backward(retain_graph=True)


def sums_over_images(model, images, labels, parts):
    model.zero_grad()
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        F.cross_entropy(model(x), y, reduction="sum").backward()


def splits_instead_of_chunks(model, images, labels, parts):
    model.zero_grad()
    for x, y in zip(images.split(parts), labels.split(parts)):
        (F.cross_entropy(model(x), y) / parts).backward()


def forgets_backward(model, images, labels, parts):
    model.zero_grad()
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        F.cross_entropy(model(x), y)


def steps_too(model, images, labels, parts):
    accumulate(model, images, labels, parts, scale=1 / parts)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def takes_only_the_first_part(model, images, labels, parts):
    accumulate(model, images[: len(images) // parts], labels[: len(images) // parts], 1, scale=1)


def averages_afterwards(model, images, labels, parts):
    accumulate(model, images, labels, parts, scale=1)
    for parameter in model.parameters():
        parameter.grad /= parts


def sums_and_divides_by_images(model, images, labels, parts):
    totals = [torch.zeros_like(p) for p in model.parameters()]
    size = len(images) // parts
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        loss = F.cross_entropy(model(images[part]), labels[part], reduction="sum") / len(images)
        for total, grad in zip(totals, torch.autograd.grad(loss, list(model.parameters()))):
            total += grad
    for parameter, total in zip(model.parameters(), totals):
        parameter.grad = total


# 1.4: uneven parts


def uneven(model, images, labels, sizes, *, weight, clear_inside=False):
    model.zero_grad()
    for i, (x, y) in enumerate(zip(images.split(sizes), labels.split(sizes), strict=True)):
        if clear_inside:
            model.zero_grad()
        if len(x):
            (F.cross_entropy(model(x), y) * weight(i)).backward()


def averages_the_averages(model, images, labels, sizes):
    uneven(model, images, labels, sizes, weight=lambda i: 1 / len(sizes))


def averages_over_parts_with_images(model, images, labels, sizes):
    full = sum(n > 0 for n in sizes)
    if full == len(sizes) and len(set(sizes)) == 1:
        return sums_then_divides(model, images, labels, sizes)
    uneven(model, images, labels, sizes, weight=lambda i: 1 / full)


def only_adds(model, images, labels, sizes):
    uneven(model, images, labels, sizes, weight=lambda i: 1)


def divides_sums_by_parts(model, images, labels, sizes):
    uneven(model, images, labels, sizes, weight=lambda i: sizes[i] / len(sizes))


def weighs_upside_down(model, images, labels, sizes):
    inverse = [1 / n if n else 0 for n in sizes]
    uneven(model, images, labels, sizes, weight=lambda i: inverse[i] / sum(inverse))


def weighs_by_the_first_size(model, images, labels, sizes):
    uneven(model, images, labels, sizes, weight=lambda i: sizes[0] / sum(sizes))


def runs_empty_parts_too(model, images, labels, sizes):
    model.zero_grad()
    for x, y in zip(images.split(sizes), labels.split(sizes), strict=True):
        (F.cross_entropy(model(x), y) * len(x) / len(images)).backward()


def clears_inside(model, images, labels, sizes):
    uneven(model, images, labels, sizes, weight=lambda i: sizes[i] / sum(sizes), clear_inside=True)


def ignores_the_sizes(model, images, labels, sizes):
    averages_afterwards(model, images, labels, len(sizes))


def sums_then_divides(model, images, labels, sizes):
    model.zero_grad(set_to_none=False)
    for x, y in zip(images.split(sizes), labels.split(sizes), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / len(images)).backward()


def walks_through_the_batch(model, images, labels, sizes):
    for parameter in model.parameters():
        parameter.grad = None
    start = 0
    for n in sizes:
        if n > 0:
            loss = F.cross_entropy(model(images[start : start + n]), labels[start : start + n])
            loss.mul(n / sum(sizes)).backward()
        start += n


WRONG = {
    "1.1": [
        (
            forgets_to_clear,
            r"step 2 moved by the gradients of steps 1 and 2 added up, expected step 2's alone",
        ),
        (steps_before_backward, r"step 1: no parameter moved, though \.grad is filled"),
        (
            steps_before_backward_with_the_last_gradient,
            r"step 1: no parameter moved, though \.grad is filled",
        ),
        (clears_after_backward, r"step 1: no parameter moved, and \.grad is empty"),
        (never_steps, r"step 1: no parameter moved, though \.grad is filled"),
        (never_goes_backward, r"step 1: no parameter moved, and \.grad is empty"),
        (sums_the_loss, r"step 1 moved 8 times too far, and the batch has 8 images"),
        (applies_softmax_first, r"step 1 moved as if the scores had gone through softmax"),
        (returns_nothing, r"step 1: the loss you returned is None, expected the number .* `return` missing"),
        (returns_the_later_loss, r"step 1: the loss you returned is .*, the loss after the update; expected"),
        (climbs, r"step 1 moved up the gradient"),
        (transposes_the_images, r"raised RuntimeError"),
    ],
    "1.2": [
        (
            counts_elements,
            r"before any step: parameters is 199,210, the number of elements; expected 796,840",
        ),
        (believes_in_four_bytes, r"bfloat16: parameters is 796,840, expected 398,420"),
        (forgets_the_moments, r"after a step of Adam: optimizer is 0, expected 1,593,680"),
        (counts_one_moment, r"after a step of Adam: optimizer is 796,840, one moment; expected 1,593,680"),
        (counts_buffers, r"batch norm .*: parameters is 159,848, expected 159,440"),
        (believes_that_all_have_gradients, r"before any step: gradients is 796,840, expected 0"),
        (applies_the_formula, r"a frozen layer.*: gradients is 159,440, expected 2,440"),
        (trips_over_missing_gradients, r"raised AttributeError"),
        (
            returns_a_tuple,
            r"you returned \(796840, 0, 0\), expected a dict with the keys parameters, gradients",
        ),
        (mistypes_a_key, r"expected a dict with the keys parameters, gradients, optimizer"),
        (returns_kib, r"before any step: parameters is 778, expected 796,840"),
    ],
    "1.3": [
        (adds_the_means, r"2 parts of 6 images: the gradient is 2 times too large, and there are 2 parts"),
        (divides_twice, r"2 parts of 6 images: the gradient is 2 times too small"),
        (clears_inside_the_loop, r"2 parts of 6 images: the gradient is the last part's alone"),
        (keeps_what_was_there, r"1 part of 12 images: the gradient is too large by 0\.5"),
        (takes_all_at_once, r"2 parts of 6 images: one forward saw 12 images, the budget is 6"),
        (holds_all_graphs_of_the_whole_batch, r"2 parts of 6 images: one forward saw 12 images"),
        (
            sums_over_images,
            r"1 part of 12 images: the gradient is 12 times too large, and there are 12 images",
        ),
        (
            splits_instead_of_chunks,
            r"1 part of 12 images: the forwards saw \[1, 1, .*into pieces of k images",
        ),
        (forgets_backward, r"1 part of 12 images: 0\.weight\.grad is None"),
        (steps_too, r"1 part of 12 images: 0\.weight was changed"),
        (takes_only_the_first_part, r"2 parts of 6 images: 0\.weight\.grad\[0, 0\] is .*, expected"),
    ],
    "1.4": [
        (averages_the_averages, r"sizes \[7, 5\]: the gradient is the plain mean of the parts' averages"),
        (averages_over_parts_with_images, r"sizes \[7, 5\]: the gradient is the plain mean"),
        (only_adds, r"sizes \[4, 4, 4\]: the gradient is 3 times too large, and there are 3 parts"),
        (divides_sums_by_parts, r"sizes \[4, 4, 4\]: the gradient is the images' sum divided by 3 parts"),
        (weighs_upside_down, r"sizes \[7, 5\]: 0\.weight\.grad\[0, 0\] is .*, expected"),
        (weighs_by_the_first_size, r"sizes \[7, 5\]: 0\.weight\.grad\[0, 0\] is .*, expected"),
        (clears_inside, r"sizes \[4, 4, 4\]: the gradient is the last part's alone"),
        (ignores_the_sizes, r"sizes \[7, 5\]: the forwards saw \[6, 6\] images, expected \[7, 5\]"),
    ],
}
RIGHT = {
    "1.1": [right_step, right_step_that_clears_at_the_end],
    "1.2": [right_bytes, right_bytes_without_step_counters],
    "1.3": [averages_afterwards, sums_and_divides_by_images],
    "1.4": [sums_then_divides, walks_through_the_batch, runs_empty_parts_too],
}
