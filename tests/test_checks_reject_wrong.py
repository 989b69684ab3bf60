"""The checks are checked: every wrong answer is rejected for the right reason, right ones are accepted.

The tables are in tests/wrong_answers/, one module per notebook; its docstring says how a row is written.
"""

import importlib
import json
import pkgutil
import re

import pytest

import wrong_answers
from workshop_utils import answers, checks, learning

WRONG, RIGHT = {}, {}
for found in pkgutil.iter_modules(wrong_answers.__path__):
    tables = importlib.import_module(f"wrong_answers.{found.name}")
    WRONG |= tables.WRONG
    RIGHT |= tables.RIGHT
BUILT = json.loads(answers.EXERCISES_FILE.read_text(encoding="utf-8"))["exercises"]


def label(value):
    return getattr(value, "__name__", None) or repr(value)[:30]


def rows(table):
    return [pytest.param(i, row, id=f"{i}-{label(row)}") for i, listed in table.items() for row in listed]


def wrong_rows():
    return [
        pytest.param(i, answer, complaint, id=f"{i}-{label(answer)}")
        for i, listed in WRONG.items()
        for answer, complaint in listed
    ]


@pytest.fixture
def judge(request, monkeypatch):
    """evaluate(id, answer), with ranks only where the exercise needs them; a deadlock costs 3 s, not 20."""

    def evaluate(exercise_id, answer):
        ranks = None
        if checks.get(exercise_id).needs_ranks:
            ranks = request.getfixturevalue("ranks5")
            monkeypatch.setattr(ranks, "timeout_s", 3.0)
        return learning.evaluate(exercise_id, answer, ranks)

    return evaluate


@pytest.mark.parametrize(("exercise_id", "answer", "complaint"), wrong_rows())
def test_wrong_answer_gets_its_complaint(judge, exercise_id, answer, complaint):
    result = judge(exercise_id, answer)
    assert result.outcome in ("wrong", "raised", "stopped"), result.text
    assert re.search(complaint, result.text), f"the reader saw:\n{result.text}\nmeant: {complaint}"


@pytest.mark.parametrize(("exercise_id", "answer"), rows(RIGHT))
def test_right_answer_written_differently_passes(judge, exercise_id, answer):
    result = judge(exercise_id, answer)
    assert result.outcome == "passed", result.text


@pytest.mark.parametrize("exercise_id", BUILT)
def test_the_solution_passes(judge, exercise_id):
    result = judge(exercise_id, answers.reference(exercise_id))
    assert result.outcome == "passed", result.text


@pytest.mark.parametrize("exercise_id", BUILT)
def test_the_stub_is_not_solved_yet(judge, exercise_id):
    result = judge(exercise_id, answers.stub(exercise_id))
    assert result.outcome == "not solved", result.text


@pytest.mark.parametrize("exercise_id", checks.all_ids())
def test_every_check_is_tested(exercise_id):
    assert exercise_id in BUILT, "registered, but in no notebook: run notebooks/build.py"
    assert len(WRONG.get(exercise_id, [])) >= 2, "needs two wrong answers in tests/wrong_answers"
    assert len(RIGHT.get(exercise_id, [])) >= 1, "needs a right answer written differently from the solution"


def test_no_row_is_of_an_exercise_that_is_gone():
    assert (WRONG.keys() | RIGHT.keys()) <= set(checks.all_ids())
