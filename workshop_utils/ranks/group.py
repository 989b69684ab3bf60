"""A rank's process group: joining it, leaving it in a hurry, counting what it does, and smaller worlds inside it.

Runs inside a rank. Notebook 02 teaches what a process group is.
"""

import socket
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from workshop_utils.connections import loopback_connections

# By name, so that a rank which never used them does not import them.
_HOLDERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeviceMesh", "ProcessGroup"}


def join_group(store_path: str, rank: int, world_size: int) -> None:
    """Join the default gloo group that meets at the file `store_path`, leaving any older one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.FileStore(store_path, world_size)
    store.set_timeout(timedelta(seconds=30))
    # Gloo's own timeout is long on purpose: a slow peer is not an error. The notebook watches for deadlocks.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(days=1))


def refuse_ranks_that_are_not_there() -> None:
    """Make a send to, or a receive from, a rank outside the group a ValueError in this process.

    gloo looks that rank up past the end of its table: it waits where no interrupt ends it, or crashes. And the reader who
    forgets `% world_size` would lose the rank's variables.
    """
    for name in ("send", "recv"):
        setattr(dist.ProcessGroup, name, _with_peer_checked(getattr(dist.ProcessGroup, name)))


def _with_peer_checked(send_or_recv):
    def checked(group, tensors, peer, *rest):
        if not 0 <= peer < group.size():
            raise ValueError(f"there is no rank {peer}: the ranks are 0 to {group.size() - 1}")
        return send_or_recv(group, tensors, peer, *rest)

    return checked


def let_go_of_the_group() -> None:
    """Close this rank's connections, so that whoever waits in a collective gets an error at once.

    Destroying the group does not do it: a blocked call holds a reference to the group, and so may the reader's
    objects. Closed connections end the wait on both sides, whoever holds what.
    """
    for sock in loopback_connections():
        with suppress(OSError):  # the peer may have closed it first
            sock.shutdown(socket.SHUT_RDWR)


def count_operations() -> int:
    """How many operations this rank has started on all of its groups."""
    if not dist.is_initialized():
        return 0
    return sum(group._get_sequence_number_for_group() for group in dist.distributed_c10d._world.pg_map)


def names_holding_a_group(variables: dict) -> list[str]:
    """Names of the variables that keep a reference to a process group or device mesh."""

    def holds(value) -> bool:
        if isinstance(value, type):
            return False  # the class DataParallel holds nothing
        names = {kind.__name__ for kind in type(value).__mro__}
        if names & _HOLDERS or getattr(value, "holds_process_group", False):
            return True
        return isinstance(value, nn.Module) and any(map(holds, value.children()))

    found = []
    for name, value in variables.items():
        with suppress(Exception):  # a reader's object may refuse any question
            if not name.startswith("_") and holds(value):
                found.append(name)
    return found


@contextmanager
def sub_world(n: int):
    """Inside: ranks 0 to n-1 see a default group of world size n. All ranks enter; yields True on those inside.

    The original group is untouched. This is how world sizes 1 to N are tried on one set of N ranks.
    """
    whole = dist.group.WORLD
    if not 1 <= n <= whole.size():
        raise ValueError(f"sub_world({n}): n must lie between 1 and the world size, {whole.size()}")
    group = dist.new_group(list(range(n)))
    inside = dist.get_rank() < n
    try:
        if inside:
            dist.barrier(
                group
            )  # a rank that left before all had connected would break the others' connecting
            dist.distributed_c10d._update_default_pg(group)
        yield inside
    finally:
        # After a failure the group may be gone altogether; then there is nothing to put back.
        if dist.is_initialized() and whole in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._update_default_pg(whole)
            if inside:
                dist.destroy_process_group(group)
