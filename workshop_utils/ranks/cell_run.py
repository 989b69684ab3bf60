"""One cell on several ranks, followed to its end: what failed first, who waited for it, and how all get free.

Part of the machinery behind `%%ranks` (notebook 00). The rule is that of any launcher, one failure ends the cell
for all, but nobody's process has to die for it: a rank that waits is freed by closing its connections, one that
computes is interrupted, and only one that ignores both is killed.
"""

import linecache
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from workshop_utils.ranks.display import Live
from workshop_utils.ranks.errors import RankError
from workshop_utils.ranks.kernel import RankKernel

GRACE_S = 0.2  # after the first sign of failure: others may be about to tell the real cause
INTERRUPT_AFTER_S = 1.0
# After an interrupt all have stopped within 3 s. Otherwise nobody waits at the button, and a busy machine gets time:
# four ranks that were freed at once on two cores can need 3 s to write their first traceback.
KILL_AFTER_S, KILL_AFTER_FAILURE_S = 2.4, 10.0
SHOW_AFTER_S = 1.0
ASK_EVERY_S = 0.25
_ECHO = re.compile(r"gloo/|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|process group|Timed out")


@dataclass
class Failure:
    """Why the cell ended early. `kind`: error, lost, deadlock, deadline or interrupt."""

    kind: str
    rank: int | None = None
    at_s: float = 0.0
    doing: dict[int, str] = field(default_factory=dict)  # what the others did when it happened
    killed: list[int] = field(default_factory=list)


class CellRun:
    """Start the code on all `kernels`; `follow()` returns when every one of them has ended or is lost."""

    def __init__(self, kernels: list[RankKernel], *, timeout_s: float, deadline_s: float | None = None):
        self.kernels, self.timeout_s, self.deadline_s = kernels, timeout_s, deadline_s
        self.failure: Failure | None = None
        self.let_go = False
        self._first_sign = self._failed_at = None
        self._asked = self._shown = self._changed_at = 0.0
        self._at_work = len(kernels)
        self._interrupted: set[int] = set()
        self._live = Live()

    def follow(self, code: str) -> Failure | None:
        self.began, self.source = time.monotonic(), code.split("\n")
        try:
            for kernel in self.kernels:
                kernel.execute(code)
        except KeyboardInterrupt:
            self._fail("interrupt")
        while True:
            try:
                while unfinished := self._unfinished():
                    self._wait_for_news(unfinished)
                    self._look_for_failure(unfinished)
                    self._free(unfinished)
                    self._ask_and_show(unfinished)
                self._look_for_failure([], last=True)
                self.seconds = time.monotonic() - self.began
                self._live.clear()
                return self.failure
            except KeyboardInterrupt:
                if self.failure is not None and self.failure.kind == "interrupt":
                    self._kill(self._unfinished())  # pressed twice: no more patience
                else:
                    self._fail("interrupt")

    # -- what has happened

    def _unfinished(self) -> list[RankKernel]:
        return [kernel for kernel in self.kernels if not kernel.cell.finished and not kernel.lost]

    def _wait_for_news(self, unfinished: list[RankKernel]) -> None:
        poller = zmq.Poller()
        for kernel in unfinished:
            for sock in kernel.sockets():
                poller.register(sock, zmq.POLLIN)
        poller.poll(50)
        for kernel in self.kernels:
            kernel.read()

    def _look_for_failure(self, unfinished: list[RankKernel], last: bool = False) -> None:
        if self.failure is not None:
            return
        now = time.monotonic()
        failed = [k for k in self.kernels if k.lost or (k.cell.done and k.cell.done["failed"])]
        if failed:
            if self._first_sign is None:
                self._first_sign = now
                self._ask(unfinished)
            if last or now - self._first_sign > GRACE_S:
                self._fail("lost" if (first := _first_to_fail(failed)).lost else "error", first.rank)
        elif unfinished and self.deadline_s is not None and now - self.began > self.deadline_s:
            self._fail("deadline")
        elif self._all_wait(unfinished):
            self._fail("deadlock")

    def _all_wait(self, unfinished: list[RankKernel]) -> bool:
        """Has every rank that is still at work waited for the whole timeout?

        When a rank finishes, the others are about to: only what they say a while later counts.
        """
        now = time.monotonic()
        if len(unfinished) != self._at_work:
            self._at_work, self._changed_at = len(unfinished), now
        not_before = max(self._changed_at + 2 * ASK_EVERY_S, now - 4 * ASK_EVERY_S)
        answers = [
            kernel.cell.where.get("waited_s", 0.0)
            for kernel in unfinished
            if kernel.cell.where_at > not_before
        ]
        return 0 < len(unfinished) == len(answers) and min(answers) >= self.timeout_s

    def _fail(self, kind: str, rank: int | None = None) -> None:
        self._failed_at = time.monotonic()
        if kind in ("deadline", "interrupt"):
            self._ask(self._unfinished())
            time.sleep(0.05)  # the answers take a millisecond, if the rank can answer at all
            for kernel in self.kernels:
                kernel.read()
        busy = [k for k in self._unfinished() if k.cell.where.get("busy")]
        self.failure = Failure(
            kind, rank, self._failed_at - self.began, {k.rank: self.describe(k) for k in busy}
        )

    # -- getting everybody free

    def _free(self, unfinished: list[RankKernel]) -> None:
        if self.failure is None:
            return
        now = time.monotonic()
        if not self.let_go:
            self.let_go = True
            for kernel in unfinished:
                kernel.ask("let_go")
        at_once = self.failure.kind in ("interrupt", "deadline")
        patience = 0.0 if at_once else INTERRUPT_AFTER_S
        for kernel in unfinished:
            if now - self._failed_at >= patience and kernel.rank not in self._interrupted:
                self._interrupted.add(kernel.rank)
                kernel.interrupt()
        kill_after = KILL_AFTER_S if self.failure.kind == "interrupt" else KILL_AFTER_FAILURE_S
        if now - self._failed_at >= patience + kill_after:
            self._kill(unfinished)

    def _kill(self, unfinished: list[RankKernel]) -> None:
        for kernel in unfinished:
            if kernel.rank not in self.failure.killed:
                self.failure.killed.append(kernel.rank)
                kernel.kill()

    # -- what the reader sees meanwhile

    def _ask(self, unfinished: list[RankKernel]) -> None:
        self._asked = time.monotonic()
        for kernel in unfinished:
            kernel.ask("where")

    def _ask_and_show(self, unfinished: list[RankKernel]) -> None:
        now = time.monotonic()
        if now - self.began < min(SHOW_AFTER_S, self.timeout_s / 2):
            return
        if now - self._asked > ASK_EVERY_S:
            self._ask(unfinished)
        if now - self._shown > ASK_EVERY_S:
            self._shown = now
            rows = [(k.rank, self._doing(k), k.cell.outputs) for k in self.kernels]
            self._live.status(now - self.began, rows)

    def _doing(self, kernel: RankKernel) -> str:
        if kernel.lost:
            return "lost"
        if kernel.cell.done is not None:
            return "failed" if kernel.cell.done["failed"] else "finished"
        if not kernel.cell.where:
            return "busy"
        return self.describe(kernel)

    def describe(self, kernel: RankKernel) -> str:
        """One rank's answer to "where are you?" in words."""
        where = kernel.cell.where
        if not where.get("busy"):
            return "between two cells"
        spot = self._spot(where)
        if not where["waits"]:
            return f"waiting for a thread{spot}" if where["for_a_thread"] else f"computing{spot}"
        peer = f" ({where['peer']})" if where.get("peer") else ""
        since = f" for {where['waited_s']:.1f} s" if where["waited_s"] >= 0.05 else ""
        return f"waiting{since} in {where['call']}{peer}{spot}"

    def _spot(self, where: dict) -> str:
        if not where.get("file"):
            return ""
        file, line = where["file"], where["line"]
        in_a_cell = "ipykernel" in file or file.startswith("<")
        code = where["code"] or linecache.getline(file, line).strip()
        if in_a_cell and not code and line <= len(self.source):
            code = self.source[line - 1].strip()
        if in_a_cell and "_process.call(" in code:  # what `ranks.run` sends
            return ", outside your function"
        return (
            f", line {line}" + ("" if in_a_cell else f" of {Path(file).name}") + (f": {code}" if code else "")
        )

    # -- what it amounted to

    def group_is_broken(self) -> bool:
        """Can the process group still be used? After a plain mistake at the same point on all ranks it can."""
        if self.failure is None:
            return False
        counts = {k.cell.done["operations"] for k in self.kernels if k.cell.done}
        return (
            self.let_go
            or len(counts) > 1
            or any(map(_is_echo, self.kernels))
            or any(k.lost for k in self.kernels)
        )

    def report(self) -> RankError | None:
        """The failure in words, with the first failing rank's own traceback at the end."""
        failure = self.failure
        if failure is None:
            return None
        echoes = {
            k.rank: "its connection broke" for k in self.kernels if k.rank != failure.rank and _is_echo(k)
        }
        others = [f"  rank {rank}: {text}" for rank, text in sorted((echoes | failure.doing).items())]
        traceback = None
        if failure.kind in ("error", "lost"):
            kernel = next(k for k in self.kernels if k.rank == failure.rank)
            if failure.kind == "error":
                headline = f"rank {failure.rank} failed after {failure.at_s:.1f} s"
                traceback = (kernel.cell.error or {}).get("traceback")
            else:
                headline = f"rank {failure.rank} (process {kernel.pid}) is lost: it {kernel.obituary()}"
            if same := _same_error(self.kernels, kernel):
                headline += f" (the same error on {_ranks(same)})"
            lines = [headline, *(["meanwhile:", *others] if others else [])]
        else:
            lines = [_HEADLINES[failure.kind](self), *others]
        if failure.killed:
            lines.append(f"{_ranks(failure.killed)} did not stop when asked, and had to be killed.")
        return RankError("\n".join(lines), rank=failure.rank, traceback=traceback)


_HEADLINES: dict[str, Callable[[CellRun], str]] = {
    "deadlock": lambda run: (
        f"deadlock: every rank still at work has waited for {run.timeout_s:g} s, so none can go on"
    ),
    "deadline": lambda run: f"the deadline of {run.deadline_s:g} s passed; the cell was stopped",
    "interrupt": lambda run: f"interrupted after {run.failure.at_s:.1f} s; all ranks were stopped",
}


def _is_echo(kernel: RankKernel) -> bool:
    """Does this rank's error only say that somebody else has gone?"""
    done = kernel.cell.done
    return bool(done and done["failed"] and _ECHO.search(done["message"]))


def _first_to_fail(failed: list[RankKernel]) -> RankKernel:
    """The cause: a lost process before any error, an error before an echo, the earliest of those."""
    lost = [kernel for kernel in failed if kernel.lost]
    if lost:
        return lost[0]
    return min(failed, key=lambda kernel: (_is_echo(kernel), kernel.cell.done["at"]))


def _same_error(kernels: list[RankKernel], first: RankKernel) -> list[int]:
    """The other ranks on which the very same thing went wrong, as after a typing mistake."""
    if first.cell.error is None:
        return []
    mine = (first.cell.error["ename"], first.cell.error["evalue"])
    others = [k for k in kernels if k is not first and k.cell.error is not None]
    return [k.rank for k in others if (k.cell.error["ename"], k.cell.error["evalue"]) == mine]


def _ranks(numbers: list[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, sorted(numbers)))
