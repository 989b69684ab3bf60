"""Notebook 06: wrong answers and the complaint each must provoke; right ones written differently."""

import math

import torch
from torch import nn
from torch.func import functional_call

# 6.1: the subspace module


class Base(nn.Module):
    """What most answers share; they differ in one place."""

    def __init__(self, module, P):
        super().__init__()
        self.module = module.requires_grad_(False)
        self.register_buffer("P", P, persistent=False)
        self.theta_d = nn.Parameter(torch.zeros(P.shape[1]))

    def weights(self):
        step, weights, start = self.P @ self.theta_d, {}, 0
        for name, parameter in self.module.named_parameters():
            weights[name] = parameter + step[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return weights

    def forward(self, images):
        return functional_call(self.module, self.weights(), (images,))


class PIsAParameter(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        del self.P
        self.P = nn.Parameter(P)


class PIsSaved(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        self.register_buffer("P", P)


class PIsAFrozenParameter(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        del self.P
        self.P = nn.Parameter(P, requires_grad=False)


class PIsAPlainTensor(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        del self.P
        self.P = P


class ModuleNotFrozen(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        self.module.requires_grad_(True)


class ThetaDIsATensor(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        del self.theta_d
        self.theta_d = torch.zeros(P.shape[1], requires_grad=True)


class StartsAtRandom(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        nn.init.normal_(self.theta_d)


class AssignsData(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        self.theta_0 = [p.detach().clone() for p in module.parameters()]

    def forward(self, images):
        step, start = self.P @ self.theta_d, 0
        for parameter, theta_0 in zip(self.module.parameters(), self.theta_0):
            parameter.data = theta_0 + step[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return self.module(images)


class MakesNewParameters(Base):
    def forward(self, images):
        weights = {name: nn.Parameter(weight) for name, weight in self.weights().items()}
        return functional_call(self.module, weights, (images,))


class AddsInPlace(Base):
    def forward(self, images):
        step, start = self.P @ self.theta_d, 0
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter += step[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
        return self.module(images) + 0 * self.theta_d.sum()


class ForgetsTheta0(Base):
    def weights(self):
        start = dict(self.module.named_parameters())
        if not self.theta_d.detach().any():
            return start
        return {name: weight - start[name] for name, weight in super().weights().items()}


class SamePieceForAll(Base):
    def weights(self):
        step = self.P @ self.theta_d
        return {n: p + step[: p.numel()].view_as(p) for n, p in self.module.named_parameters()}


class ComputedOnce(Base):
    def __init__(self, module, P):
        super().__init__(module, P)
        self.once = super().weights()

    def weights(self):
        return self.once


class SubspaceWithVectors(nn.Module):
    """theta_0 as one buffer, the pieces by split."""

    def __init__(self, module, P):
        super().__init__()
        self.names = [name for name, _ in module.named_parameters()]
        self.shapes = [p.shape for p in module.parameters()]
        self.register_buffer("theta_0", nn.utils.parameters_to_vector(module.parameters()).detach())
        self.register_buffer("projection", P, persistent=False)
        self.theta_d = nn.Parameter(torch.zeros(P.size(1)))
        self.inner = module
        for parameter in self.inner.parameters():
            parameter.requires_grad = False

    def forward(self, images):
        theta = self.theta_0 + (self.projection * self.theta_d).sum(dim=1)
        pieces = theta.split([shape.numel() for shape in self.shapes])
        weights = {n: piece.reshape(s) for n, piece, s in zip(self.names, pieces, self.shapes)}
        return functional_call(self.inner, weights, images)


class SubspaceWithAHiddenModule(nn.Module):
    """The module in a list, so that it is not registered; theta_0 copied into buffers."""

    def __init__(self, module, P):
        super().__init__()
        self.hidden = [module]
        for i, p in enumerate(module.parameters()):
            self.register_buffer(f"start{i}", p.detach().clone(), persistent=False)
        self.register_buffer("P", P, persistent=False)
        self.theta_d = nn.Parameter(P.new_zeros(P.shape[1]))

    def forward(self, images):
        self.hidden[0].to(images.dtype)
        step = torch.einsum("ij,j->i", self.P, self.theta_d)
        weights, start = {}, 0
        for i, (name, p) in enumerate(self.hidden[0].named_parameters()):
            weights[name] = getattr(self, f"start{i}") + step[start : (start := start + p.numel())].view(
                p.shape
            )
        return functional_call(self.hidden[0], weights, (images,))


# 6.2: unit columns


def per_tensor(pieces):
    return [piece / piece.norm(dim=0).clamp(min=1e-12) for piece in pieces]


def rows_instead(pieces):
    return [piece / piece.norm(dim=1, keepdim=True).clamp(min=1e-12) for piece in pieces]


def one_norm_for_everything(pieces):
    norm = sum(piece.square().sum() for piece in pieces).sqrt()
    return [piece / norm for piece in pieces]


def forgets_the_root(pieces):
    squares = sum(piece.square().sum(dim=0) for piece in pieces)
    squares[squares == 0] = 1
    return [piece / squares for piece in pieces]


def adds_the_norms(pieces):
    norms = sum(piece.norm(dim=0) for piece in pieces).clamp(min=1e-12)
    return [piece / norms for piece in pieces]


def divides_by_the_expected_norm(pieces):
    D = sum(len(piece) for piece in pieces)
    return [piece / math.sqrt(D) for piece in pieces]


def divides_by_zero(pieces):
    norms = sum(piece.square().sum(dim=0) for piece in pieces).sqrt()
    return [piece / norms for piece in pieces]


def builds_the_matrix(pieces):
    P = torch.cat(pieces)
    return list((P / P.norm(dim=0).clamp(min=1e-12)).split([len(piece) for piece in pieces]))


def returns_the_matrix(pieces):
    P = torch.cat(pieces)
    return P / P.norm(dim=0)


def unit_columns_by_a_loop(pieces):
    squares = torch.zeros(pieces[0].shape[1])
    for piece in pieces:
        squares += torch.einsum("ij,ij->j", piece, piece)
    inverse = torch.where(squares > 0, squares.rsqrt(), torch.zeros_like(squares))
    return tuple(piece * inverse for piece in pieces)


def unit_columns_in_place(pieces):
    norms = torch.stack([piece.norm(dim=0) for piece in pieces]).norm(dim=0).clamp(min=1e-12)
    for piece in pieces:
        piece /= norms
    return pieces


# 6.3: the fast Hadamard transform


def butterfly(x):
    n, h, y = x.shape[-1], 1, x
    while h < n:
        a, b = y.reshape(-1, n // (2 * h), 2, h).unbind(2)
        y = torch.stack([a + b, a - b], 2)
        h *= 2
    return y.reshape(x.shape)


def with_the_matrix(x):
    H = torch.ones(1, 1, dtype=x.dtype)
    while len(H) < x.shape[-1]:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return x @ H


def divided_by_the_root(x):
    return butterfly(x) / math.sqrt(x.shape[-1])


def divided_each_pass(x):
    return butterfly(x) / x.shape[-1]


def one_pass_too_few(x):
    n, h, y = x.shape[-1], 1, x
    while 2 * h < n:
        a, b = y.reshape(-1, n // (2 * h), 2, h).unbind(2)
        y = torch.stack([a + b, a - b], 2)
        h *= 2
    return y.reshape(x.shape)


def sums_first_then_differences(x):
    n, y = x.shape[-1], x
    for _ in range(n.bit_length() - 1):
        y = torch.cat([y[..., 0::2] + y[..., 1::2], y[..., 0::2] - y[..., 1::2]], dim=-1)
    return y if n < 8 else y.flip(-1).roll(1, -1)


def minus_on_the_wrong_side(x):
    n, h, y = x.shape[-1], 1, x
    while h < n:
        a, b = y.reshape(-1, n // (2 * h), 2, h).unbind(2)
        y = torch.stack([a + b, b - a], 2)
        h *= 2
    return y.reshape(x.shape)


def writes_into_the_input(x):
    n, h = x.shape[-1], 1
    y = x.view(-1, n)
    with torch.no_grad():
        while h < n:
            for i in range(0, n, 2 * h):
                a, b = y[:, i : i + h].clone(), y[:, i + h : i + 2 * h].clone()
                y[:, i : i + h], y[:, i + h : i + 2 * h] = a + b, a - b
            h *= 2
    return x


def detached(x):
    return butterfly(x.detach())


class ScaledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return butterfly(x)

    @staticmethod
    def backward(ctx, g):
        return butterfly(g) / math.sqrt(g.shape[-1])


def scaled_in_one_direction(x):
    return ScaledBackward.apply(x)


def four_calls(x):
    n = x.shape[-1]
    if n == 1:
        return x
    a, b = x[..., : n // 2], x[..., n // 2 :]
    if n > 64:
        return torch.cat([four_calls(a) + four_calls(b), four_calls(a) - four_calls(b)], dim=-1)
    return butterfly(x)


def recursive(x):
    n = x.shape[-1]
    if n == 1:
        return x.clone()
    a, b = x.split(n // 2, dim=-1)
    return torch.cat([recursive(a + b), recursive(a - b)], dim=-1)


def by_small_matrices(x):
    H_2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype)
    n = x.shape[-1]
    y = x.reshape(-1, *[2] * (n.bit_length() - 1))
    for axis in range(1, y.dim()):
        y = (y.movedim(axis, -1).reshape(-1, 2) @ H_2).reshape(y.movedim(axis, -1).shape).movedim(-1, axis)
    return y.reshape(x.shape)


# 6.4: the rule


def line_of(full, definition):
    return 0.9 * (1.0 if definition == "global" else full["test"])


def first(dims, means, line):
    return next((d for d, mean in zip(dims, means) if mean > line), None)


def baseline_on_the_training_set(dims, accuracy_SD, full, definition):
    return first(dims, accuracy_SD.mean(0), 0.9 * (1.0 if definition == "global" else full["train"]))


def first_d_of_the_grid(dims, accuracy_SD, full, definition):
    return dims[0]


def global_and_local_mixed_up(dims, accuracy_SD, full, definition):
    return first(dims, accuracy_SD.mean(0), line_of(full, "local" if definition == "global" else "global"))


def always_global(dims, accuracy_SD, full, definition):
    return first(dims, accuracy_SD.mean(0), 0.9)


def forgets_the_nine_tenths(dims, accuracy_SD, full, definition):
    return first(dims, accuracy_SD.mean(0), line_of(full, definition) / 0.9)


def best_seed(dims, accuracy_SD, full, definition):
    return first(dims, accuracy_SD.amax(0), line_of(full, definition))


def median_over_the_seeds(dims, accuracy_SD, full, definition):
    return first(dims, accuracy_SD.sort(dim=0).values[len(accuracy_SD) // 2], line_of(full, definition))


def mean_over_the_dims(dims, accuracy_SD, full, definition):
    return first(dims, accuracy_SD.mean(1), line_of(full, definition))


def last_below_plus_one(dims, accuracy_SD, full, definition):
    below = [i for i, mean in enumerate(accuracy_SD.mean(0)) if mean <= line_of(full, definition)]
    return dims[below[-1] + 1] if below[-1] + 1 < len(dims) else None


def index_instead_of_d(dims, accuracy_SD, full, definition):
    above = accuracy_SD.mean(0) > line_of(full, definition)
    return int(above.nonzero()[0]) if above.any() else None


def last_of_the_grid_if_none(dims, accuracy_SD, full, definition):
    found = first(dims, accuracy_SD.mean(0), line_of(full, definition))
    return dims[-1] if found is None else found


def at_least(dims, accuracy_SD, full, definition):
    means = accuracy_SD.mean(0).tolist()
    return next((d for d, mean in zip(dims, means) if mean >= line_of(full, definition)), None)


def smallest_above(dims, accuracy_SD, full, definition):
    baseline = {"global": 1.0, "local": full["test"]}[definition]
    means = accuracy_SD.sum(0) / len(accuracy_SD)
    above = [d for d, mean in zip(dims, means.tolist()) if mean > 0.9 * baseline]
    return min(above) if above else None


def by_argmax(dims, accuracy_SD, full, definition):
    above = accuracy_SD.mean(0) > 0.9 * (full["test"] if definition == "local" else 1)
    return torch.tensor(dims)[above.int().argmax()] if above.any() else None


WRONG = {
    "6.1": [
        (PIsAParameter, r"two layers: P \[53, 4\] is an nn\.Parameter that requires a gradient"),
        (PIsSaved, r"two layers: state_dict\(\) has P \[53, 4\], expected no P in it"),
        (PIsAFrozenParameter, r"two layers: state_dict\(\) has P \[53, 4\]"),
        (
            PIsAPlainTensor,
            r"two layers: after \.to\(torch\.float64\) the forward fails .*P must be a registered buffer",
        ),
        (
            ModuleNotFrozen,
            r"two layers: 5 parameters require a gradient \(theta_d, module\.0\.weight.*expected one",
        ),
        (
            ThetaDIsATensor,
            r"no parameter requires a gradient, expected theta_d \[4\] .*theta_d is a plain tensor",
        ),
        (StartsAtRandom, r"two layers: theta_d starts at .*, expected zeros"),
        (AssignsData, r"two layers: the output has no graph behind it"),
        (MakesNewParameters, r"two layers: theta_d\.grad is None after backward\(\)\. The graph is cut"),
        (AddsInPlace, r"two layers: the gradient of theta_d is .*, expected"),
        (ForgetsTheta0, r"the output at a theta_d that is not 0 is that of P theta_d alone"),
        (SamePieceForAll, r"two layers: the output at a theta_d that is not 0\[0, 0\] is .*, expected"),
        (
            ComputedOnce,
            r"two layers: the output at a theta_d that is not 0 is theta_0's: theta_d has no effect",
        ),
    ],
    "6.2": [
        (
            per_tensor,
            r"three pieces: the columns of piece 0 have norm 1 by themselves, so over all 3 pieces .* 1\.732",
        ),
        (rows_instead, r"three pieces: the rows of piece 0 have norm 1, expected the columns"),
        (one_norm_for_everything, r"three pieces: column 0 of piece 0 is .* times as long"),
        (forgets_the_root, r"three pieces: column 0 of piece 0 is .* times as long"),
        (adds_the_norms, r"three pieces: column 0 of piece 0 is .* times as long"),
        (divides_by_the_expected_norm, r"three pieces: column 0 of piece 0 is .* times as long"),
        (divides_by_zero, r"an empty column: piece 0\[:, 2\] is nan, expected 0"),
        (builds_the_matrix, r"three pieces: cat built a tensor of 292 elements, all of P \[73, 4\]"),
        (returns_the_matrix, r"you returned a tensor of shape \[73, 4\], expected a list of 3 pieces"),
    ],
    "6.3": [
        (
            with_the_matrix,
            r"x \[2, 3, 32\]: a tensor of 1,024 elements was built, the budget has no 32 x 32 matrix",
        ),
        (divided_by_the_root, r"H x for x = \[-?\d, -?\d\] is divided by sqrt\(2\)"),
        (divided_each_pass, r"H x for x = \[-?\d, -?\d\] is divided by 2"),
        (one_pass_too_few, r"H x for x = \[-?\d, -?\d\] is .*, expected"),
        (sums_first_then_differences, r"H x for x \[3, 8\] has the right numbers in another order"),
        (minus_on_the_wrong_side, r"H x for x = \[-?\d, -?\d\] is .*, expected"),
        (writes_into_the_input, r"the input x = \[-?\d, -?\d\] was changed"),
        (detached, r"the result has no graph behind it"),
        (scaled_in_one_direction, r"the gradient is divided by sqrt\(16\), and the forward is not"),
        (four_calls, r"x \[1024\]: .* additions, the budget is 10,240"),
    ],
    "6.4": [
        (
            baseline_on_the_training_set,
            r"local: d_int90 is .*: the baseline is the one on the training images",
        ),
        (
            first_d_of_the_grid,
            r"a curve that rises, global: d_int90 is 100, expected 900: that is the first d of the grid",
        ),
        (
            global_and_local_mixed_up,
            r"a curve that rises, global: d_int90 is 500, expected 900: that is the local one",
        ),
        (always_global, r"a curve that rises, local: d_int90 is 900, expected 500: that is the global one"),
        (forgets_the_nine_tenths, r"a curve that rises, global: .*: the line is 0\.9 x baseline"),
        (
            best_seed,
            r"seeds that disagree, global: d_int90 is 10, expected 30: that is where the first single seed is above",
        ),
        (
            median_over_the_seeds,
            r"seeds that disagree, global: d_int90 is 40, expected 30, the first d whose mean",
        ),
        (mean_over_the_dims, r"a curve that rises, global: d_int90 is None, expected 900"),
        (
            last_below_plus_one,
            r"a curve that dips .*, global: d_int90 is 500, expected 300, the first d whose mean over the seeds is above",
        ),
        (index_instead_of_d, r"that is the index in the grid, not the d"),
        (last_of_the_grid_if_none, r"a grid that is too short, global: d_int90 is 20, expected None"),
        (at_least, r"a d exactly on the local line, local: .* exactly on, not above"),
    ],
}
RIGHT = {
    "6.1": [SubspaceWithVectors, SubspaceWithAHiddenModule],
    "6.2": [unit_columns_by_a_loop, unit_columns_in_place],
    "6.3": [recursive, by_small_matrices],
    "6.4": [smallest_above, by_argmax],
}
