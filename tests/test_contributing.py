"""CONTRIBUTING.md, followed to the letter in a scratch copy: what it says works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEPS = TEXT[TEXT.index("## Add a notebook") : TEXT.index("## How a source is written")]


@pytest.fixture
def scratch(tmp_path):
    """A copy of what git would hold, without built notebooks."""
    for folder in ("workshop_utils", "tests", "notebooks", "bundle"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb")
        )
    for name in ("pyproject.toml", "bootstrap.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(command, folder):
    """Run a command of the document in `folder`, whose package is found before the installed one."""
    program, *rest = shlex.split(command)
    python = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest", "-q"]}.get(
        program, [program]
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [*python, *rest],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_stranger_adds_a_notebook(scratch):
    files = dict(re.findall(r"`([\w/]+\.py)`:\n\n   ```python\n(.*?)   ```\n", STEPS, re.DOTALL))
    assert set(files) == {"workshop_utils/checks/nb09.py", "tests/wrong_answers/nb09.py"}
    copy, build_command, _, pytest_command = re.findall(
        r"^   ((?:cp|python|pytest) .*)$", STEPS, re.MULTILINE
    )
    assert run(copy, scratch)[0] == 0
    status, said = run(build_command.replace("--execute ", ""), scratch)
    assert status == 1 and "no check" in said  # the document's order: the check comes next
    for name, content in files.items():
        (scratch / name).write_text(textwrap.dedent(content), encoding="utf-8")
    status, said = run(
        build_command.replace("--execute ", ""), scratch
    )  # executing is tried on real notebooks
    assert status == 0, said
    for version in ("", "solutions/", "instructor/"):
        assert (scratch / f"notebooks/{version}09_my_notebook.ipynb").exists()
    status, said = run(pytest_command, scratch)
    assert status == 0, said
    assert re.search(r"\b8 passed", said), said  # 4 wrong, 1 right, the solution, the stub, enough rows
    status, said = run("python -m ruff check .", scratch)
    assert status == 0, said


def test_the_tags_in_the_document_are_those_that_are_used():
    known = set(re.findall(r"^\| (`.*?`) \|", TEXT[TEXT.index("| tag |") :], re.MULTILINE))
    known = set(re.findall(r"`([\w-]+)`", " ".join(known)))
    for source in (ROOT / "notebooks/src").glob("*.py"):
        for tags in re.findall(r"^# %%.*tags=\[(.*)\]", source.read_text(encoding="utf-8"), re.MULTILINE):
            for tag in re.findall(r'"(.*?)"', tags):
                assert tag in known or re.fullmatch(r"(hints|exercise)-\d+\.\d+", tag), (
                    f"{source.name}: {tag}"
                )
