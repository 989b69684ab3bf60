"""Fixtures shared by all tests."""

import faulthandler
import gc
import itertools
import sys

import pytest
import zmq

from workshop_utils import train
from workshop_utils.ranks import driver


@pytest.fixture(scope="session", autouse=True)
def _no_open_socket():
    """Every test closes its kernels' sockets.

    The garbage collector may end a zmq context before it closes that context's sockets, and then waits for ever: also
    after the last test, where no time limit ends it.
    """
    yield
    # what leads to a kernel; papermill has a pair of pipes of its own
    channels = {zmq.DEALER, zmq.SUB, zmq.REQ}
    sockets = [thing for thing in gc.get_objects() if issubclass(type(thing), zmq.Socket)]
    left = [socket for socket in sockets if not socket.closed and socket.socket_type in channels]
    assert not left, f"a test left sockets open: {left}"


@pytest.fixture(scope="session")
def _sets():
    """The five ranks of this session: started at first use, and anew if a test's own `start_ranks` ended them."""
    sets: list[driver.Ranks] = []
    yield sets
    for ranks in sets:
        ranks.stop()


@pytest.fixture
def ranks5(_sets, monkeypatch):
    """Five live ranks: `sub_world(n)` makes any smaller world of them. Also what `current_ranks()` returns."""
    if not _sets or not _sets[-1].kernels:
        _sets.append(driver.start_ranks(5))
    ranks = _sets[-1]
    if any(kernel.lost for kernel in ranks.kernels):
        ranks.restart()
    monkeypatch.setattr(driver, "_current", ranks)
    return ranks


@pytest.fixture
def train_here(monkeypatch, capsys):
    """Run workshop_utils.train in this process; returns (exit status, what it printed)."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def leave(status, message=None):
        print(message or "", file=sys.stderr)
        raise SystemExit(status)

    monkeypatch.setattr(train, "end", leave)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            train.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return run


def pytest_sessionfinish():
    """Should the process not end after its last line, show where it stands, and end it."""
    faulthandler.dump_traceback_later(120, exit=True)


def pytest_terminal_summary(terminalreporter):
    """The seconds of each part of the suite, above pytest's last line."""
    seconds_s = {}
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if hasattr(report, "duration"):
            part = next((mark for mark in ("notebooks", "browser") if mark in report.keywords), "package")
            seconds_s[part] = seconds_s.get(part, 0.0) + report.duration
    if seconds_s:
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in sorted(seconds_s.items()))
        terminalreporter.write_line(f"time per part: {parts}")
