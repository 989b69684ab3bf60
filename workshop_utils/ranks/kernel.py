"""One rank as the notebook sees it: a Jupyter kernel that it starts, talks to, interrupts and, last, ends.

`driver.py` drives a set of these. What runs at the other end is `process.py`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

# The interpreter of this notebook, not whatever a kernelspec called python3 names.
_ARGV = [
    sys.executable,
    "-c",
    "from workshop_utils.ranks.process import main; main()",
    "{connection_file}",
]
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class _Manager(KernelManager):
    """A KernelManager that needs no kernelspec on disk."""

    @property
    def kernel_spec(self):
        return KernelSpec(argv=_ARGV, display_name="rank", language="python")


@dataclass
class CellState:
    """What one rank has said about the cell it is running."""

    msg_id: str
    outputs: list = field(default_factory=list)  # Jupyter messages (type, content), oldest first
    idle: bool = False
    done: dict | None = None  # the rank's own summary: failed, error, operations, sent_bytes
    error: dict | None = None  # Jupyter's error message: ename, evalue, traceback
    where: dict = field(default_factory=dict)  # the last answer to "where are you?"
    where_at: float = 0.0

    @property
    def finished(self) -> bool:
        return self.idle and self.done is not None


class RankKernel:
    """Start with `start()`, then poll: `sockets()` says on what to wait, `read()` takes in what has arrived."""

    def __init__(self, rank: int, world_size: int, folder: Path, threads: int):
        self.rank, self.folder = rank, folder
        self.events: list[str] = []  # how far it has come: ready
        self.cell: CellState | None = None
        self.log = folder / f"rank{rank}.log"
        self._pending = b""
        self._lost = False
        self.pair, theirs = socket.socketpair()
        self.pair.setblocking(False)
        # One folder entry per kernel: over Unix sockets `ip` is a path, and kernels that share it mix messages.
        self.manager = _Manager(
            transport="ipc",
            ip=str(folder / f"k{rank}"),
            connection_file=str(folder / f"k{rank}.json"),
            shutdown_wait_time=0.5,
        )
        config = {
            "fd": theirs.fileno(),
            "rank": rank,
            "world_size": world_size,
            "path": [entry or os.getcwd() for entry in sys.path],
        }
        with theirs, open(self.log, "wb") as log:
            self.manager.start_kernel(
                env=_environment(threads, config),
                pass_fds=(theirs.fileno(),),
                stdout=log,
                stderr=log,
            )
        self.process = self.manager.provisioner.process
        self.pid: int = self.process.pid
        self.session = self.manager.session
        self.channels: dict[str, zmq.Socket] = {}

    # -- what arrives

    def connect(self) -> None:
        """Open Jupyter's channels and wait until output really comes through (a subscription takes a moment)."""
        manager = self.manager
        self.channels["shell"], self.channels["iopub"] = manager.connect_shell(), manager.connect_iopub()
        self.channels["control"] = manager.connect_control()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            self._send("shell", "kernel_info_request", {})
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                if self.channels["iopub"].poll(20) and self._receive("iopub"):
                    self._drain()
                    return
        raise RuntimeError(f"rank {self.rank} started, but its output never arrived")

    def _drain(self) -> None:
        """Throw away what answers the greeting."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < 0.02:
            for channel in ("iopub", "shell"):
                if self._receive(channel):
                    quiet_since = time.monotonic()

    def _receive(self, channel: str) -> dict | None:
        try:
            _, message = self.session.recv(self.channels[channel], mode=zmq.NOBLOCK)
        except ValueError:  # a message with a bad signature is nobody's business here
            return None
        return message

    def sockets(self) -> list:
        return [self.pair, self.channels["iopub"], self.channels["shell"]]

    def read(self) -> None:
        """Take in everything that has arrived."""
        self.read_events()
        while message := self._receive("shell"):
            pass  # the reply repeats what the other channels have said
        while message := self._receive("iopub"):
            self._take_output(message)

    def read_events(self) -> None:
        while not self._lost:
            try:
                data = self.pair.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lost = True
                return
            *lines, self._pending = (self._pending + data).split(b"\n")
            for event in map(json.loads, lines):
                kind = event.pop("event")
                if kind == "done" and self.cell is not None:
                    self.cell.done = event
                elif kind == "where" and self.cell is not None:
                    self.cell.where, self.cell.where_at = event, time.monotonic()
                else:
                    self.events.append(kind)

    def _take_output(self, message: dict) -> None:
        cell = self.cell
        if cell is None or message["parent_header"].get("msg_id") != cell.msg_id:
            return
        kind, content = message["msg_type"], message["content"]
        if kind == "status":
            cell.idle = cell.idle or content["execution_state"] == "idle"
        elif kind == "error":
            cell.error = content
        elif kind in ("stream", "display_data", "execute_result", "update_display_data", "clear_output"):
            cell.outputs.append((kind, content))

    # -- what is sent

    def execute(self, code: str) -> None:
        options = {"silent": False, "store_history": True, "user_expressions": {}}
        options |= {"allow_stdin": False, "stop_on_error": False}
        self.cell = CellState(self._send("shell", "execute_request", {"code": code, **options}))

    def _send(self, channel: str, kind: str, content: dict) -> str:
        message = self.session.msg(kind, content)
        self.session.send(self.channels[channel], message)
        return message["header"]["msg_id"]

    def ask(self, op: str) -> None:
        with contextlib.suppress(
            OSError
        ):  # it is gone, or too stuck to read: the caller's deadlines deal with both
            self.pair.send(json.dumps({"op": op}).encode() + b"\n")

    def interrupt(self) -> None:
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """To the rank's own process group: the rank and what it forked. Never by name."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(self.pid, number) if number == signal.SIGKILL else os.kill(self.pid, number)

    # -- the end

    @property
    def lost(self) -> bool:
        self._lost = self._lost or self.process.poll() is not None
        return self._lost

    def obituary(self) -> str:
        """How the process ended, with the last lines it wrote to its log."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its connection to the notebook"
        if code < 0:
            name = signal.Signals(-code).name
            how = f"was killed by signal {-code} ({name})"
            how += ". If nobody did that on purpose, memory ran out" if name == "SIGKILL" else ""
        else:
            how = f"ended with exit status {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines()[-3:] if self.log.exists() else []
        return how + (". Its last words: " + " / ".join(lines) if lines else "")

    def ask_to_end(self) -> None:
        if not self.lost and "control" in self.channels:  # one that never connected is killed by `end`
            self._send("control", "shutdown_request", {"restart": False})

    def end(self, deadline: float) -> None:
        """Wait for the process until `deadline` (monotonic seconds), then kill it and whatever it forked."""
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill()
        self.process.wait()
        self.pair.close()
        for channel in self.channels.values():
            channel.close(linger=0)
        self.manager.cleanup_resources()


def _environment(threads: int, config: dict) -> dict:
    ours = {
        "WORKSHOP_RANK": json.dumps(config),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # or the debugger's advice is a lost rank's last words
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Ranks compute on the CPU, also where there is a GPU: several ranks on one card are nothing that nccl does. One
        # that saw the card would have torch build a second group, with nccl, behind every device mesh.
        "CUDA_VISIBLE_DEVICES": "",
        # Without this gloo listens on whatever interface the host name resolves to.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")])),
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "JPY_PARENT_PID")}
    return inherited | ours
