"""Start, stop, restart and run a set of ranks: what the notebook holds in its variable `ranks`."""

import atexit
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import cloudpickle

from workshop_utils.ranks.cell_run import CellRun
from workshop_utils.ranks.display import Live, show_footer, show_outputs
from workshop_utils.ranks.errors import RankError, RanksInterrupted
from workshop_utils.ranks.kernel import RankKernel

START_S = 120.0  # a slow disk can make the first import of torch take a minute
JOIN_S = 30.0
MAX_WORLD_SIZE = 64

_current: "Ranks | None" = None


def start_ranks(world_size: int = 4, *, timeout_s: float = 20.0, threads_per_rank: int = 1) -> "Ranks":
    """Start `world_size` ranks and make `%%ranks` run cells on them. A set that is running is stopped first.

    `timeout_s` is the deadlock watchdog's: when every rank that is still at work has waited in a collective for
    that long, the cell is ended with a report. A rank that computes has no deadline unless the cell sets one.
    Raises ValueError for a bad argument and RankError if a rank cannot start.
    """
    global _current
    _check_number("world_size", world_size, int, 1, MAX_WORLD_SIZE)
    _check_number("timeout_s", timeout_s, (int, float), 0.1, 86_400)
    _check_number("threads_per_rank", threads_per_rank, int, 1, 1024)
    if os.name == "nt":
        raise RankError("ranks need Linux or macOS. On Windows, run JupyterLab inside WSL2.")
    if _current is not None:
        _current.stop()
    from workshop_utils.ranks.magic import register_magic

    register_magic()
    _current = Ranks(world_size, timeout_s=timeout_s, threads_per_rank=threads_per_rank)
    return _current


def current_ranks() -> "Ranks | None":
    """The running set of ranks, or None."""
    return _current


def _check_number(name: str, value, kinds, low, high) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if kinds is int else "a number"
        raise ValueError(f"{name} must be {what} from {low} to {high}, but it is {value!r}")


class Ranks:
    """A set of live ranks. Made by `start_ranks`; `with start_ranks(4) as ranks:` stops them at the end."""

    def __init__(self, world_size: int, *, timeout_s: float, threads_per_rank: int):
        self.world_size, self.timeout_s, self.threads_per_rank = world_size, timeout_s, threads_per_rank
        self.kernels: list[RankKernel] = []
        self._group_is_broken = False
        self._count = 0  # of files made so far, for names that are never used twice
        # Private (mode 0700) and short: the path of a Unix socket ends at 108 bytes.
        root = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=root if len(root) < 60 else "/tmp"))
        atexit.register(self.stop)
        began = time.monotonic()
        try:
            self._start(range(world_size))
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began
        cores = f" on {os.cpu_count()} cores" if world_size > (os.cpu_count() or 1) else ""
        self._live.draw(
            f"{world_size} ranks are ready{cores} after {self.ready_s:.1f} s",
            f"{world_size} ranks are ready{cores} after {self.ready_s:.1f} s",
        )

    def __len__(self) -> int:
        return self.world_size

    def __repr__(self) -> str:
        lost = [kernel.rank for kernel in self.kernels if kernel.lost]
        state = "stopped" if not self.kernels else f"ranks {lost} are lost" if lost else "ready"
        return f"Ranks(world_size={self.world_size}, {state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    # -- starting and stopping

    def _start(self, which) -> None:
        """Start the ranks `which` at the same time, then let all ranks form a group."""
        self._live = Live()
        started = []
        try:
            for rank in which:
                started.append(self._new_kernel(rank))
        except BaseException:
            _end_all(started)
            raise
        survivors = [kernel for kernel in self.kernels if kernel.rank not in which]
        self.kernels = sorted(survivors + started, key=lambda kernel: kernel.rank)
        self._wait_until_ready(started)
        for kernel in started:
            kernel.connect()
        self._live.progress(9, 10, "forming the process group")
        self._form_group()

    def _new_kernel(self, rank: int) -> RankKernel:
        folder = self._new_path(f"r{rank}-")
        folder.mkdir(mode=0o700)
        return RankKernel(rank, self.world_size, folder, self.threads_per_rank)

    def _wait_until_ready(self, kernels: list[RankKernel]) -> None:
        deadline = time.monotonic() + START_S
        while not all("ready" in kernel.events for kernel in kernels):
            for kernel in kernels:
                kernel.read_events()
                if kernel.lost:
                    raise RankError(
                        f"rank {kernel.rank} did not start: it {kernel.obituary()}\n"
                        "`python -m workshop_utils doctor` tells what is wrong with this machine.",
                        rank=kernel.rank,
                    )
            done = sum(len(kernel.events) for kernel in kernels)
            self._live.progress(1 + done, 10 * len(kernels) // 4, f"starting {len(kernels)} ranks")
            if time.monotonic() > deadline:
                raise RankError(f"the ranks were not ready after {START_S:.0f} s; is this machine very busy?")
            time.sleep(0.05)

    def _new_path(self, prefix: str) -> Path:
        self._count += 1
        return self.folder / f"{prefix}{self._count}"

    def _form_group(self) -> list[str]:
        """All ranks join a fresh group, which meets at a fresh file. Returns the variables that hold the old one."""
        store = str(self._new_path("store"))
        run = self._follow_call(_join_group, (store,), {}, JOIN_S)
        self._group_is_broken = run.failure is not None
        if run.failure is not None:
            raise run.report()
        return sorted(set().union(*self._results(run)))

    def restart(self) -> None:
        """Bring back the ranks that were lost, or all if none was. Survivors keep their variables."""
        self._check_running()
        lost = [kernel.rank for kernel in self.kernels if kernel.lost] or list(range(self.world_size))
        _end_all([self.kernels[rank] for rank in lost])
        self._start(lost)
        text = f"Back, with no variables: ranks {', '.join(map(str, lost))}."
        if len(lost) < self.world_size:
            text += " The other ranks kept theirs."
        self._live.draw(text, text)

    def stop(self) -> None:
        """End all ranks. Nothing of theirs is left: no process, no file."""
        global _current
        atexit.unregister(self.stop)
        _end_all(self.kernels)
        self.kernels = []
        shutil.rmtree(self.folder, ignore_errors=True)
        if _current is self:
            _current = None

    # -- running

    def run(self, fn, *args, timeout_s: float | None = None, **kwargs) -> list[Any]:
        """Call `fn(*args, **kwargs)` on every rank; returns the results in rank order.

        `fn` may be defined in the notebook (cloudpickle takes it there). `timeout_s` ends the call after that
        many seconds. What the ranks print is shown, in rank order. Raises RankError if a rank fails.
        """
        self._make_usable()
        run = self._follow_call(fn, args, kwargs, timeout_s)
        show_outputs({kernel.rank: kernel.cell.outputs for kernel in run.kernels})
        self._raise_failure(run)
        return self._results(run)

    def run_cell(self, code: str, *, only: list[int] | None = None, deadline_s: float | None = None) -> None:
        """Run source code on every rank, or on some; what `%%ranks` does. Raises RankError if a rank fails."""
        self._make_usable()
        kernels = self.kernels if only is None else [self.kernels[rank] for rank in only]
        run = CellRun(kernels, timeout_s=self.timeout_s, deadline_s=deadline_s)
        run.follow(code)
        show_outputs({kernel.rank: kernel.cell.outputs for kernel in kernels})
        if run.failure is None:
            show_footer(run.seconds, [kernel.cell.done["sent_bytes"] for kernel in kernels])
        self._raise_failure(run)

    def _follow_call(self, fn, args, kwargs, deadline_s) -> CellRun:
        path = self._new_path("call")
        path.write_bytes(cloudpickle.dumps((fn, args, kwargs)))
        run = CellRun(self.kernels, timeout_s=self.timeout_s, deadline_s=deadline_s)
        run.path = path
        run.follow(f"from workshop_utils.ranks import process as _process; _process.call({str(path)!r})")
        path.unlink()
        return run

    def _results(self, run: CellRun) -> list[Any]:
        results = []
        for kernel in run.kernels:
            path = Path(f"{run.path}.result{kernel.rank}")
            with path.open("rb") as file:
                results.append(cloudpickle.load(file))
            path.unlink()
        return results

    def _check_running(self) -> None:
        if not self.kernels:
            raise RankError("these ranks were stopped; run start_ranks again")

    def _make_usable(self) -> None:
        self._check_running()
        lost = [kernel.rank for kernel in self.kernels if kernel.lost]
        if lost:
            raise RankError(
                f"{_named(lost)} lost, so nothing can run. ranks.restart() starts anew what is lost; "
                "the other ranks keep their variables.",
                rank=lost[0],
            )
        if self._group_is_broken:
            self._form_group()

    def _raise_failure(self, run: CellRun) -> None:
        if run.failure is None:
            return
        error = run.report()
        lost = [kernel.rank for kernel in self.kernels if kernel.lost]
        self._group_is_broken = self._group_is_broken or run.group_is_broken()
        if lost:
            error.add(
                f"{_named(lost)} lost, and so are the variables there. ranks.restart() starts anew what is lost."
            )
        elif self._group_is_broken:
            stale = self._form_group()
            error.add("All ranks are ready again, with their variables.")
            if stale:
                error.add(f"Rebuild these, they hold the old process group: {', '.join(stale)}.")
        if run.failure.kind == "interrupt":
            raise RanksInterrupted(error.message)
        raise error


def _named(ranks: list[int]) -> str:
    """The words "rank 2 is", or "ranks 0, 1 are", for a message."""
    return f"ranks {', '.join(map(str, ranks))} are" if len(ranks) > 1 else f"rank {ranks[0]} is"


def _end_all(kernels: list[RankKernel]) -> None:
    """Ask all to end, then wait for all: together, so that eight ranks take no longer than one."""
    for kernel in kernels:
        kernel.ask_to_end()
    deadline = time.monotonic() + 1.0
    for kernel in kernels:
        kernel.end(deadline)


def _join_group(store: str) -> list[str]:
    """Runs on a rank; imported there, since the notebook has no use for the rank's side."""
    from workshop_utils.ranks.process import join_group

    return join_group(store)
