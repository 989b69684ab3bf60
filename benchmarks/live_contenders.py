"""The three contenders of live_ranks.py, each run in a process of its own that live_ranks.py starts, reads and kills.

A contender starts ranks, prints what an all-reduce over them gave, times empty calls, prints those, and waits. The
ranks' functions stand in a module, because mp.spawn finds them nowhere else.
"""

import json
import os
import tempfile
import time

EMPTY_CALLS = 10


def main(contender: str, world_size: int) -> None:
    """Prints two lines of JSON, then holds its ranks until it is killed."""
    CONTENDERS[contender](world_size)


def ours(world_size: int) -> None:
    from workshop_utils import start_ranks

    ranks = start_ranks(world_size)
    say(ranks.run(all_reduced))
    say([seconds_of(lambda: ranks.run(nothing)) for _ in range(EMPTY_CALLS)])
    time.sleep(3600)


def ipyparallel(world_size: int) -> None:
    import logging

    import ipyparallel

    cluster = ipyparallel.Cluster(
        n=world_size, controller_ip="127.0.0.1", engine_timeout=250, log_level=logging.ERROR
    )
    view = cluster.start_and_connect_sync()[:]
    say(
        view.map_sync(
            join_and_all_reduce, range(world_size), [world_size] * world_size, [store()] * world_size
        )
    )
    say([seconds_of(lambda: view.apply_sync(nothing)) for _ in range(EMPTY_CALLS)])
    time.sleep(3600)


def spawn(world_size: int) -> None:
    from torch import multiprocessing

    answers = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (world_size, store(), answers)
    live = multiprocessing.spawn(spawned, arguments, nprocs=world_size, join=False)
    say([answers.get() for _ in range(world_size)])
    # No call reaches processes that are live: the next one starts new ones.
    say([seconds_of(lambda: multiprocessing.spawn(nothing, nprocs=world_size))])
    live.join()


CONTENDERS = {"start_ranks": ours, "mp.spawn": spawn, "ipyparallel": ipyparallel}


def store() -> str:
    """A fresh file for the ranks of a group to meet at, in the temporary folder that live_ranks.py set and removes."""
    return os.path.join(tempfile.mkdtemp(), "store")


def spawned(rank: int, world_size: int, store_path: str, answers) -> None:
    answers.put(join_and_all_reduce(rank, world_size, store_path))
    time.sleep(3600)


def join_and_all_reduce(rank: int, world_size: int, store_path: str) -> float:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store_path}", rank=rank, world_size=world_size)
    return all_reduced()


def all_reduced() -> float:
    """On a rank: 1 + 2 + ... + world size."""
    import torch
    import torch.distributed as dist

    answer = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(answer)
    return answer.item()


def nothing(*_) -> None:
    """An empty cell."""


def seconds_of(call) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def say(values: list[float]) -> None:
    """A line on stdout, which is for this alone: libraries print to stderr."""
    print(json.dumps(values), flush=True)
