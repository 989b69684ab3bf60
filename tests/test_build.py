"""notebooks/build.py on small notebooks in a scratch tree."""

import base64
import io
import json
import re
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
import build
from source import registered_checks

SOURCE = '''# %% [markdown]
# # A title

# %% tags=["parameters"]
PROFILE = "quick"

# %%
import math

# %% [markdown]
# ### Exercise 7.1 · Twice  (★, 5 min)
# Return twice `x`.

# %% [markdown] tags=["hints-7.1"]
# 1. Think.
# 2. Add:
#    `x + x`.
# 3. Return it.

# %% tags=["exercise-7.1"]
def twice(x):
    """Twice x."""
    if x:
        ### BEGIN SOLUTION
        #~ # TODO: in words
        #~ if x > 1:
        #~     raise NotImplementedError("exercise 7.1")
        # why
        return math.fsum([x, x])
        ### END SOLUTION


check("7.1", twice)

# %% tags=["solution"]
print("only in the solutions", 2 + 3)

# %% [markdown] tags=["instructor"]
# Ask the room.

# %%
# %%ranks --only 0,2
print(rank)
'''
LEARNER_CELL = '''def twice(x):
    """Twice x."""
    if x:
        # TODO: in words
        if x > 1:
            raise NotImplementedError("exercise 7.1")


check("7.1", twice)'''
SOLUTION_CELL = '''def twice(x):
    """Twice x."""
    if x:
        # Solution
        # why
        return math.fsum([x, x])


check("7.1", twice)'''


@pytest.fixture
def tree(tmp_path):
    """A scratch repository with one notebook, 07_tiny."""
    (tmp_path / "notebooks/src").mkdir(parents=True)
    (tmp_path / "workshop_utils/checks").mkdir(parents=True)
    (tmp_path / "workshop_utils/checks/nb07.py").write_text(
        '@exercise("7.1")\ndef check_twice(answer): ...\n'
    )
    (tmp_path / "notebooks/src/07_tiny.py").write_text(SOURCE)
    return tmp_path


def edit(tree, old, new):
    path = tree / "notebooks/src/07_tiny.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cells_of(tree, version):
    path = tree / {"learner": "notebooks", "solutions": "notebooks/solutions"}.get(
        version, f"notebooks/{version}"
    )
    return nbformat.read(path / "07_tiny.ipynb", as_version=4).cells


def everything_in(tree):
    return {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def test_learner_sees_the_stub_and_no_answer(tree):
    build.build(tree)
    cells = cells_of(tree, "learner")
    assert [c.source for c in cells if "exercise-7.1" in c.metadata.get("tags", [])] == [LEARNER_CELL]
    text = (tree / "notebooks/07_tiny.ipynb").read_text()
    for hidden in ("fsum", "BEGIN", "#~", "only in the solutions", "Ask the room", "jupytext"):
        assert hidden not in text
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in cells)
    assert cells[-1].source == "%%ranks --only 0,2\nprint(rank)"


def test_hints_become_three_folded_blocks(tree):
    build.build(tree)
    (hints,) = [c.source for c in cells_of(tree, "learner") if "hints-7.1" in c.metadata.get("tags", [])]
    assert re.findall(r"<summary>(.*?)</summary>", hints) == ["Hint 1", "Hint 2", "Hint 3"]
    assert "Add:\n`x + x`." in hints
    assert hints.count("<details>") == hints.count("</details>") == 3


def test_solutions_and_instructor_versions(tree):
    build.build(tree)
    solved, instructor = cells_of(tree, "solutions"), cells_of(tree, "instructor")
    assert SOLUTION_CELL in [c.source for c in solved]
    assert "**Solutions.**" in solved[0].source and "`07_tiny.ipynb`" in solved[0].source
    assert any("only in the solutions" in c.source for c in solved)
    assert not any("Ask the room" in c.source for c in solved)
    assert any("Ask the room" in c.source for c in instructor)
    assert '# live 7.1: def twice(x)\n# then: check("7.1", twice)' in [c.source for c in instructor]


def test_exercises_json_is_all_that_hint_solution_and_mine_need(tree):
    build.build(tree)
    data = json.loads((tree / "workshop_utils/exercises.json").read_text())
    entry = data["exercises"]["7.1"]
    assert entry["title"] == "Twice"
    assert entry["name"] == "twice"
    assert entry["hints"] == ["Think.", "Add:\n`x + x`.", "Return it."]
    assert entry["stub"] == LEARNER_CELL
    assert entry["solution"] == SOLUTION_CELL
    assert data["notebooks"]["07_tiny"]["definitions"][: entry["after"]] == [
        "PROFILE = 'quick'",
        "import math",
    ]


def test_a_rebuild_changes_no_byte(tree):
    build.build(tree)
    first = everything_in(tree)
    build.build(tree)
    assert everything_in(tree) == first
    for version in ("learner", "solutions"):
        ids = [c.id for c in cells_of(tree, version)]
        assert len(set(ids)) == len(ids)


def test_ruff_format_on_a_source_changes_no_notebook(tree):
    build.build(tree)
    first = everything_in(tree)
    edit(tree, "#~", "# ~")
    edit(tree, "# %%\nimport math", "# %%\n\nimport math\n")
    build.build(tree)
    changed = [p for p, content in everything_in(tree).items() if content != first[p] and p.suffix != ".py"]
    assert changed == []


def run_fake(tree):
    """Give the solutions outputs, as --execute does."""
    path = tree / "notebooks/solutions/07_tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", text=f"output {count}\n")]
    nbformat.write(notebook, path)


def test_check_lists_what_is_stale(tree, capsys):
    def check():
        status = build.main(["--check"], root=tree)
        return status, capsys.readouterr().out

    status, said = check()
    assert status == 1 and "notebooks/07_tiny.ipynb is missing" in said
    build.build(tree)
    assert check()[0] == 1  # the solutions have not run
    run_fake(tree)
    status, said = check()
    assert (status, "up to date: 07_tiny" in said) == (0, True)
    before = everything_in(tree)

    learner = tree / "notebooks/07_tiny.ipynb"
    learner.write_text(learner.read_text().replace("A title", "A tittle"))
    status, said = check()
    assert status == 1 and "stale: notebooks/07_tiny.ipynb is not what its source builds" in said
    build.build(tree)
    assert check()[0] == 0 and everything_in(tree) == before

    edit(tree, "# 1. Think.", "# 1. Think twice.")
    status, said = check()
    assert status == 1
    for name in ("notebooks/07_tiny.ipynb", "notebooks/solutions/07_tiny.ipynb", "exercises.json"):
        assert name in said
    (tree / "notebooks/06_gone.ipynb").write_text("{}")
    assert "notebooks/06_gone.ipynb has no source" in check()[1]


def test_outputs_stay_while_the_code_stays(tree):
    build.build(tree)
    run_fake(tree)
    edit(tree, "# # A title", "# # A better title")
    build.build(tree)
    cells = cells_of(tree, "solutions")
    assert "better" in cells[0].source
    assert all(c.outputs for c in cells if c.cell_type == "code")
    edit(tree, "math.fsum", "math.sumprod")
    build.build(tree)
    assert not any(c.get("outputs") for c in cells_of(tree, "solutions"))


def test_one_notebook_is_built_without_the_others(tree):
    build.build(tree)
    before = (tree / "workshop_utils/exercises.json").read_text()
    (tree / "notebooks/src/08_broken.py").write_text("# %%\n### BEGIN SOLUTION\n")
    build.build(tree, ["07"])
    assert (tree / "workshop_utils/exercises.json").read_text() == before
    with pytest.raises(build.SourceError, match=r"08_broken\.py:2: BEGIN SOLUTION without END"):
        build.build(tree)


HINTS = SOURCE[
    SOURCE.index('# %% [markdown] tags=["hints-7.1"]') : SOURCE.index('# %% tags=["exercise-7.1"]')
]
EXERCISE = SOURCE[SOURCE.index('# %% tags=["exercise-7.1"]') : SOURCE.index('# %% tags=["solution"]')]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("        ### END SOLUTION\n", "", r":24: BEGIN SOLUTION without END SOLUTION"),
        ("        ### BEGIN SOLUTION\n", "", r":24: `#~` outside"),
        ("        # why\n", "        ### BEGIN SOLUTION\n", r":28: BEGIN SOLUTION inside the one of line 24"),
        ("import math", "import math\n### END SOLUTION", r":9: END SOLUTION without BEGIN"),
        ("import math", "import math\n#~ x", r":9: `#~` outside"),
        ("# 3. Return it.", "#", r":14: hints-7.1 must be a numbered list of three hints, found 2"),
        ("# 3. Return it.", "# 3. Return it.\n# 4. Rest.", r":14: .* found 4"),
        (HINTS, "", r":14: exercise 7.1 has no cell tagged \"hints-7.1\""),
        (EXERCISE, "", r":14: hints-7.1 without a cell tagged exercise-7.1"),
        (EXERCISE, EXERCISE + EXERCISE, r":35: exercise 7.1 appears twice"),
        ("7.1", "6.1", r":20: exercise 6.1 is in notebook 07, so its id must begin with 7"),
        ("7.1", "7.2", r":20: exercise 7.2 has no check"),
        ("### Exercise 7.1 ·", "### Exercise", r":20: exercise 7.1 has no heading"),
        ('check("7.1", twice)', "", r":20: no `check\(\"7.1\", name\)`"),
        ('check("7.1", twice)', 'check("7.1", lambda: 1)', r":20: no `check"),
        (
            '        #~     raise NotImplementedError("exercise 7.1")\n',
            "",
            r":20: the learner's version .*indented block",
        ),
        ("import math", "import maths", r":20: solution of 7.1: it uses `math` from another cell; import it"),
        ("# %% [markdown]\n# # A title", "# # A title", r":1: there is text before the first cell"),
    ],
)
def test_a_malformed_source_is_named_with_its_line(tree, capsys, old, new, complaint):
    edit(tree, old, new)
    assert build.main([], root=tree) == 1
    said = capsys.readouterr().err
    assert re.search(r"error: 07_tiny\.py" + complaint, said), said


def test_limits_are_warnings(tree, capsys):
    build.build(tree)
    run_fake(tree)
    edit(tree, "# # A title", "# # A title\n# " + "word " * 4001)
    edit(tree, "print(rank)", "print(rank)\n" * 30)
    build.build(tree)
    run_fake(tree)
    assert build.main(["--check"], root=tree) == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: 07_tiny: 40\d\d words, at most 4000", said)
    assert re.search(r"warning: 07_tiny: line \d+: a code cell of 31 lines, at most 25", said)
    assert "cells, 40 to 70 are meant" in said


def test_execute_keeps_outputs_and_nothing_of_this_machine(tree, monkeypatch):
    edit(tree, '\n\ncheck("7.1", twice)\n', '\n\nif 0:\n    check("7.1", twice)\nprint(twice(2))\n')
    edit(
        tree,
        "# %%ranks --only 0,2\nprint(rank)\n",
        'print("50%\\r100%\\nhome", __import__("pathlib").Path.home() / "x")\n',
    )
    (tree / "notebooks/solutions").mkdir()
    monkeypatch.setenv("WORKSHOP_PROGRESS", "/nowhere")
    build.main(["--execute"], root=tree)
    cells = [c for c in cells_of(tree, "solutions") if c.cell_type == "code"]
    texts = ["".join(o.get("text", "") for o in c.outputs) for c in cells]
    assert texts == ["", "", "4.0\n", "only in the solutions 5\n", "100%\nhome ~/x\n"]
    raw = (tree / "notebooks/solutions/07_tiny.ipynb").read_text()
    for word in ("papermill", "widgets", "start_time", "iopub", str(tree), '"version": "3'):
        assert word not in raw
    first = everything_in(tree)
    assert build.main(["--check"], root=tree) == 0
    build.main(["--execute"], root=tree)
    assert everything_in(tree) == first


def figure_png() -> str:
    """A figure as the inline backend encodes it."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    ax.imshow([[0, 0.3], [0.7, 1]])
    ax.set_title("Four colours and a scale")
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        plt.close(figure)
        return base64.b64encode(file.getvalue()).decode()


def test_a_committed_picture_is_smaller_and_looks_the_same():
    before = figure_png()
    after = build.smaller_png(before)
    assert len(after) < 0.7 * len(before)
    assert build.smaller_png(after) == after  # built again, no byte changes
    old, new = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), int)
        for png in (before, after)
    )
    assert old.shape == new.shape and abs(old - new).max() <= 16


def test_live_widgets_and_progress_bars_do_not_reach_a_committed_notebook():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"}
    assert build.clean_output(nbformat.v4.new_output("display_data", data=widget)) is None
    picture = figure_png()
    pictured = build.clean_output(
        nbformat.v4.new_output("display_data", data=widget | {"image/png": picture})
    )
    assert set(pictured.data) == {"text/plain", "image/png"}
    assert build.clean_output(nbformat.v4.new_output("stream", name="stderr", text="10%\r20%\r")) is None


def test_a_bar_that_a_cleared_display_cut_in_two_shows_its_last_state():
    stream = partial(nbformat.v4.new_output, "stream", name="stderr")
    cleared = nbformat.v4.new_output("display_data", data={"text/html": "", "text/plain": ""})
    (only,) = build.clean_outputs([stream(text="\r10%"), cleared, stream(text="\r100%")])
    assert only.text == "100%"


def test_the_committed_notebooks_and_the_registry_agree():
    """The text scan that build.py makes finds the ids that importing the checks registers."""
    from workshop_utils import checks

    scanned = set().union(*(registered_checks(p) for p in (ROOT / "workshop_utils/checks").glob("nb*.py")))
    assert scanned == set(checks.all_ids())


def test_committed_notebooks_hold_no_widgets():
    for path in (*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks/solutions").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        assert "widgets" not in notebook.metadata, path.name
        assert "jupytext" not in notebook.metadata, path.name


def test_links_between_notebooks_lead_somewhere():
    for path in (ROOT / "notebooks/src").glob("*.py"):
        for target in re.findall(r"\]\(([\w/.-]+\.ipynb)\)", path.read_text(encoding="utf-8")):
            assert (ROOT / "notebooks/src" / target).with_suffix(".py").exists(), (
                f"{path.name} links {target}"
            )
