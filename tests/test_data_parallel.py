"""DataParallel against one process on the whole batch, after every step, on ranks that were seeded differently.

Functions without `test_` in their name run inside the ranks. Each rank trains the reference too, with all samples;
so what it compares is what one process would have, and not what the other ranks have.
"""

import ast
import copy
import gc
import re
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from workshop_utils import (
    RankError,
    agreement,
    background,
    data_parallel,
    gradient_buckets,
    sharded_optimizer,
    sub_world,
)
from workshop_utils.data_parallel import (
    DataParallel,
    all_reduce_gradients,
    broadcast_parameters,
    shard_indices,
)
from workshop_utils.gradient_buckets import make_buckets, trainable
from workshop_utils.network import Link
from workshop_utils.point_to_point import count_traffic, emulate_link
from workshop_utils.ranks.driver import Ranks

HUGE = 2**40
BUCKET_BYTES = [1, 400, HUGE]
WORLD_SIZES = [1, 2, 3, 4, 5]
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
}
world_sizes = pytest.mark.parametrize("n", WORLD_SIZES)


class Net(nn.Module):
    """Everything that makes gradients awkward: tied, frozen, never used, and used for some samples only."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.unused = nn.Linear(3, 3)
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.tied.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.partly_frozen = nn.Linear(8, 8)
        self.partly_frozen.weight.requires_grad_(False)
        self.special = nn.Linear(8, 8)  # for samples marked in their first feature
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("count", torch.tensor(3, dtype=torch.int64))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        h = self.inp(x).tanh()
        h = self.again(self.tied(h).tanh()).tanh()
        h = self.partly_frozen(self.frozen(h)).tanh()
        marked = x[:, 0] > 50
        if marked.any():
            h = h + torch.where(marked[:, None], self.special(h), 0.0)
        return self.out(h * self.scale)


def batch(step: int, num: int, dtype, marked: int | None = None):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(num, 6, generator=generator, dtype=torch.float64).to(dtype)
    if marked is not None:
        x[marked, 0] = 100
    return x, torch.randint(3, (num,), generator=generator)


def part(tensors, n: int, me: int):
    return [tensor.tensor_split(n)[me] for tensor in tensors]


def two_nets(dtype, make=Net):
    """This rank's own net, and the one that it must become: rank 0's."""
    torch.manual_seed(100)
    reference = make().to(dtype)
    torch.manual_seed(100 + dist.get_rank())
    return make().to(dtype), reference


def expect_same(got: nn.Module, reference: nn.Module, tolerance: float, what) -> None:
    """Weights, buffers, and which parameters have a gradient at all."""
    for (name, g), r in zip(got.named_parameters(), reference.parameters(), strict=True):
        assert (g.grad is None) == (r.grad is None), (
            f"{what}: a gradient for {name}? got {g.grad is not None}"
        )
        for kind, a, b in (("", g, r), (" gradient", g.grad, r.grad)):
            if b is not None:
                worst = (a - b).abs().max().item()
                assert worst <= tolerance, f"{what}: rank {dist.get_rank()} {name}{kind} is off by {worst}"
    for (name, g), r in zip(got.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(g, r[1]), f"{what}: buffer {name}"


def one_run(
    dtype, tolerance, optimizer: str, bucket_bytes, overlap, micro_batches=1, num=7, set_to_none=True
):
    """Four steps on uneven parts; the marked sample is on another rank in each step, and missing in one."""
    n, me = dist.get_world_size(), dist.get_rank()
    net, reference = two_nets(dtype)
    model = DataParallel(net, bucket_bytes=bucket_bytes, overlap=overlap)
    expect_same(net, reference, 0, "after construction")
    ours, theirs = OPTIMIZERS[optimizer](net.parameters()), OPTIMIZERS[optimizer](reference.parameters())
    for step in range(4):
        what = (n, dtype, optimizer, bucket_bytes, overlap, micro_batches, f"step {step}")
        ours.zero_grad(set_to_none)
        theirs.zero_grad(set_to_none)
        for micro in range(micro_batches):
            x, y = batch(10 * step + micro, num, dtype, marked=None if step == 2 else (step + micro) % num)
            (F.cross_entropy(reference(x), y) / micro_batches).backward()
            x, y = part((x, y), n, me)
            weight = len(x) * n / num
            last = micro == micro_batches - 1
            with model.no_sync() if not last else _nothing():
                (F.cross_entropy(model(x), y) * weight / micro_batches).backward()
                model.finish_gradient_sync()
        ours.step()
        theirs.step()
        expect_same(net, reference, tolerance, what)


class _nothing:
    __enter__ = __exit__ = lambda *_: None


def parity(n: int, overlap: bool) -> None:
    with sub_world(n) as inside:
        if inside:
            for bucket_bytes in BUCKET_BYTES:
                one_run(torch.float32, 1e-5, "sgd", bucket_bytes, overlap)
                one_run(torch.float64, 1e-10, "adam", bucket_bytes, overlap)
            for optimizer in ("sgd", "momentum"):
                one_run(torch.float64, 1e-10, optimizer, 400, overlap)


def accumulation(n: int) -> None:
    with sub_world(n) as inside:
        if inside:
            for bucket_bytes in BUCKET_BYTES:
                one_run(torch.float64, 1e-10, "adam", bucket_bytes, True, micro_batches=2)
            one_run(torch.float64, 1e-10, "momentum", 200, False, 3)
            one_run(torch.float64, 1e-10, "momentum", 200, True, 3, set_to_none=False)
            one_run(torch.float64, 1e-10, "adam", 200, True, 1, set_to_none=False)


@world_sizes
@pytest.mark.parametrize("overlap", [True, False])
def test_weights_equal_one_process_after_every_step(ranks5, n, overlap):
    ranks5.run(parity, n, overlap)


@world_sizes
def test_no_sync_adds_up_what_one_process_would(ranks5, n):
    ranks5.run(accumulation, n)


# ----------------------------------------------------------------------------- the parts


def broadcast_from(src: int) -> None:
    torch.manual_seed(dist.get_rank())
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 700), nn.Embedding(2000, 700))
    net[0].weight.requires_grad_(False)
    net[2].to(torch.bfloat16)
    net[1].weight = nn.Parameter(torch.randn(6)[::2])  # not contiguous
    net.register_buffer("flag", torch.tensor(dist.get_rank() == src))
    net.register_buffer("empty", torch.zeros(0))
    net[1].num_batches_tracked += dist.get_rank()
    net[1].running_mean += torch.randn(3)
    versions = [t.data_ptr() for t in net.state_dict().values()]
    expected = [torch.zeros_like(t) for t in net.state_dict().values()]
    for tensor, own in zip(expected, net.state_dict().values()):
        tensor.copy_(own)
        dist.broadcast(tensor, src)
    broadcast_parameters(net, src)
    for tensor, (name, got) in zip(expected, net.state_dict().items()):
        assert torch.equal(tensor, got), f"{name} on rank {dist.get_rank()}"
    assert versions == [t.data_ptr() for t in net.state_dict().values()], "in place"


@pytest.mark.parametrize("src", [0, 3])
def test_broadcast_reaches_parameters_and_buffers_of_any_dtype(ranks5, src):
    ranks5.run(broadcast_from, src)


def average_in_one_call(n: int) -> None:
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        net, reference = two_nets(torch.float64)
        broadcast_parameters(net)
        for step in range(3):
            net.zero_grad()
            reference.zero_grad()
            x, y = batch(step, 7, torch.float64, marked=None if step == 1 else step)
            F.cross_entropy(reference(x), y).backward()
            x, y = part((x, y), n, me)
            (F.cross_entropy(net(x), y) * len(x) * n / 7).backward()
            all_reduce_gradients(net)
            expect_same(net, reference, 1e-12, f"step {step}")
            assert net.frozen.weight.grad is None and net.unused.weight.grad is None


@world_sizes
def test_all_reduce_gradients_averages(ranks5, n):
    ranks5.run(average_in_one_call, n)


def kinds_of_dtypes() -> None:
    """Whole numbers, so that bfloat16 is exact; three dtypes mixed in the order of the parameters."""
    n, me = dist.get_world_size(), dist.get_rank()
    net = nn.ParameterList(
        nn.Parameter(torch.zeros(3 + i, dtype=dtype))
        for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64, torch.float16] * 3)
    )
    for bucket_bytes in (1, 20, HUGE):
        model = DataParallel(net, bucket_bytes=bucket_bytes)
        for step in range(2):
            net.zero_grad()
            sum((p * (5 * (me * i + step))).double().sum() for i, p in enumerate(net)).backward()
            model.finish_gradient_sync()
            for i, p in enumerate(net):
                assert p.grad.dtype == p.dtype
                assert torch.equal(p.grad, torch.full_like(p, 5 * ((n - 1) / 2 * i + step))), (
                    bucket_bytes,
                    i,
                    p.grad,
                )


def test_each_dtype_has_buckets_of_its_own(ranks5):
    ranks5.run(kinds_of_dtypes)


def large_half_precision() -> None:
    net = nn.Linear(1, 1, bias=False).half()
    model = DataParallel(net)
    (net.weight * 40_000.0).sum().backward()  # five of them do not fit into float16
    model.finish_gradient_sync()
    assert abs(net.weight.grad.item() - 40_000) < 100


def test_gradients_of_float16_do_not_overflow_in_the_sum(ranks5):
    ranks5.run(large_half_precision)


class InOrder(nn.Module):
    """Square layers of one shape, applied in any order: gradients come in the opposite one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, order):
        for i in order:
            x = self.layers[i](x).tanh()
        return x


def gradients_in_another_order_on_each_rank() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3], [0, 2, 1, 3]]
    net, reference = two_nets(torch.float64, InOrder)
    for bucket_bytes in (1, 200, HUGE):
        model = DataParallel(net, bucket_bytes=bucket_bytes)
        for step in range(2):
            x = torch.randn(n, 2, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            net.zero_grad()
            reference.zero_grad()
            sum(reference(x[r], orders[r]).sum() / n for r in range(n)).backward()
            model(x[me], orders[me]).sum().backward()
            model.finish_gradient_sync()
            expect_same(net, reference, 1e-12, (bucket_bytes, step))


def test_buckets_leave_in_one_order_on_all_ranks_whatever_order_autograd_has(ranks5):
    ranks5.run(gradients_in_another_order_on_each_rank)


def test_buckets_fill_in_reverse_order_and_the_first_is_small():
    net = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))  # each 1 MiB and 2 KiB
    buckets = make_buckets(reversed(trainable(net)), 3 * 2**20, 2**20)
    assert [len(bucket.parameters) for bucket in buckets] == [2, 6, 6, 2]
    flat_order = [p for bucket in buckets for p in bucket.parameters]
    assert all(a is b for a, b in zip(flat_order, reversed(list(net.parameters())), strict=True))
    assert [len(b.parameters) for b in make_buckets(trainable(net), 1, 2**20)] == [1] * 16
    assert [len(b.parameters) for b in make_buckets(trainable(net), HUGE, HUGE)] == [16]


def a_rank_without_a_batch() -> None:
    """Seven samples in parts of 2 on four ranks: the last rank has none, and only waits."""
    n, me = dist.get_world_size(), dist.get_rank()
    for overlap in (True, False):
        net, reference = two_nets(torch.float64)
        model = DataParallel(net, bucket_bytes=300, overlap=overlap)
        for step in range(3):
            net.zero_grad()
            reference.zero_grad()
            x, y = batch(step, 7, torch.float64)
            F.cross_entropy(reference(x), y).backward()
            if me < 4:
                x, y = x[2 * me : 2 * me + 2], y[2 * me : 2 * me + 2]
                (F.cross_entropy(model(x), y) * len(x) * n / 7).backward()
            model.finish_gradient_sync()
            expect_same(net, reference, 1e-12, f"step {step}")


def test_a_rank_without_a_batch_counts_as_zero(ranks5):
    ranks5.run(a_rank_without_a_batch)


def hands_over_gradients(overlap: bool) -> None:
    """A gradient that is None on all ranks stays None, also after a step in which it was not."""
    net = nn.Linear(2, 2)
    model = DataParallel(net, overlap=overlap)
    model(torch.ones(1, 2)).sum().backward()
    model.finish_gradient_sync()
    assert net.weight.grad is not None
    net.zero_grad()
    model.finish_gradient_sync()
    assert net.weight.grad is None and net.bias.grad is None
    if dist.get_rank() == 2:
        net.bias.grad = torch.full((2,), 10.0)
    model.finish_gradient_sync()
    assert net.weight.grad is None and net.bias.grad.tolist() == [2.0, 2.0], "nothing stale"


@pytest.mark.parametrize("overlap", [True, False])
def test_nothing_of_an_earlier_step_is_left_in_a_bucket(ranks5, overlap):
    ranks5.run(hands_over_gradients, overlap)


# ----------------------------------------------------------------------------- beside torch's own


def with_batch_norm():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def beside_torch(n: int, make, accumulate: bool) -> None:
    """The same weights, gradients and buffers, on every rank, as DistributedDataParallel."""
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        net, _ = two_nets(torch.float64, make)
        broadcast_parameters(net)
        other = DistributedDataParallel(copy.deepcopy(net), find_unused_parameters=make is Net)
        model = DataParallel(net, bucket_bytes=300)
        ours, theirs = (OPTIMIZERS["momentum"](m.parameters()) for m in (net, other))
        for step in range(4):
            for wrapped, optimizer in ((model, ours), (other, theirs)):
                optimizer.zero_grad()
                for micro in range(2 if accumulate else 1):
                    x, y = batch(2 * step + micro, 4 * n, torch.float64)
                    x, y = part((x, y), n, me)
                    with wrapped.no_sync() if accumulate and micro == 0 else _nothing():
                        F.cross_entropy(wrapped(x), y).backward()
                if wrapped is model:
                    model.finish_gradient_sync()
                optimizer.step()
            for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-12), f"step {step}, {name}"
            for (name, a), b in zip(net.named_buffers(), other.module.buffers(), strict=True):
                dist.broadcast(b.contiguous(), 0)  # torch does so at the next forward
                assert torch.allclose(a, b, rtol=0, atol=1e-12), f"step {step}, buffer {name}, rank {me}"


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("accumulate", [False, True])
def test_equal_to_distributed_data_parallel(ranks5, n, accumulate):
    for make in (Net, with_batch_norm):
        ranks5.run(beside_torch, n, make, accumulate)


def evaluate_alone() -> None:
    """After a step the running means are rank 0's everywhere, and a forward sends nothing."""
    net = with_batch_norm()
    model = DataParallel(net)
    model(torch.randn(4, 6)).sum().backward()
    own_mean = net[1].running_mean.clone()
    model.finish_gradient_sync()
    dist.broadcast(own_mean, 0)
    assert torch.equal(net[1].running_mean, own_mean) and own_mean.abs().max() > 0
    if dist.get_rank() == 3:
        model.eval()
        with torch.no_grad():
            model(torch.ones(2, 6))
        model(torch.ones(2, 6))


def test_buffers_are_rank_0s_after_a_step_and_one_rank_may_evaluate_alone(ranks5):
    ranks5.run(evaluate_alone)


# ----------------------------------------------------------------------------- bytes and order


def bytes_of_one_step(n: int, bucket_bytes: int) -> tuple[int, int, int]:
    sent, received, size = 0, 0, 0
    with sub_world(n) as inside:
        if inside:
            net = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 33), nn.Linear(33, 10))
            model = DataParallel(net, bucket_bytes=bucket_bytes)
            size = sum(p.nbytes + p.element_size() for p in net.parameters())  # one flag for each
            with count_traffic() as traffic:
                model(torch.ones(3, 100)).sum().backward()
                model.finish_gradient_sync()
            sent, received = traffic.bytes_sent, traffic.bytes_received
    return sent, received, size


@world_sizes
def test_a_rank_sends_2_s_n_minus_1_by_n_and_one_flag_for_each_parameter(ranks5, n):
    for bucket_bytes, buckets in ((1, 6), (3000, 3), (HUGE, 1)):
        found = ranks5.run(bytes_of_one_step, n, bucket_bytes)[:n]
        size = found[0][2]
        assert sum(sent for sent, _, _ in found) == 2 * (n - 1) * size
        assert sum(received for _, received, _ in found) == 2 * (n - 1) * size
        for sent, _, _ in found:
            assert abs(sent - 2 * (n - 1) / n * size) <= 2 * 4 * buckets, "chunks differ by one element"


class Slow(torch.autograd.Function):
    """Nothing, but its backward takes 0.3 s, as that of a large layer would."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.3)
        return gradient


class SlowInTheMiddle(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(100, 100), nn.Linear(100, 100)

    def forward(self, x):
        return self.second(Slow.apply(self.first(x)))


def timelines(overlap: bool) -> list[dict]:
    model = DataParallel(SlowInTheMiddle(), bucket_bytes=1000, overlap=overlap)
    found = []
    with emulate_link(Link(1e-3, 12.5e6)):
        for _ in range(2):
            before_s = time.monotonic()
            model(torch.ones(2, 100)).sum().backward()
            model.finish_gradient_sync()
            took_s = time.monotonic() - before_s
            labels = [label for label, _, _ in model.timeline]
            found.append({label: (began, ended) for label, began, ended in model.timeline})
            assert labels == ["forward", "backward", *(f"bucket {i}" for i in range(len(labels) - 3)), "wait"]
            assert all(0 <= began <= ended <= took_s for began, ended in found[-1].values())
    return found


def test_with_overlap_a_bucket_leaves_before_backward_ends(ranks5):
    for steps in ranks5.run(timelines, True):
        for spans in steps:
            began_s, ended_s = spans["backward"]
            assert spans["forward"][0] == 0 and ended_s - began_s >= 0.3
            assert spans["bucket 0"][0] < ended_s <= spans["wait"][1]
            assert spans["bucket 0"][1] < ended_s, "0.3 s are enough for 40 KB at 12.5 MB/s"
    for steps in ranks5.run(timelines, False):
        for spans in steps:
            assert spans["backward"][1] <= spans["wait"][0] <= spans["bucket 0"][0]


def timeline_of_micro_batches() -> list[str]:
    model = DataParallel(nn.Linear(2, 2))
    for _ in range(2):
        with model.no_sync():
            model(torch.ones(1, 2)).sum().backward()
        model(torch.ones(1, 2)).sum().backward()
        model.finish_gradient_sync()
    return [label for label, _, _ in model.timeline]


def test_the_timeline_holds_each_micro_batch_of_the_last_step(ranks5):
    labels = ["forward", "forward", "backward", "backward", "bucket 0", "wait"]
    assert ranks5.run(timeline_of_micro_batches) == [labels] * 5


# ----------------------------------------------------------------------------- mistakes


def complaint(case: str) -> str:
    me = dist.get_rank()

    def step(model):
        model(torch.ones(1, 4)).sum().backward()

    def forgotten():
        model = DataParallel(nn.Linear(4, 4), overlap="no overlap" not in case)
        step(model)
        step(model)

    def second_backward():
        model = DataParallel(nn.Linear(4, 4))
        loss = model(torch.ones(1, 4)).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    def unfrozen():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[0].bias.requires_grad_(False)
        model = DataParallel(net)
        net[0].bias.requires_grad_(True)
        step(model)

    def sparse():
        net = nn.Embedding(4, 4, sparse=True)
        model = DataParallel(net)
        model(torch.tensor([1])).sum().backward()

    cases = {
        "shape": lambda: DataParallel(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2 + (me == 2)))),
        "number": lambda: DataParallel(nn.Sequential(*(nn.Linear(4, 4) for _ in range(2 + (me == 3))))),
        "dtype": lambda: broadcast_parameters(nn.Linear(2, 2, dtype=[torch.float32, torch.float64][me == 1])),
        "frozen": lambda: DataParallel(nn.Linear(2, 2).requires_grad_(me != 4)),
        "bucket_bytes differ": lambda: DataParallel(nn.Linear(2, 2), bucket_bytes=100 + me),
        "elsewhere": lambda: DataParallel(nn.Linear(2, 2, device="meta")),
        "bucket_bytes": lambda: DataParallel(nn.Linear(2, 2), bucket_bytes=0),
        "forgotten": forgotten,
        "forgotten, no overlap": forgotten,
        "second backward": second_backward,
        "unfrozen": unfrozen,
        "sparse": sparse,
    }
    try:
        cases[case]()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("shape", "rank 2 has parameter '1.weight' of shape [3, 3] and dtype float32, where rank 0 has"),
        ("number", "rank 3 has parameter '2.weight' of shape [4, 4] and dtype float32, where rank 0 has"),
        ("dtype", "rank 1 has parameter 'weight' of shape [2, 2] and dtype float64, where rank 0 has"),
        ("frozen", "rank 4 has parameter 'weight' of shape [2, 2] and dtype float32, frozen, where rank 0"),
        ("bucket_bytes differ", "rank 1 has bucket_bytes=101, where rank 0 has bucket_bytes=100"),
        ("bucket_bytes", "bucket_bytes must be 1 or more, got 0"),
        ("elsewhere", "parameter 'weight' is not in CPU memory"),
        ("forgotten", "finish_gradient_sync() was not called after the last backward"),
        ("forgotten, no overlap", "finish_gradient_sync() was not called after the last backward"),
        ("second backward", "a second backward before finish_gradient_sync()"),
        ("unfrozen", "parameter '0.bias' was frozen when DataParallel was built"),
        ("sparse", "sparse=False"),
    ],
)
def test_mistakes_are_named_on_every_rank(ranks5, case, words):
    for text in ranks5.run(complaint, case):
        assert words in text


def failing_communication() -> list[str]:
    """The all-reduce fails on all ranks alike, so nobody is left waiting."""

    def out_of_order(*_):
        raise ConnectionError("cable pulled")

    net = nn.Linear(4, 4)
    model = DataParallel(net, bucket_bytes=1)
    data_parallel.ring_all_reduce_, kept = out_of_order, data_parallel.ring_all_reduce_
    said = []
    try:
        model(torch.ones(1, 4)).sum().backward()
        try:
            model.finish_gradient_sync()
        except ConnectionError as error:
            frame = error.__traceback__
            while frame is not None:
                said.append(frame.tb_frame.f_code.co_name)
                frame = frame.tb_next
    finally:
        data_parallel.ring_all_reduce_ = kept
    try:
        model(torch.ones(1, 4))
    except RuntimeError as error:
        said.append(str(error))
    try:
        model.finish_gradient_sync()
    except RuntimeError as error:
        assert str(error) == said[-1]
    again = DataParallel(net)
    again(torch.ones(1, 4)).sum().backward()
    again.finish_gradient_sync()
    return said


def test_an_error_of_the_communicating_thread_keeps_its_traceback(ranks5):
    for *frames, after in ranks5.run(failing_communication):
        assert frames[0] == "failing_communication" and "_serve" in frames and frames[-1] == "out_of_order"
        assert "wrap the module again" in after


def wrapped_many_times() -> tuple[int, int, int]:
    def threads() -> int:
        gc.collect()
        return sum(thread.name == "data-parallel" for thread in threading.enumerate())

    net = nn.Linear(4, 4)
    kept, before = [], threads()  # tracebacks of other tests may hold wrappers of theirs
    for _ in range(5):
        model = DataParallel(net)
        kept.append(model)
        model(torch.ones(1, 4)).sum().backward()
        model.finish_gradient_sync()
    hooks = len(net.weight._post_accumulate_grad_hooks)
    del model, kept
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    return hooks, len(net.weight._post_accumulate_grad_hooks), max(0, threads() - before)


def test_a_module_can_be_wrapped_again_and_nothing_is_left_of_the_wrapper(ranks5):
    assert ranks5.run(wrapped_many_times) == [(1, 0, 0)] * 5


def trained_net() -> nn.Module:
    model = DataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    model.finish_gradient_sync()
    return model.module


def test_a_wrapped_module_can_be_copied_and_pickled(ranks5):
    nets = ranks5.run(trained_net)
    assert all(torch.equal(net.weight, nets[0].weight) for net in nets)
    assert torch.equal(copy.deepcopy(nets[0]).weight, nets[0].weight)


# ----------------------------------------------------------------------------- ranks that part company


@pytest.fixture(scope="module")
def _impatient():
    ranks = Ranks(3, timeout_s=2.0, threads_per_rank=1)
    yield ranks
    ranks.stop()


@pytest.fixture
def impatient(_impatient):
    """Three ranks with a wrapped net; a deadlock is reported after 2 s."""
    _impatient.run_cell(
        "import time, gc\nfrom torch import nn\nfrom workshop_utils.data_parallel import DataParallel\n"
        "net = nn.Linear(300, 300)\nmodel = DataParallel(net, bucket_bytes=1000)\n"
        "def step():\n    model(torch.ones(2, 300)).sum().backward()\n    model.finish_gradient_sync()\n"
        "step()"
    )
    return _impatient


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("for i in range(3 if rank != 1 else 2):\n    step()", "deadlock"),
        ("model.overlap = False\nfor i in range(3 if rank != 1 else 2):\n    step()", "deadlock"),
        ("if rank == 1:\n    1 / 0\nstep()", "ZeroDivisionError"),
        (
            "loss = model(torch.ones(2, 300)).sum()\nloss.backward()\nif rank == 1:\n    1 / 0\nmodel.finish_gradient_sync()",
            "ZeroDivisionError",
        ),
    ],
)
def test_a_rank_that_leaves_the_others_waiting_is_reported(impatient, cell, words):
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        impatient.run_cell(cell)
    assert time.monotonic() - began < 30
    text = str(caught.value)
    assert words in text
    if words == "deadlock":
        for rank in (0, 2):
            assert re.search(rf"rank {rank}: waiting for .* model.finish_gradient_sync\(\)", text), text
        assert "they hold the old process group: model." in text
    impatient.run_cell("model = DataParallel(net); step(); assert net.weight.grad is not None")


def test_the_interrupt_button_frees_a_rank_that_waits_for_its_thread(impatient):
    with pytest.raises(
        RankError, match="the deadline of 1 s passed(.|\n)*waiting(.|\n)*finish_gradient_sync"
    ):
        impatient.run_cell("if rank != 1:\n    step()\nwhile rank == 1:\n    pass", deadline_s=1.0)
    impatient.run_cell("model = DataParallel(net); step()")


def test_a_slow_link_is_not_a_deadlock(impatient):
    """One bucket takes 3 s, longer than the ranks' patience, and nobody works meanwhile; but messages arrive."""
    impatient.run_cell(
        "from workshop_utils.network import Link\nfrom workshop_utils.point_to_point import emulate_link\n"
        "from workshop_utils import ring\nring.SEGMENT_BYTES = 2**18\n"
        "net = nn.Linear(1000, 1000); model = DataParallel(net)\n"
        "with emulate_link(Link(1e-3, 1.8e6)):\n"
        "    began = time.monotonic()\n"
        "    model(torch.ones(2, 1000)).sum().backward(); model.finish_gradient_sync()\n"
        "    assert time.monotonic() - began > 2.5\n"
        "ring.SEGMENT_BYTES = 4 * 2**20"
    )


# ----------------------------------------------------------------------------- sharing out the samples


@pytest.mark.parametrize("drop_last", [False, True])
def test_shard_indices_are_those_of_the_distributed_sampler(drop_last):
    for num_samples in (1, 2, 5, 7, 12, 100, 101):
        for n in (1, 2, 3, 4, 5, 8, 17):
            if drop_last and num_samples < n:
                continue
            for rank in range(n):
                sampler = DistributedSampler(range(num_samples), n, rank, seed=3, drop_last=drop_last)
                for epoch in (0, 1, 4):
                    sampler.set_epoch(epoch)
                    got = shard_indices(num_samples, rank, n, epoch=epoch, seed=3, drop_last=drop_last)
                    assert got.dtype == torch.int64 and got.tolist() == list(sampler)


@pytest.mark.parametrize(
    ("arguments", "drop_last", "words"),
    [
        ((10, 4, 4), False, "rank must lie between 0 and world_size - 1, got rank 4 of 4"),
        ((10, -1, 4), False, "got rank -1 of 4"),
        ((10, 0, 0), False, "got rank 0 of 0"),
        ((0, 0, 4), False, "0 samples do not give each of 4 ranks one"),
        ((3, 0, 4), True, "3 samples do not give each of 4 ranks one: drop_last=False repeats some"),
    ],
)
def test_shard_indices_says_what_is_wrong(arguments, drop_last, words):
    with pytest.raises(ValueError, match="rank") as caught:
        shard_indices(*arguments, drop_last=drop_last)
    assert words in str(caught.value)


# ----------------------------------------------------------------------------- the source


def test_written_by_hand_with_our_own_collectives_only():
    allowed = {"ProcessGroup", "get_rank", "get_world_size", "group"}
    names = set()
    for module in (data_parallel, gradient_buckets, background, agreement, sharded_optimizer):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
                if isinstance(node.value, ast.Name) and node.value.id == "dist":
                    assert node.attr in allowed, f"{module.__name__}: dist.{node.attr}"
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("torch.distributed"), module.__name__
                names |= {alias.name for alias in node.names}
    assert not names & {"DistributedDataParallel", "fully_shard", "ZeroRedundancyOptimizer", "all_reduce"}
