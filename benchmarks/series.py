"""The whole series: every solution executed, one after the other, in the quick profile. About four minutes."""

import os
import sys
import tempfile
from pathlib import Path

from cells import missing, number, section, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import run_all

TITLE = "The whole series, executed"


def run(solutions: Path = ROOT / "notebooks" / "solutions") -> dict:
    """A row for each notebook, and their sum."""
    progress = os.environ.get("WORKSHOP_PROGRESS")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["WORKSHOP_PROGRESS"] = scratch  # the reader's own progress is not touched
        try:
            results = run_all.run_all(solutions, Path(scratch) / "pages")
        finally:
            del os.environ["WORKSHOP_PROGRESS"]
            if progress is not None:
                os.environ["WORKSHOP_PROGRESS"] = progress
    rows = [
        [result.title, missing(result.failure) if result.failure else seconds(result.elapsed_s)]
        for result in results
    ]
    rows.append(["all", seconds(sum(result.elapsed_s for result in results))])
    return section(
        TITLE,
        "`make run`: the solutions in the quick profile, one after the other, each in a kernel of its own; the start of "
        "the kernel and of the ranks and the writing of the page are included. Once.",
        table(["notebook", "time"], rows),
    )


def seconds(elapsed_s: float) -> dict:
    return number(elapsed_s, 0, " s")
