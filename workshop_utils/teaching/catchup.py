"""`%catchup 04.3`: the state at the start of a section, for latecomers and for kernels that died.

Runs the code of the solved notebook up to there, in this kernel and on new ranks, in the quick profile, without figures
and without cells tagged `measures`. Where the reader's own answer is kept, it is used, as `mine` does. Nothing that is
kept changes.
The code is in `notebook_cells.json`, written by notebooks/build.py, so no notebook is needed at run time.
"""

import html
import json
import linecache
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from IPython import get_ipython
from IPython.core.error import UsageError
from IPython.utils.capture import capture_output

from workshop_utils import learning
from workshop_utils.answers import load_exercises
from workshop_utils.own_lines import own_lines
from workshop_utils.ranks.display import Live

CELLS_FILE = Path(__file__).resolve().parent.parent / "notebook_cells.json"
SILENCED = ("check", "compare_guess", "guess", "hint", "progress", "solution")  # they show or keep something


class CannotCatchUp(Exception):
    """A cell failed. The text says which; what ran before it is there."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@cache
def load_cells() -> dict:
    """notebook_cells.json: {stem: {"sections": [title], "cells": [{"section", "source" or "exercise", "live"}]}}."""
    return json.loads(CELLS_FILE.read_text(encoding="utf-8"))


def catch_up(line: str) -> None:
    """What `%catchup 04.3` and `%catchup 04` do."""
    stem, section = _place(line)
    if section is None:
        print("\n".join(_listed(stem)))
        return
    live, began_s = Live(), time.perf_counter()
    cells = [cell for cell in load_cells()[stem]["cells"] if cell["section"] < section]
    yours = []
    with _quiet(get_ipython().user_ns):
        for number, cell in enumerate(cells, start=1):
            where = f"cell {number} of {len(cells)}, in section {stem[:2]}.{cell['section']}"
            live.progress(number - 1, len(cells), f"catching up: {where}")
            yours += _run(cell, where)
    place = f"{stem[:2]}.{section} · {load_cells()[stem]['sections'][section - 1]}"
    rest = f"{len(cells)} cells in {time.perf_counter() - began_s:.0f} s."
    rest += f" Your own answers: {', '.join(yours)}." if yours else ""
    rest += " Left out: figures, and the measurements that the key figures at the end sum up."
    live.draw(f"You are at <b>{html.escape(place)}</b>: {rest}", f"You are at {place}: {rest}")


def _place(line: str) -> tuple[str, int | None]:
    """("04_fully_sharded_data_parallel", 3) of "04.3"; the section is None for "04"."""
    found = re.fullmatch(r"(\d{1,2})(?:\.(\d{1,2}))?", line.strip())
    if not found:
        raise UsageError(
            "write %catchup 04.3 for the start of section 3 of notebook 04; %catchup 04 lists them"
        )
    stems = {int(stem[:2]): stem for stem in load_cells()}
    stem = stems.get(int(found[1]))
    if stem is None:
        raise UsageError(f"there is no notebook {found[1]}; there are {', '.join(stems.values())}")
    section = int(found[2]) if found[2] else None
    if section is not None and not 1 <= section <= len(load_cells()[stem]["sections"]):
        raise UsageError("\n".join([f"{stem} has no section {section}:", *_listed(stem)]))
    return stem, section


def _listed(stem: str) -> list[str]:
    titles = load_cells()[stem]["sections"]
    return [f"{stem[:2]}.{number:<3} {title}" for number, title in enumerate(titles, start=1)]


def _run(cell: dict, where: str) -> list[str]:
    """Run one cell without showing anything. Returns [id] where the reader's own answer took the solution's place."""
    exercise = load_exercises()["exercises"].get(cell.get("exercise"))
    source = exercise["solution"] if exercise else cell["source"]
    names = get_ipython().user_ns
    if "WORLD_SIZE" in names:  # the set-up cell on Colab: as many ranks as there are cores
        source = source.replace("start_ranks(4)", "start_ranks(WORLD_SIZE)")
    names.update(dict.fromkeys(SILENCED, _say_nothing))
    try:
        with capture_output() as said:
            _execute(source, names, f"<{where}>")
            if exercise:
                names[exercise["name"]] = learning.mine(cell["exercise"])
    except (Exception, SystemExit) as error:  # whatever a cell raises is named
        first_line = next(text for text in source.split("\n") if text.strip())
        reason = f"{type(error).__name__}: {error}\n{own_lines(error)}"
        text = f"%catchup stopped at {where}, which begins with\n    {first_line}\n{reason}"
        raise CannotCatchUp(f"{text}What ran before it is there.") from error
    finally:
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")  # the cell's figures, which nobody has seen
    own = exercise and "your own answer to exercise" in said.stdout
    return [cell["exercise"]] if own else []


def _execute(source: str, names: dict, label: str) -> None:
    first_line, _, body = source.partition("\n")
    if first_line.startswith("%%"):
        magic, _, options = first_line[2:].partition(" ")
        get_ipython().run_cell_magic(magic, options, body)
        return
    linecache.cache[label] = (len(source), None, source.splitlines(keepends=True), label)
    exec(compile(source, label, "exec", dont_inherit=True), names)  # noqa: S102  our own notebook


@contextmanager
def _quiet(names: dict) -> Iterator[None]:
    """No figure is drawn meanwhile; afterwards `check` and the others are themselves again."""
    import matplotlib.pyplot as plt

    show, plt.show = plt.show, _say_nothing
    try:
        yield
    finally:
        plt.show = show
        for name in SILENCED:
            if names.get(name) is _say_nothing:
                names[name] = getattr(learning, name)


def _say_nothing(*_, **__) -> None:
    """Stands in for what would show or keep something."""
