"""For those who teach: the notes before each section, the cells that are typed live, `%reveal`, `large_fonts`."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import workshop_utils
from workshop_utils.plotting import use_style
from workshop_utils.teaching import fonts
from workshop_utils.teaching.reveal import reveal_next

ROOT = Path(__file__).resolve().parents[1]
import build
from source import SourceError, read_source

SOURCES = sorted((ROOT / "notebooks/src").glob("[0-9][0-9]_*.py"))
TINY = '''# %% [markdown]
# # A title
#
# 9 minutes.

# %% [markdown] tags=["instructor"]
# **For the instructor.** Have water at hand.

# %%
import math

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Ask*: who is here?

# %% [markdown]
# The end of what came before.
#
# ## First question?

# %% tags=["live", "nbval-check-output"]
def thrice(x):
    """Three times x."""
    return 3 * x


# %% tags=["measures"]
seconds = math.pi

# %% [markdown] tags=["instructor"]
# **5 min.** Say little.

# %% [markdown]
# ## Second question?
#
# ## Third question?
#
# ### Exercise 7.1 · Twice  (★, 5 min)

# %% [markdown] tags=["hints-7.1"]
# 1. Think.
# 2. Add.
# 3. Return.


# %% tags=["exercise-7.1"]
def twice(x):
    """Twice x."""
    ### BEGIN SOLUTION
    #~ raise NotImplementedError("exercise 7.1")
    return thrice(x) - x
    ### END SOLUTION


check("7.1", twice)

# %% tags=["key-figures"]
print(seconds)
'''


@pytest.fixture
def tree(tmp_path):
    """A scratch repository with one notebook, 07_tiny."""
    (tmp_path / "notebooks/src").mkdir(parents=True)
    (tmp_path / "workshop_utils/checks").mkdir(parents=True)
    (tmp_path / "workshop_utils/checks/nb07.py").write_text('@exercise("7.1")\ndef check_twice(a): ...\n')
    (tmp_path / "notebooks/src/07_tiny.py").write_text(TINY)
    return tmp_path


def cells_of(tree, folder):
    return nbformat.read(tree / "notebooks" / folder / "07_tiny.ipynb", as_version=4).cells


def test_notes_carry_section_and_clock_and_live_cells_are_empty(tree):
    build.build(tree)
    texts = [cell.source for cell in cells_of(tree, "instructor")]
    assert "> **For the instructor.** Have water at hand." in texts
    assert "> **07.1 · 0:00 to 0:04 · 4 min.**\n>\n> - *Ask*: who is here?" in texts
    assert "> **07.2 to 07.3 · 0:04 to 0:09 · 5 min.** Say little." in texts
    assert "# live thrice: def thrice(x)" in texts
    assert '# live 7.1: def twice(x)\n# then: check("7.1", twice)' in texts
    assert "import math" in texts and "seconds = math.pi" in texts  # what is not taught stays full


def test_learner_and_solutions_know_nothing_of_it(tree):
    build.build(tree)
    for folder in ("", "solutions"):
        cells = cells_of(tree, folder)
        assert not any("min.**" in cell.source or "# live" in cell.source for cell in cells)
        assert not {"live", "measures"} & {tag for cell in cells for tag in cell.metadata.get("tags", [])}
        assert any("return 3 * x" in cell.source for cell in cells)


def test_catchups_cells(tree):
    build.build(tree)
    found = json.loads((tree / "workshop_utils/notebook_cells.json").read_text())["07_tiny"]
    assert found["sections"] == ["First question?", "Second question?", "Third question?"]
    assert [(cell["section"], cell.get("live"), cell.get("exercise")) for cell in found["cells"]] == [
        (0, None, None),
        (1, "thrice", None),
        (3, None, "7.1"),
        (3, None, None),
    ]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "# The end of what came before.\n#\n# ## First",
            "# First",
            r":12: a note with minutes stands right before",
        ),
        ("    return 3 * x", "    return seconds", None),
        ('["key-figures"]', '["nbval-ignore-output"]', r":58: this cell reads `seconds`, which .* line 28"),
        ("= math.pi\n", "= math.pi\n\n# %%\nseconds + 1\n", r":31: this cell reads `seconds`"),
        ('["measures"]', '["live"]', r":28: a cell tagged live defines a function or a class"),
    ],
)
def test_a_source_that_cannot_be_taught_is_named(tree, old, new, complaint):
    path = tree / "notebooks/src/07_tiny.py"
    assert old in TINY
    path.write_text(TINY.replace(old, new))
    if complaint is None:
        build.build(tree)  # `seconds` is bound later: nothing is known to be missing
        return
    with pytest.raises(SourceError, match=complaint):
        build.build(tree)


# The real notebooks


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_every_section_has_a_note_and_the_minutes_add_up(path):
    cells = read_source(path)
    minutes = int(re.search(r"^(\d+) minutes", cells[0].source, re.MULTILINE)[1])
    noted = []
    for position, cell in enumerate(cells):
        if cell.kind != "markdown" or not re.search("^## ", cell.source, re.MULTILINE):
            continue
        note = cells[position - 1]
        assert "instructor" in note.tags, f"no note before line {cell.line}"
        noted.append(int(re.match(r"\*\*(\d+) min\.\*\*", note.source)[1]))
        bullets = re.findall(r"^- \*(.+?)\*:", note.source, re.MULTILINE)
        assert 1 <= len(bullets) <= 6 and set(bullets) <= {
            "Say",
            "Ask",
            "Type",
            "Break it",
            "Room",
            "Stuck",
            "Cut",
        }
        rest = []
        for later in cells[position:]:
            if (
                later is not cell
                and later.kind == "markdown"
                and re.search("^## ", later.source, re.MULTILINE)
            ):
                break
            rest.append(later.source)
        exercises = re.findall(r"^### Exercise .*, (\d+) min\)", "\n".join(rest), re.MULTILINE)
        assert noted[-1] >= sum(map(int, exercises)), f"line {note.line}: less than its exercises take"
    assert sum(noted) == minutes


# %reveal


@pytest.fixture
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_reveal_puts_a_solution_or_its_first_lines_into_the_next_cell(shell, capsys):
    reveal_next("2.3")
    whole = shell.rl_next_input
    compile(whole, "revealed", "exec")
    assert (
        whole.startswith("def ring_reduce_scatter_(chunks):")
        and 'check("2.3", ring_reduce_scatter_)' in whole
    )
    assert "Solution" not in whole and "NotImplementedError" not in whole
    reveal_next("2.3 5")
    assert shell.rl_next_input == "\n".join(whole.split("\n")[:5])
    reveal_next("ring_reduce_scatter_ 500")
    assert shell.rl_next_input == whole
    assert "the first 5 of its" in capsys.readouterr().out


def test_reveal_without_an_id_takes_the_live_cell_that_ran_last(shell):
    with pytest.raises(UsageError, match=r"no cell with a `# live` line has run yet"):
        reveal_next("")
    for source in ("# live 2.2: def tree_broadcast_(tensor)", "# live ring_all_gather_: def ...", "1 + 1"):
        shell.run_cell(source, store_history=True)
    reveal_next("2")
    assert shell.rl_next_input.split("\n")[0] == "def ring_all_gather_(chunks):"
    assert shell.rl_next_input.count("\n") == 1


def test_reveal_of_what_does_not_exist_lists_what_does(shell):
    with pytest.raises(
        UsageError, match=r"nothing to reveal under 9\.9; there are 0\.1, .*8\.4, MLP, .*Codes"
    ):
        reveal_next("9.9")
    with pytest.raises(UsageError, match="write %reveal"):
        reveal_next("2.3 five lines")


def test_an_import_in_a_notebook_registers_the_magics(shell):
    workshop_utils._register_line_magics()
    assert {"reveal", "catchup"} <= set(shell.magics_manager.magics["line"])


# large_fonts


def test_large_fonts_last_until_they_are_switched_back(capsys):
    use_style()
    before = plt.rcParams["figure.dpi"]
    workshop_utils.large_fonts()
    use_style()  # as the next notebook's first cell does
    assert plt.rcParams["figure.dpi"] == pytest.approx(fonts.FACTOR * before)
    workshop_utils.large_fonts(False)
    assert plt.rcParams["figure.dpi"] == before
    assert "large_fonts(False) switches back" in capsys.readouterr().out
