"""The thread of a rank that answers while its main thread hangs, and that ends the rank when the notebook goes.

It talks over a socket pair, one JSON object per line. When the other end closes, for whatever reason, the
notebook is gone: then the rank ends itself and its children. That is why no orphan is left.
"""

import gc
import json
import linecache
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from torch._C._distributed_c10d import Work

from workshop_utils.ranks.group import let_go_of_the_group

TICK_S = 0.1
# Work that takes more than this share of a core counts as progress; a blocked collective takes none.
BUSY_SHARE = 0.10
_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep
_STANDARD_LIBRARY = os.path.dirname(threading.__file__) + os.sep
_WAITING_PLACES = tuple(
    os.path.join("torch", *p) for p in (("distributed",), ("autograd",), ("nn", "parallel"))
)


class Monitor(threading.Thread):
    """`folder` belongs to all ranks and is removed with them; `sock` is this rank's line to the notebook."""

    def __init__(self, sock: socket.socket, folder: Path):
        super().__init__(name="rank-monitor", daemon=True)
        self.sock, self.folder, self.pid = sock, folder, os.getpid()
        self.main = threading.main_thread().ident
        self.busy = False
        self._send_lock = threading.Lock()
        self.cell_begins()
        self.busy = False
        _give_waits_a_frame()
        os.register_at_fork(after_in_child=self._in_forked_child)

    def cell_begins(self) -> None:
        self._place, self._since, self._cpu = None, time.monotonic(), time.process_time()
        self.freed = False
        self.busy = True

    def send(self, **event) -> None:
        with self._send_lock:
            self.sock.sendall(json.dumps(event).encode() + b"\n")

    def run(self) -> None:
        pending = b""
        while True:
            readable, _, _ = select.select([self.sock], [], [], TICK_S)
            if self.busy:
                self._sample()
            if not readable:
                continue
            try:
                data = self.sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._end_with_the_notebook()
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                try:
                    self._answer(json.loads(line)["op"])
                except Exception:  # noqa: BLE001  this thread must outlive every surprise; the log keeps it
                    traceback.print_exc(file=sys.__stderr__)

    def _answer(self, op: str) -> None:
        if op == "where":
            self.send(event="where", **self.where())
        elif op == "let_go":
            self.freed = True
            let_go_of_the_group()

    def _sample(self) -> None:
        """Has the main thread moved, or has the process worked (gloo's own thread included), since last time?"""
        _, frame = self._frames()
        place, cpu = (id(frame), getattr(frame, "f_lasti", 0)), time.process_time()
        if place != self._place or cpu - self._cpu > BUSY_SHARE * TICK_S or not _waits(frame):
            self._since = time.monotonic()
        self._place, self._cpu = place, cpu

    def _frames(self):
        """The main thread's innermost frame, and that of the thread it waits for: of itself, as a rule."""
        frames = _current_frames()
        frame = at_work = frames.get(self.main)
        if frame is not None and frame.f_code.co_name == "wait_for_thread":  # background.py
            at_work = frames.get(_local_variables(frame)["thread"].ident)
        return frame, at_work

    def where(self) -> dict:
        """Where the main thread is: the reader's line, and the torch call it waits in, if it waits in one."""
        frame, at_work = self._frames()
        if not self.busy or frame is None or _writes_a_traceback(frame):
            return {"busy": False}
        waits = _waits(at_work)
        found = {"busy": True, "waits": waits, "waited_s": time.monotonic() - self._since if waits else 0.0}
        found["for_a_thread"] = frame.f_code.co_filename == threading.__file__
        return found | _reader_line(frame)

    def _end_with_the_notebook(self) -> None:
        """Leave nothing behind: no files, no children, not this process."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if os.getpgid(0) == self.pid:  # our own session: only our own children are in it
            os.killpg(self.pid, signal.SIGKILL)
        os._exit(1)

    def _in_forked_child(self) -> None:
        """A forked child must not outlive its rank, nor wait for a lock that a thread of the rank held at the fork."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "_buffer_lock"):  # ipykernel's; its own thread takes it at any moment
                stream._buffer_lock = threading.RLock()

        def follow(parent: int = self.pid) -> None:
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _no_collection():
    """No garbage collection while another thread's frames are looked at. Before Python 3.12 any allocation may begin one.

    Freeing a tensor then hands the interpreter to other threads in the middle of the look: sys._current_frames()
    holds a lock that they need, and the process hangs for good (Python issue 106883); the frame that f_back or f_locals
    reads may have returned, and the process crashes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _current_frames() -> dict:
    with _no_collection():
        return sys._current_frames()


def _caller(frame):
    with _no_collection():
        return frame.f_back


def _local_variables(frame) -> dict:
    with _no_collection():
        return frame.f_locals


def _give_waits_a_frame() -> None:
    """Wrap `work.wait()`: without a Python frame of its own, a wait cannot be told from computing."""
    original = Work.wait

    def watched_wait(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    Work.wait = watched_wait


def _waits(frame) -> bool:
    """Is this innermost frame one in which a rank waits for others?"""
    if frame is None:
        return False
    file = frame.f_code.co_filename
    return frame.f_code.co_name == "watched_wait" or any(place in file for place in _WAITING_PLACES)


def _reader_line(innermost) -> dict:
    """The innermost line that is not torch's or ours, and the outermost torch.distributed call below it."""
    frame, call, peer = innermost, "", ""
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if "distributed" in file and name != "wrapper":
            call, peer = name, _peer(frame) or peer
        frame = _caller(frame)
    call = call or ("backward" if "autograd" in innermost.f_code.co_filename else "wait")
    if frame is None:
        return {"call": call, "peer": peer}
    file, line = frame.f_code.co_filename, frame.f_lineno or 0  # None between two lines
    return {
        "call": call,
        "peer": peer,
        "file": file,
        "line": line,
        "code": _source_line(file, line),
    }


def _source_line(file: str, line: int) -> str:
    """The text of a line, as far as IPython keeps it: its entry can be incomplete while a cell starts."""
    entry = linecache.cache.get(file, ())
    lines = entry[2] if len(entry) > 2 else None
    return lines[line - 1].strip() if lines and 0 < line <= len(lines) else ""


def _is_machinery(file: str) -> bool:
    standard = file.startswith(_STANDARD_LIBRARY) and f"-packages{os.sep}" not in file
    return standard or f"{os.sep}torch{os.sep}" in file or file.startswith(_PACKAGE)


def _writes_a_traceback(frame) -> bool:
    """Is IPython at it? Then the cell has failed already, and where the rank is says nothing about the reader's code."""
    while frame is not None and frame.f_code.co_name != "showtraceback":
        frame = _caller(frame)
    return frame is not None


def _peer(frame) -> str:
    """The rank that a send or receive waits for. Looks into no other frame: that can free its tensors, which lets
    its thread run on while it is being read."""
    words = {"src": "from", "dst": "to", "group_src": "from", "group_dst": "to"}
    if not words.keys() & set(frame.f_code.co_varnames):
        return ""
    values = _local_variables(frame)
    return next((f"{w} rank {values[k]}" for k, w in words.items() if isinstance(values.get(k), int)), "")
