"""`%%ranks` as a reader meets it: in a notebook's kernel, with its interrupt button, restart and sudden end."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


class _Manager(KernelManager):
    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=[*argv, "--HistoryManager.enabled=False"], language="python")


class Notebook:
    """A kernel, and what its cells put out."""

    def __init__(self):
        self.manager = _Manager()
        self.manager.start_kernel()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str, timeout: float = 90) -> list[dict]:
        """Run a cell; its outputs as plain text, in order: {'text': ...} or {'error': ...}."""
        return self.finish(self.client.execute(code), timeout)

    def finish(self, msg_id: str, timeout: float = 90) -> list[dict]:
        outputs, displays, end = [], {}, time.monotonic() + timeout
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.1, end - time.monotonic()))
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return outputs
            if kind == "error":
                outputs.append({"error": content["ename"], "text": "\n".join(content["traceback"])})
            elif kind == "stream":
                outputs.append({"text": content["text"]})
            elif kind in ("display_data", "execute_result"):
                outputs.append({"text": content["data"].get("text/plain", ""), "data": content["data"]})
                displays[content.get("transient", {}).get("display_id")] = outputs[-1]
            elif kind == "update_display_data":
                shown = displays.get(content["transient"]["display_id"])
                shown["updates"] = [*shown.get("updates", []), content["data"]["text/plain"]]

    def start_ranks(self, n: int, **options) -> list[int]:
        """Start ranks and return their process ids."""
        arguments = ", ".join([str(n), *(f"{key}={value!r}" for key, value in options.items())])
        code = f"import json\nfrom workshop_utils import start_ranks\nranks = start_ranks({arguments})\n"
        outputs = self.run(code + "print(json.dumps([kernel.pid for kernel in ranks.kernels]))")
        assert not errors(outputs), outputs
        return json.loads(outputs[-1]["text"])

    def stop(self):
        self.client.stop_channels()
        # Also where the kernel is dead: this closes the manager's socket.
        self.manager.shutdown_kernel(now=True)


def errors(outputs) -> list[str]:
    return [output["error"] for output in outputs if "error" in output]


def text(outputs) -> str:
    return "\n".join(output["text"] for output in outputs)


@pytest.fixture(scope="module")
def notebook():
    book = Notebook()
    book.pids = book.start_ranks(3, timeout_s=5.0)
    yield book
    book.stop()
    assert gone(book.pids, 10), "the ranks end with the kernel"


def gone(pids, within_s: float) -> bool:
    def alive(pid):
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_a_cell_on_the_ranks(notebook):
    outputs = notebook.run(
        "%%ranks\nx = torch.ones(2) * rank\ndist.all_reduce(x)\nprint('rank', rank, 'of', world_size)\nx"
    )
    shown = text(outputs)
    assert not errors(outputs)
    for rank in range(3):
        assert f"[rank {rank}] rank {rank} of 3\n[rank {rank}] tensor([3., 3.])" in shown
    assert "sent per rank" in outputs[-1]["text"]
    assert all("text/html" in output["data"] for output in outputs)


def test_a_plot_appears_under_its_rank(notebook):
    outputs = notebook.run("%%ranks --only 1\nimport matplotlib.pyplot as plt\nplt.plot([1, 2, rank]);")
    places = [i for i, output in enumerate(outputs) if "image/png" in output.get("data", {})]
    assert len(places) == 1 and outputs[places[0] - 1]["text"].startswith("[rank 1]")


def test_options(notebook):
    outputs = notebook.run(
        "%%ranks --only 0,2 --here\nwho = globals().get('rank', 'the notebook')\nprint('I am', who)"
    )
    shown = text(outputs)
    assert "[rank 0] I am 0" in shown and "[rank 2] I am 2" in shown and "I am the notebook" in shown
    assert "[rank 1]" not in shown
    for line, words in [
        ("--only 7", "the ranks are 0 to 2"),
        ("--only a", "separated by commas"),
        ("--deadline 0", "more than 0"),
    ]:
        outputs = notebook.run(f"%%ranks {line}\npass")
        assert words in text(outputs), line


def test_an_expected_error_is_ordinary_output(notebook):
    outputs = notebook.run("%%ranks --expect-error\nif rank == 1:\n    1 / 0\ndist.barrier()")
    assert not errors(outputs) and "ZeroDivisionError" in text(outputs)
    assert "did not" in text(notebook.run("%%ranks --expect-error\npass"))


def test_an_error_shows_the_ranks_own_traceback(notebook):
    outputs = notebook.run(
        "%%ranks\ndef broken():\n    return undefined\nif rank == 2:\n    broken()\ndist.barrier()"
    )
    assert errors(outputs) == ["RankError"]
    shown = text(outputs)
    assert "rank 2 failed" in shown and "undefined" in shown and "workshop_utils" not in shown
    assert not errors(notebook.run("%%ranks\ndist.barrier()"))


def test_a_function_of_the_notebook_runs_on_the_ranks(notebook):
    outputs = notebook.run(
        "def square():\n    import torch.distributed as dist\n    return dist.get_rank() ** 2\nranks.run(square)"
    )
    assert outputs[-1]["text"] == "[0, 1, 4]"


def test_while_a_cell_runs_the_reader_sees_what_each_rank_does(notebook):
    outputs = notebook.run(
        "%%ranks\nimport time\nprint('step 1')\nif rank == 0:\n    end = time.monotonic() + 3\n"
        "    while time.monotonic() < end: pass\ndist.barrier()"
    )
    updates = "\n".join(outputs[0].get("updates", []))
    assert "[rank 0] computing, line" in updates
    assert "[rank 1] waiting for" in updates and "in barrier" in updates
    assert outputs[0]["updates"][-1] == "", "the live view leaves nothing behind"


@pytest.mark.parametrize(
    "hang",
    [
        "dist.recv(torch.ones(1), src=(rank + 1) % world_size)",
        "while True: pass",
        "import time; time.sleep(100)",
    ],
)
def test_the_interrupt_button_stops_all_ranks(notebook, hang):
    msg_id = notebook.client.execute(f"%%ranks\nkept = 7\n{hang}")
    time.sleep(1.5)
    began = time.monotonic()
    notebook.manager.interrupt_kernel()
    outputs = notebook.finish(msg_id, timeout=30)
    took_s = time.monotonic() - began
    assert errors(outputs) == ["RanksInterrupted"] and took_s < 15, took_s
    assert "all ranks were stopped" in text(outputs)
    assert not errors(notebook.run("%%ranks\nassert kept == 7; dist.barrier()"))


def test_running_start_ranks_again_replaces_them(notebook):
    old = notebook.pids
    notebook.pids = notebook.start_ranks(2, timeout_s=5.0)
    assert gone(old, 5)
    assert not errors(notebook.run("%%ranks\nassert world_size == 2 and 'kept' not in globals()"))


def test_restarting_the_kernel_ends_its_ranks(notebook):
    notebook.manager.restart_kernel(now=False)
    notebook.client.wait_for_ready(timeout=60)
    assert gone(notebook.pids, 10)
    outputs = notebook.run("from workshop_utils import start_ranks")
    outputs = notebook.run("%load_ext workshop_utils\nget_ipython().run_cell_magic('ranks', '', 'pass')")
    assert "start_ranks(4)" in text(outputs)
    notebook.pids = notebook.start_ranks(1)


@contextmanager
def subreaper():
    """Orphans come to this process instead of to process 1, as in many containers: their parent is never 1."""
    prctl = ctypes.CDLL(None).prctl
    prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        prctl(36, 0, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a subreaper exists on Linux only")
@pytest.mark.parametrize("cell", ["dist.barrier() if rank else __import__('time').sleep(1000)", "pass"])
def test_no_orphan_is_left_when_the_kernel_is_killed(cell):
    with subreaper():
        book = Notebook()
        try:
            pids = book.start_ranks(2)
            folder = book.run("print(ranks.folder)")[-1]["text"].strip()
            book.run("%%ranks --only 1\nimport subprocess\nhelper = subprocess.Popen(['sleep', '1000'])")
            children = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
            assert children
            book.client.execute(f"%%ranks\n{cell}")
            time.sleep(1.5)
            os.kill(book.manager.provisioner.pid, signal.SIGKILL)
            assert gone(pids + children, 10)
            assert not os.path.exists(folder)
        finally:
            book.stop()


@pytest.mark.slow
def test_four_notebooks_side_by_side():
    script = (
        "from workshop_utils.ranks import start_ranks\nimport torch.distributed as dist\n"
        "with start_ranks(2) as ranks:\n    print(ranks.run(lambda: dist.get_world_size()))"
    )
    # Four kernels would do the same; four plain interpreters also show that no notebook is needed.
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for process in running:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0 and "[2, 2]" in out
