"""Notebook 02: wrong answers and the complaint each must provoke; right ones written differently."""

import math
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed import all_reduce as known_by_another_name

from workshop_utils import point_to_point


def me():
    return dist.get_rank(), dist.get_world_size()


# 2.1 pass_right


def receives_first(tensor):
    rank, n = me()
    received = torch.empty_like(tensor)
    dist.recv(received, (rank - 1) % n)
    dist.send(tensor, (rank + 1) % n)
    return received


def sends_first(tensor):
    rank, n = me()
    received = torch.empty_like(tensor)
    dist.send(tensor, (rank + 1) % n)
    dist.recv(received, (rank - 1) % n)
    return received


def swaps_with_a_partner(tensor):
    rank, _ = me()
    received = torch.empty_like(tensor)
    sending = dist.isend(tensor, rank ^ 1)
    dist.recv(received, rank ^ 1)
    sending.wait()
    return received


def forgets_that_it_is_a_ring(tensor):
    rank = dist.get_rank()
    received = torch.empty_like(tensor)
    sending = dist.isend(tensor, rank + 1)
    dist.recv(received, rank - 1)
    sending.wait()
    return received


def passes_left(tensor):
    rank, n = me()
    received = torch.empty_like(tensor)
    sending = dist.isend(tensor, (rank - 1) % n)
    dist.recv(received, (rank + 1) % n)
    sending.wait()
    return received


def receives_into_its_own(tensor):
    rank, n = me()
    sending = dist.isend(tensor.clone(), (rank + 1) % n)
    dist.recv(tensor, (rank - 1) % n)
    sending.wait()
    return tensor


def tells_everybody(tensor):
    rank, n = me()
    others = [r for r in range(n) if r != rank]
    received = {r: torch.empty_like(tensor) for r in others}
    sends = [dist.isend(tensor, r) for r in others]
    for r in others:
        dist.recv(received[r], r)
    for sending in sends:
        sending.wait()
    return received[(rank - 1) % n]


def gathers(tensor):
    rank, n = me()
    everything = [torch.empty_like(tensor) for _ in range(n)]
    dist.all_gather(everything, tensor)
    return everything[(rank - 1) % n]


def returns_nothing(tensor):
    rank, n = me()
    received = torch.empty_like(tensor)
    sending = dist.isend(tensor, (rank + 1) % n)
    dist.recv(received, (rank - 1) % n)
    sending.wait()


def even_ranks_send_first(tensor):
    rank, n = me()
    received = torch.empty_like(tensor)
    if rank % 2 == 0:
        dist.send(tensor, dst=(rank + 1) % n)
        dist.recv(received, src=(rank - 1) % n)
    else:
        dist.recv(received, src=(rank - 1) % n)
        dist.send(tensor, dst=(rank + 1) % n)
    return received


def in_a_batch(tensor):
    rank, n = me()
    received = torch.empty_like(tensor)
    operations = [
        dist.P2POp(dist.isend, tensor, (rank + 1) % n),
        dist.P2POp(dist.irecv, received, (rank - 1) % n),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def with_counted_sends(tensor):
    rank, n = me()
    received = torch.empty_like(tensor)
    receiving = point_to_point.irecv(received, (rank - 1) % n)
    point_to_point.send(tensor, (rank + 1) % n)
    receiving.wait()
    return received


# 2.2 tree_broadcast_


def root_sends_to_all(tensor):
    rank, n = me()
    if rank:
        dist.recv(tensor, 0)
    else:
        for dst in range(1, n):
            dist.send(tensor, dst)


def along_a_chain(tensor):
    rank, n = me()
    if rank:
        dist.recv(tensor, rank - 1)
    if rank + 1 < n:
        dist.send(tensor, rank + 1)


def power_of_two_ranks_only(tensor):
    rank, n = me()
    distance = 1
    while 2 * distance <= n:
        if rank < distance:
            dist.send(tensor, rank + distance)
        elif rank < 2 * distance:
            dist.recv(tensor, rank - distance)
        distance *= 2


def hangs_from_three_ranks_on(tensor):
    rank, n = me()
    if rank:
        dist.recv(tensor, rank - (1 << (rank.bit_length() - 1)))
    for k in range(int(math.log2(n))):
        if rank < 1 << k and rank + (1 << k) < n:
            dist.send(tensor, rank + (1 << k))


def by_torch(tensor):
    dist.broadcast(tensor, src=0)


def broadcast_into_a_copy(tensor):
    copy = tensor.clone()
    tree_from_near_to_far(copy)
    return copy


def sends_its_own_instead_of_roots(tensor):
    rank, _ = me()
    received = tensor.clone()
    tree_from_near_to_far(received)
    if rank < 2:
        tensor.copy_(received)


def tree_from_near_to_far(tensor):
    rank, n = me()
    distance = 1
    while distance < n:
        if rank < distance and rank + distance < n:
            dist.send(tensor, rank + distance)
        elif distance <= rank < 2 * distance:
            dist.recv(tensor, rank - distance)
        distance *= 2


def tree_by_halves(tensor):
    rank, n = me()
    low, high = 0, n  # rank `low` has it and serves the ranks low to high - 1
    while high - low > 1:
        middle = (low + high + 1) // 2
        if rank == low:
            dist.send(tensor, middle)
        elif rank == middle:
            dist.recv(tensor, low)
        low, high = (low, middle) if rank < middle else (middle, high)


# 2.3 ring_reduce_scatter_


def _pass_on(chunks, first, steps, step_left=1):
    """n-1 steps around the ring; in step k chunk first-k leaves and chunk first-1-k arrives and is added to."""
    rank, n = me()
    for k in range(steps):
        target = chunks[(first - (k + 1) * step_left) % n]
        received = torch.empty_like(target)
        sending = dist.isend(chunks[(first - k * step_left) % n], (rank + step_left) % n)
        dist.recv(received, (rank - step_left) % n)
        sending.wait()
        target += received


def ends_with_the_next_chunk(chunks):
    rank, n = me()
    _pass_on(chunks, rank, n - 1)


def one_step_too_many(chunks):
    rank, n = me()
    _pass_on(chunks, rank - 1, n)


def one_step_too_few(chunks):
    rank, n = me()
    _pass_on(chunks, rank - 1, n - 2)


def replaces_the_list_entry(chunks):
    rank, n = me()
    for k in range(n - 1):
        received = torch.empty_like(chunks[(rank - 2 - k) % n])
        sending = dist.isend(chunks[(rank - 1 - k) % n], (rank + 1) % n)
        dist.recv(received, (rank - 1) % n)
        sending.wait()
        chunks[(rank - 2 - k) % n] = chunks[(rank - 2 - k) % n] + received


def keeps_instead_of_adding(chunks):
    rank, n = me()
    for k in range(n - 1):
        sending = dist.isend(chunks[(rank - 1 - k) % n], (rank + 1) % n)
        dist.recv(chunks[(rank - 2 - k) % n], (rank - 1) % n)
        sending.wait()


def to_each_owner(chunks):
    rank, n = me()
    others = [r for r in range(n) if r != rank]
    sends = [dist.isend(chunks[r], r) for r in others]
    for r in others:
        received = torch.empty_like(chunks[rank])
        dist.recv(received, r)
        chunks[rank] += received
    for sending in sends:
        sending.wait()


def sends_all_chunks_each_time(chunks):
    rank, n = me()
    for k in range(n - 1):
        everything = torch.cat(chunks)
        received = torch.empty_like(everything)
        sending = dist.isend(everything, (rank + 1) % n)
        dist.recv(received, (rank - 1) % n)
        sending.wait()
        place = (rank - 2 - k) % n
        chunks[place] += received.tensor_split(n)[place]


def blocks_in_send(chunks):
    rank, n = me()
    for k in range(n - 1):
        received = torch.empty_like(chunks[(rank - 2 - k) % n])
        dist.send(chunks[(rank - 1 - k) % n], (rank + 1) % n)
        dist.recv(received, (rank - 1) % n)
        chunks[(rank - 2 - k) % n] += received


def adds_in_float32(chunks):
    rank, n = me()
    for k in range(n - 1):
        target = chunks[(rank - 2 - k) % n]
        received = torch.empty_like(target)
        sending = dist.isend(chunks[(rank - 1 - k) % n], (rank + 1) % n)
        dist.recv(received, (rank - 1) % n)
        sending.wait()
        target.copy_(target.float() + received.float())


def to_the_left(chunks):
    rank, n = me()
    _pass_on(chunks, rank + 1, n - 1, step_left=-1)


def receiving_first(chunks):
    rank, n = me()
    for chunk in [(rank - 2 - k) % n for k in range(n - 1)]:
        received = chunks[chunk].clone()
        receiving = dist.irecv(received, (rank - 1) % n)
        dist.send(chunks[(chunk + 1) % n], (rank + 1) % n)
        receiving.wait()
        chunks[chunk].add_(received)


# 2.4 ring_all_reduce_


def _ring(chunks):
    rank, n = me()
    _pass_on(chunks, rank - 1, n - 1)
    for k in range(n - 1):
        sending = dist.isend(chunks[(rank - k) % n], (rank + 1) % n)
        dist.recv(chunks[(rank - 1 - k) % n], (rank - 1) % n)
        sending.wait()


def all_reduce_by_torch(tensor):
    dist.all_reduce(tensor)


def all_reduce_under_another_name(tensor):
    known_by_another_name(tensor)


def naive(tensor):
    rank, n = me()
    if rank:
        dist.send(tensor, 0)
        dist.recv(tensor, 0)
        return
    for src in range(1, n):
        received = torch.empty_like(tensor)
        dist.recv(received, src)
        tensor += received
    for dst in range(1, n):
        dist.send(tensor, dst)


def sum_on_rank_0_only(tensor):
    rank, n = me()
    if rank:
        dist.send(tensor, 0)
        return
    for src in range(1, n):
        received = torch.empty_like(tensor)
        dist.recv(received, src)
        tensor += received


def returns_a_new_tensor(tensor):
    flat = tensor.flatten().clone()
    _ring(flat.tensor_split(dist.get_world_size()))
    return flat.view(tensor.shape)


def forgets_the_rest(tensor):
    n = dist.get_world_size()
    flat = tensor.view(-1)
    size = len(flat) // n
    _ring([flat[i * size : (i + 1) * size] for i in range(n)])


def pads_generously(tensor):
    n = dist.get_world_size()
    flat = tensor.reshape(-1)
    padded = torch.zeros(-(-len(flat) // (4 * n)) * 4 * n, dtype=tensor.dtype)
    padded[: len(flat)] = flat
    _ring(padded.chunk(n))
    tensor.copy_(padded[: len(flat)].view(tensor.shape))


def recursive_doubling(tensor):
    rank, n = me()
    distance = 1
    while distance < n:
        received = torch.empty_like(tensor)
        sending = dist.isend(tensor, rank ^ distance)
        dist.recv(received, rank ^ distance)
        sending.wait()
        tensor += received
        distance *= 2


def averages(tensor):
    flat = tensor.contiguous().view(-1)
    _ring(flat.tensor_split(dist.get_world_size()))
    if dist.get_world_size() > 1:
        flat.copy_(flat / dist.get_world_size())
    tensor.copy_(flat.view(tensor.shape))


def adds_in_both_halves(tensor):
    rank, n = me()
    flat = tensor.contiguous().view(-1)
    chunks = flat.tensor_split(n)
    _pass_on(chunks, rank - 1, n - 1)
    _pass_on(chunks, rank, n - 1)
    tensor.copy_(flat.view(tensor.shape))


def forgets_to_write_back(tensor):
    _ring(tensor.contiguous().view(-1).tensor_split(dist.get_world_size()))


def views_what_cannot_be_viewed(tensor):
    _ring(tensor.view(-1).tensor_split(dist.get_world_size()))


def all_in_float32(tensor):
    flat = tensor.flatten().float()
    _ring(flat.tensor_split(dist.get_world_size()))
    tensor.copy_(flat.view(tensor.shape))


def in_the_wrong_dtype_on_the_wire(tensor):
    flat = tensor.flatten().to(torch.int64)
    _ring(flat.tensor_split(dist.get_world_size()))
    tensor.copy_(flat.view(tensor.shape))


def hangs_with_three(tensor):
    rank, n = me()
    if n == 3 and rank == 2:
        dist.recv(torch.empty_like(tensor), 0)
    edges_by_hand(tensor)


def edges_by_hand(tensor):
    n = dist.get_world_size()
    flat = tensor.contiguous().view(-1)
    edges = [len(flat) * i // n for i in range(n + 1)]
    _ring([flat[low:high] for low, high in pairwise(edges)])
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def padded_to_whole_chunks(tensor):
    n = dist.get_world_size()
    size = -(-tensor.numel() // n)
    padded = tensor.new_zeros(n, size)
    padded.view(-1)[: tensor.numel()] = tensor.flatten()
    _ring(list(padded))
    tensor.copy_(padded.view(-1)[: tensor.numel()].view_as(tensor))
    return tensor


# 2.5 all_reduce_s


def _seconds(steps, factor):
    def all_reduce_s(algorithm, world_size, size_bytes, link):
        n = world_size
        return (
            steps(algorithm, n) * link.latency_s
            + factor(algorithm, n) * size_bytes / link.bandwidth_bytes_per_s
        )

    return all_reduce_s


def _steps(algorithm, n):
    return 2 * math.ceil(math.log2(n)) if algorithm == "tree" else 2 * (n - 1)


def _factor(algorithm, n):
    return {"naive": 2 * (n - 1), "tree": 2 * math.ceil(math.log2(n)), "ring": 2 * (n - 1) / n}[algorithm]


one_half_of_the_ring = _seconds(_steps, lambda a, n: (n - 1) / n if a == "ring" else _factor(a, n))
whole_tensor_per_step = _seconds(_steps, lambda a, n: 2 * (n - 1) if a == "ring" else _factor(a, n))
floor_of_log = _seconds(lambda a, n: 2 * int(math.log2(n)) if a == "tree" else _steps(a, n), _factor)
senders_at_once = _seconds(lambda a, n: 2 if a == "naive" else _steps(a, n), _factor)
bits = _seconds(_steps, lambda a, n: 8 * _factor(a, n))
written_as_terms = _seconds(_steps, _factor)


def written_as_messages(algorithm, world_size, size_bytes, link):
    chunk_bytes = size_bytes / world_size if algorithm == "ring" else size_bytes
    rounds = (world_size - 1).bit_length() if algorithm == "tree" else world_size - 1
    return 2 * rounds * (link.latency_s + chunk_bytes / link.bandwidth_bytes_per_s)


WRONG = {
    "2.1": [
        (receives_first, r"rank 0: waiting .* in recv \(from rank 1\)[\s\S]*world had 2 ranks"),
        (sends_first, r"rank 0: waiting .* in send \(to rank 1\)"),
        (swaps_with_a_partner, r"world had 3 ranks|rank 2"),
        (
            forgets_that_it_is_a_ring,
            r"rank [01] (sends to|receives from) rank (2|-1), but the ranks are 0 to 1",
        ),
        (passes_left, r"With world size 3: rank 0: what you return \(from rank 2\) is \[.*\], expected \["),
        (receives_into_its_own, r"rank 0: your own tensor was changed: now \[.*\], before \["),
        (tells_everybody, r"world size 3: rank 0: you sent 2.00 S, the budget is 1.00 S"),
        (gathers, r"dist.all_gather is not allowed here"),
        (returns_nothing, r"what you return .* is None, expected .* `return` missing"),
    ],
    "2.2": [
        (root_sends_to_all, r"With world size 4: rank 0: you sent 3.00 S, the budget is 2.00 S"),
        (along_a_chain, r"world size 4: rank 3 has the tensor after 3 rounds, the budget is 2"),
        (power_of_two_ranks_only, r"With world size 3: rank 2: the tensor is \[.*\], expected \["),
        (hangs_from_three_ranks_on, r"rank 2: waiting .* in recv \(from rank 0\)[\s\S]*world had 3 ranks"),
        (by_torch, r"dist.broadcast is not allowed here"),
        (broadcast_into_a_copy, r"rank 1: the right numbers are in a new tensor"),
        (sends_its_own_instead_of_roots, r"With world size 3: rank 2: the tensor is \[.*\], expected \["),
    ],
    "2.3": [
        (
            ends_with_the_next_chunk,
            r"world size 2: rank 0: chunks\[1\] holds the sum .*, expected chunks\[0\]",
        ),
        (one_step_too_many, r"ValueError: rank 0 sends to itself, in a world of size 1"),
        (one_step_too_few, r"With world size 2: rank 0: chunks\[0\] is \[.*\], expected \["),
        (replaces_the_list_entry, r"rank 0: the right numbers are in a new tensor, .* Write into it"),
        (keeps_instead_of_adding, r"With world size 2: rank 0: chunks\[0\] is \[.*\], expected \["),
        (
            to_each_owner,
            r"With world size 3: rank 0: you sent to ranks \[1, 2\], expected one neighbour, rank 1",
        ),
        (sends_all_chunks_each_time, r"world size 2: rank 0: you sent 1.00 S, the budget is 0.50 S"),
        (blocks_in_send, r"rank 0: waiting .* in send \(to rank 1\)"),
        (adds_in_float32, r"With world size 2: rank 0: chunks\[0\] is \[.*\], expected \["),
    ],
    "2.4": [
        (all_reduce_by_torch, r"dist.all_reduce is not allowed here"),
        (all_reduce_under_another_name, r"sent 0 bytes with send and isend"),
        (naive, r"With world size 3: rank 0: you sent 2.00 S, the budget is 1.33 S"),
        (sum_on_rank_0_only, r"With world size 2: rank 1: the tensor\[\d+\] is .*, expected"),
        (returns_a_new_tensor, r"rank 0: the right numbers are in a new tensor"),
        (forgets_the_rest, r"With world size 2: rank 0: the tensor is \[.*\], expected \["),
        (pads_generously, r"world size 2: rank 0: you sent .* S, the budget is .* S"),
        (recursive_doubling, r"3 ranks|rank [012]"),
        (averages, r"With world size 2: rank 0: the tensor\[0\] is .*, expected"),
        (adds_in_both_halves, r"With world size 2: rank 0: the tensor"),
        (forgets_to_write_back, r"a tensor that is not contiguous\[0, 0\] is .*, expected"),
        (views_what_cannot_be_viewed, r"raised RuntimeError[\s\S]*view"),
        (all_in_float32, r"With world size [12]: rank 0: the tensor is \[.*\], expected \["),
        (in_the_wrong_dtype_on_the_wire, r"With world size 2: rank 0: you sent 2.00 S, the budget is 1.00 S"),
        (hangs_with_three, r"rank 2: waiting .* in recv \(from rank 0\)[\s\S]*world had 3 ranks"),
    ],
    "2.5": [
        (
            one_half_of_the_ring,
            r'all_reduce_s\("ring", 4 ranks, 8 MB, a link without latency\) is 6, expected 12',
        ),
        (whole_tensor_per_step, r"is 48, expected 12"),
        (
            floor_of_log,
            r'all_reduce_s\("tree", 5 ranks, 8 MB, a link with latency only\) is 0.004, expected 0.006',
        ),
        (
            senders_at_once,
            r'all_reduce_s\("naive", 4 ranks, 8 MB, a link with latency only\) is 0.002, expected 0.006',
        ),
        (bits, r"a link without latency\) is 384, expected 48"),
    ],
}
RIGHT = {
    "2.1": [even_ranks_send_first, in_a_batch, with_counted_sends],
    "2.2": [tree_from_near_to_far, tree_by_halves],
    "2.3": [to_the_left, receiving_first],
    "2.4": [edges_by_hand, padded_to_whole_chunks],
    "2.5": [written_as_terms, written_as_messages],
}
