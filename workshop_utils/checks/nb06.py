"""Checks of notebook 06, intrinsic dimension.

Expected values come from matrices that are built entry by entry here, and from the full gradient of a copy of the model.

Shape letters: D parameters, d directions, S seeds, n the length of a vector that is transformed.
"""

import copy
import math

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from workshop_utils.checks import Wrong, exercise, expect_close, expect_unchanged, subspaces

# 6.1


@exercise("6.1")
def check_subspace(answer):
    """`answer(module, P)` is a module: theta = theta_0 + P theta_d."""
    for case, make in {"two layers": subspaces.two_layers, "a batch norm": subspaces.with_batch_norm}.items():
        module = make()
        D, d = sum(p.numel() for p in module.parameters()), 4
        P = torch.randn(D, d, generator=torch.Generator().manual_seed(2)) / math.sqrt(D)
        built = answer(copy.deepcopy(module), P.clone())
        theta_d = subspaces.only_trained(case, built, D, d)
        subspaces.expect_p_not_saved(case, built, D, d)
        images = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
        expect_close(
            built(images), module(images), name=f"{case}: the output at theta_d = 0", **subspaces.CLOSE
        )
        subspaces.compare_moved(case, built, theta_d, module, P, images)
        subspaces.expect_it_follows(case, built, images)
    return "one trained parameter, P neither trained nor saved, and theta_d's gradient is P^T times the full gradient"


# 6.2


@exercise("6.2")
def check_unit_columns(answer):
    """`answer(pieces)`: the pieces [D_i, d], every column of norm 1 over all of them."""
    for case, sizes, d, empty in (
        ("three pieces", (20, 3, 50), 4, None),
        ("an empty column", (2, 30, 5, 1), 6, 2),
    ):
        generator = torch.Generator().manual_seed(d)
        pieces = [torch.randn(size, d, generator=generator) * (i + 1) for i, size in enumerate(sizes)]
        if empty is not None:
            for piece in pieces:
                piece[:, empty] = 0
        norms = [math.sqrt(sum(x * x for piece in pieces for x in piece[:, j].tolist())) for j in range(d)]
        wanted = [piece / torch.tensor([norm or 1.0 for norm in norms]) for piece in pieces]
        with _LargestResult() as seen:
            got = answer([piece.clone() for piece in pieces])
        _compare_pieces(case, got, wanted, pieces, empty)
        if seen.numel >= sum(sizes) * d:
            raise Wrong(
                f"{case}: {seen.name} built a tensor of {seen.numel} elements, all of P [{sum(sizes)}, {d}]."
                " The budget is one piece at a time"
            )
    return "every column has norm 1 over all pieces, and an empty one stays zero"


def _compare_pieces(case, got, wanted, pieces, empty):
    if isinstance(got, torch.Tensor) or not isinstance(got, (list, tuple)) or len(got) != len(wanted):
        shown = f"a tensor of shape {list(got.shape)}" if isinstance(got, torch.Tensor) else f"{got!r:.60}"
        raise Wrong(f"{case}: you returned {shown}, expected a list of {len(wanted)} pieces")
    for i, (piece, right) in enumerate(zip(got, wanted)):
        if isinstance(piece, torch.Tensor) and piece.shape == right.shape:
            if empty is not None and piece[:, empty].isnan().any():
                raise Wrong(
                    f"{case}: piece {i}[:, {empty}] is nan, expected 0: its norm is 0, do not divide by it"
                )
            _explain_scale(case, i, piece, right, pieces)
        expect_close(piece, right, name=f"{case}: piece {i}")


def _explain_scale(case, i, piece, right, pieces):
    norms = piece.norm(dim=0)
    if torch.allclose(piece, right, rtol=1e-5, atol=1e-6):
        return
    used = right.norm(dim=0) > 0
    if torch.allclose(norms[used], torch.ones(int(used.sum())), atol=1e-4):
        raise Wrong(
            f"{case}: the columns of piece {i} have norm 1 by themselves, so over all {len(pieces)} pieces the norm is"
            f" {math.sqrt(len(pieces)):.3f}, expected 1: per tensor is not over all D"
        )
    if torch.allclose(piece.norm(dim=1), torch.ones(len(piece)), atol=1e-4) and len(piece) > 1:
        raise Wrong(
            f"{case}: the rows of piece {i} have norm 1, expected the columns: which dimension is summed?"
        )
    column = int(used.nonzero()[0])
    ratio = (norms / right.norm(dim=0).clamp(min=1e-12))[column].item()
    raise Wrong(
        f"{case}: column {column} of piece {i} is {ratio:.4g} times as long as it must be for a norm of 1 over all pieces"
    )


class _LargestResult(TorchFunctionMode):
    """The largest tensor that a call of torch returned inside, and the call."""

    def __init__(self):
        super().__init__()
        self.numel, self.name = 0, ""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() > self.numel:
            self.numel, self.name = result.numel(), function.__name__
        return result


# 6.3


@exercise("6.3")
def check_fast_hadamard_transform(answer):
    """`answer(x)` is H x along the last dimension, in n log2 n additions."""
    for shape in ((2,), (4,), (1,), (3, 8), (2, 3, 32), (1024,)):
        generator = torch.Generator().manual_seed(shape[-1])
        x = torch.randint(-9, 10, shape, generator=generator).double()
        H, before = _hadamard_matrix(shape[-1]), x.clone()
        name = f"x = {x.int().tolist()}" if x.numel() <= 4 else f"x {list(shape)}"
        with _Additions() as counted:
            got = answer(x)
        expect_unchanged(x, before, name=f"the input {name}")
        if isinstance(got, torch.Tensor) and got.shape == x.shape:
            _explain_transform(name, got, before, H)
        expect_close(got, before @ H, name=f"H x for {name}", rtol=1e-9, atol=1e-9)
        _expect_hadamard_budget(shape, counted)
    _expect_gradient(answer)
    return "the sums are right, the gradient is H times the gradient, and 1,024 numbers take 10,240 additions"


def _hadamard_matrix(n):
    """H[i, j] = -1 to the number of bits that i and j share."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=torch.float64)


def _explain_transform(name, got, x, H):
    n = x.shape[-1]
    wanted = x @ H
    if n < 2 or torch.allclose(got, wanted):
        return
    for scale, by in ((1 / math.sqrt(n), f"sqrt({n})"), (1 / n, str(n))):
        if torch.allclose(got, wanted * scale):
            raise Wrong(f"H x for {name} is divided by {by}: nothing is divided in H itself")
    if n > 2 and torch.allclose(got.sort(-1).values, wanted.sort(-1).values):
        raise Wrong(
            f"H x for {name} has the right numbers in another order: a pass replaces a and b in their places"
        )
    if n > 2 and torch.allclose(got[..., 0], wanted[..., 0]):
        raise Wrong(
            f"H x for {name}: element 0 is the sum of x, as it should be; the signs elsewhere are not H's"
        )


def _expect_hadamard_budget(shape, counted):
    n, vectors = shape[-1], math.prod(shape[:-1])
    if n < 32:
        return
    if counted.largest >= n * n:
        raise Wrong(
            f"x {list(shape)}: a tensor of {counted.largest:,} elements was built, the budget has no {n} x {n} matrix"
        )
    budget = vectors * n * int(math.log2(n))
    if counted.additions > budget:
        raise Wrong(
            f"x {list(shape)}: {counted.additions:,} additions, the budget is {budget:,} = n log2 n per vector"
        )


def _expect_gradient(answer):
    n = 16
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = answer(x)
    if not result.requires_grad:
        raise Wrong("the result has no graph behind it: theta_d would get no gradient through it")
    (got,) = torch.autograd.grad(result, x, g)
    wanted = g @ _hadamard_matrix(n)
    for scale, by in ((1 / math.sqrt(n), f"sqrt({n})"), (1 / n, str(n))):
        if torch.allclose(got, wanted * scale):
            raise Wrong(
                f"the gradient is divided by {by}, and the forward is not: both are H, without any factor"
            )
    expect_close(got, wanted, name=f"the gradient for n = {n}", rtol=1e-9, atol=1e-9)


class _Additions(TorchDispatchMode):
    """Counts additions and subtractions of elements, those inside matrix products too, and the largest tensor."""

    def __init__(self):
        super().__init__()
        self.additions, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if name.rstrip("_") in ("add", "sub", "rsub"):
                self.additions += result.numel()
            elif name in ("mm", "bmm", "mv", "dot"):
                self.additions += result.numel() * (args[0].shape[-1] - 1)
            elif name in ("sum", "cumsum"):
                self.additions += args[0].numel() - (result.numel() if name == "sum" else 0)
        return result


# 6.4


@exercise("6.4")
def check_first_d_above(answer):
    """`answer(dims, accuracy_SD, full, definition)` is d_int90."""
    for case, dims, rows, full in _CURVES:
        accuracy = torch.tensor(rows, dtype=torch.float64)
        for definition in ("global", "local"):
            wanted = _first_above(dims, rows, 0.9 * (1.0 if definition == "global" else full["test"]))
            got = answer(list(dims), accuracy.clone(), dict(full), definition)
            got = got.item() if isinstance(got, torch.Tensor) and got.numel() == 1 else got
            if got != wanted or (got is not None and isinstance(got, bool)):
                raise Wrong(f"{case}, {definition}: {_explain_d(got, wanted, dims, rows, full, definition)}")
    return "global and local, the mean over the seeds, the first d above the line, and None if there is none"


_CURVES = [  # case, dims, accuracy [S, d], full training
    (
        "a curve that rises",
        [100, 300, 500, 700, 900],
        [[0.60, 0.80, 0.86, 0.89, 0.93], [0.62, 0.82, 0.892, 0.895, 0.95]],
        {"train": 0.99, "test": 0.95},
    ),
    (
        "a curve that dips after it has crossed",
        [100, 200, 300, 400, 500],
        [[0.50, 0.85, 0.93, 0.88, 0.95], [0.52, 0.87, 0.91, 0.89, 0.97]],
        {"train": 1.0, "test": 0.94},
    ),
    (
        "seeds that disagree",
        [10, 20, 30, 40],
        [[0.91, 0.91, 0.97, 0.99], [0.50, 0.85, 0.90, 0.95], [0.60, 0.88, 0.89, 0.96]],
        {"train": 0.999, "test": 0.96},
    ),
    (
        "a grid that is too short",
        [5, 10, 20],
        [[0.1, 0.2, 0.3], [0.1, 0.2, 0.4]],
        {"train": 1.0, "test": 0.9},
    ),
    ("a d exactly on the local line", [5, 10, 20], [[0.1, 0.45, 0.5]], {"train": 0.6, "test": 0.5}),
]


def _first_above(dims, rows, line):
    means = [sum(column) / len(column) for column in zip(*rows)]
    for d, mean in zip(dims, means):
        if mean > line:
            return d
    return None


def _explain_d(got, wanted, dims, rows, full, definition):
    said = f"d_int90 is {got!r:.40}, expected {wanted}"
    local, other = 0.9 * full["test"], "local" if definition == "global" else "global"
    line = 0.9 if definition == "global" else local
    means = [sum(column) / len(column) for column in zip(*rows)]
    if isinstance(got, int) and got not in dims and wanted is not None and got == dims.index(wanted):
        return f"{said}: that is the index in the grid, not the d"
    if definition == "local" and got == _first_above(dims, rows, 0.9 * full["train"]):
        return f"{said}: the baseline is the one on the training images, and accuracy_SD is on test images"
    if got == _first_above(dims, rows, local if definition == "global" else 0.9):
        return f"{said}: that is the {other} one"
    if got == _first_above(dims, rows, line / 0.9):
        return f"{said}: the line is 0.9 x baseline, not the baseline"
    best = [[max(column) for column in zip(*rows)]]
    if (
        len(rows) > 1
        and got in dims
        and means[dims.index(got)] <= line
        and got == _first_above(dims, best, line)
    ):
        return f"{said}: that is where the first single seed is above, and the rule takes the mean over the seeds"
    if got == dims[0]:
        return (
            f"{said}: that is the first d of the grid, whose mean accuracy {means[0]:.3f} is below {line:.3f}"
        )
    if got in dims:
        mean = means[dims.index(got)]
        if mean > line:
            return f"{said}, the first d whose mean over the seeds is above {line:.3f}"
        where = "exactly on, not above," if mean == line else "not above"
        return f"{said}: at {got} the mean over the seeds is {mean:.4g}, {where} {line:.4g}"
    return said
