"""What the checks of notebook 03 run on the ranks: small models, counted messages, an all-reduce that is watched.

n is the world size. Everything here that begins with `on_rank` runs on ranks 0 to n-1, a world of its own.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from workshop_utils.checks import Wrong, expect_close
from workshop_utils.checks.watching import TIMEOUT_S, world_named
from workshop_utils.collectives import ring_all_reduce_
from workshop_utils.ranks import sub_world

WAITED_INSIDE_S = 2.0  # a hook that waits for its job is found out after this
SETTLE_S = 1.5  # so long, in all, the jobs that an answer did not wait for may take


def in_worlds(ranks, on_rank, answer, *args, smallest: int = 1) -> Iterator[tuple[int, list]]:
    """For each world size n: (n, [on_rank(answer, *args) of each of the n ranks]). A complaint names n."""
    for n in range(smallest, len(ranks) + 1):
        with world_named(n):
            yield n, ranks.run(_inside, n, on_rank, answer, args, timeout_s=TIMEOUT_S)[:n]


def _inside(n: int, on_rank, answer, args):
    with sub_world(n) as inside:
        return on_rank(answer, *args) if inside else None


# Bytes, whoever carries them


class Sent:
    """Payload bytes that this rank sent. torch's own collectives count as much as a ring would send."""

    num_bytes: float = 0.0


@contextmanager
def counted() -> Iterator[Sent]:
    sent, n = Sent(), dist.get_world_size()
    factors = {"send": 1, "allreduce": 2 * (n - 1) / n, "broadcast": (n - 1) / n, "allgather": (n - 1)}
    patches = [
        patch.object(dist.ProcessGroup, name, _noting(getattr(dist.ProcessGroup, name), sent, factor))
        for name, factor in factors.items()
    ]
    for p in patches:
        p.start()
    try:
        yield sent
    finally:
        for p in patches:
            p.stop()


def _noting(original, sent: Sent, factor: float):
    def noting(group, *args, **kwargs):
        tensors = args[1][0] if original.__name__ == "allgather" and len(args) > 1 else args[0]
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        sent.num_bytes += factor * sum(
            tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)
        )
        return original(group, *args, **kwargs)

    return noting


# Models. All parameters of `Twelve` have 12 elements: a mistake in the order gives wrong numbers, not a crash.


class Twelve(nn.Module):
    """Parameters of every kind: used by all, tied, frozen, used by some ranks, used by none; two kinds of buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3, bias=False)
        self.again = nn.Linear(4, 3, bias=False)
        self.again.weight = self.first.weight  # tied
        self.frozen = nn.Linear(3, 4, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm1d(12)
        self.last = nn.Linear(3, 4, bias=False)
        self.unused = nn.Linear(3, 4, bias=False)
        self.even_ranks = nn.Linear(3, 4, bias=False)


class Branches(nn.Module):
    """Tied and frozen parameters in float64, and a branch that is used only if it is asked for."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.branch = nn.Linear(5, 5)
        self.c = nn.Linear(5, 5)
        self.c.weight = self.b.weight  # tied
        self.d = nn.Linear(5, 3)
        self.double()

    def forward(self, x, with_branch: bool):
        h = self.frozen(self.b(self.a(x).tanh()).tanh())
        return self.d(self.c(h + self.branch(h) if with_branch else h).tanh())


# An all-reduce that is watched, for exercises 3.3 and 3.4


class WatchedStart:
    """`start(tensor)`: a real all-reduce in a second thread, which begins once the backward is over.

    So a hook that waits for it is found out. The ranks compare sizes first: one that starts another tensor than the
    others would make gloo end the process.
    """

    def __init__(self):
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.backward_is_over = threading.Event()
        self.waited_inside = False
        self.patience_s = SETTLE_S
        self.begin_step()

    def begin_step(self) -> None:
        self.backward_is_over.clear()
        self.started: list[tuple[torch.Tensor, bool]] = []  # (tensor, during the backward?)
        self.changed = False  # is a tensor another one when its turn comes?
        self.jobs: list[Future] = []
        self.sizes: list[list[int]] = []  # of each all-reduce: bytes on each rank

    def __call__(self, tensor) -> Future:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"start() takes the tensor to all-reduce, got {type(tensor).__name__}")
        self.started.append((tensor, not self.backward_is_over.is_set()))
        self.jobs.append(self.thread.submit(self._all_reduce, tensor, tensor.detach().clone()))
        return self.jobs[-1]

    def _all_reduce(self, tensor: torch.Tensor, as_started: torch.Tensor) -> None:
        if not self.waited_inside and not self.backward_is_over.wait(WAITED_INSIDE_S):
            self.waited_inside = True
        self.changed |= not torch.equal(tensor, as_started)
        sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        sizes[dist.get_rank()] = tensor.nbytes
        ring_all_reduce_(sizes)
        self.sizes.append(sizes.tolist())
        if (sizes == sizes[0]).all():
            ring_all_reduce_(tensor)

    def settle(self) -> None:
        """Let jobs end that the answer did not wait for: beside the main thread's next collective their messages would mix.

        A job that another rank has not started cannot end, and is given up.
        """
        began_s = time.monotonic()
        wait(self.jobs, timeout=max(0.0, self.patience_s))
        self.patience_s -= time.monotonic() - began_s


def on_rank_train(install, with_branch) -> dict:
    """Three backwards of `Branches` with finish = install(model, start). What happened, step by step.

    with_branch(step, rank) says whether this rank uses the branch in that step.
    """
    rank, start = dist.get_rank(), WatchedStart()
    torch.manual_seed(7)
    model, plain = Branches(), Branches()
    plain.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    finish = install(model, start)
    if not callable(finish):
        return {"returned": repr(finish)}
    steps = []
    for step in range(3):
        torch.manual_seed(100 * step + rank)
        x, branch = torch.randn(4, 6, dtype=torch.float64), with_branch(step, rank)
        for net in (model, plain):
            net.zero_grad(set_to_none=step != 1)
        start.begin_step()
        plain(x, branch).square().sum().backward()
        model(x, branch).square().sum().backward()
        start.backward_is_over.set()
        finish()
        steps.append(_seen(model, plain, start))
        start.settle()
    unchanged = all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    dist.barrier()
    return {"steps": steps, "waited_inside": start.waited_inside, "unchanged": unchanged}


def _seen(model: nn.Module, plain: nn.Module, start: WatchedStart) -> dict:
    pointers = {p.data_ptr(): name for name, p in model.named_parameters()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    local = {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in plain.named_parameters()
    }
    return {
        "parameters started": [pointers[t.data_ptr()] for t, _ in start.started if t.data_ptr() in pointers],
        "started": [(t.nbytes, early) for t, early in start.started],
        "unfinished": sum(not job.done() for job in start.jobs),
        "changed": start.changed,
        "sizes": start.sizes,
        "gradients": gradients,
        "local": {name: g.detach().clone() for name, g in local.items()},
    }


def expect_steps(seen, n: int, are_sizes, what: str, may_be_late: tuple[int, ...] = ()) -> None:
    """`seen` is what on_rank_train returned on each rank; are_sizes(bytes of each all-reduce) judges those."""
    for rank, rank_seen in enumerate(seen):
        if "returned" in rank_seen:
            raise Wrong(f"rank {rank}: you returned {rank_seen['returned']}, expected the function finish()")
    for rank, rank_seen in enumerate(seen):
        if started := rank_seen["steps"][0]["parameters started"]:
            raise Wrong(
                f"rank {rank}: you started the all-reduce of the parameter {started[0]} itself. A hook is given the "
                "parameter; what has to be averaged is its .grad"
            )
        if rank_seen["waited_inside"]:
            raise Wrong(f"rank {rank}: you wait for a job inside the backward, which has to go on meanwhile")
    for step in range(3):
        for rank, rank_seen in enumerate(seen):
            case = f"With world size {n}, step {step + 1}: "
            try:
                _expect_step(rank, rank_seen["steps"][step], are_sizes, what, step not in may_be_late)
                _expect_means(rank, step, seen)
            except Wrong as complaint:
                raise Wrong(f"{case}{complaint}") from None
    for rank, rank_seen in enumerate(seen):
        if not rank_seen["unchanged"]:
            raise Wrong(f"rank {rank}: a parameter was changed; only gradients are averaged")


def _expect_step(rank: int, step_seen, are_sizes, what: str, late_is_wrong: bool) -> None:
    if step_seen["unfinished"]:
        raise Wrong(
            f"rank {rank}: finish() returned before {step_seen['unfinished']} of the all-reduces were done"
        )
    if step_seen["changed"]:
        raise Wrong(
            f"rank {rank}: you change a tensor after start(tensor), while another thread may be adding it up. Divide "
            "before it is started, or in finish() after job.result(), and forget the jobs of earlier steps"
        )
    uneven = [(i, sizes) for i, sizes in enumerate(step_seen["sizes"]) if len(set(sizes)) > 1]
    if uneven:
        raise Wrong(
            f"all-reduce {uneven[0][0]} has {uneven[0][1]} bytes on the ranks: every rank must start them in one order"
        )
    got = [num_bytes for num_bytes, _ in step_seen["started"]]
    if not are_sizes(got):
        raise Wrong(f"rank {rank}: you started all-reduces of {got} bytes; expected {what}")
    late = sum(not early for _, early in step_seen["started"])
    if late and late_is_wrong:
        raise Wrong(f"rank {rank}: {late} of {len(got)} all-reduces were started only after the backward")


def _expect_means(rank: int, step: int, seen) -> None:
    for name, got in seen[rank]["steps"][step]["gradients"].items():
        wanted = sum(s["steps"][step]["local"][name] for s in seen) / len(seen)
        if name.startswith("frozen"):
            if got is not None:
                raise Wrong(f"rank {rank}: {name} has a gradient now; a frozen parameter takes no part")
        elif got is not None or wanted.any():
            expect_close(got, wanted, rank=rank, name=f"{name}.grad", rtol=1e-10, atol=1e-12)
