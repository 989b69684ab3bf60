"""Run an answer on the ranks and watch what it sends. For checks of hand-written collectives, notebook 02 on.

Messages are seen where all sends meet, at the process group, so an answer may use torch.distributed's or those of
`workshop_utils.point_to_point`. torch's collectives raise: the answer is to build one.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist

from workshop_utils.checks import Wrong
from workshop_utils.ranks import RankError, sub_world

TIMEOUT_S = 5.0  # an answer that hangs is stopped after this

COLLECTIVES = [
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "gather", "scatter", "broadcast"),
    *(
        "broadcast_object_list",
        "all_to_all",
        "all_to_all_single",
        "all_gather_single",
        "reduce_scatter_single",
    ),
]


class NotByHand(RuntimeError):
    """The answer called the collective that it is to build."""


@dataclass
class Seen:
    """What one rank did in one case."""

    after: torch.Tensor  # the tensor that the answer was given, as it is now
    returned: torch.Tensor | None
    sent: list[tuple[int, int]]  # (receiver, bytes) of each message, in order

    @property
    def bytes_sent(self) -> int:
        return sum(num_bytes for _, num_bytes in self.sent)


def run_watched(ranks, n: int, answer, cases: list[list[torch.Tensor]]) -> list[list[Seen]]:
    """Call `answer` on ranks 0 to n-1, a world of its own; cases[case][rank] is a rank's tensor.

    Returns seen[case][rank]. RankError if a rank fails, or hangs for TIMEOUT_S.
    """
    by_rank = ranks.run(_on_rank, n, answer, cases, timeout_s=TIMEOUT_S)[:n]
    return [list(case) for case in zip(*by_rank, strict=True)]


@contextmanager
def world_named(n: int):
    """A complaint from inside says in which world size it was."""
    try:
        yield
    except Wrong as complaint:
        raise Wrong(f"With world size {n}: {complaint}") from None
    except RankError as error:
        error.add(f"The world had {n} {'rank' if n == 1 else 'ranks'}.")
        raise


def _on_rank(n: int, answer, cases: list[list[torch.Tensor]]) -> list[Seen]:
    with sub_world(n) as inside:
        return [_one_case(answer, inputs[dist.get_rank()]) for inputs in cases] if inside else []


def _one_case(answer, tensor: torch.Tensor) -> Seen:
    tensor = tensor.clone()
    with watched() as sent:
        returned = answer(tensor)
    dist.barrier()  # nobody goes on while a message is under way
    return Seen(tensor, returned if isinstance(returned, torch.Tensor) else None, sent)


@contextmanager
def watched():
    """Inside, messages sent are noted as (receiver, bytes), and torch's collectives raise."""
    sent: list[tuple[int, int]] = []
    replaced = {name: _refusing(name) for name in COLLECTIVES}
    patches = [
        patch.object(module, name, function)
        for module in (dist, dist.distributed_c10d)
        for name, function in replaced.items()
        if hasattr(module, name)
    ]
    patches.append(patch.object(dist.ProcessGroup, "send", _noting(dist.ProcessGroup.send, sent)))
    patches.append(patch.object(dist.ProcessGroup, "recv", _in_range(dist.ProcessGroup.recv)))
    for p in patches:
        p.start()
    try:
        yield sent
    finally:
        for p in patches:
            p.stop()


def _noting(original, sent: list):
    def noting(group, tensors, dst, *args):
        _expect_rank(group, dst, "sends to")
        receiver = dist.get_global_rank(group, dst)
        if receiver == dist.get_rank():
            raise ValueError(f"rank {receiver} sends to itself, in a world of size {dist.get_world_size()}")
        sent.append((receiver, sum(tensor.nbytes for tensor in tensors)))
        return original(group, tensors, dst, *args)

    return noting


def _in_range(original):
    def receiving(group, tensors, src, *args):
        _expect_rank(group, src, "receives from")
        return original(group, tensors, src, *args)

    return receiving


def _expect_rank(group, other: int, does: str) -> None:
    """gloo would wait for a rank that does not exist until the process is killed."""
    if not 0 <= other < group.size():
        raise ValueError(
            f"rank {dist.get_rank()} {does} rank {other}, but the ranks are 0 to {group.size() - 1}: in a ring "
            "count round with % n, in a tree leave out a partner that is not there"
        )


def _refusing(name: str):
    def refusing(*_args, **_kwargs):
        raise NotByHand(f"build it from sends and receives; dist.{name} is not allowed here")

    return refusing
