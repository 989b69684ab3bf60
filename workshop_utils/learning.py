"""What a reader calls in a notebook: check, hint, solution, guess, compare_guess, mine, progress.

Introduced in notebook 00, used in every later one. What is right is decided in `checks`; what an exercise
consists of stands in `exercises.json`; what the reader has done is kept by `progress_file`.
"""

import html
import re
from dataclasses import dataclass

from workshop_utils import answers, checks, progress_file
from workshop_utils.guesses import compare_guess, guess
from workshop_utils.own_lines import own_lines, own_lines_on_rank
from workshop_utils.showing import display_bundle, show_block, show_markdown

__all__ = [
    "Result",
    "check",
    "compare_guess",
    "evaluate",
    "guess",
    "hint",
    "mine",
    "progress",
    "progress_report",
    "solution",
]


@dataclass(frozen=True)
class Result:
    """What `check` found. True where the answer passed; `text` is what the reader saw."""

    outcome: str  # "passed", "not solved", "wrong", "raised", "stopped" (on the ranks), "unknown" (exercise)
    text: str

    def __bool__(self):
        return self.outcome == "passed"

    def _ipython_display_(self):
        """Show nothing when `check(...)` is a cell's last line: it has been shown already."""


# check


def check(exercise_id: str, answer) -> Result:
    """Judge `answer` (mostly a function) to an exercise and say pass, or what is wrong where.

    Never raises for a wrong answer, so that "Run All" goes on. A passing answer is kept for `mine`.
    """
    result = evaluate(exercise_id, answer)
    title, _, body = result.text.partition("\n")
    if result.outcome != "unknown":
        body += _record_check(exercise_id, answer, result)
    show_block(result.outcome, title, body.strip("\n"))
    return result


def evaluate(exercise_id: str, answer, ranks=None) -> Result:
    """Judge `answer` without showing or recording anything. `ranks`: the running ones if None."""
    try:
        exercise = checks.get(exercise_id)
    except KeyError as error:
        return Result("unknown", error.args[0])
    if answer is None or answer is ...:
        return _not_solved(exercise_id)
    try:
        if exercise.needs_ranks and ranks is None:
            ranks = _running_ranks()
        sentence = exercise.run(answer, ranks)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the reader's function raises is shown
        return _failure(exercise_id, error)
    return Result("passed", f"Exercise {exercise_id} passed.\n{_sentence(sentence)}")


def _running_ranks():
    from workshop_utils.ranks import current_ranks, start_ranks

    if current_ranks() is None:
        print("This exercise needs ranks and none is running: starting 4.")
        return start_ranks(4)
    if len(current_ranks()) < 2:
        raise checks.Wrong("One rank alone cannot show it. Run ranks = start_ranks(4) and check again.")
    return current_ranks()


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", ":")) or not text else ".")


def _not_solved(exercise_id: str) -> Result:
    return Result(
        "not solved", f"Exercise {exercise_id} is not solved yet.\nFor a hint: hint({exercise_id!r})"
    )


def _failure(exercise_id: str, error: BaseException) -> Result:
    from workshop_utils.ranks import RankError

    if isinstance(error, checks.Wrong):
        return Result("wrong", f"Exercise {exercise_id} is not right yet.\n{error}")
    # torch raises NotImplementedError, too: the stub's is told by its words
    if isinstance(error, NotImplementedError) and str(error) in ("", f"exercise {exercise_id}"):
        return _not_solved(exercise_id)
    if isinstance(error, RankError):
        return _failure_on_ranks(exercise_id, error)
    lines, kind = own_lines(error), type(error).__name__
    message = f"{kind}: {error}" if str(error) else kind
    if not lines:
        return Result(
            "wrong", f"Exercise {exercise_id} is not right yet.\nThe check cannot use your answer. {message}"
        )
    return Result("raised", f"Exercise {exercise_id}: your function raised {kind}.\n{lines}{message}")


def _failure_on_ranks(exercise_id: str, error) -> Result:
    """A deadlock, a lost rank, or an exception on a rank: who, where, and the learner's own lines."""
    text = str(error)
    last = text.rstrip().rpartition("\n")[2]
    if last.removeprefix("NotImplementedError").strip(": ") in ("", f"exercise {exercise_id}"):
        return _not_solved(exercise_id)
    if not error.traceback:
        return Result("stopped", f"Exercise {exercise_id} stopped on the ranks.\n{text}")
    lines = own_lines_on_rank(text)
    if re.match(r"NameError: name '(rank|world_size)' is not defined", last):
        last += "\nInside a function, ask dist.get_rank() and dist.get_world_size()."
    kind = last.partition(":")[0]
    title = f"Exercise {exercise_id}: your function raised {kind} on rank {error.rank}."
    return Result("raised", f"{title}\n{error.message}\n{lines}{last}")


def _record_check(exercise_id: str, answer, result: Result) -> str:
    """Keep the attempt and a passing answer; returns what to add to the message."""
    kept, note = None, ""
    if result and callable(answer):
        try:
            name, source = answers.keepable_source(exercise_id, answer)
            kept = {"name": name, "source": source}
        except answers.CannotRestore as reason:
            note = f"\nLater notebooks will use the reference because {reason}. Put all of it in one cell"
            note += " and check again, and they will use yours."
    if result.outcome == "not solved":
        return note

    def change(data):
        entry = data["exercises"].setdefault(exercise_id, {})
        entry["attempts"] = entry.get("attempts", 0) + 1
        if result:
            entry.setdefault("passed_at", progress_file.now())
        if kept:
            entry["answer"] = kept

    progress_file.update(change)
    if result.outcome in ("wrong", "raised", "stopped"):
        note = f"\nFor a hint: hint({exercise_id!r})"
    return note


# hint and solution


def hint(exercise_id: str) -> None:
    """Show the next of the exercise's three hints, with those shown before."""
    entry = _entry(exercise_id)
    if entry is None:
        return

    def change(data):
        kept = data["exercises"].setdefault(exercise_id, {})
        kept["hints"] = kept.get("hints", 0) + 1

    asked = progress_file.update(change)["exercises"][exercise_id]["hints"]
    shown = "\n\n".join(
        f"**Hint {number} of 3.** {text}" for number, text in enumerate(entry["hints"][:asked], start=1)
    )
    if asked > 3:
        shown += f"\n\nThere are no more hints. `solution({exercise_id!r})` shows a solution."
    show_markdown(shown)


def solution(exercise_id: str) -> None:
    """Show a solution. The progress record notes that it was looked at."""
    entry = _entry(exercise_id)
    if entry is None:
        return

    def change(data):
        data["exercises"].setdefault(exercise_id, {}).setdefault("solution_seen_at", progress_file.now())

    progress_file.update(change)
    show_markdown(f"**A solution of exercise {exercise_id}**\n\n```python\n{entry['solution']}\n```")


def _entry(exercise_id: str) -> dict | None:
    known = answers.load_exercises()["exercises"]
    if exercise_id not in known:
        show_block("unknown", checks.no_such_exercise(exercise_id, known), "")
    return known.get(exercise_id)


# mine


def mine(name: str):
    """The reader's own passing answer, given as "2.3" or by its function's name; else the reference.

    Prints which one it is. The result can be sent to the ranks. ValueError where there is no such exercise.
    """
    exercises = answers.load_exercises()["exercises"]
    id_ = next((i for i, entry in exercises.items() if name in (i, entry["name"])), None)
    if id_ is None:
        raise ValueError(
            checks.no_such_exercise(name, [*exercises, *(e["name"] for e in exercises.values())])
        )
    label = exercises[id_]["name"]
    kept = progress_file.read()["exercises"].get(id_, {})
    own = kept.get("answer")
    if own:
        try:
            function = answers.restore(id_, own["source"], own["name"], f"your answer to {id_}")
            print(f"{label}: your own answer to exercise {id_}")
            return function
        except Exception as error:  # noqa: BLE001  an answer kept long ago may fail in any way
            why = f"your saved answer does not run here: {error}"
    elif kept.get("passed_at"):
        why = "your answer passed, but could not be kept"
    else:
        why = "you have not solved it yet"
    print(f"{label}: the reference solution of exercise {id_} ({why})")
    return answers.reference(id_)


# progress


def progress() -> None:
    """Show what is passed so far, as a small table."""
    rows = "".join(
        f"<tr><td>{html.escape(id_)}</td><td style='text-align:left'>{html.escape(title)}</td>"
        f"<td style='text-align:left'>{html.escape(state)}</td></tr>"
        for _, lines in _by_notebook()
        for id_, title, state in lines
    )
    table = f"<table><tr><th>exercise</th><th></th><th style='text-align:left'>state</th></tr>{rows}</table>"
    display_bundle({"text/html": table, "text/plain": progress_report()})


def progress_report() -> str:
    """Per notebook, as plain text: what is passed, since when, with how many hints."""
    parts = []
    for notebook, lines in _by_notebook():
        passed = sum(state.startswith("passed") for _, _, state in lines)
        parts.append(f"{notebook}: {passed} of {len(lines)} passed")
        width = max(len(title) for _, title, _ in lines)
        parts += [f"  {id_:5} {title:{width}}  {state}" for id_, title, state in lines]
    return "\n".join([*parts, f"kept in {progress_file.progress_path()}"])


def _by_notebook() -> list[tuple[str, list]]:
    """[(notebook, [(id, title, state)])], exercises that this version does not know at the end."""
    known, kept = answers.load_exercises()["exercises"], progress_file.read()["exercises"]
    found: dict[str, list] = {}
    for id_ in [*known, *sorted(kept.keys() - known.keys())]:
        entry = known.get(id_, {"notebook": "from another version", "title": ""})
        found.setdefault(entry["notebook"], []).append((id_, entry["title"], _state(kept.get(id_, {}))))
    return list(found.items())


def _state(kept: dict) -> str:
    words = ["not tried"] if not kept.get("attempts") else [f"tried {_times(kept['attempts'])}"]
    if kept.get("passed_at"):
        words = [f"passed {kept['passed_at'][:16].replace('T', ' ')}"]
    if kept.get("hints"):
        words.append("1 hint" if kept["hints"] == 1 else f"{min(kept['hints'], 3)} hints")
    if kept.get("solution_seen_at"):
        words.append("solution seen")
    return ", ".join(words)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
