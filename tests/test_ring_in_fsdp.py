"""The ring inside torch's fully_shard: the same weights, fewer bytes, on any group, for every operation it promises.

Functions without `test_` in their name run inside the ranks.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from workshop_utils import RankError, sub_world
from workshop_utils.fully_sharded import use_ring_reduce_scatter
from workshop_utils.models import SmallViT
from workshop_utils.point_to_point import count_traffic, wire_bytes
from workshop_utils.ring_in_fsdp import RingReduceScatter

REDUCE_DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


# ----------------------------------------------------------------------------- inside the ranks


def mesh_of(ranks):
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard")[-torch.tensor(ranks).dim() :])


def shard(model, mesh, **arguments):
    """Each layer, and the rest, as units of torch's fully_shard."""
    from torch.distributed.fsdp import fully_shard

    for layer in [m for m in model.modules() if isinstance(m, (nn.Linear, nn.TransformerEncoderLayer))]:
        fully_shard(layer, mesh=mesh, **arguments)
    return fully_shard(model, mesh=mesh, **arguments)


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(30, 17), nn.ReLU(), nn.Linear(17, 33), nn.LayerNorm(33), nn.Linear(33, 5))


def train(model, steps=3, shape=(30,)):
    """A few steps on this rank's own data; returns this rank's parts of the parameters, and what was sent by us."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with count_traffic() as traffic:
        for _ in range(steps):
            x = torch.randn(8, *shape, generator=generator)
            y = torch.randint(0, 5, (8,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x).float(), y).backward()
            optimizer.step()
    return [p.to_local().clone() for p in model.parameters()], traffic.bytes_sent


def train_both(n, reduce_dtype, divide_by=None):
    """The largest difference between the default and the ring, and whether the ring was used."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    with sub_world(n) as inside:
        if not inside:
            return 0.0, True
        ends, sent = [], []
        for plug in (lambda model: None, use_ring_reduce_scatter):
            model = shard(
                mlp(), mesh_of(list(range(n))), mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
            )
            if divide_by:
                for module in model.modules():
                    if hasattr(module, "set_gradient_divide_factor"):
                        module.set_gradient_divide_factor(divide_by)
                        # gloo has no PREMUL_SUM: its own run adds up, and divides itself
                        module.set_force_sum_reduction_for_comms(plug is not use_ring_reduce_scatter)
            plug(model)
            end, bytes_sent = train(model)
            ends.append(end)
            sent.append(bytes_sent)
        differences = [(a - b).abs().max().item() for a, b in zip(*ends) if a.numel()]
        return max(differences), sent[0] == 0 and (sent[1] > 0 or n == 1)


def train_hybrid():
    """Four of the five ranks as 2 replicas of 2 shards; all ranks build the meshes. This rank's parts of the
    parameters after the default, after the ring, and after the ring's job on 4 shards without replicas."""
    ends = []
    mesh, flat_mesh = mesh_of([[0, 1], [2, 3]]), mesh_of([0, 1, 2, 3])
    if dist.get_rank() == 4:
        return None
    for plug in (lambda model: None, use_ring_reduce_scatter):
        model = shard(mlp(), mesh)
        plug(model)
        ends.append(train(model)[0])
    flat = shard(mlp(), flat_mesh)
    return *ends, train(flat)[0]


def send_a_step(n, plugged, reshard):
    """What a step of 3 x Linear(240) sends, in units of S (n-1)/n."""
    with sub_world(n) as inside:
        if not inside:
            return None
        model = nn.Sequential(*(nn.Linear(240, 240) for _ in range(3)))
        size = sum(p.nbytes for p in model.parameters())
        model = shard(model, mesh_of(list(range(n))), reshard_after_forward=reshard)
        if plugged:
            use_ring_reduce_scatter(model)
        x = torch.randn(4, 240)
        model(x).sum().backward()
        dist.barrier()
        with wire_bytes() as wire:
            model(x).sum().backward()
        return wire.bytes_sent / (size * (n - 1) / n)


def reduce_with(op_name, n, dtype, async_op):
    """RingReduceScatter by itself, on a group that is not the first n ranks."""
    group = dist.new_group(list(range(5 - n, 5)))
    me = dist.get_rank(group)
    if me < 0:
        return
    inputs = [
        torch.randn(6 * n, generator=torch.Generator().manual_seed(r), dtype=torch.float64).to(dtype)
        for r in range(n)
    ]
    premul = getattr(dist, "_make_nccl_premul_sum", dist.ReduceOp.PREMUL_SUM)
    op = premul(0.25) if op_name == "PREMUL_SUM" else getattr(dist.ReduceOp, op_name)
    for given in (op, op if op_name == "PREMUL_SUM" else dist.ReduceOp(op)):
        ring, mine = RingReduceScatter(), inputs[me].clone()
        output = ring.allocate((6,), dtype=dtype, device=torch.device("cpu"))
        work = ring(output_tensor=output, input_tensor=mine, group=group, op=given, async_op=async_op)
        assert (work is not None) == async_op and (not async_op or (work.wait() and work.is_completed()))
        factor = {"SUM": 1, "AVG": 1 / n, "PREMUL_SUM": 0.25}[op_name]
        expected = (sum(x.double() for x in inputs) * factor)[6 * me : 6 * me + 6]
        assert torch.allclose(output.double(), expected, atol={torch.bfloat16: 0.1}.get(dtype, 1e-6))
        assert torch.equal(mine, inputs[me]), "the input stays as it was"
    dist.destroy_process_group(group)


def refuse(op_name):
    op = getattr(dist.ReduceOp, op_name)
    for given in (op, dist.ReduceOp(op)):
        with pytest.raises(ValueError, match=f"sum .SUM., average .AVG.*but not {op_name}"):
            RingReduceScatter()(torch.zeros(1), torch.zeros(5), dist.group.WORLD, given)


def plug_in_everywhere():
    model = shard(SmallViT(2, 16), mesh_of(list(range(5))))
    use_ring_reduce_scatter(model)
    groups = [g for m in model.modules() if hasattr(m, "_get_fsdp_state") for g in param_groups(m)]
    assert len(groups) > 5 and all(isinstance(g._reduce_scatter_comm, RingReduceScatter) for g in groups)
    with pytest.raises(TypeError, match="call torch's fully_shard on it first"):
        use_ring_reduce_scatter(mlp())


def param_groups(module):
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def break_on_one_rank():
    model = shard(mlp(), mesh_of(list(range(5))))
    use_ring_reduce_scatter(model)
    if dist.get_rank() == 3:
        raise ArithmeticError("on its way")
    train(model)


# ----------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_same_weights_as_the_default(ranks5, n):
    for dtype in REDUCE_DTYPES:
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 2e-3)
        for difference, used in ranks5.run(train_both, n, dtype):
            assert used and difference <= (0.0 if n == 1 else tolerance), f"{dtype}: {difference}"


def test_gradients_divided_by_another_number(ranks5):
    for difference, used in ranks5.run(train_both, 3, torch.float32, 2.5):
        assert used and difference <= 1e-6


def test_two_replicas_of_two_shards(ranks5):
    by_rank = ranks5.run(train_hybrid)[:4]
    for default, ring, _ in by_rank:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(default, ring))
    for parts in zip(*(ring for _, ring, _ in by_rank)):  # of one parameter
        assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[3])
    for i in range(len(by_rank[0][1])):
        hybrid = torch.cat([by_rank[rank][1][i] for rank in (0, 1)])
        without_replicas = torch.cat([by_rank[rank][2][i] for rank in range(4)])
        assert torch.allclose(hybrid, without_replicas, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_three_on_the_wire_in_place_of_four(ranks5, n):
    for plugged, reshard, units in [(True, True, 3), (False, True, 4), (True, False, 2), (False, False, 3)]:
        for got in ranks5.run(send_a_step, n, plugged, reshard)[:n]:
            assert units <= got <= units * 1.02, f"{plugged=}, {reshard=}: {got}"


@pytest.mark.parametrize("op", ["SUM", "AVG", "PREMUL_SUM"])
def test_any_group_and_operation(ranks5, op):
    for n, dtype, async_op in [
        (1, torch.float32, False),
        (3, torch.float64, True),
        (4, torch.bfloat16, False),
    ]:
        ranks5.run(reduce_with, op, n, dtype, async_op)


@pytest.mark.parametrize("op", ["MAX", "MIN", "PRODUCT"])
def test_other_operations_are_refused(ranks5, op):
    ranks5.run(refuse, op)


def test_every_unit_gets_it(ranks5):
    ranks5.run(plug_in_everywhere)


def test_an_error_on_one_rank_frees_the_others(ranks5):
    with pytest.raises(RankError) as caught:
        ranks5.run(break_on_one_rank)
    assert caught.value.rank == 3 and "on its way" in str(caught.value)
    ranks5.run(plug_in_everywhere)
