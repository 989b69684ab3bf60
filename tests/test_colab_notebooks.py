"""How the Colab notebooks are built: what they carry, what they change, where badges and links lead."""

import base64
import io
import re
import subprocess
import sys
import zipfile

import nbformat
import pytest

import colab
from build import ROOT

pytestmark = pytest.mark.slow  # building the wheel takes some seconds


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{path below the folder: notebook}, with badges."""
    out = tmp_path_factory.mktemp("built") / "colab"
    return {
        path.relative_to(out).as_posix(): nbformat.read(path, as_version=4)
        for path in colab.build(out, "owner/name", "v1")
    }


def test_each_carries_this_very_package(built):
    for notebook in built.values():
        (encoded,) = re.findall(r'^WHEEL = "(.+)"$', notebook.cells[1].source, re.MULTILINE)
        wheel = zipfile.ZipFile(io.BytesIO(base64.b64decode(encoded)))
        for name in wheel.namelist():
            if name.startswith("workshop_utils/"):
                assert wheel.read(name) == (ROOT / name).read_bytes()
        inside = {name for name in wheel.namelist() if name.startswith("workshop_utils/")}
        here = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / "workshop_utils").rglob("*")
            if path.is_file()
        }
        assert inside == {path for path in here if "__pycache__" not in path}


def test_ranks_are_two_unless_the_reader_says_otherwise(built):
    for path, notebook in built.items():
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert "WORLD_SIZE = 2" in code[0]
        started = re.findall(r"^ranks = start_ranks\((.*)\)$", "\n".join(code[1:]), re.MULTILINE)
        assert set(started) <= {"WORLD_SIZE", "2", "max(2, min(4, os.cpu_count()))"}, path


def test_badges_and_links_lead_to_notebooks_that_are_there(built):
    for path, notebook in built.items():
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        targets = re.findall(
            r"\]\(https://colab\.research\.google\.com/github/owner/name/blob/v1/colab/(.+?)\)", text
        )
        assert targets[0] == path  # the badge comes first
        assert set(targets) <= set(built)
        assert not re.search(r"\]\(\d\d_\w+\.ipynb", text)


def test_the_two_with_the_language_model_fetch_it(built):
    fetching = [
        path for path, notebook in built.items() if "workshop_utils fetch" in notebook.cells[2].source
    ]
    assert [path.rpartition("/")[2][:2] for path in fetching] == ["07", "08", "07", "08"]


def test_without_an_address_links_become_text():
    title = nbformat.v4.new_markdown_cell(
        "# T, after [notebook 00](00_start_here.ipynb) and [this](https://a.org)"
    )
    notebook = colab.for_colab(nbformat.v4.new_notebook(cells=[title]), "", None)
    assert notebook.cells[0].source.startswith("# T, after notebook 00 and [this](https://a.org)")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--repo", "owner/name"], "belong together"),
        (["--repo", "name", "--ref", "v1"], "owner/name as on GitHub"),
    ],
)
def test_half_an_address_is_refused(arguments, complaint):
    command = [sys.executable, ROOT / "notebooks/colab.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and complaint in done.stderr
