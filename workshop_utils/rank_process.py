"""What runs inside a rank: a Jupyter kernel, a live gloo group, and a monitor thread.

Used from notebook 00 on. The notebook's side is `ranks.py`. The two talk in two ways: cells travel over
Jupyter's own channels, and a socket pair carries one JSON object per line for everything that must work while
a cell hangs ("where are you?", "let go of the group"). When the notebook's end of that pair closes, for
whatever reason, the rank ends itself and its children: that is why no orphan is left.
"""

import json
import linecache
import os
import select
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

TICK_S = 0.1
# Work that takes more than this share of a core counts as progress; a blocked collective takes none.
BUSY_SHARE = 0.10
_HERE = str(Path(__file__).resolve().parent) + os.sep

rank: int = int(os.environ.get("WORKSHOP_RANK", "0"))
_monitor: "Monitor | None" = None


# ----------------------------------------------------------------------------- the process group


def join_group(store_path: str, world_size: int) -> list[str]:
    """Join the default gloo group that meets at `store_path`, leaving any older one.

    Returns the reader's variables that still hold the group that was left.
    """
    import torch.distributed as dist

    stale = objects_holding_a_group()
    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.FileStore(store_path, world_size)
    store.set_timeout(timedelta(seconds=30))
    # Gloo's own timeout is long on purpose: a slow peer is not an error. The notebook watches for deadlocks.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(days=1))
    return stale


def let_go_of_the_group() -> None:
    """Close this rank's connections, so that whoever waits in a collective gets an error at once.

    Destroying the group does not do it: a blocked call holds a reference to the group, and so may the reader's
    objects. Closed connections end the wait on both sides, whoever holds what.
    """
    for sock in connected_sockets():
        with sock:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the peer closed it first


def connected_sockets() -> list[socket.socket]:
    """Duplicates of this process's TCP connections over loopback. They are gloo's: Jupyter uses Unix sockets."""
    found = []
    for name in os.listdir("/dev/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed since it was listed
        try:
            host = sock.getpeername()[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else ""
        except OSError:
            host = ""  # a listener has no peer
        if host == "::1" or str(host).startswith(("127.", "::ffff:127.")):
            found.append(sock)
        else:
            sock.close()
    return found


def count_operations() -> int:
    """How many operations this rank has started on all of its groups."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return 0
    return sum(group._get_sequence_number_for_group() for group in dist.distributed_c10d._world.pg_map)


# By name, so that a rank which never used them does not import them: FSDP1 and FSDP2, DDP, meshes, groups.
_HOLDERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeviceMesh", "ProcessGroup"}


def objects_holding_a_group() -> list[str]:
    """Names of the reader's variables that keep a reference to a process group or device mesh."""
    from torch import nn

    def holds(value) -> bool:
        names = {kind.__name__ for kind in type(value).__mro__}
        if names & _HOLDERS or getattr(value, "holds_process_group", False):
            return True
        return isinstance(value, nn.Module) and any(map(holds, value.children()))

    names = []
    for name, value in list(_monitor.shell.user_ns.items()):
        try:
            if not name.startswith("_") and name not in _monitor.given_names and holds(value):
                names.append(name)
        except Exception:  # a reader's object may refuse any question
            continue
    return names


@contextmanager
def sub_world(n: int):
    """Inside: ranks 0 to n-1 see a default group of world size n. All ranks enter; yields True on those inside.

    The original group is untouched. This is how world sizes 1 to N are tried on one set of N ranks.
    """
    import torch.distributed as dist

    whole = dist.group.WORLD
    if not 1 <= n <= whole.size():
        raise ValueError(f"sub_world({n}): n must lie between 1 and the world size, {whole.size()}")
    group = dist.new_group(list(range(n)))
    inside = dist.get_rank() < n
    try:
        if inside:
            dist.distributed_c10d._update_default_pg(group)
        yield inside
    finally:
        # After a failure the group may be gone altogether; then there is nothing to put back.
        if dist.is_initialized() and whole in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._update_default_pg(whole)
            if inside:
                dist.destroy_process_group(group)


# ----------------------------------------------------------------------------- where is this rank?


def where(frame) -> dict:
    """Where a thread is: the reader's line, and the torch call it waits in, if it waits in one."""
    innermost, call, peer = frame, "", ""
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        name = frame.f_code.co_name
        if name not in ("wrapper", "_counted_wait", "inner") and "distributed" in frame.f_code.co_filename:
            call, peer = name, _peer(frame) or peer
        frame = frame.f_back
    waits = _waits(innermost)
    if frame is None:
        return {"waits": waits, "call": call or innermost.f_code.co_name, "peer": peer}
    file, line = frame.f_code.co_filename, frame.f_lineno
    if waits and not call:
        call = "backward" if "autograd" in innermost.f_code.co_filename else "wait"
    code = linecache.getline(file, line).strip()
    return {"waits": waits, "call": call, "peer": peer, "file": file, "line": line, "code": code}


def _is_machinery(file: str) -> bool:
    return f"{os.sep}torch{os.sep}" in file or file.startswith(_HERE) or file.endswith("contextlib.py")


def _waits(frame) -> bool:
    """Is this innermost frame one in which a rank waits for others?"""
    file = frame.f_code.co_filename
    return frame.f_code.co_name == "_counted_wait" or any(
        part in file for part in ("torch/distributed", "torch/autograd", "torch/nn/parallel")
    )


def _peer(frame) -> str:
    names = frame.f_locals
    for key, word in (("src", "from"), ("dst", "to"), ("group_src", "from"), ("group_dst", "to")):
        if isinstance(names.get(key), int):
            return f"{word} rank {names[key]}"
    return ""


def _watch_waits() -> None:
    """Give `work.wait()` a Python frame of its own: without one, the monitor cannot tell waiting from computing."""
    from torch._C._distributed_c10d import Work

    original = Work.wait

    def _counted_wait(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    Work.wait = _counted_wait


class Monitor(threading.Thread):
    """Answers the notebook while the main thread runs a cell, and ends the rank when the notebook is gone."""

    def __init__(self, sock: socket.socket, folder: str):
        super().__init__(name="rank-monitor", daemon=True)
        self.sock, self.folder, self.pid = sock, folder, os.getpid()
        self.main = threading.main_thread().ident
        self.shell = None
        self.given_names: set[str] = set()
        self.busy = False
        self._send_lock = threading.Lock()
        self._last = (None, 0.0, 0.0)  # (place, since when without progress, CPU seconds)
        os.register_at_fork(after_in_child=self._in_forked_child)

    def send(self, **event) -> None:
        with self._send_lock:
            self.sock.sendall(json.dumps(event).encode() + b"\n")

    def run(self) -> None:
        pending = b""
        while True:
            readable, _, _ = select.select([self.sock], [], [], TICK_S if self.busy else None)
            if self.busy:
                self._sample()
            if not readable:
                continue
            try:
                data = self.sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._end_of_notebook()
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._answer(json.loads(line))

    def _answer(self, message: dict) -> None:
        if message["op"] == "where":
            self.send(event="where", **self.status())
        elif message["op"] == "let_go":
            let_go_of_the_group()

    def _sample(self) -> None:
        frame = sys._current_frames().get(self.main)
        now, cpu = time.monotonic(), time.process_time()
        place = (id(frame), frame.f_lasti) if frame is not None else None
        old_place, since, old_cpu = self._last
        if place != old_place or cpu - old_cpu > BUSY_SHARE * TICK_S or not _waits(frame):
            since = now
        self._last = (place, since, cpu)

    def status(self) -> dict:
        frame = sys._current_frames().get(self.main)
        if not self.busy or frame is None:
            return {"busy": False, "waits": False, "waited_s": 0.0}
        place = where(frame)
        waited_s = time.monotonic() - self._last[1] if place["waits"] else 0.0
        return {"busy": True, "waited_s": waited_s, **place}

    def _end_of_notebook(self) -> None:
        """The notebook's kernel is gone. Leave nothing behind: no files, no children, not this process."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if os.getpgid(0) == self.pid:  # our own session: only our own children are in it
            os.killpg(self.pid, signal.SIGKILL)
        os._exit(1)

    def _in_forked_child(self) -> None:
        """A forked child must not outlive its rank, nor serve the rank's sockets."""

        def follow(parent: int = self.pid) -> None:
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


# ----------------------------------------------------------------------------- running cells


def _before_cell(*_info) -> None:
    _monitor._last = (None, time.monotonic(), time.process_time())
    _monitor.call_error = None
    _monitor.busy = True
    _monitor.cell_start = (count_operations(), sent_bytes())


def _after_cell(result) -> None:
    if os.getpid() != _monitor.pid:
        sys.stdout.flush()
        os._exit(
            0
        )  # a child that the cell forked and that came back here: it must not read the kernel's sockets
    _monitor.busy = False
    operations, sent = _monitor.cell_start
    now_sent = sent_bytes()
    error = result.error_before_exec or result.error_in_exec or _monitor.call_error
    _monitor.send(
        event="done",
        at=time.monotonic(),
        failed=error is not None,
        error=type(error).__name__ if error is not None else "",
        message=str(error)[:2000] if error is not None else "",
        operations=count_operations() - operations,
        sent_bytes=None if sent is None or now_sent is None else max(0, now_sent - sent),
    )


def sent_bytes() -> int | None:
    """Bytes that gloo has sent from this rank so far, by the kernel's count; None where it does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    total = 0
    for sock in connected_sockets():
        with sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
        total += int.from_bytes(info[200:208], sys.byteorder)  # tcpi_bytes_sent, since Linux 4.19
    return total


def call(path: str) -> None:
    """Run the pickled (fn, args, kwargs) at `path`; leave the pickled result beside it."""
    import cloudpickle

    try:
        with open(path, "rb") as file:
            fn, args, kwargs = cloudpickle.load(file)
        result = fn(*args, **kwargs)
        with open(f"{path}.result{rank}", "wb") as file:
            cloudpickle.dump(result, file)
    except BaseException as error:  # an interrupt, too: it is reported like any other end
        _monitor.call_error = error
        shown = error.__traceback__.tb_next or error.__traceback__  # without this function's own frame
        _monitor.shell.showtraceback((type(error), error, shown))


def _no_exit(*_args) -> None:
    raise RuntimeError("exit() would end this rank. To stop all ranks, run ranks.stop() in the notebook.")


def _no_input(*_args) -> None:
    raise RuntimeError(
        "input() cannot work on a rank: nobody types there. Ask in the notebook, then pass the value with ranks.run."
    )


def main() -> None:
    """Start the monitor, join the group, and serve cells until the notebook goes away."""
    global _monitor
    connection_file, config = sys.argv[1], json.loads(os.environ.pop("WORKSHOP_RANK_CONFIG"))
    world_size = config["world_size"]
    _monitor = Monitor(socket.socket(fileno=config["fd"]), os.path.dirname(os.path.dirname(connection_file)))
    _monitor.start()
    sys.path[:] = config["path"]
    _volunteer_for_the_memory_killer()

    import torch
    import torch.distributed as dist

    _watch_waits()
    _monitor.send(event="torch")

    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    # Several ranks must not write into one history database.
    app.initialize(["-f", connection_file, "--HistoryManager.enabled=False"])
    given = {"torch": torch, "dist": dist, "rank": rank, "world_size": world_size}
    given |= {"exit": _no_exit, "quit": _no_exit, "input": _no_input}
    app.shell.user_ns.update(given)
    _monitor.given_names = set(given) | {"In", "Out"}
    _monitor.shell = app.shell
    warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning)
    app.shell.events.register("pre_run_cell", _before_cell)
    app.shell.events.register("post_run_cell", _after_cell)
    _monitor.send(event="ready")
    app.start()


def _volunteer_for_the_memory_killer() -> None:
    """If memory runs out, Linux should end a rank, which can be restarted, and not the notebook."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        pass  # not Linux, or not allowed
