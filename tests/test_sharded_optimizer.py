"""ShardedOptimizer against the plain optimizer, on the same gradients, after every step.

Functions without `test_` in their name run inside the ranks.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from workshop_utils import sub_world
from workshop_utils.data_parallel import DataParallel, ShardedOptimizer
from workshop_utils.memory import measure_memory
from workshop_utils.models import MLP
from workshop_utils.point_to_point import count_traffic
from workshop_utils.sharded_optimizer import ELEMENTWISE

world_sizes = pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


class Odd(nn.Module):
    """Sizes that no world size divides; a scalar, a frozen and an unused parameter, a tied one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 13), nn.Linear(13, 13)
        self.c = nn.Linear(13, 3)
        self.again = nn.Linear(13, 13)
        self.again.weight = self.b.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)


def models(dtype, make=Odd):
    torch.manual_seed(7)
    first = make().to(dtype)
    torch.manual_seed(7)
    return first, make().to(dtype)


def give_gradients(step: int, *modules) -> None:
    """The same on all ranks; in the first step, one parameter has none."""
    generator = torch.Generator().manual_seed(step)
    for parameters in zip(*(m.named_parameters() for m in modules)):
        name, first = parameters[0]
        gradient = torch.randn(first.shape, generator=generator, dtype=torch.float64).to(first.dtype)
        absent = name == "unused" or not first.requires_grad or (step == 0 and name == "c.bias")
        for _, p in parameters:
            p.grad = None if absent else gradient.clone()


def worst(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def groups_of(model: nn.Module) -> list[dict]:
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    return [{"params": rest}, {"params": biases, "lr": 0.003, "weight_decay": 0.0}]


def parity(n: int) -> None:
    with sub_world(n) as inside:
        for name, (kind, options) in OPTIMIZERS.items() if inside else ():
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
                for split in (lambda m: m.parameters(), groups_of):
                    ours, plain = models(dtype)
                    sharded = ShardedOptimizer(split(ours), kind, **options)
                    reference = kind(split(plain), **options)
                    for step in range(4):
                        for optimizer in (sharded, reference):
                            optimizer.param_groups[0]["lr"] = options["lr"] / (1 + step)
                        give_gradients(step, ours, plain)
                        sharded.step()
                        reference.step()
                        assert worst(ours, plain) <= tolerance, (name, dtype, step)
                    sharded.zero_grad()
                    assert all(p.grad is None for p in ours.parameters())


@world_sizes
def test_the_same_weights_as_the_plain_optimizer_after_every_step(ranks5, n):
    ranks5.run(parity, n)


def every_kind() -> None:
    for kind in ELEMENTWISE:
        ours, plain = models(torch.float64)
        sharded, reference = (
            ShardedOptimizer(ours.parameters(), kind, lr=0.01),
            kind(plain.parameters(), lr=0.01),
        )
        for step in range(3):
            give_gradients(step, ours, plain)
            sharded.step()
            reference.step()
            assert worst(ours, plain) <= 1e-10, (kind.__name__, step)
        both = sharded.state_dict(), reference.state_dict()
        expect_same_state(*both, kind.__name__)


def expect_same_state(ours: dict, plain: dict, what) -> None:
    assert ours["param_groups"] == plain["param_groups"], what
    assert ours["state"].keys() == plain["state"].keys(), what
    for i, entry in plain["state"].items():
        assert ours["state"][i].keys() == entry.keys(), (what, i)
        for key, value in entry.items():
            got = ours["state"][i][key]
            if isinstance(value, torch.Tensor):
                assert got.shape == value.shape and got.dtype == value.dtype, (what, i, key)
                assert torch.allclose(got.double(), value.double(), rtol=0, atol=1e-10), (what, i, key)
            else:
                assert got == value, (what, i, key)


def test_every_elementwise_optimizer_of_torch_has_the_same_weights_and_state(ranks5):
    ranks5.run(every_kind)


def with_data_parallel(n: int) -> None:
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        torch.manual_seed(me)
        net = MLP(hidden=20).double()
        model = DataParallel(net, bucket_bytes=5000)
        sharded = ShardedOptimizer(net.parameters(), torch.optim.AdamW, lr=0.01)
        plain = MLP(hidden=20).double()
        plain.load_state_dict(net.state_dict())
        reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
        for step in range(3):
            x = torch.randn(2 * n, 784, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            sharded.zero_grad()
            reference.zero_grad()
            plain(x).square().mean().backward()
            model(x[2 * me : 2 * me + 2]).square().mean().backward()
            model.finish_gradient_sync()
            sharded.step()
            reference.step()
            assert worst(net, plain) <= 1e-10


@world_sizes
def test_it_follows_data_parallel(ranks5, n):
    ranks5.run(with_data_parallel, n)


# ----------------------------------------------------------------------------- what it holds and sends


def held_and_sent(n: int) -> tuple[int, int, int, int]:
    held, sent, parameters, moments = 0, 0, 0, 0
    with sub_world(n) as inside:
        if inside:
            net = MLP()
            sharded = ShardedOptimizer(net.parameters(), torch.optim.Adam)
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            with count_traffic() as traffic:
                sharded.step()
            report = measure_memory(net, sharded)
            held, sent, parameters = report.optimizer_bytes, traffic.bytes_sent, report.parameters_bytes
            moments = sum(entry["exp_avg"].numel() for entry in sharded.state.values())
    return held, sent, parameters, moments


@world_sizes
def test_state_is_an_nth_and_a_step_gathers_the_parameters(ranks5, n):
    size = 199_210
    padded = -(-size // n) * n
    found = ranks5.run(held_and_sent, n)[:n]
    assert sum(moments for *_, moments in found) == size, "each weight's on one rank only"
    for held, sent, parameters, moments in found:
        assert moments <= padded // n
        assert parameters == 4 * padded, "no second copy of the weights"
        counters = 6 * 4  # at most one step counter for each parameter
        assert 8 * padded // n - 8 * n <= held <= 8 * padded // n + counters
        assert sent == 4 * padded // n * (n - 1)


# ----------------------------------------------------------------------------- saving and loading


def resume(n: int, name: str) -> None:
    """Two steps on n ranks; then on, from the saved state, sharded over another number of ranks, and plain."""
    kind, options = OPTIMIZERS[name]
    ours, plain = models(torch.float64)
    reference = kind(groups_of(plain), **options)
    saved = None
    with sub_world(n) as inside:
        if inside:
            sharded = ShardedOptimizer(groups_of(ours), kind, **options)
            for step in range(2):
                give_gradients(step, ours)
                sharded.param_groups[1]["lr"] = 0.5 / (1 + step)
                sharded.step()
            saved = [sharded.state_dict(), ours.state_dict()]
    for step in range(2):
        give_gradients(step, plain)
        reference.param_groups[1]["lr"] = 0.5 / (1 + step)
        reference.step()
    if saved is not None:
        expect_same_state(saved[0], reference.state_dict(), (n, name))
    box = [saved]
    dist.broadcast_object_list(box, 0)
    state, weights = box[0]
    again, _ = models(torch.float64)
    again.load_state_dict(weights)
    single, _ = models(torch.float64)
    single.load_state_dict(weights)
    sharded, unsharded = (
        ShardedOptimizer(groups_of(again), kind, **options),
        kind(groups_of(single), **options),
    )
    sharded.load_state_dict(state)
    unsharded.load_state_dict(copy.deepcopy(state))  # torch's own shares the tensors it is given
    assert sharded.param_groups[1]["lr"] == 0.25
    for step in (2, 3):
        give_gradients(step, again, single, plain)
        for optimizer in (sharded, unsharded, reference):
            optimizer.step()
        assert worst(again, plain) <= 1e-12 and worst(single, plain) <= 1e-12, (n, name, step)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_saved_state_goes_on_with_any_number_of_ranks(ranks5, name):
    for n in (1, 3, 4):
        ranks5.run(resume, n, name)


# ----------------------------------------------------------------------------- the rest


def scheduler_and_closure() -> None:
    ours, plain = models(torch.float64)
    sharded = ShardedOptimizer(ours.parameters(), torch.optim.SGD, lr=1.0)
    reference = torch.optim.SGD(plain.parameters(), lr=1.0)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (sharded, reference)]
    for _ in range(3):
        for model, optimizer, schedule in zip((ours, plain), (sharded, reference), schedules):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = model.a.weight.square().sum()
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
            schedule.step()
        assert worst(ours, plain) <= 1e-12 and schedules[0].get_last_lr() == schedules[1].get_last_lr()


def test_schedulers_and_closures_work(ranks5):
    ranks5.run(scheduler_and_closure)


def complaint(case: str) -> str:
    net = nn.Linear(3, 3)
    me = dist.get_rank()

    def moved():
        sharded = ShardedOptimizer(net.parameters(), torch.optim.SGD)
        net.double()
        sharded.step()

    def other_groups():
        sharded = ShardedOptimizer(net.parameters(), torch.optim.SGD)
        sharded.load_state_dict(torch.optim.SGD([net.weight]).state_dict())

    def one_more():
        ShardedOptimizer([net.weight], torch.optim.SGD).add_param_group({"params": [net.bias]})

    cases = {
        "lbfgs": lambda: ShardedOptimizer(net.parameters(), torch.optim.LBFGS),
        "a function": lambda: ShardedOptimizer(net.parameters(), lambda params: None),
        "mismatch": lambda: ShardedOptimizer(nn.Linear(3, 2 + (me == 1)).parameters(), torch.optim.SGD),
        "bad option": lambda: ShardedOptimizer(net.parameters(), torch.optim.SGD, lr=-1.0),
        "no parameters": lambda: ShardedOptimizer([], torch.optim.SGD),
        "moved": moved,
        "other groups": other_groups,
        "one more": one_more,
    }
    try:
        cases[case]()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("lbfgs", "LBFGS cannot be sharded here: tensors are cut anywhere"),
        ("a function", "cannot be sharded here"),
        (
            "mismatch",
            "rank 1 has parameter 0 of shape [3, 3] and dtype float32, where rank 0 has parameter 0",
        ),
        ("bad option", "Invalid learning rate: -1.0"),
        ("no parameters", "empty parameter list"),
        ("moved", "a parameter of shape [3, 3] has moved to other memory"),
        ("other groups", "groups of [1] parameters, this optimizer has groups of [2]"),
        ("one more", "build a new ShardedOptimizer"),
    ],
)
def test_mistakes_are_named_on_every_rank(ranks5, case, words):
    for text in ranks5.run(complaint, case):
        assert words in text
