"""Notebook 00: wrong answers and the complaint each must provoke; right ones written differently."""

import math

import torch.distributed as dist


def forgets_that_elements_have_sizes(tensor):
    return tensor.numel()


def believes_in_float32(tensor):
    return 4 * tensor.numel()


def prints_instead_of_returning(tensor):
    print(tensor.numel() * tensor.element_size())


def one_element(tensor):
    return tensor.element_size()


def indexes_the_shape(tensor):
    return tensor.shape[0] * tensor.shape[1] * tensor.element_size()


def by_nbytes(tensor):
    return tensor.nbytes


def by_shape(tensor):
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def line_without_ends():
    rank = dist.get_rank()
    return rank - 1, rank + 1


def right_end_only():
    rank, n = dist.get_rank(), dist.get_world_size()
    return rank - 1, (rank + 1) % n


def wrong_way_round():
    rank, n = dist.get_rank(), dist.get_world_size()
    return (rank + 1) % n, (rank - 1) % n


def of_four():
    return (dist.get_rank() - 1) % 4, (dist.get_rank() + 1) % 4


def only_right():
    return (dist.get_rank() + 1) % dist.get_world_size()


def rank_one_has_a_slip():
    rank, n = dist.get_rank(), dist.get_world_size()
    return (rank - 1) % n, [*range(n), 0][rank + 1 if rank != 1 else 9]


def by_cases():
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    left = last if rank == 0 else rank - 1
    right = 0 if rank == last else rank + 1
    return left, right


def by_rotation():
    members = list(range(dist.get_world_size()))
    rank = dist.get_rank()
    return [members[rank - 1], (members + members)[rank + 1]]


WRONG = {
    "0.1": [
        (forgets_that_elements_have_sizes, r"float32\)\) is 12, expected 48"),
        (believes_in_float32, r"bfloat16\)\) is 48, expected 24"),
        (prints_instead_of_returning, r"is None, expected the number 48"),
        (one_element, r"float32\)\) is 4, expected 48"),
        (indexes_the_shape, r"raised IndexError"),
    ],
    "0.2": [
        (line_without_ends, r"rank 0: \(left, right\) is \[-1, 1\], expected \[4, 1\]"),
        (right_end_only, r"rank 0: \(left, right\) is \[-1, 1\], expected \[4, 1\]"),
        (wrong_way_round, r"rank 0: \(left, right\) is \[1, 4\], expected \[4, 1\]"),
        (of_four, r"rank 0: \(left, right\) is \[3, 1\], expected \[4, 1\]"),
        (only_right, r"rank 0: you returned 1, expected two numbers"),
        (rank_one_has_a_slip, r"rank 1 failed[\s\S]*IndexError: list index out of range"),
    ],
}
RIGHT = {
    "0.1": [by_nbytes, by_shape],
    "0.2": [by_cases, by_rotation],
}
