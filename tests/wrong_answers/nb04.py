"""Notebook 04: wrong answers and the complaint each must provoke; right ones written differently.

S is the bytes of one padded layer, n the world size. Shape letters as in the exercises: B images, I inputs, O outputs.
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from workshop_utils.collectives import ring_all_reduce_


def me():
    return dist.get_rank(), dist.get_world_size()


# 4.1 bytes_per_rank


def bill(stage, parameters, gradients, optimizer, n, divided=(3, 2, 1)):
    kinds = zip(("parameters", "gradients", "optimizer"), (parameters, gradients, optimizer), divided)
    return {kind: size / (n if stage >= first else 1) for kind, size, first in kinds}


def forgets_the_master_weights(stage, num_parameters, world_size):
    return bill(stage, 2 * num_parameters, 2 * num_parameters, 8 * num_parameters, world_size)


def divides_the_gradients_a_stage_early(stage, num_parameters, world_size):
    return bill(stage, 2 * num_parameters, 2 * num_parameters, 12 * num_parameters, world_size, (3, 1, 1))


def begins_with_the_parameters(stage, num_parameters, world_size):
    return bill(stage, 2 * num_parameters, 2 * num_parameters, 12 * num_parameters, world_size, (1, 2, 3))


def counts_stages_from_zero(stage, num_parameters, world_size):
    return bill(stage, 2 * num_parameters, 2 * num_parameters, 12 * num_parameters, world_size, (2, 1, 0))


def computes_in_float32(stage, num_parameters, world_size):
    return bill(stage, 4 * num_parameters, 4 * num_parameters, 8 * num_parameters, world_size)


def counts_the_copy_as_a_parameter(stage, num_parameters, world_size):
    return bill(stage, 6 * num_parameters, 2 * num_parameters, 8 * num_parameters, world_size)


def returns_the_total(stage, num_parameters, world_size):
    return sum(bill(stage, 2 * num_parameters, 2 * num_parameters, 12 * num_parameters, world_size).values())


def counts_elements(stage, num_parameters, world_size):
    return bill(stage, num_parameters, num_parameters, 3 * num_parameters, world_size)


def with_a_table(stage, num_parameters, world_size):
    whole = {
        "parameters": 2 * num_parameters,
        "gradients": 2 * num_parameters,
        "optimizer": 12 * num_parameters,
    }
    for kind in ["optimizer", "gradients", "parameters"][:stage]:
        whole[kind] /= world_size
    return whole


def rounded_up(stage, num_parameters, world_size):
    mine = -(-num_parameters // world_size)
    parameters, gradients, adam = (mine if stage >= first else num_parameters for first in (3, 2, 1))
    return {"optimizer": 4 * adam + 8 * adam, "parameters": 2 * parameters, "gradients": 2 * gradients}


# 4.2 shard_of


def forgets_the_padding(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    return flat[rank * size : (rank + 1) * size].clone()


def pads_into_the_neighbour(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    start = min(
        rank * size, max(0, flat.numel() - size)
    )  # the last shards begin earlier, so that they are full
    return F.pad(flat[start : start + size], (0, max(0, size - flat.numel()))).clone()


def rounds_down_the_start(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    start = rank * flat.numel() // world_size
    part = flat[start : start + size]
    return torch.cat([part, part.new_zeros(size - part.numel())])


def uneven_shards(flat, rank, world_size):
    return flat.tensor_split(world_size)[rank].clone()


def drops_the_rest(flat, rank, world_size):
    size = flat.numel() // world_size
    return flat[rank * size : (rank + 1) * size].clone()


def keeps_a_view(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    part = flat[rank * size : (rank + 1) * size]
    return part if part.numel() == size else F.pad(part, (0, size - part.numel()))


def keeps_a_view_of_a_padded_copy(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    return F.pad(flat, (0, world_size * size - flat.numel()))[rank * size : (rank + 1) * size]


def pads_with_ones(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    shard = flat.new_ones(size)
    part = flat[rank * size : (rank + 1) * size]
    shard[: part.numel()] = part
    return shard


def always_float32(flat, rank, world_size):
    return by_padding_first(flat, rank, world_size).float()


def every_nth_element(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    part = flat[rank::world_size]
    return F.pad(part, (0, size - part.numel())).clone()


def one_shard_too_far(flat, rank, world_size):
    return by_padding_first(flat, (rank + 1) % world_size, world_size)


def by_padding_first(flat, rank, world_size):
    size = -(-flat.numel() // world_size)
    return F.pad(flat, (0, world_size * size - flat.numel())).view(world_size, size)[rank].clone()


def by_concatenating(flat, rank, world_size):
    size = (flat.numel() + world_size - 1) // world_size
    part = flat[rank * size :][:size]
    return torch.cat([part, torch.zeros(size - len(part), dtype=flat.dtype)])


# 4.3 gathered_forward


def gather(shard, all_gather):
    full = shard.new_empty(dist.get_world_size() * shard.numel())
    all_gather(full, shard)
    return full


def cut(full, out_features, in_features):
    num_weights = out_features * in_features
    return full[:num_weights].view(out_features, in_features), full[num_weights : num_weights + out_features]


def never_frees(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    return F.linear(x_BI, *cut(full, out_features, x_BI.shape[1]))


def keeps_the_weight_for_backward(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    weight, bias = (part.clone() for part in cut(full, out_features, x_BI.shape[1]))
    full.untyped_storage().resize_(0)
    shard.kept = weight
    return F.linear(x_BI, weight, bias)


def frees_before_computing(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    full.untyped_storage().resize_(0)
    return F.linear(x_BI, *cut(full.clone(), out_features, x_BI.shape[1]))


def does_not_gather(x_BI, shard, out_features, all_gather):
    full = shard.repeat(dist.get_world_size())
    return F.linear(x_BI, *cut(full, out_features, x_BI.shape[1]))


def takes_the_padding_for_the_bias(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    weight, _ = cut(full, out_features, x_BI.shape[1])
    y = F.linear(x_BI, weight, full[-out_features:])
    full.untyped_storage().resize_(0)
    return y


def bias_first(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    bias, weight = full[:out_features], full[out_features : out_features * (x_BI.shape[1] + 1)]
    y = F.linear(x_BI, weight.view(out_features, -1), bias)
    full.untyped_storage().resize_(0)
    return y


def forgets_the_bias(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    y = F.linear(x_BI, cut(full, out_features, x_BI.shape[1])[0])
    full.untyped_storage().resize_(0)
    return y


def gathers_weight_and_bias_apart(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    weight = cut(full, out_features, x_BI.shape[1])[0].clone()
    full = gather(shard, all_gather)
    return F.linear(x_BI, weight, cut(full, out_features, x_BI.shape[1])[1])


def returns_nothing(x_BI, shard, out_features, all_gather):
    never_frees(x_BI, shard, out_features, all_gather)


def gathers_with_torch(x_BI, shard, out_features, all_gather):
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    return F.linear(x_BI, *cut(torch.cat(parts), out_features, x_BI.shape[1]))


def forgets_to_make_room(x_BI, shard, out_features, all_gather):
    full = torch.empty_like(shard)
    all_gather(full, shard)
    return F.linear(x_BI, *cut(full, out_features, x_BI.shape[1]))


def in_two_steps(x_BI, shard, out_features, all_gather):
    full = torch.zeros(dist.get_world_size(), shard.numel(), dtype=shard.dtype)
    all_gather(full, shard)
    I = x_BI.shape[1]
    weight, bias, _ = full.view(-1).split(
        [out_features * I, out_features, full.numel() - out_features * (I + 1)]
    )
    y = x_BI @ weight.view(out_features, I).T
    y += bias
    full.untyped_storage().resize_(0)
    return y


def as_one_matrix(x_BI, shard, out_features, all_gather):
    full = gather(shard, all_gather)
    weight, bias = cut(full, out_features, x_BI.shape[1])
    y = torch.addmm(bias, x_BI, weight.t())
    full.untyped_storage().resize_(0)
    return y


# 4.4 gathered_backward


def backward(grad_y, x, shard, all_gather, reduce_scatter, *, weight=None, finish=None, fill=True):
    """The solution, with parts to replace."""
    O, I = grad_y.shape[1], x.shape[1]
    full = gather(shard, all_gather) if weight is None else None
    grad_x = grad_y @ (cut(full, O, I)[0] if weight is None else weight)
    if full is not None:
        full.untyped_storage().resize_(0)
    grad_full = shard.new_zeros(dist.get_world_size() * shard.numel())
    grad_full[: O * I] = (grad_y.T @ x).reshape(-1)
    if fill:
        grad_full[O * I : O * I + O] = grad_y.sum(0)
    return grad_x, finish(grad_full)


def scattered(reduce_scatter, shard):
    def finish(grad_full):
        own = torch.empty_like(shard)
        reduce_scatter(own, grad_full)
        return own / dist.get_world_size()

    return finish


def sums_instead_of_averaging(grad_y, x, shard, all_gather, reduce_scatter):
    grad_x, grad = backward(
        grad_y, x, shard, all_gather, reduce_scatter, finish=scattered(reduce_scatter, shard)
    )
    return grad_x, grad * dist.get_world_size()


def forgets_the_second_gather(grad_y, x, shard, all_gather, reduce_scatter):
    weight = cut(shard.repeat(dist.get_world_size()), grad_y.shape[1], x.shape[1])[0]
    finish = scattered(reduce_scatter, shard)
    return backward(grad_y, x, shard, all_gather, reduce_scatter, weight=weight, finish=finish)


def uses_what_the_forward_freed(grad_y, x, shard, all_gather, reduce_scatter):
    weight = torch.zeros(grad_y.shape[1], x.shape[1])
    finish = scattered(reduce_scatter, shard)
    return backward(grad_y, x, shard, all_gather, reduce_scatter, weight=weight, finish=finish)


def all_reduces_and_cuts(grad_y, x, shard, all_gather, reduce_scatter):
    rank, n = me()

    def finish(grad_full):
        ring_all_reduce_(grad_full)
        return grad_full.view(n, -1)[rank].clone() / n

    return backward(grad_y, x, shard, all_gather, reduce_scatter, finish=finish)


def all_reduces_with_torch(grad_y, x, shard, all_gather, reduce_scatter):
    rank, n = me()

    def finish(grad_full):
        dist.all_reduce(grad_full)
        return grad_full.view(n, -1)[rank].clone() / n

    return backward(grad_y, x, shard, all_gather, reduce_scatter, finish=finish)


def keeps_its_own_gradient(grad_y, x, shard, all_gather, reduce_scatter):
    rank, n = me()
    return backward(
        grad_y, x, shard, all_gather, reduce_scatter, finish=lambda full: full.view(n, -1)[rank].clone()
    )


def returns_the_whole_gradient(grad_y, x, shard, all_gather, reduce_scatter):
    def finish(grad_full):
        ring_all_reduce_(grad_full)
        return grad_full / dist.get_world_size()

    return backward(grad_y, x, shard, all_gather, reduce_scatter, finish=finish)


def without_the_padding(grad_y, x, shard, all_gather, reduce_scatter):
    O, I = grad_y.shape[1], x.shape[1]
    full = gather(shard, all_gather)
    grad_x = grad_y @ cut(full, O, I)[0]
    full.untyped_storage().resize_(0)
    grad_shard = torch.empty_like(shard)
    reduce_scatter(grad_shard, torch.cat([(grad_y.T @ x).reshape(-1), grad_y.sum(0)]))
    return grad_x, grad_shard / dist.get_world_size()


def in_float64(grad_y, x, shard, all_gather, reduce_scatter):
    grad_x, grad = right_backward(grad_y, x, shard, all_gather, reduce_scatter)
    return grad_x, grad.double()


def forgets_the_gradient_of_the_bias(grad_y, x, shard, all_gather, reduce_scatter):
    finish = scattered(reduce_scatter, shard)
    return backward(grad_y, x, shard, all_gather, reduce_scatter, finish=finish, fill=False)


def averages_the_bias_over_images(grad_y, x, shard, all_gather, reduce_scatter):
    O, I = grad_y.shape[1], x.shape[1]
    scatter = scattered(reduce_scatter, shard)

    def finish(grad_full):
        grad_full[O * I : O * I + O] = grad_y.mean(0)
        return scatter(grad_full)

    return backward(grad_y, x, shard, all_gather, reduce_scatter, finish=finish)


def never_frees_in_backward(grad_y, x, shard, all_gather, reduce_scatter):
    full = gather(shard, all_gather)
    weight = cut(full, grad_y.shape[1], x.shape[1])[0]
    finish = scattered(reduce_scatter, shard)
    return backward(grad_y, x, shard, all_gather, reduce_scatter, weight=weight, finish=finish)


def keeps_a_view_of_the_whole_gradient(grad_y, x, shard, all_gather, reduce_scatter):
    rank, n = me()

    def finish(grad_full):
        own = grad_full.view(n, -1)[rank]
        reduced = torch.empty_like(own)
        reduce_scatter(reduced, grad_full)
        own.copy_(reduced / n)
        return own

    return backward(grad_y, x, shard, all_gather, reduce_scatter, finish=finish)


def returns_grad_shard_only(grad_y, x, shard, all_gather, reduce_scatter):
    return right_backward(grad_y, x, shard, all_gather, reduce_scatter)[1]


def scatters_before_it_fills(grad_y, x, shard, all_gather, reduce_scatter):
    finish = scattered(reduce_scatter, shard)
    grad_x, _ = backward(grad_y, x, shard, all_gather, reduce_scatter, finish=lambda full: None)
    return grad_x, finish(shard.new_zeros(dist.get_world_size() * shard.numel()))


def right_backward(grad_y, x, shard, all_gather, reduce_scatter):
    return backward(grad_y, x, shard, all_gather, reduce_scatter, finish=scattered(reduce_scatter, shard))


def by_autograd(grad_y, x, shard, all_gather, reduce_scatter):
    full = gather(shard, all_gather)
    with torch.enable_grad():
        leaf, weights = x.detach().requires_grad_(), full.clone().requires_grad_()
        y = F.linear(leaf, *cut(weights, grad_y.shape[1], x.shape[1]))
        grad_x, grad_full = torch.autograd.grad(y, (leaf, weights), grad_y)
    full.untyped_storage().resize_(0)
    grad_shard = torch.empty_like(shard)
    reduce_scatter(grad_shard, grad_full)
    return grad_x.clone(), grad_shard.div_(dist.get_world_size())


def divides_first(grad_y, x, shard, all_gather, reduce_scatter):
    n, (O, I) = dist.get_world_size(), (grad_y.shape[1], x.shape[1])
    full = torch.empty(n * len(shard))
    all_gather(full, shard)
    grad_x = torch.einsum("bo,oi->bi", grad_y, full[: O * I].view(O, I))
    full.untyped_storage().resize_(0)
    flat = torch.cat([torch.einsum("bo,bi->oi", grad_y, x).flatten(), torch.ones(len(x)) @ grad_y]) / n
    own = torch.zeros_like(shard)
    reduce_scatter(own, F.pad(flat, (0, n * len(shard) - len(flat))))
    return [grad_x, own]


# 4.5 bytes_sent_per_step


def padded(unit_numels, n):
    return sum(-(-numel // n) * n for numel in unit_numels)


def as_data_parallel(unit_numels, world_size, reshard_after_forward=True):
    return 2 * 4 * padded(unit_numels, world_size) * (world_size - 1) // world_size


def sends_to_itself_too(unit_numels, world_size, reshard_after_forward=True):
    return (3 if reshard_after_forward else 2) * 4 * padded(unit_numels, world_size)


def sent_and_received(unit_numels, world_size, reshard_after_forward=True):
    return (
        2
        * sends_to_itself_too(unit_numels, world_size, reshard_after_forward)
        * (world_size - 1)
        / world_size
    )


def all_ranks_together(unit_numels, world_size, reshard_after_forward=True):
    return (3 if reshard_after_forward else 2) * 4 * padded(unit_numels, world_size) * (world_size - 1)


def without_padding(unit_numels, world_size, reshard_after_forward=True):
    return (3 if reshard_after_forward else 2) * 4 * sum(unit_numels) * (world_size - 1) / world_size


def pads_the_sum_only(unit_numels, world_size, reshard_after_forward=True):
    return (3 if reshard_after_forward else 2) * 4 * (world_size - 1) * -(-sum(unit_numels) // world_size)


def always_gathers_twice(unit_numels, world_size, reshard_after_forward=True):
    return 3 * 4 * padded(unit_numels, world_size) * (world_size - 1) // world_size


def as_gloo_does(unit_numels, world_size, reshard_after_forward=True):
    return (
        (4 if reshard_after_forward else 3)
        * 4
        * padded(unit_numels, world_size)
        * (world_size - 1)
        // world_size
    )


def in_elements(unit_numels, world_size, reshard_after_forward=True):
    return bytes_by_unit(unit_numels, world_size, reshard_after_forward) // 4


def bytes_by_unit(unit_numels, world_size, reshard_after_forward=True):
    sent = 0
    for numel in unit_numels:
        shard_bytes = 4 * ((numel + world_size - 1) // world_size)
        gathers = 1 + reshard_after_forward
        sent += (gathers + 1) * (world_size - 1) * shard_bytes
    return sent


def as_a_share(unit_numels, world_size, reshard_after_forward=True):
    return (2 + bool(reshard_after_forward)) * 4 * padded(unit_numels, world_size) * (1 - 1 / world_size)


WRONG = {
    "4.1": [
        (
            forgets_the_master_weights,
            r"stage 0, .*: optimizer is 60,000,000,000, expected 90,000,000,000.*4 more",
        ),
        (
            divides_the_gradients_a_stage_early,
            r"stage 1, .* 64 ranks: gradients is .*stage 1 leaves it whole",
        ),
        (begins_with_the_parameters, r"stage 1, .*: parameters is .*stage 1 leaves it whole"),
        (counts_stages_from_zero, r"stage 0, .*: optimizer is .*stage 0 leaves it whole"),
        (computes_in_float32, r"stage 0, .*: parameters is 30,000,000,000, expected 15,000,000,000"),
        (counts_the_copy_as_a_parameter, r"stage 0, .*: parameters is 45,000,000,000.*as the optimizer's"),
        (
            returns_the_total,
            r"you returned 1\d+.*, expected a dict with the keys parameters, gradients, optimizer",
        ),
        (counts_elements, r"stage 0, .*: parameters is 7,500,000,000, expected 15,000,000,000"),
    ],
    "4.2": [
        (
            forgets_the_padding,
            r"rank 3: 10 elements on 4 ranks: the shard has 1 elements, expected 3: .*padded",
        ),
        (
            pads_into_the_neighbour,
            r"rank 3: 10 elements on 4 ranks: the shard holds elements of another rank's",
        ),
        (
            rounds_down_the_start,
            r"rank 1: 10 elements on 4 ranks: the shard holds elements of another rank's",
        ),
        (uneven_shards, r"rank 2: 10 elements on 4 ranks: the shard has 2 elements, expected 3"),
        (drops_the_rest, r"rank 0: 10 elements on 4 ranks: the shard has 2 elements, expected 3"),
        (keeps_a_view, r"rank 0: 12 elements on 4 ranks: the shard is a view of the flat tensor"),
        (keeps_a_view_of_a_padded_copy, r"rank 0: .* the shard keeps \d+ bytes alive, the budget is \d+"),
        (pads_with_ones, r"rank 3: 10 elements on 4 ranks: the padding holds \[1.0, 1.0\], expected zeros"),
        (always_float32, r"the shard has dtype torch.float32, expected torch.bfloat16"),
        (every_nth_element, r"rank 0: 12 elements on 4 ranks: the shard is \[.*\], expected \["),
        (one_shard_too_far, r"rank 0: 12 elements on 4 ranks: the shard holds elements of another rank's"),
    ],
    "4.3": [
        (never_frees, r"rank 0: the gathered layer still holds 32 bytes .*expected 0.*resize_\(0\)"),
        (keeps_the_weight_for_backward, r"rank 0: \d+ bytes more than your results are still held"),
        (frees_before_computing, r"raised RuntimeError[\s\S]*storage has 0 bytes: it was freed too early"),
        (does_not_gather, r"rank 0: the forward called all_gather no times, expected once"),
        (
            takes_the_padding_for_the_bias,
            r"rank 0: the output \(world size 3, 8 parameters\).* is .*, expected",
        ),
        (bias_first, r"rank 0: the output \(world size 2, 8 parameters\).* is .*, expected"),
        (forgets_the_bias, r"rank 0: the output \(world size 2, 8 parameters\).* is .*, expected"),
        (gathers_weight_and_bias_apart, r"rank 0: the forward called all_gather twice, expected once"),
        (returns_nothing, r"rank 0: the output .* is None, expected .* `return` missing"),
        (gathers_with_torch, r"dist.all_gather is not allowed here"),
        (forgets_to_make_room, r"raised ValueError[\s\S]*output must have 2 times as many elements as input"),
    ],
    "4.4": [
        (
            sums_instead_of_averaging,
            r"rank 0: grad_shard is the sum of all ranks' gradients, 2 times too large",
        ),
        (
            forgets_the_second_gather,
            r"you called all_gather no times, .*so the backward has to gather it again",
        ),
        (uses_what_the_forward_freed, r"you called all_gather no times"),
        (all_reduces_and_cuts, r"rank 0: with world size 2 you sent 1.50 S, the budget is at most 1.00 S"),
        (all_reduces_with_torch, r"dist.all_reduce is not allowed here"),
        (keeps_its_own_gradient, r"rank 0: grad_shard comes from this rank's own images alone"),
        (returns_the_whole_gradient, r"grad_shard has shape \[8\], that of the whole layer"),
        (without_the_padding, r"raised ValueError[\s\S]*input must have 3 times as many elements as output"),
        (in_float64, r"rank 0: grad_shard .* has dtype torch.float64, expected torch.float32"),
        (
            forgets_the_gradient_of_the_bias,
            r"rank 1: grad_shard \(world size 2, 8 parameters\).* is .*, expected",
        ),
        (
            averages_the_bias_over_images,
            r"rank 1: grad_shard \(world size 2, 8 parameters\).* is .*, expected",
        ),
        (never_frees_in_backward, r"rank 0: the gathered layer still holds 32 bytes"),
        (keeps_a_view_of_the_whole_gradient, r"rank 0: \d+ bytes more than your results are still held"),
        (returns_grad_shard_only, r"rank 0: you returned .*, expected \(grad_x_BI, grad_shard\)"),
        (scatters_before_it_fills, r"rank 0: grad_shard .* is .*, expected"),
    ],
    "4.5": [
        (as_data_parallel, r"world size 5, reshard_after_forward=True: .*That is what data parallel sends"),
        (sends_to_itself_too, r"world size 5, .*need not send its own part to itself"),
        (all_ranks_together, r"world size 5, .*That is what all ranks together send"),
        (sent_and_received, r"world size 5, .*what a rank sends and receives"),
        (without_padding, r"Each unit is padded until n divides it"),
        (pads_the_sum_only, r"Each unit is padded by itself"),
        (always_gathers_twice, r"reshard_after_forward=False: .*the second gather is spared"),
        (as_gloo_does, r"world size 5, .*your number of bytes is .*, expected"),
        (in_elements, r"world size 5, .*Those are elements: float32 has 4 bytes"),
    ],
}
RIGHT = {
    "4.1": [with_a_table, rounded_up],
    "4.2": [by_padding_first, by_concatenating],
    "4.3": [in_two_steps, as_one_matrix],
    "4.4": [right_backward, by_autograd, divides_first],
    "4.5": [bytes_by_unit, as_a_share],
}
