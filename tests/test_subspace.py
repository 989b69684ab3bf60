"""RandomSubspace against the formula with an explicit P, its file, and the toy whose answer is known."""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from workshop_utils.lora import apply_lora
from workshop_utils.models import MLP
from workshop_utils.projections import KINDS
from workshop_utils.subspace import RandomSubspace, SubspaceFileError, load_subspace, save_subspace


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def seeded(make, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def move_(model: RandomSubspace) -> RandomSubspace:
    """theta_d somewhere else than 0."""
    with torch.no_grad():
        model.theta_d.copy_(torch.randn(model.d, generator=torch.Generator().manual_seed(5)))
    return model


X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])


# The idea: a toy whose intrinsic dimension is 10


class Sums(nn.Module):
    """1,000 parameters; the loss asks ten groups of 100 to sum to 1, 2, ... 10 (Li et al. 2018, section 2)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1000))

    def forward(self):
        wanted = torch.arange(1, 11, dtype=self.weight.dtype)
        return (self.weight.view(10, 100).sum(1) - wanted).square().sum()


@pytest.mark.parametrize("kind", ["dense", "fastfood"])
def test_the_toy_is_solved_with_ten_dimensions_and_not_with_nine(kind):
    least = {}
    for d in (9, 10):
        model = RandomSubspace(seeded(Sums), d, projection=kind, seed=1).double()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-14, tolerance_change=1e-18)  # fmt: skip

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            return loss

        optimizer.step(closure)
        least[d] = model().item()
    assert least[10] < 1e-12
    assert least[9] > 1e-2


# theta_0 + P theta_d


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradient_are_those_of_the_plain_module_at_theta(kind):
    base = seeded(small).double()
    plain = copy.deepcopy(base)
    model = move_(RandomSubspace(base, 20, projection=kind, seed=2).double())
    P = model.P.as_matrix()
    theta = nn.utils.parameters_to_vector(plain.parameters()) + P @ model.theta_d
    nn.utils.vector_to_parameters(theta.detach(), plain.parameters())
    torch.testing.assert_close(model.theta(), theta)
    torch.testing.assert_close(model(X.double()), plain(X.double()))
    F.cross_entropy(model(X.double()), Y).backward()
    F.cross_entropy(plain(X.double()), Y).backward()
    g = nn.utils.parameters_to_vector(p.grad for p in plain.parameters())
    torch.testing.assert_close(model.theta_d.grad, P.T @ g, rtol=1e-10, atol=1e-12)


def test_gradient_by_finite_differences():
    model = RandomSubspace(seeded(small).double(), 6, projection="fastfood").double()

    def loss(theta_d):
        return F.cross_entropy(functional_call(model, {"theta_d": theta_d}, (X.double(),)), Y)

    assert torch.autograd.gradcheck(loss, torch.randn(6, dtype=torch.float64, requires_grad=True))


def test_it_starts_at_theta_0_bit_for_bit_and_every_direction_has_length_1():
    base = seeded(small)
    expected, theta_0 = base(X), nn.utils.parameters_to_vector(base.parameters()).detach()
    model = RandomSubspace(base, 12, projection="dense")
    assert model(X).equal(expected)
    for i in range(12):
        with torch.no_grad():
            model.theta_d.copy_(F.one_hot(torch.tensor(i), 12))
        assert (model.theta() - theta_0).norm().item() == pytest.approx(1, abs=1e-6)  # over all D together


def test_theta_d_is_the_one_parameter_and_the_one_thing_in_the_state():
    model = RandomSubspace(seeded(MLP), 750)
    assert [(name, p.shape) for name, p in model.named_parameters()] == [("theta_d", (750,))]
    assert list(model.state_dict()) == ["theta_d"]
    assert model.D == 199_210 and model.theta_d.dtype == torch.float32 and not model.theta_d.any()


def test_an_optimizer_moves_theta_and_leaves_theta_0():
    model = RandomSubspace(seeded(small), 10, projection="one_hot")
    before, start = model.base_sha256(), model.theta().detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert model.base_sha256() == before
    torch.testing.assert_close(model.theta() - start, model.P(model.theta_d))


def test_frozen_parameters_stay_and_do_not_count():
    base = seeded(small)
    base[0].weight.requires_grad = False
    frozen = base[0].weight.detach().clone()
    model = move_(RandomSubspace(base, 8))
    assert model.D == 9 + 9 * 4 + 4
    model(X).sum().backward()
    assert model.module[0].weight.equal(frozen)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name != "theta_d")


def test_tied_parameters_count_once_and_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
            self.other.weight = self.one.weight

        def forward(self, x):
            return self.other(self.one(x).tanh())

    plain = seeded(Tied)
    model = move_(RandomSubspace(copy.deepcopy(plain), 9, projection="dense"))
    assert model.D == 36 + 6 + 6
    nn.utils.vector_to_parameters(model.theta().detach(), plain.parameters())
    torch.testing.assert_close(model(X), plain(X))
    plain(X).square().sum().backward()
    model(X).square().sum().backward()
    g = nn.utils.parameters_to_vector(p.grad for p in plain.parameters())
    torch.testing.assert_close(model.theta_d.grad, model.P.transposed(g), rtol=1e-4, atol=1e-5)


def test_running_means_are_updated_saved_and_loaded(tmp_path):
    def with_norm():
        return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))

    model = move_(RandomSubspace(seeded(with_norm), 9))
    model.train()(X)
    assert model.module[1].num_batches_tracked == 1 and model.module[1].running_mean.abs().sum() > 0
    save_subspace(model, tmp_path / "file", base_seed=0)
    assert load_subspace(tmp_path / "file", with_norm).eval()(X).equal(model.eval()(X))


def test_a_subspace_of_loras_factors():
    base = seeded(MLP)
    images = torch.rand(3, 784)
    expected = base(images)
    lora = apply_lora(base, ["fc1", "fc2", "fc3"], r=1, lora_alpha=1)
    factors = [p.detach().clone() for p in lora.parameters() if p.requires_grad]
    frozen = lora.fc1.base_layer.weight.detach().clone()
    model = RandomSubspace(lora, 100, projection="one_hot")
    assert model.D == 1_594 and [name for name, _ in model.named_parameters()] == ["theta_d"]
    torch.testing.assert_close(model(images), expected)
    model(images).square().sum().backward()
    assert model.theta_d.grad.abs().sum() > 0
    move_(model)
    start = torch.cat([p.flatten() for p in factors])
    torch.testing.assert_close(model.theta() - start, model.P(model.theta_d), atol=1e-6, rtol=1e-5)
    assert not model(images).allclose(expected, atol=1e-3) and model.module.fc1.base_layer.weight.equal(
        frozen
    )


def test_said_gives_each_tensor_its_own_scale():
    plain = seeded(small)
    model = RandomSubspace(copy.deepcopy(plain), 24, projection="dense", layer_scales=True)
    assert model.P.d == 20 and [p.shape for p in model.parameters()] == [(24,)]
    assert model(X).equal(plain(X))
    move_(model)
    deltas = model.P.as_matrix() @ model.theta_d[:20]
    scales = 1 + model.theta_d[20:].repeat_interleave(torch.tensor([p.numel() for p in plain.parameters()]))
    theta_0 = nn.utils.parameters_to_vector(plain.parameters())
    torch.testing.assert_close(model.theta(), theta_0 + scales * deltas)
    model(X).sum().backward()
    assert (model.theta_d.grad != 0).all()
    with pytest.raises(ValueError, match="d must be more than 4, the number of layer scales; got 4"):
        RandomSubspace(seeded(small), 4, layer_scales=True)


@pytest.mark.parametrize("d", [0, 104])
def test_d_outside_1_to_D_is_refused_and_the_module_is_left_whole(d):
    base = seeded(small)
    with pytest.raises(ValueError, match=f"D = 103; got d = {d}"):
        RandomSubspace(base, d)
    assert len(list(base.parameters())) == 4


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter of the module requires a gradient"):
        RandomSubspace(small().requires_grad_(False), 3)


# The file


@pytest.mark.parametrize("kind", ["sparse", "one_hot", "fastfood"])
def test_a_file_of_3_6_kb_gives_equal_outputs(tmp_path, kind):
    model = move_(RandomSubspace(seeded(MLP), 750, projection=kind, seed=4))
    save_subspace(model, tmp_path / "file", base_seed=0)
    assert os.path.getsize(tmp_path / "file") < 0.005 * 4 * 199_210
    assert list(load_file(tmp_path / "file")) == ["theta_d"]
    random_state = torch.get_rng_state()
    loaded = load_subspace(tmp_path / "file", MLP)
    images = torch.rand(9, 784, generator=torch.Generator().manual_seed(1))
    assert loaded(images).equal(model(images)) and loaded.theta_d.requires_grad
    assert torch.get_rng_state().equal(random_state)


def test_a_float64_model_with_layer_scales_and_a_given_base(tmp_path):
    base = seeded(small)
    model = move_(RandomSubspace(copy.deepcopy(base), 30, layer_scales=True).double())
    save_subspace(model, tmp_path / "file")
    assert load_subspace(tmp_path / "file", lambda: base)(X.double()).equal(model(X.double()))


def save_and_edit(path, **changes):
    save_subspace(move_(RandomSubspace(seeded(small), 10)), path, base_seed=0)
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(load_file(path), path, metadata=about | changes)


@pytest.mark.parametrize("changes,make,match", [
    ({"base_seed": "1"}, small, r"theta_0 differs .* \(saved under torch 2.1.0, this is torch "),
    ({}, lambda: nn.Sequential(nn.Linear(6, 9)), "D is 103 in the file, but the module has 63"),
    ({"fingerprint": "0"}, small, r"seed 0 gives another P .* \(saved under torch 2.1.0, this is torch "),
    ({"seed": "1"}, small, "another P"),
    ({"d": "9"}, small, "another P"),
    ({"projection": "one_hot"}, small, "another P"),
    ({"format": "other"}, small, "was not written by save_subspace"),
])  # fmt: skip
def test_a_mismatch_is_refused(tmp_path, changes, make, match):
    save_and_edit(tmp_path / "file", torch="2.1.0", **changes)
    with pytest.raises(SubspaceFileError, match=match):
        load_subspace(tmp_path / "file", make)


def test_other_frozen_weights_are_another_base(tmp_path):
    def partly_frozen(value=0.0):
        model = seeded(small)
        model[0].requires_grad_(False)
        with torch.no_grad():
            model[0].weight[0, 0] += value
        return model

    save_subspace(RandomSubspace(partly_frozen(), 5), tmp_path / "file")
    assert load_subspace(tmp_path / "file", partly_frozen).d == 5
    with pytest.raises(SubspaceFileError, match="theta_0 differs"):
        load_subspace(tmp_path / "file", lambda: partly_frozen(1e-6))


def test_files_that_are_none(tmp_path):
    with pytest.raises(SubspaceFileError, match="does not exist"):
        load_subspace(tmp_path / "nothing", small)
    (tmp_path / "cut").write_bytes(b"123")
    with pytest.raises(SubspaceFileError, match="damaged, or not a safetensors file"):
        load_subspace(tmp_path / "cut", small)
    save_file({"theta_d": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(SubspaceFileError, match="was not written by save_subspace"):
        load_subspace(tmp_path / "other", small)
