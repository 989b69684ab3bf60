"""Checks of notebook 00, start here. n is the number of ranks."""

import torch
import torch.distributed as dist

from workshop_utils.checks import Wrong, exercise, expect_equal, expect_number


@exercise("0.1")
def check_tensor_bytes(answer):
    """`answer(tensor)` is the number of bytes that the tensor's elements take."""
    cases = [
        ((3, 4), torch.float32, 48),
        ((3, 4), torch.bfloat16, 24),
        ((5,), torch.int64, 40),
        ((), torch.float64, 8),
    ]
    for shape, dtype, expected in cases:
        got = answer(torch.ones(shape, dtype=dtype))
        expect_number(got, expected, name=f"tensor_bytes(ones({list(shape)}, {dtype}))")
    return "12 float32 elements take 48 bytes, the same 12 in bfloat16 take 24"


@exercise("0.2", needs_ranks=True)
def check_ring_neighbours(answer, ranks):
    """`answer()`, called on each rank, is (left, right): whom it receives from and whom it sends to."""
    n = len(ranks)
    for rank, (got, seen_rank) in enumerate(ranks.run(_call_on_rank, answer)):
        if seen_rank != rank:
            raise RuntimeError(f"result {rank} came from rank {seen_rank}")
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Wrong(f"rank {rank}: you returned {got!r:.60}, expected two numbers (left, right)")
        expect_equal(list(got), [(rank - 1) % n, (rank + 1) % n], rank=rank, name="(left, right)")
    return f"{n} ranks form one closed ring"


def _call_on_rank(answer):
    return answer(), dist.get_rank()
