"""Collectives against plain arithmetic: world sizes 1 to 5 on real ranks, every rank with numbers of its own.

Functions without `test_` in their name run inside the ranks. Values are whole numbers small enough that even
bfloat16 adds them exactly, so results are compared with `equal`; one test compares rounded sums across ranks.
"""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from workshop_utils import collectives, network_card, pieces, point_to_point, ring, start_ranks, sub_world
from workshop_utils.collectives import (
    all_gather,
    broadcast_,
    gather,
    halving_doubling_all_reduce_,
    naive_all_reduce_,
    reduce_,
    reduce_scatter,
    ring_all_gather,
    ring_all_reduce_,
    ring_reduce_scatter,
    scatter,
    tree_all_reduce_,
)
from workshop_utils.point_to_point import Traffic, count_traffic, irecv, isend

ALL_REDUCE = {
    "naive": naive_all_reduce_,
    "tree": tree_all_reduce_,
    "ring": ring_all_reduce_,
    "halving-doubling": halving_doubling_all_reduce_,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
SHAPES = [(), (0,), (1,), (2,), (3,), (4,), (5,), (7, 11), (2, 0, 3), (3, 5, 7), (1024,), (4099,)]
WORLD_SIZES = [1, 2, 3, 4, 5]

all_reduces = pytest.mark.parametrize("name", ALL_REDUCE)
world_sizes = pytest.mark.parametrize("n", WORLD_SIZES)


# ----------------------------------------------------------------------------- inside the ranks


def numbers(rank: int, shape=(), dtype=torch.float64) -> torch.Tensor:
    """Different for every rank and position, at most 40 in absolute value."""
    count = torch.Size(shape).numel()
    steps = torch.arange(count, dtype=torch.int64)
    return ((steps * (2 * rank + 3) + 7 * rank * rank + rank) % 81 - 40).reshape(shape).to(dtype)


def total(ranks, shape=(), dtype=torch.float64) -> torch.Tensor:
    return sum(numbers(r, shape, torch.int64) for r in ranks).to(dtype)


def same(got: torch.Tensor, expected: torch.Tensor, what="") -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got, expected), f"rank {dist.get_rank()} {what}: got {got}, expected {expected}"


def nothing_left_over() -> None:
    """Whatever a collective forgot to receive would be received now, in place of the right number."""
    me, n = dist.get_rank(), dist.get_world_size()
    for tag in (0, 1):
        for distance in range(1, n):
            to, source = (me + distance) % n, (me - distance) % n
            mark = torch.zeros(1, dtype=torch.int64)
            waiting = irecv(mark, source, tag=tag), isend(torch.tensor([10_000 + me]), to, tag=tag)
            for transfer in waiting:
                transfer.wait()
            assert mark.item() == 10_000 + source, f"a message of an earlier collective was left over: {mark}"


def reduce_everything(name: str, n: int) -> None:
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        for dtype in DTYPES:
            for shape in SHAPES:
                tensor = numbers(me, shape, dtype)
                pointer = tensor.data_ptr()
                assert ALL_REDUCE[name](tensor) is None
                assert tensor.data_ptr() == pointer
                same(tensor, total(range(n), shape, dtype), f"{name} {shape} {dtype}")
        nothing_left_over()


def reduce_views(name: str, n: int) -> None:
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        for view in (
            lambda x: x.t(),
            lambda x: x[:, 1::2],
            lambda x: x[3],
            lambda x: x[:, 2],
            lambda x: x[2:4, 3:9],
        ):
            whole, expected = numbers(me, (6, 10)), numbers(me, (6, 10))
            view(expected).copy_(view(total(range(n), (6, 10))))
            ALL_REDUCE[name](view(whole))
            same(whole, expected, f"{name} of a view, and nothing beside it")
        parameter = torch.nn.Parameter(numbers(me, (3, 3)))
        ALL_REDUCE[name](parameter)
        same(parameter.detach(), total(range(n), (3, 3)), "a parameter that requires grad")


def reduce_in_segments(n: int, segment_bytes: int) -> None:
    """Chunks of up to 26 segments: with few messages at a time under way, all must still get through."""
    ring.SEGMENT_BYTES = segment_bytes
    try:
        with sub_world(n) as inside:
            if not inside:
                return
            me = dist.get_rank()
            for count in (1, 7, 100, 103):
                tensor = numbers(me, (count,))
                ring_all_reduce_(tensor)
                same(tensor, total(range(n), (count,)), f"{count} elements")
            output = torch.zeros(26)
            ring_reduce_scatter(output, numbers(me, (n * 26,), torch.float32))
            same(output, total(range(n), (n * 26,), torch.float32)[me * 26 : (me + 1) * 26])
            output = torch.zeros(n, 26)
            ring_all_gather(output, numbers(me, (26,), torch.float32))
            same(output, torch.stack([numbers(r, (26,), torch.float32) for r in range(n)]))
            nothing_left_over()
    finally:
        ring.SEGMENT_BYTES = 4 * 2**20


def count_reduces(name: str, n: int) -> dict[tuple, Traffic]:
    """What this rank sends and receives, for some numbers of elements and dtypes."""
    found = {}
    with sub_world(n) as inside:
        for count in (0, 1, 3, 5, 1000, 1003) if inside else ():
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                tensor = numbers(dist.get_rank(), (count,), dtype)
                with count_traffic() as traffic:
                    ALL_REDUCE[name](tensor)
                found[count, dtype] = traffic
    return found


def reduce_noise(n: int) -> dict[tuple, torch.Tensor]:
    found = {}
    with sub_world(n) as inside:
        for name in ALL_REDUCE if inside else ():
            for dtype in (torch.float32, torch.bfloat16):
                found[name, dtype] = noise(dist.get_rank(), dtype)
                ALL_REDUCE[name](found[name, dtype])
    return found


def noise(rank: int, dtype) -> torch.Tensor:
    return torch.randn(4099, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def collectives_from_every_root(n: int) -> None:
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        for root in range(n):
            for shape in [(), (0,), (5,), (3, 4)]:
                mine = numbers(me, shape)
                broadcast_(mine, root)
                same(mine, numbers(root, shape), f"broadcast from {root}")
                mine = numbers(me, shape)
                reduce_(mine, root)
                same(mine, total(range(n), shape) if me == root else numbers(me, shape), f"reduce to {root}")
                mine = numbers(me, shape)
                scatter(mine, [numbers(10 * root + i, shape) for i in range(n)] if me == root else None, root)
                same(mine, numbers(10 * root + me, shape), f"scatter from {root}")
                slots = [torch.zeros(shape, dtype=torch.float64) for _ in range(n)] if me == root else None
                gather(numbers(me, shape), slots, root)
                for i, slot in enumerate(slots or []):
                    same(slot, numbers(i, shape), f"gather to {root}")
        nothing_left_over()


def collectives_to_all(n: int) -> None:
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        for shape in [(), (0,), (5,), (3, 4)]:
            slots = [torch.zeros(shape, dtype=torch.float64) for _ in range(n)]
            all_gather(slots, numbers(me, shape))
            for i, slot in enumerate(slots):
                same(slot, numbers(i, shape), "all_gather")
            output, inputs = (
                torch.zeros(shape, dtype=torch.float64),
                [numbers(me + 10 * i, shape) for i in range(n)],
            )
            reduce_scatter(output, inputs)
            same(output, total([r + 10 * me for r in range(n)], shape), "reduce_scatter")
            for i, part in enumerate(inputs):
                same(part, numbers(me + 10 * i, shape), "an input of reduce_scatter")
        nothing_left_over()


def ring_halves(n: int) -> None:
    with sub_world(n) as inside:
        if not inside:
            return
        me = dist.get_rank()
        for dtype in DTYPES:
            for shape in [(0,), (1,), (2, 3), (1000,)]:
                ring_half_each_way(me, n, shape, dtype)
        board = torch.zeros(4, n)
        ring_all_gather(board.t(), numbers(me, (4,), torch.float32))
        same(
            board,
            torch.stack([numbers(r, (4,), torch.float32) for r in range(n)], dim=1),
            "an output that is a view",
        )
        columns, given = torch.zeros(4, 2), numbers(me, (4, n), torch.float32)
        ring_reduce_scatter(columns[:, 1], given.t())
        same(columns[:, 1], total(range(n), (4, n), torch.float32)[:, me], "views in and out")
        same(columns[:, 0], torch.zeros(4), "what lies beside a view")
        nothing_left_over()


def ring_half_each_way(me: int, n: int, shape, dtype) -> None:
    whole = (n, *shape)
    output, given = torch.zeros(shape, dtype=dtype), numbers(me, whole, dtype)
    with count_traffic() as traffic:
        ring_reduce_scatter(output, given)
    same(output, total(range(n), whole, dtype)[me], "ring_reduce_scatter")
    same(given, numbers(me, whole, dtype), "the input of ring_reduce_scatter")
    assert traffic.bytes_sent == traffic.bytes_received == (n - 1) * output.nbytes
    output, given = torch.zeros(whole, dtype=dtype), numbers(me, shape, dtype)
    with count_traffic() as traffic:
        ring_all_gather(output, given)
    same(output, torch.stack([numbers(r, shape, dtype) for r in range(n)]), "ring_all_gather")
    assert traffic.bytes_sent == traffic.bytes_received == (n - 1) * given.nbytes


def in_a_subgroup(ranks: list[int]) -> None:
    group = dist.new_group(ranks)
    me = dist.get_rank()
    if me in ranks:
        for reduce in ALL_REDUCE.values():
            tensor = numbers(me, (11,))
            reduce(tensor, group)
            same(tensor, total(ranks, (11,)))
        place, root = ranks.index(me), ranks[-1]
        tensor = numbers(me, (4,))
        broadcast_(tensor, src=root, group=group)
        same(tensor, numbers(root, (4,)))
        tensor = numbers(me, (4,))
        reduce_(tensor, dst=root, group=group)
        same(tensor, total(ranks, (4,)) if me == root else numbers(me, (4,)))
        scatter(tensor, [numbers(r, (4,)) for r in range(3)] if me == root else None, root, group)
        same(tensor, numbers(place, (4,)))
        slots = [torch.zeros(4, dtype=torch.float64) for _ in ranks]
        gather(numbers(me, (4,)), slots if me == root else None, root, group)
        all_gather(slots, numbers(me, (4,)), group)
        same(torch.stack(slots), torch.stack([numbers(r, (4,)) for r in ranks]))
        reduce_scatter(tensor, list(numbers(me, (3, 4))), group)
        same(tensor, total(ranks, (3, 4))[place])
        ring_reduce_scatter(tensor, numbers(me, (3, 4)), group)
        same(tensor, total(ranks, (3, 4))[place])
        output = torch.zeros(12, dtype=torch.float64)
        ring_all_gather(output, numbers(me, (4,)), group)
        same(output.view(3, 4), torch.stack([numbers(r, (4,)) for r in ranks]))
    nothing_left_over()
    dist.barrier()
    if me in ranks:
        dist.destroy_process_group(group)


def complaint(call: str) -> str:
    group = dist.new_group([0, 2])
    n, me = dist.get_world_size(), dist.get_rank()
    x = torch.zeros(3)
    calls = {
        "not in the group": lambda: ring_all_reduce_(x, group) if me == 1 else None,
        "source not in the group": lambda: broadcast_(x, src=1, group=group) if me in (0, 2) else None,
        "no list": lambda: scatter(x, None) if me == 0 else None,
        "short list": lambda: all_gather([x] * (n - 1), x),
        "input too long": lambda: ring_reduce_scatter(x, torch.zeros(3 * n + 1)),
        "output too short": lambda: ring_all_gather(torch.zeros(3 * n - 1), x),
        "other dtype": lambda: ring_all_gather(torch.zeros(3 * n, dtype=torch.float64), x),
    }
    try:
        calls[call]()
    except ValueError as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------- the tests


@all_reduces
@world_sizes
def test_every_shape_and_dtype_is_summed_in_place(ranks5, name, n):
    ranks5.run(reduce_everything, name, n)


@all_reduces
@pytest.mark.parametrize("n", [1, 3, 4])
def test_views_and_parameters_are_summed_in_place(ranks5, name, n):
    ranks5.run(reduce_views, name, n)


@world_sizes
def test_the_ring_takes_chunks_of_many_segments(ranks5, n):
    for segment_bytes in (8, 24, 64):
        ranks5.run(reduce_in_segments, n, segment_bytes)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_ranks_end_with_the_same_bits_close_to_the_true_sum(ranks5, n):
    results = ranks5.run(reduce_noise, n)[:n]
    for (name, dtype), first in results[0].items():
        assert all(torch.equal(first, other[name, dtype]) for other in results), name
        true_sum = sum(noise(r, dtype).double() for r in range(n))
        # n - 1 roundings, each of at most half the spacing of dtype near the largest partial sum, about 8
        assert (first.double() - true_sum).abs().max() < (n - 1) * 8 * torch.finfo(dtype).eps, name


@world_sizes
def test_the_ring_sends_its_budget_and_not_a_byte_more(ranks5, n):
    per_rank = ranks5.run(count_reduces, "ring", n)[:n]
    for count, dtype in per_rank[0]:
        traffic, size = [found[count, dtype] for found in per_rank], dtype.itemsize
        chunk = [high - low for low, high in pairwise(count * i // n for i in range(n + 1))]
        for me, t in enumerate(traffic):
            # all chunks but its own in the first half, all but its right neighbour's in the second
            expected = (2 * count - chunk[me] - chunk[(me + 1) % n]) * size
            assert t.bytes_sent == expected and abs(expected - 2 * (n - 1) / n * count * size) < 2 * size
            assert t.messages_sent <= 2 * (n - 1)
        both = sum(t.bytes_sent for t in traffic), sum(t.bytes_received for t in traffic)
        assert both == (2 * (n - 1) * count * size,) * 2


@world_sizes
def test_the_other_all_reduces_send_their_budgets(ranks5, n):
    depth, p = (n - 1).bit_length(), 1 << (n.bit_length() - 1)
    naive, tree, halving = (
        ranks5.run(count_reduces, name, n)[:n] for name in ("naive", "tree", "halving-doubling")
    )
    for count, dtype in naive[0]:
        key, size = (count, dtype), count * dtype.itemsize
        assert [found[key].bytes_sent for found in naive] == [(n - 1) * size] + [size] * (n - 1)
        assert [found[key].bytes_received for found in naive] == [(n - 1) * size] + [size] * (n - 1)
        assert tree[0][key].bytes_sent == depth * size
        assert sum(found[key].bytes_sent for found in tree) == 2 * (n - 1) * size
        assert sum(found[key].bytes_sent for found in halving) == 2 * (n - 1) * size
        for me, t in enumerate(found[key] for found in halving):
            folded = size if me >= p or me + p < n else 0
            core = 2 * (p - 1) / p * size if me < p else 0
            # 1000 elements are cut evenly in 2 and in 4; otherwise a step may carry an element more or less
            slack = 0 if count == 1000 else dtype.itemsize * 2 * p.bit_length()
            assert abs(t.bytes_sent - core - folded) <= slack
            assert t.messages_sent == (1 if me >= p else 2 * (p.bit_length() - 1) + (me + p < n))


@world_sizes
def test_broadcast_reduce_scatter_and_gather_work_from_every_root(ranks5, n):
    ranks5.run(collectives_from_every_root, n)


@world_sizes
def test_all_gather_and_reduce_scatter(ranks5, n):
    ranks5.run(collectives_to_all, n)


@world_sizes
def test_ring_reduce_scatter_and_all_gather(ranks5, n):
    ranks5.run(ring_halves, n)


@pytest.mark.parametrize("ranks", [[0, 1, 2], [1, 3, 4], [0, 2, 4]])
def test_a_subgroup_sums_its_own_ranks_only(ranks5, ranks):
    ranks5.run(in_a_subgroup, ranks)


@pytest.mark.parametrize(
    ("call", "rank", "words"),
    [
        ("not in the group", 1, "rank 1 called a collective of a group it is not in: its ranks are [0, 2]"),
        ("source not in the group", 0, "rank 1 is not in this group: its ranks are [0, 2]"),
        ("no list", 0, "scatter_list needs one tensor for each of the 5 ranks, got none"),
        ("short list", 3, "tensor_list needs one tensor for each of the 5 ranks, got 4"),
        ("input too long", 2, "input must have 5 times as many elements as output"),
        ("output too short", 4, "output must have 5 times as many elements as input"),
        ("other dtype", 4, "the same dtype: got 15 (torch.float64) and 3 (torch.float32)"),
    ],
)
def test_wrong_calls_say_what_is_wrong(ranks5, call, rank, words):
    assert words in ranks5.run(complaint, call)[rank]


@pytest.mark.slow
def test_six_to_eight_ranks():
    with start_ranks(8) as ranks:
        for n in (6, 7, 8):
            for name in ALL_REDUCE:
                ranks.run(reduce_everything, name, n)
            ranks.run(ring_halves, n)


def test_collectives_are_made_of_sends_and_receives_only():
    questions = {
        "ProcessGroup",
        "Work",
        "get_global_rank",
        "get_group_rank",
        "get_process_group_ranks",
        "get_rank",
    }
    allowed = questions | {"get_world_size", "group", "send", "recv"}
    forbidden = {
        name
        for name in dir(dist.ProcessGroup)
        if re.search("reduce|broadcast|gather|scatter|all|barrier", name)
    }
    assert {"allreduce", "broadcast", "reduce_scatter", "alltoall"} <= forbidden
    for module in (collectives, ring, pieces, point_to_point, network_card):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        of_dist = {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id == "dist"}
        assert of_dist <= allowed, module.__name__
        assert not {a.attr for a in attributes} & forbidden, module.__name__
        imports = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert "distributed" not in imports
