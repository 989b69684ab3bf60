"""Sections of a notebook: the notes for its instructor, the cells that are typed live, the cells that %catchup runs.

A section begins with a `##` heading; sections are numbered in order, and 04.3 is the third of notebook 04. Whatever is
wrong with a source is a SourceError that names file and line.
"""

import ast
import re
from pathlib import Path

from source import Cell, SourceError, checked_name
from workshop_utils.answers import bound_names, free_names, python_only

HEADING = re.compile(r"^## (.+?)\s*$", re.MULTILINE)
MINUTES = re.compile(r"^\*\*(\d+) min\.\*\*")
ONLY_TO_BUILD = {"live", "measures"}  # tags that no built notebook carries
FOR_INSTRUCTORS = (
    "\n\n> **For live coding.** Cells that begin with `# live` are yours to type; all others are there. `%reveal` puts the"
    " solution of the one that ran last into the next cell, `%reveal 2.3 5` five lines of exercise 2.3. `%catchup {name}.3`"
    " brings this kernel to the start of section 3. `from workshop_utils import large_fonts; large_fonts()` is for the back"
    " of the room."
)


def titles(cell: Cell) -> list[str]:
    """The sections that begin in this cell."""
    hidden = cell.kind != "markdown" or "instructor" in cell.tags or "solution" in cell.tags
    return [] if hidden else HEADING.findall(cell.source)


# What the instructor's version has in other words


def instructor_texts(path: Path, cells: list[Cell]) -> dict[int, str]:
    """{position: text} of the cells that differ from the learner's: title, notes with their clock, empty cells."""
    notebook, begun, minutes = path.stem[:2], 0, 0
    texts = {0: cells[0].learner + FOR_INSTRUCTORS.format(name=notebook)}
    for position, cell in enumerate(cells):
        names = live_names(path, cell) if cell.kind == "code" else None
        found = MINUTES.match(cell.source) if "instructor" in cell.tags else None
        if names:
            texts[position] = _empty_cell(cell, *names)
        elif found:
            opened = len(titles(cells[position + 1])) if position + 1 < len(cells) else 0
            if not opened:
                advice = "a note with minutes stands right before a cell with a `##` heading"
                raise SourceError(path, cell.line, advice)
            until = minutes + int(found[1])
            sections = " to ".join(f"{notebook}.{n}" for n in sorted({begun + 1, begun + opened}))
            label = f"{sections} · {_clock(minutes)} to {_clock(until)} · {found[1]} min."
            texts[position] = _quoted(f"**{label}**{cell.source[found.end() :]}")
            minutes = until
        elif "instructor" in cell.tags:
            texts[position] = _quoted(cell.source)
        begun += len(titles(cell))
    return texts


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def live_names(path: Path, cell: Cell) -> tuple[str, str] | None:
    """(what `%reveal` calls the cell, what it defines) of a cell to be typed; None for one that stays full."""
    exercises = cell.tagged("exercise")
    if exercises:
        return exercises[0], checked_name(path, cell, exercises[0])
    if "live" not in cell.tags:
        return None
    defined = (node for node in ast.parse(python_only(cell.solution)).body if hasattr(node, "body"))
    name = next((node.name for node in defined if hasattr(node, "name")), None)
    if name is None:
        raise SourceError(
            path, cell.line, "a cell tagged live defines a function or a class: %reveal needs its name"
        )
    return name, name


def _empty_cell(cell: Cell, id_: str, name: str) -> str:
    """Comments only: the id that `%reveal` finds, the signature, and the check."""
    signature = re.search(rf"^(def|class) {name}\b.*", cell.solution, re.MULTILINE)
    text = f"# live {id_}: {signature[0].rstrip(':') if signature else name}"
    return text if id_ == name else f'{text}\n# then: check("{id_}", {name})'


# What %catchup and %reveal read at run time


def collect_cells(path: Path, cells: list[Cell]) -> dict:
    """{"sections": [title], "cells": [{"section", "source" or "exercise", "live"}]}, as notebook_cells.json keeps it.

    A cell's section is the number of sections begun before it. Left out: cells tagged `measures`, and those that are
    meant to fail. A SourceError says which name a later cell would miss.
    """
    begun, kept, latest = (
        [],
        [],
        {True: {}, False: {}},
    )  # {on ranks: {name: (cell that bound it last, its section)}}
    for cell in cells:
        begun += titles(cell)
        if cell.kind != "code" or {"solution", "instructor"} & set(cell.tags):
            continue
        for on_ranks in _runs_where(cell):
            _check_reads(path, cell, len(begun), latest[on_ranks])
            bound = bound_names(python_only(cell.solution))
            latest[on_ranks] |= dict.fromkeys(bound, (cell, len(begun)))
        names = live_names(path, cell)
        if is_left_out(cell):
            continue
        entry = {"section": len(begun), "source": cell.solution}
        if names and names[0] != names[1]:
            entry = {"section": len(begun), "exercise": names[0]}  # exercises.json has its source
        elif names:
            entry["live"] = names[0]
        kept.append(entry)
    return {"sections": begun, "cells": kept}


def is_left_out(cell: Cell) -> bool:
    meant_to_fail = (
        cell.solution.startswith("%%ranks") and "--expect-error" in cell.solution.partition("\n")[0]
    )
    return meant_to_fail or bool({"measures", "raises-exception"} & set(cell.tags))


def _runs_where(cell: Cell) -> list[bool]:
    """[on the ranks?], both for `%%ranks --here`."""
    first_line = cell.solution.partition("\n")[0]
    if not first_line.startswith("%%ranks"):
        return [False]
    return [True, False] if "--here" in first_line else [True]


def _check_reads(path: Path, cell: Cell, section: int, latest: dict[str, tuple[Cell, int]]) -> None:
    """SourceError where %catchup itself, or the reader afterwards, would run this cell without a name that it reads.

    Key figures and extras may miss one: the former sum up what was measured, the latter are off.
    """
    if {"key-figures", "extra"} & set(cell.tags):
        return
    for name in sorted(free_names(python_only(cell.solution))):
        binder, where = latest.get(name, (cell, section))
        if binder is not cell and is_left_out(binder) and (where < section or not is_left_out(cell)):
            problem = (
                f"this cell reads `{name}`, which %catchup leaves out with the cell of line {binder.line}"
            )
            raise SourceError(
                path, cell.line, f"{problem}; tag this one `measures` too, or bind the name before"
            )


def check_live_names(collected: dict[str, dict]) -> None:
    """SourceError where two live cells have one name: `%reveal NAME` could not tell them apart."""
    seen = {}
    for stem, entry in collected.items():
        for name in (cell["live"] for cell in entry["cells"] if "live" in cell):
            if name in seen:
                problem = f"a live cell defines `{name}`, and so does one of {seen[name]}; %reveal needs one"
                raise SourceError(Path(f"{stem}.py"), 1, problem)
            seen[name] = stem
