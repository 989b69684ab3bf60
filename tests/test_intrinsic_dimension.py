"""The rule of d_int90, and sweeps: resumed, interrupted, shared out by ranks. The data are small and made up."""

import dataclasses
import functools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workshop_utils import intrinsic_dimension
from workshop_utils.data import MNIST
from workshop_utils.intrinsic_dimension import IntrinsicDimension, measure_intrinsic_dimension
from workshop_utils.projections import make_projection
from workshop_utils.ranks import sub_world
from workshop_utils.training import draw_batches

DIMS = [2, 8, 30]
FEW = {"seeds": (0, 1), "epochs": 3, "batch_size": 16}


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def made_up(seed: int = 0) -> MNIST:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (400,), generator=generator)
    images = torch.randn(3, 12, generator=generator)[labels] + 0.8 * torch.randn(400, 12, generator=generator)
    return MNIST(images[:300], labels[:300], images[300:], labels[300:], "made up")


@pytest.fixture
def count_runs(monkeypatch):
    """The (d, seed) of every training that takes place in this process."""
    done, train = [], intrinsic_dimension._train_and_score

    def counted(make_model, data, d, seed, **settings):
        done.append((d, seed))
        return train(make_model, data, d, seed, **settings)

    monkeypatch.setattr(intrinsic_dimension, "_train_and_score", counted)
    return done


# The rule


def result(accuracy, baselines=(0.95, 0.95)) -> IntrinsicDimension:
    return IntrinsicDimension(
        dims=[10, 20, 30, 40],
        seeds=[0, 1],
        accuracy=torch.tensor(accuracy, dtype=torch.float64),
        baselines=torch.tensor(baselines, dtype=torch.float64),
        D=100,
        settings={"projection": "one_hot"},
        seconds=1.5,
    )


def test_global_and_local_use_their_own_baseline_and_the_mean_over_the_seeds():
    measured = result([[0.80, 0.87, 0.91, 0.93], [0.80, 0.85, 0.88, 0.92]])
    assert measured.d_int90("global") == 40  # means .80, .86, .895, .925 against .9
    assert measured.d_int90("local") == 20  # against .855
    assert measured.d_int90() == 40
    assert measured.d_int90_per_seed("global") == [30, 40]
    assert measured.d_int90_per_seed("local") == [20, 30]
    assert measured.threshold("local") == pytest.approx(0.855) and measured.threshold("global") == 0.9


def test_local_per_seed_takes_that_seeds_baseline():
    measured = result([[0.80, 0.85, 0.86, 0.9], [0.80, 0.85, 0.86, 0.9]], baselines=(0.9, 1.0))
    assert measured.d_int90_per_seed("local") == [20, None]
    assert measured.baseline == pytest.approx(0.95)


def test_the_threshold_must_be_exceeded_and_the_first_d_counts():
    row = [0.9, 0.91, 0.89, 0.95]
    assert result([row, row]).d_int90("global") == 20
    assert result([[0.1] * 4] * 2).d_int90("global") is None
    with pytest.raises(ValueError, match='"global" or "local", got \'Local\''):
        result([row, row]).d_int90("Local")


def test_json_round_trip():
    measured = result([[0.80, 0.87, 0.91, 0.93], [0.80, 0.85, 0.88, 0.92]])
    back = IntrinsicDimension.from_json(measured.to_json())
    assert back.to_json() == measured.to_json()
    assert back.accuracy.equal(measured.accuracy) and back.d_int90_per_seed() == [30, 40]


# A sweep


def test_a_run_is_adam_in_the_subspace_scored_on_the_test_set():
    data = made_up()
    measured = measure_intrinsic_dimension(make_model, data, [30], **FEW | {"seeds": (3,)})
    torch.manual_seed(3)
    model = make_model()
    theta_0 = nn.utils.parameters_to_vector(model.parameters()).detach()
    P = make_projection("one_hot", theta_0.numel(), 30, seed=3).as_matrix()
    theta_d = torch.zeros(30, requires_grad=True)
    optimizer = torch.optim.Adam([theta_d], 0.1)

    def scores(images):
        w1, b1, w2, b2 = (theta_0 + P @ theta_d).split([120, 10, 30, 3])
        return F.linear(F.linear(images, w1.view(10, 12), b1).relu(), w2.view(3, 10), b2)

    for batch in draw_batches(300, 16, 3 * (300 // 16), seed=3):
        optimizer.zero_grad()
        F.cross_entropy(scores(data.train_images[batch]), data.train_labels[batch]).backward()
        optimizer.step()
    right = (scores(data.test_images).argmax(1) == data.test_labels).double().mean().item()
    assert measured.accuracy.tolist() == [[pytest.approx(right, abs=0.011)]]
    assert measured.D == 163 and measured.dims == [30] and measured.seeds == [3]


def test_more_dimensions_and_the_whole_network_do_better():
    measured = measure_intrinsic_dimension(make_model, made_up(), [30, 2, 8, 8], **FEW | {"epochs": 8})
    assert measured.dims == DIMS and measured.accuracy.shape == (2, 3) and measured.baselines.shape == (2,)
    assert measured.accuracy[:, 0].mean() < measured.accuracy[:, 2].mean()
    assert measured.settings["projection"] == "one_hot" and measured.seconds > 0


def test_what_is_finished_is_not_repeated(tmp_path, count_runs):
    sweep = functools.partial(measure_intrinsic_dimension, make_model, made_up(), **FEW, folder=tmp_path)
    first = sweep([2, 30])
    assert len(count_runs) == 6  # two d and the whole network, two seeds
    again = sweep([2, 30])
    assert len(count_runs) == 6 and again.to_json() == first.to_json()
    finer = sweep(DIMS)
    assert count_runs[6:] == [(8, 0), (8, 1)]
    assert finer.accuracy[:, [0, 2]].equal(first.accuracy) and finer.baselines.equal(first.baselines)
    sweep([2, 30], projection="sparse")
    assert len(count_runs) == 12  # the whole network needs no projection
    assert all(json.loads(path.read_text())["epochs"] == 3 for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize("change", ["data", "model", "epochs", "initial weights"])
def test_another_setting_is_another_run(tmp_path, count_runs, change):
    asked = {
        "make_model": make_model,
        "data": made_up(),
        "dims": [2],
        "seeds": (0,),
        "epochs": 1,
        "folder": tmp_path,
    }
    measure_intrinsic_dimension(**asked)
    others = {
        "data": {"data": dataclasses.replace(made_up(), train_labels=made_up().train_labels.flip(0))},
        "model": {"make_model": lambda: nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))},
        "epochs": {"epochs": 2},
        "initial weights": {"make_model": lambda: [torch.rand(1), make_model()][1]},
    }
    measure_intrinsic_dimension(**asked | others[change])
    assert len(count_runs) == 4


def test_an_interrupt_loses_the_run_in_flight_only(tmp_path, monkeypatch):
    train, done = intrinsic_dimension._train_and_score, []

    def pressed_in_the_fifth(make_model, data, d, seed, **settings):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((d, seed))
        return train(make_model, data, d, seed, **settings)

    sweep = functools.partial(
        measure_intrinsic_dimension, make_model, made_up(), DIMS, **FEW, folder=tmp_path
    )
    with monkeypatch.context() as patched:
        patched.setattr(intrinsic_dimension, "_train_and_score", pressed_in_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            sweep()
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(
        intrinsic_dimension, "_train_and_score", lambda *a, **k: done.append((a[2], a[3])) or train(*a, **k)
    )
    resumed = sweep()
    assert len(done) == len(set(done)) == 8
    assert resumed.accuracy.equal(measure_intrinsic_dimension(make_model, made_up(), DIMS, **FEW).accuracy)


class FirstOf:
    """The first n of five live ranks, in the place of a set of n."""

    def __init__(self, ranks, n):
        self.ranks, self.n = ranks, n

    def __len__(self):
        return self.n

    def run(self, fn, *args):
        return self.ranks.run(_if_inside, self.n, fn, args)[: self.n]


def _if_inside(n, fn, args):
    with sub_world(n) as inside:
        return fn(*args) if inside else None


def test_one_two_and_three_ranks_measure_what_no_ranks_do(ranks5, tmp_path):
    sweep = functools.partial(measure_intrinsic_dimension, make_model, made_up(), DIMS, **FEW)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = sweep()
    torch.set_num_threads(threads)
    for n in (1, 2, 3):
        shared = sweep(ranks=FirstOf(ranks5, n), folder=tmp_path / str(n))
        assert shared.accuracy.equal(alone.accuracy) and shared.baselines.equal(alone.baselines)
        assert len(list((tmp_path / str(n)).glob("*.json"))) == 8
    for path in list((tmp_path / "3").glob("*.json"))[::2]:
        path.unlink()
    resumed = sweep(ranks=FirstOf(ranks5, 3), folder=tmp_path / "3")
    assert resumed.accuracy.equal(alone.accuracy) and resumed.baselines.equal(alone.baselines)


def test_a_known_baseline_and_the_training_accuracy(count_runs):
    measured = measure_intrinsic_dimension(
        make_model, made_up(), [100], **FEW | {"epochs": 12}, baseline=0.9, score_on="train"
    )
    assert count_runs == [(100, 0), (100, 1)] and measured.baselines.tolist() == [0.9, 0.9]
    one_image = dataclasses.replace(
        made_up(), test_images=torch.zeros(1, 12), test_labels=torch.zeros(1).long()
    )
    on_test = measure_intrinsic_dimension(make_model, one_image, [100], **FEW, baseline=0.9)
    assert set(on_test.accuracy.flatten().tolist()) <= {0.0, 1.0}  # there is only one image to be right on


def test_the_state_of_the_random_numbers_stays():
    before = torch.get_rng_state()
    measure_intrinsic_dimension(make_model, made_up(), [2], seeds=(0,), epochs=1)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("bad,match", [
    ({"dims": []}, "dims must be a grid between 1 and D = 163, got"),
    ({"dims": [0, 3]}, "got \\[0, 3\\]"),
    ({"dims": [3, 164]}, "got \\[3, 164\\]"),
    ({"dims": [3], "seeds": ()}, "at least one seed"),
    ({"dims": [3], "score_on": "validation"}, "got 'validation'"),
    ({"dims": [3], "projection": "onehot"}, "one of dense, sparse, fastfood, one_hot; got 'onehot'"),
])  # fmt: skip
def test_bad_arguments_are_named_before_anything_is_trained(bad, match, count_runs):
    with pytest.raises(ValueError, match=match):
        measure_intrinsic_dimension(make_model, made_up(), **bad)
    assert count_runs == []
