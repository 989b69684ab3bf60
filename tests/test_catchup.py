"""`%catchup`: what a section needs is there, the reader's own answers come first, and nothing that is kept changes."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from workshop_utils import learning, progress_file, training
from workshop_utils.ranks import current_ranks
from workshop_utils.teaching import catchup

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A kernel, and a reader who has solved 1.1 in another way."""
    monkeypatch.setenv("WORKSHOP_PROGRESS", str(tmp_path))
    monkeypatch.setattr(progress_file, "_memory", {})
    own = {"name": "train_step", "source": OWN_STEP}
    progress_file.update(lambda data: data["exercises"].update({"1.1": {"passed_at": "2026", "answer": own}}))
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()
    plt.close("all")


OWN_STEP = """from torch.nn import functional as F
def train_step(model, optimizer, images, labels):
    "mine"
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()
"""


def code_of_section(stem, number):
    """The code cells of a section, from the solved notebook: what its reader runs next."""
    begun, code = 0, []
    for cell in nbformat.read(ROOT / f"notebooks/solutions/{stem}.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown":
            begun += sum(line.startswith("## ") for line in cell.source.split("\n"))
        elif begun == number:
            code.append(cell.source)
    return code


def run_section(shell, stem, number):
    code = code_of_section(stem, number)
    assert code
    for source in code:
        shell.run_cell(source).raise_error()


def test_the_last_exercise_of_01_can_be_done_after_a_catchup(shell, monkeypatch):
    full = training.train
    monkeypatch.setattr(
        training, "train", lambda *args, steps, **rest: full(*args, steps=steps // 20, **rest)
    )
    before = progress_file.progress_path().read_bytes()
    catchup.catch_up("01.11")
    assert progress_file.progress_path().read_bytes() == before
    assert shell.user_ns["train_step"].__doc__ == shell.user_ns["step"].__doc__ == "mine"
    assert shell.user_ns["check"] is learning.check
    run_section(shell, "01_single_device_mlp", 11)
    assert shell.user_ns["mean_of_means_error"] > 0.1


@pytest.mark.slow
def test_catching_up_with_02_brings_ranks(shell):
    catchup.catch_up("02.16")
    try:
        assert len(current_ranks()) == 4 and current_ranks() is shell.user_ns["ranks"]
        run_section(shell, "02_all_reduce", 16)
        assert shell.user_ns["wire_S"][0] == pytest.approx(0.75, abs=0.1)
    finally:
        current_ranks().stop()


def test_nothing_is_shown_but_where_one_is(shell, capsys):
    show = plt.show
    catchup.catch_up("01.3")
    said = capsys.readouterr().out
    assert "You are at 01.3 · Does it learn?: " in said and "Your own answers: 1.1." in said
    assert "fc1.weight" not in said and "passed" not in said
    assert plt.get_fignums() == [] and plt.show is show


def test_a_cell_that_fails_is_named(shell, monkeypatch):
    cells = [{"section": 0, "source": "from workshop_utils import check\nx = 1"}]
    cells.append({"section": 1, "source": "\ny = x\ny / 0"})
    cells.append({"section": 2, "source": "beyond = 1"})
    notebook = {"sections": ["One?", "Two?"], "cells": cells}
    monkeypatch.setattr(catchup, "load_cells", lambda: {"03_broken": notebook})
    with pytest.raises(catchup.CannotCatchUp) as caught:
        catchup.catch_up("3.2")
    text = str(caught.value)
    assert "stopped at cell 2 of 2, in section 03.1, which begins with\n    y = x\n" in text
    assert "ZeroDivisionError: division by zero" in text and "line 3" in text
    assert shell.user_ns["y"] == 1 and shell.user_ns["check"] is learning.check


def test_places_that_do_not_exist_and_the_list_of_those_that_do(capsys):
    catchup.catch_up("04")
    assert "04.3   How can a layer compute if no rank has it?" in capsys.readouterr().out
    for line, complaint in {
        "": r"write %catchup 04\.3",
        "04.99": r"has no section 99:\n04\.1   What does one parameter cost",
        "04.0": "has no section 0",
        "12.1": "there is no notebook 12; there are 00_start_here",
    }.items():
        with pytest.raises(UsageError, match=complaint):
            catchup.catch_up(line)


def test_sections_are_the_headings_that_the_reader_sees():
    for stem, entry in catchup.load_cells().items():
        cells = nbformat.read(ROOT / f"notebooks/{stem}.ipynb", as_version=4).cells
        lines = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown").split("\n")
        assert entry["sections"] == [line[3:].strip() for line in lines if line.startswith("## ")]


def test_on_colab_there_are_as_many_ranks_as_its_set_up_cell_says(shell):
    shell.user_ns["WORLD_SIZE"] = 2
    catchup.catch_up("02.1")
    try:
        assert len(current_ranks()) == 2
    finally:
        current_ranks().stop()
