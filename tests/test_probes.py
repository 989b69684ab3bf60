"""What notebook 04 counts with agrees with torch's own counter, also where that of torch 2.11 fails."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from workshop_utils.probes import Collectives, count_collectives


def model_and_step(mesh_shape, names, parts):
    torch.manual_seed(0)
    model, mesh = (
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))),
        init_device_mesh("cpu", mesh_shape, mesh_dim_names=names),
    )
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh)

    def step():
        for _ in range(parts):
            model(torch.rand(4, 8)).square().mean().backward()

    return model, step


def count(mesh_shape, names, parts):
    model, step = model_and_step(mesh_shape, names, parts)
    step()
    return count_collectives(model, step)


def count_with_torch(mesh_shape, names):
    _, step = model_and_step(mesh_shape, names, 1)
    step()
    with CommDebugMode() as calls:
        step()
    by_name = {str(operation): count for operation, count in calls.get_comm_counts().items()}
    gathers = sum(count for name, count in by_name.items() if "gather" in name)
    scatters = sum(count for name, count in by_name.items() if "reduce_scatter" in name)
    return gathers, scatters, sum(by_name.values()) - gathers - scatters


def test_counts_equal_torchs(ranks5):
    for mesh in (((5,), ("shard",)), ((5, 1), ("replicate", "shard"))):
        for ours, torchs in zip(
            ranks5.run(count, *mesh, 1), ranks5.run(count_with_torch, *mesh), strict=True
        ):
            assert (ours.all_gathers, ours.reduce_scatters, ours.others) == torchs
            assert sum(torchs) > 0


def test_two_parts_are_twice_the_collectives(ranks5):
    once, twice = (ranks5.run(count, (5,), ("shard",), parts)[0] for parts in (1, 2))
    # 8 rows are padded to 10, two for each rank
    assert once == Collectives(peak_bytes=4 * (10 * 8 + 10), all_gathers=6, reduce_scatters=3, others=0)
    assert twice == Collectives(once.peak_bytes, 12, 6, 0)
