"""What runs inside a rank: a Jupyter kernel in which `torch`, `dist`, `rank` and `world_size` are defined.

Cells come over Jupyter's own channels. Everything that must work while a cell hangs goes through `monitor.py`.
"""

import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import cloudpickle
import torch
import torch.distributed as dist
from ipykernel.kernelapp import IPKernelApp

from workshop_utils.point_to_point import gloo_bytes_sent
from workshop_utils.ranks import group
from workshop_utils.ranks.monitor import Monitor


class RankProcess:
    """One per process; `RankProcess.current` is it."""

    current: "RankProcess"

    def __init__(self, connection_file: Path, fd: int, rank: int, world_size: int):
        RankProcess.current = self
        self.rank, self.world_size = rank, world_size
        self.monitor = Monitor(socket.socket(fileno=fd), connection_file.parent.parent)
        self.monitor.start()
        group.refuse_ranks_that_are_not_there()
        self.app = IPKernelApp.instance()
        # Several ranks must not write into one history database; what C++ says before it aborts must reach the
        # log, which a pipe that this very process reads would not allow; and what a machine adds to every kernel
        # (Colab: its own page's helpers) is not for ranks.
        quiet = ["--HistoryManager.enabled=False", "--IPKernelApp.capture_fd_output=False"]
        quiet += ["--IPKernelApp.extensions=[]"]
        self.app.initialize(["-f", str(connection_file), *quiet])
        self.shell = self.app.shell
        self.shell.user_ns.update(torch=torch, dist=dist, rank=rank, world_size=world_size)
        self.shell.user_ns.update(exit=_no_exit, quit=_no_exit, input=_no_input)
        self.given = set(self.shell.user_ns)
        self.show_error, self.shell.showtraceback = self.shell.showtraceback, self.showtraceback
        self.shell.events.register("pre_run_cell", self.before_cell)
        self.shell.events.register("post_run_cell", self.after_cell)

    def serve(self) -> None:
        self.monitor.send(event="ready")
        self.app.start()

    def join_group(self, store_path: str) -> list[str]:
        """Join a new group; returns the reader's variables that still hold the old one."""
        mine = {name: value for name, value in self.shell.user_ns.items() if name not in self.given}
        group.join_group(store_path, self.rank, self.world_size)
        return group.names_holding_a_group(mine)

    # -- around every cell

    def before_cell(self, *_info) -> None:
        self.call_error = None
        self.operations, self.sent_bytes = group.count_operations(), gloo_bytes_sent()
        self.monitor.cell_begins()

    def showtraceback(self, *args, **kwargs) -> None:
        """As IPython's, but silent once the cell has failed elsewhere: that error is an echo, and slow to render."""
        if not self.monitor.freed:
            self.show_error(*args, **kwargs)

    def after_cell(self, result) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # too late to interrupt; the next cell sets it again
        if os.getpid() != self.monitor.pid:
            sys.stdout.flush()
            os._exit(0)  # a child that the cell forked came back here; the kernel's sockets are not its own
        self.monitor.busy = False
        error = result.error_before_exec or result.error_in_exec or self.call_error
        sent_bytes = gloo_bytes_sent()
        self.monitor.send(
            event="done",
            at=time.monotonic(),  # one clock for all processes of a machine
            failed=error is not None,
            message="" if error is None else str(error)[:2000],
            operations=group.count_operations() - self.operations,
            sent_bytes=None if sent_bytes is None else max(0, sent_bytes - self.sent_bytes),
        )

    def call(self, path: str) -> None:
        """Run the pickled (fn, args, kwargs) at `path`; leave the pickled result beside it."""
        try:
            with open(path, "rb") as file:
                fn, args, kwargs = cloudpickle.load(file)
            result = fn(*args, **kwargs)
            with open(f"{path}.result{self.rank}", "wb") as file:
                cloudpickle.dump(result, file)
        except BaseException as error:  # noqa: BLE001  an interrupt, too, is reported like any other end
            self.call_error = error
            shown = error.__traceback__.tb_next or error.__traceback__  # without this function's own frame
            self.showtraceback((type(error), error, shown))


def call(path: str) -> None:
    RankProcess.current.call(path)


def join_group(store_path: str) -> list[str]:
    return RankProcess.current.join_group(store_path)


def main() -> None:
    config = json.loads(os.environ.pop("WORKSHOP_RANK"))
    sys.path[:] = config.pop("path")
    warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning)
    _volunteer_for_the_memory_killer()
    RankProcess(Path(sys.argv[1]), **config).serve()


def _volunteer_for_the_memory_killer() -> None:
    """If memory runs out, Linux should end a rank, which can be restarted, and not the notebook."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        return  # not Linux, or not allowed


def _no_exit(*_args) -> None:
    raise RuntimeError("exit() would end this rank. To stop all ranks, run ranks.stop() in the notebook.")


def _no_input(*_args) -> None:
    raise RuntimeError(
        "input() cannot work on a rank: nobody types there. Ask in the notebook, pass the value with ranks.run."
    )
