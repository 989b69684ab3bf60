"""The ranks under everything that can happen to them: each fault is made for real, and the next cell must work.

Time limits catch a hang; they are far above what was seen on an idle machine, because tests share two cores.
"""

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from workshop_utils.ranks import RankError, driver
from workshop_utils.ranks.driver import Ranks, start_ranks
from workshop_utils.ranks.kernel import RankKernel

pytestmark = [pytest.mark.alone, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def _ranks():
    ranks = Ranks(4, timeout_s=2.0, threads_per_rank=1)
    yield ranks
    ranks.stop()


@pytest.fixture
def ranks(_ranks):
    if any(kernel.lost for kernel in _ranks.kernels):
        _ranks.restart()
    _ranks.run_cell("x = torch.full((3,), float(rank)); kept = 'kept'")
    return _ranks


def fails(ranks, cell: str, **options) -> RankError:
    """Run a cell that must fail; afterwards the ranks must be usable and their variables intact."""
    with pytest.raises(RankError) as caught:
        ranks.run_cell(cell, **options)
    if not any(kernel.lost for kernel in ranks.kernels):
        assert_usable(ranks)
    return caught.value


def assert_usable(ranks) -> None:
    ranks.run_cell(
        "y = torch.ones(1); dist.all_reduce(y); assert y.item() == world_size; assert kept == 'kept'"
    )


def all_reduce_of_rank(scale=1):
    import torch.distributed as dist

    value = torch.tensor([float(dist.get_rank()) * scale])
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


# ------------------------------------------------------------------- what works


def test_run_returns_results_in_rank_order(ranks):
    assert ranks.run(all_reduce_of_rank, scale=2) == [(rank, 12.0) for rank in range(4)]


def test_run_takes_functions_made_on_the_spot_and_keeps_variables_between_cells(ranks):
    offset = 10
    ranks.run_cell("z = rank + 1")
    assert ranks.run(lambda: offset) == [10] * 4
    ranks.run_cell("assert z == rank + 1")


def test_run_brings_back_tensors_of_100_megabytes(ranks):
    sizes = ranks.run(lambda n: torch.arange(n, dtype=torch.float32), 25_000_000)
    assert len(sizes) == 4
    assert all(result[-1] == 24_999_999 and result.nbytes == 100_000_000 for result in sizes)
    assert not list(ranks.folder.glob("call*")), "the files that carried them are gone"


def test_a_result_that_cannot_travel_is_an_error_on_that_rank(ranks):
    import threading

    with pytest.raises(RankError, match="pickle"):
        ranks.run(lambda: threading.Lock())
    assert_usable(ranks)


def test_output_comes_in_rank_order_with_plain_text(ranks, capsys):
    ranks.run_cell("import time; time.sleep(0.1 * (world_size - rank)); print('hello from', rank)")
    shown = capsys.readouterr().out
    places = [shown.index(f"[rank {rank}] hello from {rank}") for rank in range(4)]
    assert places == sorted(places)


def test_footer_counts_the_bytes_that_each_rank_sent(ranks, capsys):
    ranks.run_cell("big = torch.ones(1_000_000); dist.all_reduce(big)")
    footer = capsys.readouterr().out.strip().splitlines()[-1]
    assert "sent per rank: 6 MB" in footer, "2 (n-1)/n S = 6 MB for S = 4 MB and n = 4"


def test_only_some_ranks(ranks, capsys):
    ranks.run_cell("print('here')", only=[0, 2])
    shown = capsys.readouterr().out
    assert "[rank 0] here" in shown and "[rank 2] here" in shown and "[rank 1]" not in shown


@pytest.mark.parametrize("bad", [0, -1, 2.5, "4", True, 1000])
def test_a_bad_world_size_is_named(bad):
    with pytest.raises(ValueError, match="world_size must be a whole number from 1 to 64"):
        start_ranks(bad)


# ------------------------------------------------------------------- what goes wrong


def test_an_exception_on_one_rank_frees_the_others(ranks):
    began = time.monotonic()
    error = fails(ranks, "if rank == 1:\n    raise ValueError('boom')\ndist.all_reduce(x)")
    assert time.monotonic() - began < 10
    assert error.rank == 1
    text = str(error)
    assert text.rstrip().endswith("ValueError: boom")
    assert "rank 0: waiting" in text and "in all_reduce, line 3: dist.all_reduce(x)" in text


def test_the_first_failure_is_reported_not_its_echo(ranks):
    error = fails(ranks, "import time\nif rank == 3:\n    time.sleep(0.5); 1 / 0\ndist.all_reduce(x)")
    assert error.rank == 3 and "ZeroDivisionError" in str(error)


def test_a_rank_that_computes_is_stopped_when_another_fails(ranks):
    error = fails(ranks, "if rank == 0:\n    raise KeyError('gone')\nwhile True:\n    pass")
    assert error.rank == 0 and "rank 2: computing, line 4: pass" in str(error) or "line 3" in str(error)


def test_a_typing_mistake_on_all_ranks_keeps_the_process_group(ranks):
    ranks.run_cell("group_before = dist.group.WORLD")
    error = fails(ranks, "undefined_name")
    assert "the same error on ranks" in str(error) and "NameError" in str(error)
    ranks.run_cell("assert dist.group.WORLD is group_before")


def test_a_deadlock_says_where_each_rank_waits(ranks):
    error = fails(
        ranks,
        "if rank == 0:\n    dist.recv(x, src=1)\nelif rank == 1:\n    work = dist.irecv(x, src=0)\n    work.wait()",
    )
    text = str(error)
    assert error.rank is None and text.startswith("deadlock")
    assert "in recv (from rank 1), line 2: dist.recv(x, src=1)" in text
    assert "in wait, line 5: work.wait()" in text


def test_waiting_for_a_rank_that_has_left_is_a_deadlock(ranks):
    assert "in barrier, line 2" in str(fails(ranks, "if rank:\n    dist.barrier()"))


def test_a_report_names_the_readers_lines_and_nobody_elses(ranks):
    error = fails(ranks, "import threading\nthreading.Event().wait(60)", deadline_s=1.0)
    assert "rank 0: waiting for a thread, line 2: threading.Event().wait(60)" in str(error)
    with pytest.raises(RankError) as caught:  # dist.recv itself: no line of the reader's is running
        ranks.run(torch.distributed.recv, torch.empty(1), 3, timeout_s=1.0)
    assert "rank 0: waiting" in str(caught.value) and "outside your function" in str(caught.value)


def test_a_slow_peer_is_not_a_deadlock(ranks):
    ranks.run_cell("import time\nif rank == 0:\n    time.sleep(4)\ndist.all_reduce(x)")


def test_a_rank_that_computes_for_long_has_no_deadline(ranks):
    ranks.run_cell("import time\nend = time.monotonic() + 4\nwhile time.monotonic() < end:\n    pass")


def test_a_deadline_ends_an_endless_loop(ranks):
    error = fails(ranks, "while rank == 2:\n    pass\ndist.all_reduce(x)", deadline_s=1.0)
    assert "the deadline of 1 s passed" in str(error) and "rank 2: computing" in str(error)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("exit()", "would end this rank"),
        ("quit()", "would end this rank"),
        ("input('name?')", "nobody types there"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("torch.ones(25_000_000_000)", "memory"),
        ("1 +", "SyntaxError"),
    ],
)
def test_survived_on_one_rank(ranks, code, words):
    # exec, so that a syntax error, too, happens on rank 2 alone
    error = fails(ranks, f"if rank == 2:\n    exec({code!r})\ndist.all_reduce(x)")
    assert error.rank == 2 and words in str(error)


def test_a_fork_on_one_rank_is_survived_and_leaves_no_child(ranks, capsys):
    ranks.run_cell(
        "import os\nif rank == 2:\n    child = os.fork()\n    print('child' if child == 0 else child)"
    )
    assert_usable(ranks)
    process = psutil.Process(ranks.kernels[2].pid)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and [c for c in process.children() if c.status() != "zombie"]:
        time.sleep(0.1)
    assert not [c for c in process.children() if c.status() != "zombie"]


def test_objects_that_hold_the_old_group_are_named(ranks):
    ranks.run_cell(
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "net = torch.nn.Sequential(torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)))\n"
        "mesh = init_device_mesh('cpu', (world_size,)); plain = torch.nn.Linear(2, 2)"
    )
    error = fails(ranks, "if rank == 1:\n    1 / 0\ndist.all_reduce(x)")
    named = str(error).split("they hold the old process group: ")[1].split(".")[0].split(", ")
    assert {"mesh", "net"} <= set(named) and not {"plain", "x", "kept"} & set(named)


def test_a_killed_rank_is_named_and_restart_brings_it_back(ranks):
    pid = ranks.kernels[2].pid
    began = time.monotonic()
    error = fails(ranks, "import os\nif rank == 2:\n    os.kill(os.getpid(), 9)\ndist.all_reduce(x)")
    assert time.monotonic() - began < 10
    assert error.rank == 2
    assert f"rank 2 (process {pid}) is lost: it was killed by signal 9 (SIGKILL)" in str(error)
    with pytest.raises(RankError, match="rank 2 is lost"):
        ranks.run_cell("pass")
    ranks.restart()
    ranks.run_cell("assert (rank == 2) != ('kept' in globals()); kept = 'kept'")
    assert_usable(ranks)


def test_a_rank_that_dies_between_two_cells_is_named(ranks):
    os.kill(ranks.kernels[1].pid, signal.SIGKILL)
    ranks.kernels[1].process.wait()
    with pytest.raises(RankError, match="rank 1 is lost") as caught:
        ranks.run(all_reduce_of_rank)
    assert caught.value.rank == 1


def test_a_rank_that_ignores_everything_is_killed_and_named(ranks):
    stubborn = (
        "import signal\nif rank == 3:\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    while True: pass"
    )
    error = fails(ranks, stubborn, deadline_s=0.5)
    assert "rank 3 did not stop when asked, and had to be killed" in str(error)
    ranks.restart()
    ranks.run_cell("kept = 'kept'")
    assert_usable(ranks)


def test_a_crash_in_native_code_leaves_its_last_words(ranks):
    error = fails(ranks, "import ctypes\nif rank == 0:\n    ctypes.string_at(0)\ndist.all_reduce(x)")
    assert error.rank == 0 and "SIGSEGV" in str(error)


# ------------------------------------------------------------------- beginning and end


def test_nothing_listens_beyond_loopback(ranks):
    for kernel in ranks.kernels:
        for connection in psutil.Process(kernel.pid).net_connections(kind="inet"):
            assert connection.laddr.ip in ("127.0.0.1", "::1")


def test_stop_leaves_no_process_and_no_file(monkeypatch):
    monkeypatch.setattr(driver, "_current", None)
    with start_ranks(2) as two:
        pids, folder = [kernel.pid for kernel in two.kernels], two.folder
        assert driver.current_ranks() is two and len(two) == 2
        again = start_ranks(1)  # running the cell again replaces the set
        assert driver.current_ranks() is again
        assert not any(map(psutil.pid_exists, pids)) and not folder.exists()
        again.stop()
    assert driver.current_ranks() is None
    with pytest.raises(RankError, match="start_ranks"):
        two.run_cell("pass")


@pytest.mark.parametrize(
    "call",
    [
        "dist.send(x, dst=rank + 1)",
        "dist.recv(x, src=rank - 1)",
        "dist.isend(x, rank + 1).wait()",
        "dist.irecv(x, rank - 1).wait()",
        "[work.wait() for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, rank + 1)])]",
    ],
)
def test_a_rank_that_is_not_there_is_named_and_no_rank_is_lost(ranks, call):
    """Without the modulo. gloo alone waits for good, or crashes."""
    error = fails(ranks, call)
    assert re.search(r"there is no rank (4|-1): the ranks are 0 to 3", str(error))
    assert not any(kernel.lost for kernel in ranks.kernels)


def test_a_rank_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "ipykernel.py").write_text("raise ImportError('a broken ipykernel')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RankError, match="did not start(.|\n)*a broken ipykernel"):
        Ranks(1, timeout_s=2.0, threads_per_rank=1)
    assert not list(Path(driver.tempfile.gettempdir()).glob("ranks-*/r0-1/never"))


@pytest.mark.slow
def test_eight_ranks_on_whatever_cores_there_are():
    with Ranks(8, timeout_s=20.0, threads_per_rank=1) as eight:
        assert eight.run(all_reduce_of_rank) == [(rank, 28.0) for rank in range(8)]
        eight.run_cell("pass")


def test_ranks_that_started_end_where_a_later_one_cannot(monkeypatch):
    """No process and no open socket is left of those that did start (sockets: see conftest.py)."""
    started = []

    def two_and_no_more(rank, *settings):
        if rank == 2:
            raise OSError("no memory")
        started.append(RankKernel(rank, *settings))
        return started[-1]

    monkeypatch.setattr(driver, "RankKernel", two_and_no_more)
    with pytest.raises(OSError, match="no memory"):
        Ranks(3, timeout_s=2.0, threads_per_rank=1)
    assert len(started) == 2 and not any(psutil.pid_exists(kernel.pid) for kernel in started)
