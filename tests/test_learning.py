"""check, hint, solution, guess, mine and the progress file, without ranks; with ranks: test_learning_on_ranks.py."""

import json
import os
import signal
import subprocess
import sys
import time

import cloudpickle
import pytest
from IPython.core.interactiveshell import InteractiveShell

from workshop_utils import answers, checks, learning, progress_file

EXERCISES = {
    "notebooks": {
        "09_test": {
            "definitions": [
                "import math",
                "PROFILE = 'quick'",
                "def helper(x):\n    return math.fsum([x, x])",
                "def twice(x):\n    return helper(x)",
            ]
        }
    },
    "exercises": {
        "9.1": {
            "notebook": "09_test",
            "title": "Twice",
            "name": "twice",
            "hints": ["Think.", "Add.", "`x + x`"],
            "after": 3,
            "stub": 'def twice(x):\n    raise NotImplementedError("exercise 9.1")\n\ncheck("9.1", twice)',
            "solution": 'def twice(x):\n    # Solution\n    return helper(x)\n\n\ncheck("9.1", twice)',
        },
        "9.10": {
            "notebook": "09_test",
            "title": "A number",
            "name": "number",
            "hints": ["a", "b", "c"],
            "after": 4,
            "stub": 'number = None\ncheck("9.10", number)',
            "solution": 'number = 7\ncheck("9.10", number)',
        },
    },
}


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """A series of one notebook with two exercises, and a progress folder of its own."""
    monkeypatch.setenv("WORKSHOP_PROGRESS", str(tmp_path / "progress"))
    monkeypatch.setattr(progress_file, "_memory", {})
    monkeypatch.setattr(answers, "load_exercises", lambda: EXERCISES)
    checks.all_ids()  # loads the real ones, before the registry is replaced
    monkeypatch.setattr(checks, "_registry", dict(checks._registry))

    @checks.exercise("9.1")
    def check_twice(answer):
        for x in (1, 2.5):
            checks.expect_number(answer(x), 2 * x, name=f"twice({x})")
        return "two cases"

    @checks.exercise("9.10")
    def check_number(answer):
        checks.expect_number(answer, 7)

    return tmp_path


@pytest.fixture
def shell():
    """An IPython shell, so that functions are defined in cells."""
    instance = InteractiveShell.instance()
    instance.run_cell("from workshop_utils.learning import *")
    yield instance
    InteractiveShell.clear_instance()


def kept():
    return json.loads((progress_file.progress_path()).read_text())


# check


def test_pass_says_the_checks_own_sentence(capsys):
    assert learning.check("9.1", lambda x: x + x)
    assert "✓ Exercise 9.1 passed.\n  Two cases." in capsys.readouterr().out
    assert kept()["exercises"]["9.1"]["attempts"] == 1


def test_wrong_names_what_was_got_and_expected_and_offers_a_hint(capsys):
    result = learning.check("9.1", lambda x: x)
    assert not result and result.outcome == "wrong"
    said = capsys.readouterr().out
    assert "✗ Exercise 9.1 is not right yet.\n  twice(1) is 1, expected 2\n  For a hint: hint('9.1')" in said
    assert "passed_at" not in kept()["exercises"]["9.1"]


@pytest.mark.parametrize("unsolved", [None, ..., "stub"])
def test_a_stub_is_not_solved_yet_and_does_not_count_as_a_try(capsys, unsolved):
    answer = answers.stub("9.1") if unsolved == "stub" else unsolved
    assert learning.check("9.1", answer).outcome == "not solved"
    assert "○ Exercise 9.1 is not solved yet.\n  For a hint: hint('9.1')" in capsys.readouterr().out
    assert not progress_file.progress_path().exists()


def test_an_exception_shows_the_learners_own_lines_only():
    def inner(x):
        return x / 0

    def answer(x):
        return inner(x)

    text = learning.check("9.1", answer).text
    assert text.startswith("Exercise 9.1: your function raised ZeroDivisionError.\ntest_learning.py, line ")
    assert "in answer\n    return inner(x)\n" in text
    assert text.endswith("in inner\n    return x / 0\nZeroDivisionError: division by zero")
    assert "learning.py, line" not in text.replace("test_learning.py", "")


def test_an_exception_in_a_cell_names_the_line_of_the_cell(shell, capsys):
    shell.run_cell("def twice(x):\n    y = x\n    return y.missing\nr = check('9.1', twice)")
    assert "cell, line 3, in twice\n    return y.missing" in shell.user_ns["r"].text


def test_a_check_that_cannot_use_the_answer_does_not_blame_a_line():
    result = learning.evaluate("0.1", 5)
    assert result.outcome == "wrong"
    assert "The check cannot use your answer. TypeError: 'int' object is not callable" in result.text


def test_exit_in_an_answer_does_not_end_the_notebook_but_an_interrupt_does():
    def leaves(x):
        sys.exit(3)

    def interrupted(x):
        raise KeyboardInterrupt

    assert learning.check("9.1", leaves).outcome == "raised"
    with pytest.raises(KeyboardInterrupt):
        learning.check("9.1", interrupted)


@pytest.mark.parametrize(("wrong_id", "near"), [("9.11", "9.1"), (9.1, "9.1"), ("9,10", "9.10")])
def test_an_unknown_id_suggests_a_near_one(capsys, wrong_id, near):
    assert not learning.check(wrong_id, lambda x: x)
    said = capsys.readouterr().out
    assert f"There is no exercise {wrong_id!r}. Did you mean" in said and near in said
    assert not progress_file.progress_path().exists()


def test_an_exercise_whose_notebook_is_not_built_yet_is_checked_all_the_same(shell, capsys, monkeypatch):
    monkeypatch.setattr(answers, "load_exercises", lambda: {"notebooks": {}, "exercises": {}})
    shell.run_cell("def twice(x):\n    return x + x\ncheck('9.1', twice)\ncheck('9.1', lambda x: x + x)")
    said = capsys.readouterr().out
    assert "exercises.json does not have 9.1: run notebooks/build.py" in said and said.count("passed.") == 2


def test_check_as_the_last_line_of_a_cell_shows_nothing_twice(shell, capsys):
    shell.run_cell("check('9.1', lambda x: 2 * x)")
    said = capsys.readouterr().out
    assert said.count("passed") == 1 and "Result(" not in said


def test_shown_as_html_with_the_same_words_as_plain_text(monkeypatch):
    shown = []
    monkeypatch.setattr("workshop_utils.showing.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    learning.check("9.1", lambda x: "<b>")
    (bundle,) = shown
    assert set(bundle) == {"text/html", "text/plain"}
    assert "✗ Exercise 9.1 is not right yet." in bundle["text/html"]
    assert "&#x27;&lt;b&gt;&#x27;" in bundle["text/html"]
    assert "color:inherit" in bundle["text/html"] and "background:none" in bundle["text/html"]


# hint and solution


def test_hints_come_one_by_one_then_the_solution_is_named(capsys):
    def hints():
        learning.hint("9.1")
        return capsys.readouterr().out

    first, second, third, fourth = hints(), hints(), hints(), hints()
    assert "Hint 1 of 3. Think." in first and "Hint 2" not in first
    assert "Hint 1 of 3. Think." in second and "Hint 2 of 3. Add." in second and "Hint 3" not in second
    assert "Hint 3 of 3. `x + x`" in third and "solution" not in third
    assert "solution('9.1')" in fourth
    assert kept()["exercises"]["9.1"]["hints"] == 4


def test_solution_is_shown_and_noted(capsys):
    learning.solution("9.1")
    assert "```python\ndef twice(x):\n    # Solution" in capsys.readouterr().out
    assert kept()["exercises"]["9.1"]["solution_seen_at"]
    learning.solution("7.7")
    assert "There is no exercise '7.7'." in capsys.readouterr().out


# guesses


def test_a_guess_is_kept_and_compared(capsys):
    learning.compare_guess("speed", 3.0, "ms")
    assert "measured: 3 ms (you made no guess)" in capsys.readouterr().out
    learning.guess("speed", None)
    assert "No guess yet" in capsys.readouterr().out
    assert not progress_file.progress_path().exists()
    learning.guess("speed", 1500)
    learning.compare_guess("speed", 3.0, "ms")
    assert "your guess: 1,500 ms\nmeasured: 3 ms" in capsys.readouterr().out
    learning.guess("winner", "naive")
    learning.compare_guess("winner", "ring")
    assert "your guess: naive\nmeasured: ring" in capsys.readouterr().out


def test_a_guess_may_be_a_tensor():
    torch = pytest.importorskip("torch")
    learning.guess("bytes", torch.tensor(4))
    assert kept()["guesses"]["bytes"]["value"] == 4
    learning.guess("bytes", [1, 2])
    learning.compare_guess("bytes", torch.tensor(2.5))


@pytest.mark.parametrize(
    ("guessed", "measured", "scale"), [(2, 3, "linear"), (1, 1e6, "log"), (0, 5, "linear")]
)
def test_guess_plot(guessed, measured, scale):
    import matplotlib.pyplot as plt

    from workshop_utils.guesses import plot_guess

    figure, axes = plt.subplots()
    plot_guess(axes, guessed, measured, "s")
    assert axes.get_xscale() == scale
    assert [bar.get_width() for bar in axes.patches] == [measured, guessed]
    labels = [text.get_text() for text in axes.texts]
    assert len(labels) == 2 and all(label.endswith(" s") for label in labels)
    plt.close(figure)


# mine


def test_mine_is_the_reference_until_the_reader_passes(shell, capsys):
    assert learning.mine("9.1")(4) == 8
    assert (
        "twice: the reference solution of exercise 9.1 (you have not solved it yet)"
        in capsys.readouterr().out
    )
    shell.run_cell(
        "import functools\nSCALE = 2\nstarted = print('side effect')\n"
        "def scaled(x, by=SCALE):\n    return functools.reduce(lambda a, b: a + b, [x] * by)\n"
        "def twice(x):\n    return scaled(x)\ncheck('9.1', twice)"
    )
    capsys.readouterr()
    own = learning.mine("twice")
    assert own(4) == 8 and own.__code__.co_names == ("scaled",)
    said = capsys.readouterr().out
    assert "twice: your own answer to exercise 9.1" in said and "side effect" not in said


def test_mine_travels_to_another_process(shell, tmp_path):
    shell.run_cell("import math\ndef twice(x):\n    return math.fsum([x, x])\ncheck('9.1', twice)")
    (tmp_path / "own").write_bytes(cloudpickle.dumps(learning.mine("9.1")))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'own')!r}, 'rb'))(21))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "42.0\n"


def test_an_answer_may_use_what_the_notebook_gave(shell, capsys):
    shell.run_cell("import math\ndef helper(x):\n    return math.fsum([x, x])")
    shell.run_cell("def twice(x):\n    return helper(x)\ncheck('9.1', twice)")
    assert "Later notebooks" not in capsys.readouterr().out
    assert learning.mine("9.1")(3) == 6
    assert "your own answer" in capsys.readouterr().out


def test_an_answer_that_leans_on_another_cell_is_not_kept_and_says_why(shell, capsys):
    shell.run_cell("def my_helper(x):\n    return x + x")
    shell.run_cell("def twice(x):\n    return my_helper(x)\ncheck('9.1', twice)")
    said = capsys.readouterr().out
    assert "passed" in said
    assert "Later notebooks will use the reference because it uses `my_helper` from another cell." in said
    assert learning.mine("9.1")(3) == 6
    assert "your answer passed, but could not be kept" in capsys.readouterr().out
    shell.run_cell(
        "def my_helper(x):\n    return x + x\ndef twice(x):\n    return my_helper(x)\ncheck('9.1', twice)"
    )
    assert "Later notebooks" not in capsys.readouterr().out
    learning.mine("9.1")
    assert "your own answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (
            "def make():\n    def twice(x):\n        return x + x\n    return twice\ntwice = make()",
            "inside another function",
        ),
        (
            "import functools, operator\ntwice = functools.partial(operator.mul, 2)",
            "its source cannot be found",
        ),
        ("factor = int('2')\ndef twice(x):\n    return factor * x", "it uses `factor` from another cell"),
        (
            "import math\ndef twice(x, f=rank_count()):\n    return x + x",
            "it uses `rank_count` from another cell",
        ),
        (
            "import missing_module as mm\n" if False else "def twice(x, n=[][:1] or 2):\n    return n * x",
            None,
        ),
        ("twice = lambda x: x + x", None),
        ("%time 1\n!true\ndef twice(x):\n    return x + x", None),
        ("class Twice:\n    def __new__(cls, x):\n        return x + x\ntwice = Twice", None),
    ],
)
def test_what_can_be_kept(shell, capsys, cell, why):
    shell.run_cell("def rank_count():\n    return 2")
    shell.run_cell(f"{cell}\ncheck('9.1', twice)")
    said = capsys.readouterr().out
    assert "passed" in said
    assert (why in said) if why else ("Later notebooks" not in said), said
    assert learning.mine("9.1")(3) == 6


def test_a_worse_answer_later_does_not_replace_the_kept_one(shell, capsys):
    shell.run_cell("def twice(x):\n    return x + x\ncheck('9.1', twice)")
    shell.run_cell("def twice(x):\n    return x\ncheck('9.1', twice)")
    assert learning.mine("9.1")(3) == 6
    assert "your own answer" in capsys.readouterr().out


def test_mine_falls_back_when_the_kept_answer_no_longer_loads(shell, capsys):
    shell.run_cell("def twice(x):\n    return x + x\ncheck('9.1', twice)")
    for source, why in (
        ("import no_such_module\ndef twice(x):\n    return no_such_module.f(x)", "No module named"),
        ("def twice(x:", "never closed"),
        ("def thrice(x):\n    return x", "twice"),
    ):
        progress_file.update(lambda data, s=source: data["exercises"]["9.1"]["answer"].update(source=s))
        assert learning.mine("9.1")(3) == 6
        said = capsys.readouterr().out
        assert (
            "the reference solution of exercise 9.1 (your saved answer does not run here" in said
            and why in said
        )


def test_mine_of_an_unknown_name():
    with pytest.raises(ValueError, match="There is no exercise 'twise'. Did you mean twice"):
        learning.mine("twise")


# the progress file


def pass_one():
    learning.check("9.1", lambda x: x + x)


def test_progress_survives_a_restart(capsys):
    pass_one()
    code = "from workshop_utils import progress_file; print(progress_file.read()['exercises']['9.1']['attempts'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"version": 1, "exerc',
        b"\x00\xff\xfe",
        b"[]",
        b"null",
        b'{"exercises": 3}',
        b'{"exercises": {"9.1": 4}}',
        b'{"exercises": {"9.1": {"hints": "two"}}}',
        b'{"version": "one"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_kept_aside_and_said_once(capsys, damage):
    path = progress_file.progress_path()
    path.parent.mkdir()
    path.write_bytes(damage)
    pass_one()
    said = capsys.readouterr().out
    (aside,) = path.parent.glob("progress.json.damaged-*")
    assert aside.read_bytes() == damage
    assert said.count("was damaged") == 1 and str(aside) in said and "passed" in said
    assert kept()["exercises"]["9.1"]["passed_at"]
    learning.hint("9.1")
    learning.progress_report()
    assert "damaged" not in capsys.readouterr().out


def test_unknown_parts_of_another_version_are_kept():
    path = progress_file.progress_path()
    path.parent.mkdir()
    newer = {
        "version": 7,
        "badges": ["x"],
        "exercises": {"99.1": {"passed_at": "2030-01-01T10:00:00", "stars": 3}},
    }
    path.write_text(json.dumps(newer))
    pass_one()
    data = kept()
    assert data["version"] == 7 and data["badges"] == ["x"]
    assert data["exercises"]["99.1"] == newer["exercises"]["99.1"]
    assert data["exercises"]["9.1"]["passed_at"]
    assert "from another version: 1 of 1 passed" in learning.progress_report()
    path.write_text('{"exercises": {"9.1": {"hints": 2}}}')  # an older one, without a version
    pass_one()
    assert kept()["version"] == 1 and kept()["exercises"]["9.1"]["hints"] == 2


WRITER = """
import sys
from workshop_utils import progress_file
for i in range(25):
    def change(data):
        kept = data["exercises"].setdefault("9.1", {})
        kept["attempts"] = kept.get("attempts", 0) + 1
        data["guesses"][f"{sys.argv[1]}-{i}"] = {"value": i}
    progress_file.update(change)
"""


def test_four_notebooks_writing_at_once_lose_nothing():
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(n)]) for n in range(4)]
    while any(writer.poll() is None for writer in writers):
        progress_file.read()  # never sees half a file
    assert [writer.returncode for writer in writers] == [0] * 4
    assert kept()["exercises"]["9.1"]["attempts"] == 100
    assert len(kept()["guesses"]) == 100
    assert not list(progress_file.progress_folder().glob("*damaged*"))
    assert not list(progress_file.progress_folder().glob("*.tmp"))


HOLDER = """
import time
from workshop_utils import progress_file
def change(data):
    print("holding", flush=True)
    time.sleep(60)
progress_file.update(change)
"""


@pytest.fixture
def lock_holder():
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.wait()


def test_a_writer_that_was_killed_blocks_nobody(lock_holder):
    os.kill(lock_holder.pid, signal.SIGKILL)
    lock_holder.wait()
    began = time.monotonic()
    pass_one()
    assert time.monotonic() - began < 3
    assert kept()["exercises"]["9.1"]["passed_at"]


def test_a_lock_that_is_never_released_costs_seconds_and_is_said(lock_holder, monkeypatch, capsys):
    monkeypatch.setattr(progress_file, "LOCK_S", 0.2)
    pass_one()
    assert "another notebook has held its lock" in capsys.readouterr().out


def test_an_unwritable_folder_is_said_once_and_memory_is_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("WORKSHOP_PROGRESS", str(tmp_path / "file" / "progress"))
    for _ in range(2):
        learning.hint("9.1")
    pass_one()
    said = capsys.readouterr().out
    assert said.count("cannot be written to") == 1 and "set WORKSHOP_PROGRESS" in said
    assert "Hint 2 of 3" in said
    assert "1 of 2 passed" in learning.progress_report()


def test_a_full_disk_leaves_the_old_file_whole(monkeypatch, capsys):
    pass_one()
    before = progress_file.progress_path().read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    learning.hint("9.1")
    assert "No space left on device" in capsys.readouterr().out
    assert progress_file.progress_path().read_bytes() == before
    assert [p.name for p in progress_file.progress_folder().iterdir() if p.suffix == ".tmp"] == []


def test_without_the_variable_progress_is_in_the_users_data_folder(monkeypatch):
    monkeypatch.delenv("WORKSHOP_PROGRESS")
    assert progress_file.progress_path().name == "progress.json"
    assert "training-workshop" in str(progress_file.progress_path())


def test_the_report_and_the_table(monkeypatch, capsys):
    learning.hint("9.1")
    learning.solution("9.1")
    pass_one()
    learning.check("9.10", 3)
    capsys.readouterr()
    report = learning.progress_report()
    assert report.startswith("09_test: 1 of 2 passed\n  9.1   Twice     passed 20")
    assert ", 1 hint, solution seen\n" in report
    assert "  9.10  A number  tried once\n" in report
    assert str(progress_file.progress_path()) in report
    learning.progress()
    assert capsys.readouterr().out.strip() == report


# the sources of answers


def test_definitions_drop_what_acts():
    cell = "%%ranks --here\nimport os\nx = 3\ny = f(x)\nx += 1\nprint(x)\n!ls\ng = lambda: f(1)\na = b = 1, 2\nt[0] = 1"
    assert answers.definitions(cell) == ["import os", "x = 3", "g = lambda: f(1)", "a = b = (1, 2)"]


def test_free_names_are_the_globals_that_are_read():
    source = (
        "import math\ndef f(a, b=default):\n    c = math.pi\n    def g():\n        return a + c + other\n"
        "    return [g() for x in range(k)]\nclass C(Base):\n    n: int = size\n    def m(self):\n        return f, C, self.n"
    )
    assert answers.free_names(source) == {"default", "other", "k", "Base", "size"}


def test_a_not_implemented_error_of_torch_is_not_the_stub(capsys):
    import torch

    def answer(tensor):
        return torch.nn.functional.cross_entropy(torch.tensor([1, 2]), torch.ones(2, 3))

    result = learning.check("0.1", answer)
    assert result.outcome == "raised"
