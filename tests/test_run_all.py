"""The report of `make run`, on two small notebooks: one that runs, one that fails."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
import run_all

pytestmark = pytest.mark.slow


def write(path: Path, heading: str, *more: str):
    """A notebook with a parameters cell, a key-figures cell and `more` cells."""
    new = nbformat.v4
    cells = [
        new.new_markdown_cell(f"# {heading}"),
        new.new_code_cell('PROFILE = "unset"', metadata={"tags": ["parameters"]}),
        new.new_code_cell('print(PROFILE, "<98%>")', metadata={"tags": ["key-figures"]}),
        *map(new.new_code_cell, more),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def test_one_failing_notebook_hides_no_other(tmp_path, capsys):
    write(tmp_path / "01_breaks.ipynb", "Breaks, before [02](02_runs.ipynb)", "1 / 0", "print('never')")
    write(tmp_path / "02_runs.ipynb", "02 · Runs")
    out = tmp_path / "out"
    breaks, runs = run_all.run_all(tmp_path, out)
    assert (breaks.title, breaks.failure) == (
        "01 Breaks, before [02](02_runs.ipynb)",
        "ZeroDivisionError: division by zero",
    )
    assert (runs.title, runs.failure, runs.figures) == ("02 · Runs", "", "quick <98%>")
    assert runs.elapsed_s > 0
    report = (out / "index.html").read_text()
    assert "2 notebooks" in report and "1 failed" in report and "quick &lt;98%&gt;" in report
    for result in (breaks, runs):
        assert f'href="{result.page}"' in report
        assert "98%" in (out / result.page).read_text()
    page = (out / breaks.page).read_text()
    assert "ZeroDivisionError" in page and 'href="02_runs.html"' in page
    assert capsys.readouterr().out.splitlines()[0].endswith("division by zero")


@pytest.mark.parametrize(("failure", "status"), [("", 0), ("DeadKernelError", 1)])
def test_exit_status(monkeypatch, failure, status):
    results = [run_all.Result("01", "01.html", 1.0, "", failure)]
    monkeypatch.setattr(run_all, "run_all", lambda *_: results)
    monkeypatch.setenv("WORKSHOP_PROGRESS", "")  # main sets it; restored afterwards
    assert run_all.main() == status


def test_a_figure_is_left_to_the_page():
    new = nbformat.v4
    picture = new.new_output(
        "display_data", data={"image/png": "AAAA", "text/plain": "<Figure size 550x143>"}
    )
    outputs = [new.new_output("stream", text="98.1%\n"), picture]
    cell = new.new_code_cell(metadata={"tags": ["key-figures"]}, outputs=outputs)
    assert run_all.key_figures(new.new_notebook(cells=[cell])) == "98.1%"


def test_nothing_to_run_is_said(monkeypatch, capsys):
    monkeypatch.setattr(run_all, "run_all", lambda *_: [])
    monkeypatch.setenv("WORKSHOP_PROGRESS", "")
    assert run_all.main() == 1
    assert "make solutions" in capsys.readouterr().err
