"""Projections against matrices that are built here by another way, and what all of them promise."""

import math

import pytest
import torch

from workshop_utils.projections import KINDS, fast_hadamard_transform, make_projection

SIZES = [(1, 1), (5, 1), (37, 37), (300, 100), (1000, 10), (1000, 33)]
every_kind = pytest.mark.parametrize("kind", KINDS)


def sylvester(n: int) -> torch.Tensor:
    """H[i, j] is -1 to the number of ones that i and j have in common, in binary."""
    common = torch.arange(n)[:, None] & torch.arange(n)
    return (-1.0) ** sum((common >> bit) & 1 for bit in range(n.bit_length())).double()


@pytest.mark.parametrize("n", [1, 2, 4, 32, 64, 256, 2048])
def test_hadamard_transform_is_sylvesters_matrix(n):
    x = torch.randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(fast_hadamard_transform(x), x @ sylvester(n))
    torch.testing.assert_close(fast_hadamard_transform(fast_hadamard_transform(x)), n * x)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_transform_has_the_right_gradient(n):
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast_hadamard_transform, x)
    assert torch.autograd.gradgradcheck(fast_hadamard_transform, x)


@pytest.mark.parametrize("shape", [(3,), (8, 6), (0,), ()])
def test_hadamard_transform_needs_a_power_of_two(shape):
    with pytest.raises(ValueError, match="power of two, got shape"):
        fast_hadamard_transform(torch.zeros(shape))


def explicit(P) -> torch.Tensor:
    """P [D, d] from what was drawn, with loops and dense matrices; columns divided by their norms at the end."""
    if P.kind == "dense":
        matrix = P.matrix.double()
    elif P.kind == "fastfood":
        H = sylvester(P.m)
        blocks = []
        for signs, permutation, normal in zip(P.signs, P.permutation, P.normal, strict=True):
            Pi = torch.zeros(P.m, P.m, dtype=torch.float64)
            Pi[range(P.m), permutation] = 1
            blocks.append(H @ normal.double().diag() @ Pi @ H @ signs.double().diag())
        matrix = torch.cat(blocks)[: P.D, : P.d]
    else:
        rows = P.rows.tolist() if P.kind == "sparse" else range(P.D)
        matrix = torch.zeros(P.D, P.d, dtype=torch.float64)
        for row, column in zip(rows, P.columns.tolist(), strict=True):
            assert matrix[row, column % P.d] == 0
            matrix[row, column % P.d] = 1 if column < P.d else -1
    return matrix / matrix.square().sum(0).sqrt()


@every_kind
@pytest.mark.parametrize("D,d", SIZES)
def test_product_and_transpose_are_those_of_the_explicit_matrix(kind, D, d):
    P = make_projection(kind, D, d, seed=3).double()
    matrix, theta_d, g = explicit(P), torch.randn(d).double(), torch.randn(D).double()
    torch.testing.assert_close(P(theta_d), matrix @ theta_d, atol=1e-6, rtol=0)
    torch.testing.assert_close(P.transposed(g), matrix.T @ g, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(P.as_matrix(), matrix, atol=1e-6, rtol=0)


@every_kind
@pytest.mark.parametrize("D,d", [*SIZES, (2000, 300), (4097, 64)])
def test_every_column_has_norm_1_over_all_rows(kind, D, d):
    norms = make_projection(kind, D, d, seed=0).double().as_matrix().norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(d).double(), atol=2e-7, rtol=0)


def test_norms_of_a_large_cropped_fastfood_block_are_close_to_1(monkeypatch):
    monkeypatch.setattr("workshop_utils.projections._EXACT_NORMS_UP_TO", 0)
    P = make_projection("fastfood", 20_000, 150, seed=0)  # m = 256, the last block has 32 of 256 rows
    norms = torch.stack([P(unit).norm() for unit in torch.eye(150)])
    assert 0 < (norms - 1).abs().max() < 4 / math.sqrt(2 * 20_000)


@every_kind
def test_gradients_by_finite_differences(kind):
    P = make_projection(kind, 50, 7, seed=0).double()
    theta_d = torch.randn(7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(P, theta_d) and torch.autograd.gradgradcheck(P, theta_d)
    assert torch.autograd.gradcheck(P.transposed, g)


@every_kind
def test_lengths_are_about_kept(kind):
    x = torch.randn(60)
    assert make_projection(kind, 20_000, 60, seed=0)(x).norm() / x.norm() == pytest.approx(1, abs=0.06)


@every_kind
def test_the_seed_decides_and_the_global_random_numbers_stay(kind):
    before = torch.get_rng_state()
    first, again, other = (make_projection(kind, 300, 20, seed) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert first.as_matrix().equal(again.as_matrix()) and first.fingerprint == again.fingerprint
    assert not first.as_matrix().equal(other.as_matrix()) and first.fingerprint != other.fingerprint


def test_fingerprints_differ_between_kinds_and_sizes():
    prints = {make_projection(kind, D, d, 0).fingerprint for kind in KINDS for D, d in SIZES[1:]}
    assert len(prints) == len(KINDS) * len(SIZES[1:])


def test_p_shares_no_random_numbers_with_a_model_of_the_same_seed():
    torch.manual_seed(0)
    of_model = torch.randn(1000)
    matrix = make_projection("dense", 1000, 1, seed=0).matrix[:, 0]
    assert torch.corrcoef(torch.stack([of_model, matrix]))[0, 1].abs() < 0.2


@every_kind
def test_p_is_no_parameter_and_in_no_checkpoint(kind):
    P = make_projection(kind, 40, 5, seed=0)
    assert list(P.parameters()) == [] and P.state_dict() == {}
    assert P.to(torch.float64)(torch.zeros(5).double()).dtype == torch.float64


def test_sparse_has_the_density_of_li_et_al():
    P = make_projection("sparse", 10_000, 500, seed=0)
    assert len(P.rows) / (10_000 * 500) == pytest.approx(1 / math.sqrt(10_000), rel=0.02)
    assert (P.columns < 500).float().mean() == pytest.approx(0.5, abs=0.02)
    per_row = torch.bincount(P.rows, minlength=10_000).double()
    mean, variance = per_row.mean().item(), per_row.var().item()
    assert mean == pytest.approx(variance, rel=0.1)  # Poisson: rows are independent


@pytest.mark.parametrize("D,d", [(1000, 10), (1003, 10), (50, 50), (50, 49)])
def test_one_hot_reads_every_coordinate_equally_often_and_is_isometric(D, d):
    P = make_projection("one_hot", D, d, seed=0).double()
    counts = torch.bincount(P.columns % d, minlength=d)
    assert counts.sum() == D and counts.max() - counts.min() <= 1
    matrix = P.as_matrix()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(d).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind,D,d,error,match", [
    ("Dense", 10, 2, ValueError, "one of dense, sparse, fastfood, one_hot; got 'Dense'"),
    ("sparse", 10, 0, ValueError, "d must be from 1 to the number of parameters, D = 10; got d = 0"),
    ("one_hot", 10, 11, ValueError, "got d = 11"),
    ("dense", 10, 2.0, TypeError, "d must be a whole number, got 2.0"),
])  # fmt: skip
def test_bad_arguments_are_named(kind, D, d, error, match):
    with pytest.raises(error, match=match):
        make_projection(kind, D, d, seed=0)


def test_theta_d_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"theta_d must have shape \[5\], got \[4\]"):
        make_projection("one_hot", 10, 5, seed=0)(torch.zeros(4))
