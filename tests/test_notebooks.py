"""Every notebook, executed: the solutions by nbval, learner versions unsolved, as a reader's "Run All".

papermill runs the solutions too: in a Python like Colab's (tests/on_colab), and with `make run`.

The learner versions are run once. Where there is a browser, that run is the one in JupyterLab (tests/browser), which also
sees what nbval does not: menus, widgets, output that is shown. Where there is none, nbval runs them here.
nbval compares outputs only in cells tagged nbval-check-output (lax); in all others an exception is a failure.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chromium import TESTED_IN_BROWSER

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
STEMS = sorted(source.stem for source in (NOTEBOOKS / "src").glob("[0-9][0-9]_*.py"))
assert STEMS
CELL_LIMIT_S = 120

pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(600)]
each_notebook = pytest.mark.parametrize("stem", STEMS)


@each_notebook
@pytest.mark.skipif(TESTED_IN_BROWSER, reason="tests/browser runs the learner versions, in JupyterLab")
def test_learner_version_runs_unsolved(stem, tmp_path):
    nbval(NOTEBOOKS / f"{stem}.ipynb", tmp_path)


@each_notebook
def test_solution_gives_the_committed_outputs(stem, tmp_path):
    nbval(NOTEBOOKS / "solutions" / f"{stem}.ipynb", tmp_path)


def nbval(notebook: Path, progress: Path):
    """Run nbval over one notebook, as `pytest --nbval-lax` from a shell does."""
    options = [
        "--nbval-lax",
        "--nbval-current-env",
        f"--nbval-cell-timeout={CELL_LIMIT_S}",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-q", notebook],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"WORKSHOP_PROGRESS": str(progress)},
        cwd=NOTEBOOKS.parent,
        check=False,
    )
    assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)[-6000:]
