"""FullyShardedDataParallel against one process, after every step: world sizes 1 to 5, ranks that start differently.

Functions without `test_` in their name run inside the ranks. There, every rank also trains the plain module by
itself, from rank 0's start: on the whole batch, or on the ranks' parts one after another, which is the same sum.
"""

import ast
import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from workshop_utils import RankError, flat_shard, fully_sharded, sub_world
from workshop_utils.fully_sharded import FullyShardedDataParallel
from workshop_utils.memory import measure_memory
from workshop_utils.models import MLP, SmallViT
from workshop_utils.point_to_point import count_traffic
from workshop_utils.ring import ring_all_gather

WORLD_SIZES = [1, 2, 3, 4, 5]
BATCH = 60  # divides by every world size
world_sizes = pytest.mark.parametrize("n", WORLD_SIZES)

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
}


# ----------------------------------------------------------------------------- models


class Tied(nn.Module):
    """A language model in small: the embedding's weight is also the head's. Own parameters, a norm layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.position = nn.Parameter(torch.randn(3, 7))
        self.scale = nn.Parameter(torch.tensor(1.5))  # no dimension
        self.hidden = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens_BT):
        h = self.embed(tokens_BT) * self.scale + self.position
        return self.head(self.norm(h + self.hidden(h).relu_())).mean(1)  # relu in place on a unit's output


class Mixed(nn.Module):
    """Frozen units between trainable ones, a unit that is half frozen, an unused one, one smaller than the world."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.partly = nn.Linear(784, 13), nn.Linear(13, 13), nn.Linear(13, 13)
        self.unused, self.tiny, self.last = nn.Linear(5, 5), nn.Linear(1, 1), nn.Linear(13, 10)
        self.frozen.requires_grad_(False)
        self.partly.weight.requires_grad_(False)
        self.register_buffer("shift", torch.ones(13))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        h = self.partly(self.frozen(self.frozen(self.first(x)).tanh()).tanh() + self.shift).tanh()
        return self.last(h) + self.tiny(h.mean(1, keepdim=True))


class Twice(nn.Module):
    """One layer under two names, called three times, and a block that reads a weight of its own layer directly."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.out = nn.Linear(784, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        self.again = self.shared
        self.norm = nn.BatchNorm1d(12, affine=True, track_running_stats=False)

    def forward(self, x):
        h = self.stem(x).tanh()
        h = self.again(self.shared(h).tanh()).tanh() + self.out(h).sum(1, keepdim=True)
        return self.out(self.shared(h))


class Checkpointed(nn.Module):
    """Blocks that are computed a second time in backward."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(784, 9), nn.Linear(9, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 17), nn.GELU(), nn.Linear(17, 9)) for _ in range(3)
        )

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = h + checkpoint(block, h, use_reentrant=False)
        return self.head(h)


class Encoder(nn.Module):
    """torch's own transformer layers, which in eval mode have a fast path past the forwards inside."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.encoder(x.view(len(x), 49, 16)[:, :5]).mean(1))


def images(generator, dtype):
    return torch.rand(BATCH, 784, generator=generator, dtype=dtype)


def tokens(generator, dtype):
    return torch.randint(0, 11, (BATCH, 3), generator=generator)


# name -> (model, inputs, arguments)
CASES = {
    "mlp": (lambda: MLP(33), images, {}),
    "mlp, kept whole": (lambda: MLP(33), images, {"reshard_after_forward": False}),
    "mlp, one unit": (lambda: MLP(33), images, {"unit_types": (MLP,)}),
    "mlp, root only": (lambda: MLP(33), images, {"unit_types": ()}),
    "vit": (lambda: SmallViT(2, 16), images, {}),
    "tied": (Tied, tokens, {}),
    "tied, kept whole": (Tied, tokens, {"reshard_after_forward": False}),
    "tied, one unit": (Tied, tokens, {"unit_types": (Tied,)}),
    "mixed": (Mixed, images, {}),
    "twice": (Twice, images, {}),
    "checkpointed layers": (Checkpointed, images, {}),
    "checkpointed blocks": (Checkpointed, images, {"unit_types": (nn.Sequential, nn.Linear)}),
    "checkpointed, kept whole": (Checkpointed, images, {"reshard_after_forward": False}),
    "encoder": (Encoder, images, {}),
    "encoder layers": (Encoder, images, {"unit_types": (nn.TransformerEncoderLayer, nn.Linear)}),
}


# ----------------------------------------------------------------------------- inside the ranks


def build(make, dtype=torch.float64, **arguments):
    """The plain module from rank 0's seed, and the sharded one from this rank's own."""
    torch.manual_seed(0)
    plain = make().to(dtype)
    torch.manual_seed(dist.get_rank())
    return plain, FullyShardedDataParallel(make().to(dtype), **arguments)


def batches(make_inputs, steps, dtype=torch.float64):
    """Inputs [BATCH, ...] and labels [BATCH] of each step, the same on all ranks."""
    generator = torch.Generator().manual_seed(77)
    for _ in range(steps):
        yield make_inputs(generator, dtype), torch.randint(0, 10, (BATCH,), generator=generator)


def loss_of(model, inputs, labels):
    return F.cross_entropy(model(inputs), labels)


def plain_step(model, optimizer, inputs, labels, parts):
    """One process: the batch in `parts` parts, gradients accumulated."""
    optimizer.zero_grad()
    for x, y in zip(inputs.chunk(parts), labels.chunk(parts)):
        (loss_of(model, x, y) / parts).backward()
    optimizer.step()


def sharded_step(model, optimizer, inputs, labels, accumulate=1):
    """This rank's part of the batch, in `accumulate` parts."""
    x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (inputs, labels))
    optimizer.zero_grad()
    for x_part, y_part in zip(x.chunk(accumulate), y.chunk(accumulate)):
        (loss_of(model, x_part, y_part) / accumulate).backward()
    model.finish_gradient_sync()
    optimizer.step()


def difference(plain, sharded) -> float:
    """The largest difference between the plain module and the sharded one; keys and types must agree."""
    expected, got = plain.state_dict(), sharded.full_state_dict()
    assert list(got) == list(expected)
    assert all(got[k].shape == v.shape and got[k].dtype == v.dtype for k, v in expected.items())
    return max((got[key].double() - v.double()).abs().max().item() for key, v in expected.items())


def train_beside_one_process(case, optimizer, n, parts_of, dtype=torch.float64, steps=3, accumulate=1):
    """Largest difference after each step; on the way, what must hold for gradients and memory."""
    make, make_inputs, arguments = CASES[case]
    with sub_world(n) as inside:
        if not inside:
            return [0.0]
        plain, sharded = build(make, dtype, **arguments)
        plain_optimizer, sharded_optimizer = (OPTIMIZERS[optimizer](m.parameters()) for m in (plain, sharded))
        found = [difference(plain, sharded)]
        for inputs, labels in batches(make_inputs, steps, dtype):
            plain_step(plain, plain_optimizer, inputs, labels, parts_of(n))
            sharded_step(sharded, sharded_optimizer, inputs, labels, accumulate)
            assert sharded.full_parameter_bytes() == 0
            for shard in sharded.parameters():
                assert shard.dim() == 1 and (
                    shard.grad is None or (shard.grad.shape, shard.grad.dtype) == (shard.shape, dtype)
                )
            found.append(difference(plain, sharded))
        padding_is_zero(sharded)
        for mode in (torch.no_grad, torch.inference_mode):  # evaluation, on the whole batch
            with mode():
                assert torch.allclose(
                    sharded.eval()(inputs),
                    plain.eval()(inputs),
                    atol=1e-9 if dtype == torch.float64 else 1e-4,
                )
            assert sharded.full_parameter_bytes() == 0
        return found


def padding_is_zero(sharded):
    """In parameters and gradients: a norm over all shards is the norm over all parameters."""
    for flat in (flat for unit in sharded.units for flat in unit.flat_shards):
        for mine in (flat.shard.detach(), flat.shard.grad):
            if mine is not None:
                everything = mine.new_empty(flat.n * mine.numel())
                ring_all_gather(everything, mine)
                assert not everything[flat.numel :].any()


def train_all(configurations, **keywords):
    """{configuration: differences}; a configuration is (case, optimizer, n)."""
    return {c: train_beside_one_process(*c, **keywords) for c in configurations}


def whole_batch(n):
    return 1


def same_parts(n):
    return n


# ----------------------------------------------------------------------------- parity


def assert_below(results, tolerance):
    for rank, found in enumerate(results):
        for configuration, differences in found.items():
            assert max(differences) <= tolerance, (
                f"rank {rank} {configuration}: after each step {differences}"
            )


@world_sizes
def test_equals_one_process_after_every_step_whatever_the_optimizer(ranks5, n):
    configurations = [("vit", "Adam", n), *((c, o, n) for c in ("mlp", "tied") for o in OPTIMIZERS)]
    assert_below(ranks5.run(train_all, configurations, parts_of=whole_batch), 1e-10)


@world_sizes
def test_equals_one_process_after_every_step_whatever_the_model(ranks5, n):
    configurations = [(c, "momentum", n) for c in CASES if c not in ("mlp", "vit", "tied", "twice")]
    assert_below(ranks5.run(train_all, configurations, parts_of=whole_batch), 1e-10)


def test_a_layer_used_three_times(ranks5):
    """Batch norm sees the parts one by one, on the ranks and in the one process."""
    configurations = [("twice", o, n) for n in WORLD_SIZES for o in ("momentum", "Adam")]
    assert_below(ranks5.run(train_all, configurations, parts_of=same_parts), 1e-10)


def test_float32(ranks5):
    configurations = [(c, "SGD", n) for n in WORLD_SIZES for c in ("mlp", "tied")]
    results = ranks5.run(train_all, configurations, parts_of=whole_batch, dtype=torch.float32)
    assert_below(results, 1e-5)


def test_two_ranks_are_bit_equal_to_one_process_that_accumulates_the_halves(ranks5):
    cases = [c for c in CASES if not c.startswith("encoder")]
    configurations = [(c, o, 2) for c in cases for o in ("SGD", "Adam")]
    results = ranks5.run(train_all, configurations, parts_of=same_parts, dtype=torch.float32)
    assert_below(results, 0.0)


def test_accumulation_over_several_backward_passes(ranks5):
    configurations = [(c, "Adam", n) for n in (1, 2, 5) for c in ("mlp", "tied", "mlp, kept whole", "mixed")]
    results = ranks5.run(train_all, configurations, parts_of=whole_batch, accumulate=3, steps=2)
    assert_below(results, 1e-10)


# ----------------------------------------------------------------------------- lower precision


class CastedCopy(nn.Module):
    """One process with the same casting: computes with a bf16 copy of float32 weights."""

    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.copy, self.dtype = module, copy.deepcopy(module).to(dtype), dtype

    def accumulate(self, inputs, labels, parts):
        with torch.no_grad():
            for master, low in zip(self.module.parameters(), self.copy.parameters()):
                low.copy_(master)
        for master in self.module.parameters():
            master.grad = torch.zeros_like(master) if master.requires_grad else None
        for x, y in zip(inputs.chunk(parts), labels.chunk(parts)):
            self.copy.zero_grad()
            x = x.to(self.dtype) if x.is_floating_point() else x
            F.cross_entropy(self.copy(x).float(), y).backward()
            for master, low in zip(self.module.parameters(), self.copy.parameters()):
                if low.grad is not None:
                    master.grad += low.grad.float() / parts


def train_in_low_precision(n, dtype):
    found = {}
    with sub_world(n) as inside:
        cases = ("mlp", "tied", "vit", "checkpointed layers") if dtype == torch.bfloat16 else ("mlp",)
        for case in cases if inside else ():
            make, make_inputs, arguments = CASES[case]
            plain, sharded = build(make, torch.float32, compute_dtype=dtype, **arguments)
            casted = CastedCopy(plain, dtype)
            optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, sharded)]
            worst = 0.0
            for inputs, labels in batches(make_inputs, 3, torch.float32):
                casted.accumulate(inputs, labels, n)
                x, y = (t.chunk(n)[dist.get_rank()] for t in (inputs, labels))
                sharded.zero_grad()
                output = sharded(x)
                assert output.dtype == dtype
                F.cross_entropy(output.float(), y).backward()
                sharded.finish_gradient_sync()
                assert all(p.dtype == p.grad.dtype == torch.float32 for p in sharded.parameters())
                for optimizer in optimizers:
                    optimizer.step()
                worst = max(worst, difference(plain, sharded))
            found[case] = worst
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_compute_equals_one_process_that_casts_alike(ranks5, dtype):
    for n in (1, 2, 3):
        tolerance = 0.0 if n <= 2 else 1e-6  # two addends have one order
        for found in ranks5.run(train_in_low_precision, n, dtype):
            assert all(worst <= tolerance for worst in found.values()), f"{n} ranks: {found}"


# ----------------------------------------------------------------------------- against torch


def train_beside_torch(n, compute_dtype):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    worst = 0.0
    with sub_world(n) as inside:
        if not inside:
            return worst
        plain, sharded = build(lambda: MLP(33), torch.float32, compute_dtype=compute_dtype)
        mesh = DeviceMesh("cpu", list(range(n)))
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        for layer in (plain.fc1, plain.fc2, plain.fc3, plain):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, sharded)]
        for inputs, labels in batches(images, 3, torch.float32):
            x, y = (t.chunk(n)[dist.get_rank()] for t in (inputs, labels))
            for model, optimizer in zip((plain, sharded), optimizers):
                optimizer.zero_grad()
                F.cross_entropy(model(x).float(), y).backward()
                if model is sharded:
                    model.finish_gradient_sync()
                optimizer.step()
            theirs = {key: whole(p) for key, p in plain.state_dict().items()}
            ours = sharded.full_state_dict()
            worst = max([worst] + [(ours[key] - theirs[key]).abs().max().item() for key in theirs])
    return worst


def whole(dtensor):
    """All ranks' parts of a DTensor. Its own full_tensor() finds the group of an earlier sub_world."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, dtensor.to_local())
    return torch.cat(parts)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_equals_torchs_fully_shard(ranks5, compute_dtype):
    for n in (1, 2, 4, 5):
        worst = max(ranks5.run(train_beside_torch, n, compute_dtype))
        assert worst <= (1e-6 if n > 2 else 0.0), f"{n} ranks: {worst}"


# ----------------------------------------------------------------------------- memory


def watch_memory(n, case):
    """Most full-parameter bytes at any boundary of any module, forward and backward; per unit; at the end."""
    make, make_inputs, arguments = CASES[case]
    with sub_world(n) as inside:
        if not inside:
            return None
        _, model = build(make, **arguments)
        seen, in_use = [], []

        def look(*_):
            seen.append(model.full_parameter_bytes())
            flats = [flat for unit in model.units for flat in unit.flat_shards]
            views = {
                v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for f in flats for v in f._views
            }
            in_use.append(sum(views.values()))

        for module in model.modules():
            if module is not model and not isinstance(module, nn.ParameterList):
                module.register_forward_pre_hook(look)
                module.register_forward_hook(look)
                module.register_forward_hook(lambda m, args, output: look_in_backward(output, look))
        for flat in (flat for unit in model.units for flat in unit.flat_shards):
            flat.gather, flat.free = looking(flat.gather, look), looking(flat.free, look)
        inputs, labels = next(batches(make_inputs, 1))
        loss_of(model, inputs, labels).backward()
        look()
        after_backward = seen[-1]
        model.finish_gradient_sync()
        whole = sorted(sum(flat.full_bytes for flat in unit.flat_shards) for unit in model.units)
        assert seen[:-1] == in_use[:-1]
        return max(seen), whole, after_backward, model.full_parameter_bytes()


def look_in_backward(output, look):
    for tensor in output if isinstance(output, tuple) else (output,):
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(look)


def looking(function, look):
    def wrapped():
        function()
        look()

    return wrapped


@pytest.mark.parametrize("case", ["mlp", "tied", "mixed", "checkpointed blocks", "encoder layers"])
def test_never_more_than_the_two_largest_units_are_whole(ranks5, case):
    for n in (1, 4, 5):
        for most, whole, after_backward, at_the_end in ranks5.run(watch_memory, n, case)[:n]:
            assert 0 < most <= sum(whole[-2:]), f"{most} of {whole}"
            frozen_bytes = (
                sum(whole[-2:]) if case == "mixed" else 0
            )  # they stay until the next unit's backward
            assert after_backward <= frozen_bytes and at_the_end == 0


def test_kept_whole_means_all_units_are(ranks5):
    for most, whole, _, at_the_end in ranks5.run(watch_memory, 2, "mlp, kept whole")[:2]:
        assert most == sum(whole) and at_the_end == 0


def hold_a_step(n, compute_dtype):
    with sub_world(n) as inside:
        if not inside:
            return None
        torch.manual_seed(dist.get_rank())
        net = MLP(100)
        psi = sum(p.numel() for p in net.parameters())
        model = FullyShardedDataParallel(net, compute_dtype=compute_dtype)
        optimizer = torch.optim.Adam(model.parameters())
        F.cross_entropy(model(torch.rand(8, 784)).float(), torch.arange(8)).backward()
        model.finish_gradient_sync()
        optimizer.step()
        return psi, measure_memory(model, optimizer).by_kind()


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_rank_holds_16_bytes_per_parameter_divided_by_n(ranks5, compute_dtype):
    for n in (1, 4):
        for psi, held in ranks5.run(hold_a_step, n, compute_dtype)[:n]:
            assert sum(held.values()) == pytest.approx(16 * psi / n, rel=0.01)
            assert held["parameters"] == held["gradients"] == pytest.approx(4 * psi / n, rel=0.01)


# ----------------------------------------------------------------------------- what it sends


def send_a_step(n, case, compute_dtype=None):
    make, make_inputs, arguments = CASES[case]
    with sub_world(n) as inside:
        if not inside:
            return None
        _, model = build(make, torch.float32, compute_dtype=compute_dtype, **arguments)
        inputs, labels = next(batches(make_inputs, 1, torch.float32))
        with count_traffic() as traffic:
            F.cross_entropy(model(inputs).float(), labels).backward()
            model.finish_gradient_sync()
        trainable = [shard for shard in model.parameters() if shard.requires_grad]
        return traffic.bytes_sent, traffic.bytes_received, n * sum(shard.nbytes for shard in trainable)


@world_sizes
def test_sends_three_quarters_of_what_gloo_would(ranks5, n):
    """3 S (n-1)/n; 2 where units stay whole; under bfloat16, 1 for both gathers and 1 for the gradients."""
    for case, dtype, factor in [
        ("mlp", None, 3),
        ("mlp, kept whole", None, 2),
        ("vit", None, 3),
        ("tied", None, 3),
        ("mlp", torch.bfloat16, 2),
        ("checkpointed blocks", None, None),
    ]:
        for sent, received, size in ranks5.run(send_a_step, n, case, dtype)[:n]:
            if factor is None:  # the first gather in backward serves the second forward too
                factor = 3
            assert sent == received == factor * size * (n - 1) / n, f"{case}, {dtype}"


# ----------------------------------------------------------------------------- what goes wrong


def use_a_sharded_weight():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.inner.weight)

    class Block(Reads):
        pass

    model = FullyShardedDataParallel(nn.Sequential(Reads()))
    weight = model.module[0].inner.weight
    assert (weight.shape, weight.dtype, str(weight.device)) == ((4, 4), torch.float32, "cpu")
    assert "0.inner.weight, sharded" in repr(weight)
    with pytest.raises(RuntimeError, match=r"0\.inner\.weight was used while it is sharded.*unit_types"):
        model(torch.ones(2, 4))
    model = FullyShardedDataParallel(nn.Sequential(Block()), unit_types=(Block,))
    model(torch.ones(2, 4)).sum().backward()


def forget_to_finish():
    model = FullyShardedDataParallel(nn.Linear(4, 4))
    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), nn.Linear(2, 2)
    model(torch.ones(2, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()  # another model's optimizer may step
    with pytest.raises(RuntimeError, match="call finish_gradient_sync"):
        optimizer.step()
    model.finish_gradient_sync()
    optimizer.step()


def bad_arguments():
    for arguments, complaint in [
        ({"unit_types": (3,)}, "must be module classes"),
        ({"compute_dtype": torch.int8}, "must be a float dtype"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            FullyShardedDataParallel(nn.Linear(2, 2), **arguments)
    net = nn.Sequential(nn.Linear(2, 2))
    FullyShardedDataParallel(net)
    with pytest.raises(ValueError, match="sharded before"):
        FullyShardedDataParallel(net)
    with pytest.raises(
        ValueError, match="rank 1 has reshard_after_forward=False|compute_dtype=None, reshard"
    ):
        FullyShardedDataParallel(nn.Linear(2, 2), reshard_after_forward=dist.get_rank() != 1)
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        torch.autograd.grad(FullyShardedDataParallel(nn.Linear(2, 2))(x).sum(), x, create_graph=True)


class Breaks(nn.Module):
    """Fails in the middle of a forward, on some ranks."""

    def __init__(self, on):
        super().__init__()
        self.on, self.first, self.last = on, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        if dist.get_rank() in self.on:
            raise ArithmeticError("in the middle")
        return self.last(h)


def all_break():
    """After a mistake on all ranks, nothing is left whole, and the same model trains on."""
    net = Breaks(range(5))
    model = FullyShardedDataParallel(net, unit_types=(Breaks,))
    with pytest.raises(ArithmeticError):
        model(torch.ones(2, 4))
    assert model.full_parameter_bytes() == 0
    net.on = ()
    model(torch.ones(2, 4)).sum().backward()
    model.finish_gradient_sync()
    assert all(p.grad is not None for p in model.parameters())


def rank_two_breaks():
    FullyShardedDataParallel(Breaks([2]))(torch.ones(2, 4))


def rank_one_takes_another_way():
    """Units of one size: what one rank sends for `last` must not end up in another rank's `first`."""
    net = Breaks(())
    model = FullyShardedDataParallel(net)
    (net.last if dist.get_rank() == 1 else net.first)(torch.ones(2, 4))
    return model.full_parameter_bytes()


def outputs_of_other_kinds():
    """Dicts are looked into; from an object that hides its tensors, the unit stays whole until backward."""

    class Hides:
        def __init__(self, tensor):
            self.tensor = tensor

    class Block(nn.Linear):
        def forward(self, x):
            y = super().forward(x).tanh()
            return {"deep": [y, 3]} if self.bias is not None else Hides(y)

    for bias in (True, False):
        model = FullyShardedDataParallel(nn.ModuleList([Block(5, 4, bias)]), unit_types=(Block,))
        output = model.module[0](torch.ones(2, 5, requires_grad=True))
        assert (model.full_parameter_bytes() == 0) == bias
        (output["deep"][0] if bias else output.tensor).sum().backward()
        model.finish_gradient_sync()
        assert model.full_parameter_bytes() == 0
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "function", [use_a_sharded_weight, forget_to_finish, bad_arguments, all_break, outputs_of_other_kinds]
)
def test_mistakes_are_named(ranks5, function):
    ranks5.run(function)


def test_an_error_on_one_rank_frees_the_others_and_they_are_usable_again(ranks5):
    with pytest.raises(RankError) as caught:
        ranks5.run(rank_two_breaks)
    assert caught.value.rank == 2 and "in the middle" in str(caught.value)
    configurations = [("mlp", "SGD", 5)]
    assert_below(ranks5.run(train_all, configurations, parts_of=whole_batch), 1e-10)


def test_a_unit_that_one_rank_alone_uses_makes_the_ranks_wait_and_mixes_nothing_up(ranks5, monkeypatch):
    monkeypatch.setattr(ranks5, "timeout_s", 1.0)
    with pytest.raises(RankError, match="waiting"):
        ranks5.run(rank_one_takes_another_way)


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="needs a process group"):
        FullyShardedDataParallel(nn.Linear(2, 2))


def test_the_classes_use_no_collective_of_torch():
    allowed = {"ProcessGroup", "group", "is_initialized", "Work", "ReduceOp"}
    for module in (fully_sharded, flat_shard):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "dist"
        }
        assert used <= allowed, f"{module.__name__} uses dist.{used - allowed}"
        names = set(
            itertools.chain(*(node.names for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)))
        )
        assert not {name.name for name in names} & {"fully_shard", "DistributedDataParallel", "all_reduce"}
