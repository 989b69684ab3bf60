"""The Colab notebooks in a Python like Colab's (`make test-colab`): an empty folder, no repository on the path.

Every notebook, learner's and solution, installs the wheel that it carries; every solution then runs to its end.
"""

import json
import subprocess
from pathlib import Path

import environment
import nbformat
import papermill
import pytest

import colab
import workshop_utils
from build import load_sources

CELL_LIMIT_S = 180
STEMS = sorted(load_sources(colab.ROOT, []))
pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def notebooks(tmp_path_factory):
    """The folder of the built notebooks; the environment is made."""
    environment.make()
    out = tmp_path_factory.mktemp("built") / "colab"
    colab.build(out)
    return out


@pytest.fixture
def run_there(tmp_path, monkeypatch):
    """run_there(notebook) executes it in Colab's stand-in, in an empty folder, the package not installed."""
    kernel = tmp_path / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    command = [str(environment.PYTHON), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {"argv": command, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(described))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(environment.HERE / "stand_in"))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "stand-in")
    monkeypatch.setenv("WORKSHOP_PROGRESS", str(tmp_path / "progress"))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    empty = tmp_path / "content"
    empty.mkdir()
    environment.uv(["pip", "uninstall", "--quiet", "--python", str(environment.PYTHON), "workshop-utils"])

    def run(path: Path):
        done = tmp_path / path.name
        papermill.execute_notebook(
            path, done, kernel_name="colab", cwd=empty, progress_bar=False, execution_timeout=CELL_LIMIT_S
        )
        return nbformat.read(done, as_version=4)

    return run


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def versions() -> dict:
    """{name: version} of the environment's packages."""
    command = [*environment.UV, "pip", "list", "--format=json", "--python", str(environment.PYTHON)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {row["name"]: row["version"] for row in json.loads(listed)}


@pytest.mark.parametrize("stem", STEMS)
def test_learner_version_loads_its_wheel(stem, notebooks, run_there, tmp_path):
    notebook = nbformat.read(notebooks / f"{stem}.ipynb", as_version=4)
    assert any("from workshop_utils import check" in cell.source for cell in notebook.cells[2:6])
    where = (
        "from workshop_utils import check, mine, start_ranks\nimport workshop_utils; workshop_utils.__file__"
    )
    notebook.cells = [*notebook.cells[:2], nbformat.v4.new_code_cell(where, id="where")]
    start = tmp_path / "start.ipynb"
    nbformat.write(notebook, start)
    done = run_there(start)
    assert f"workshop_utils {workshop_utils.__version__} installed" in printed(done.cells[1])
    (path,) = (output.data["text/plain"].strip("'") for output in done.cells[-1].outputs)
    assert Path(path).is_relative_to(environment.FOLDER) and "site-packages" in path


@pytest.mark.parametrize("stem", STEMS)
def test_solution_runs(stem, notebooks, run_there):
    before = versions()
    done = run_there(notebooks / "solutions" / f"{stem}.ipynb")
    assert "installed" in printed(done.cells[1])
    after = versions()
    assert {name: after.get(name) for name in before} == before  # nothing that was there is touched
    assert set(after) - set(before) <= {"workshop-utils", "bitsandbytes", "gguf"}


def test_a_second_run_of_the_first_cell_installs_nothing(notebooks, run_there, tmp_path):
    notebook = nbformat.read(notebooks / f"{STEMS[0]}.ipynb", as_version=4)
    notebook.cells = [notebook.cells[1], nbformat.v4.new_code_cell("set_up()", id="again")]
    start = tmp_path / "start.ipynb"
    nbformat.write(notebook, start)
    first, again = (printed(cell) for cell in run_there(start).cells)
    assert "installed" in first and "was there" in again


def test_elsewhere_than_on_colab_nothing_is_installed(notebooks, run_there, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    notebook = nbformat.read(notebooks / f"{STEMS[0]}.ipynb", as_version=4)
    notebook.cells = [notebook.cells[1]]
    start = tmp_path / "start.ipynb"
    nbformat.write(notebook, start)
    with pytest.raises(papermill.PapermillExecutionError, match="this is not Colab"):
        run_there(start)
    assert "workshop-utils" not in versions()
