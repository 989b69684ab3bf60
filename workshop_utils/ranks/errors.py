"""What the ranks raise in the notebook. Jupyter shows the report, not the frames of this package."""

import re

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def strip_ansi(text: str) -> str:
    return _ANSI.sub("", text)


class RankError(RuntimeError):
    """A cell or function failed on the ranks. `.rank` is the rank that failed first, None for a deadlock."""

    def __init__(self, message: str, *, rank: int | None = None, traceback: list[str] | None = None):
        self.rank, self.message, self.traceback = rank, message, traceback or []
        super().__init__("\n\n".join([message, *(strip_ansi(line) for line in self.traceback)]))

    def add(self, line: str) -> None:
        """Add a line to the report, above the traceback."""
        RankError.__init__(self, f"{self.message}\n{line}", rank=self.rank, traceback=self.traceback)

    def _render_traceback_(self) -> list[str]:
        return [f"\x1b[31mRankError\x1b[0m: {self.message}", "", *self.traceback]


class RanksInterrupted(KeyboardInterrupt):
    """The reader pressed the stop button; all ranks have stopped."""

    def _render_traceback_(self) -> list[str]:
        return [f"\x1b[31mKeyboardInterrupt\x1b[0m: {self}"]
