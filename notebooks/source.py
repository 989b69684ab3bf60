"""Read a notebook's source: its cells in two texts (learner's, solution's), its hints and its exercises.

Whatever is wrong with a source is a SourceError that names file and line.
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import jupytext

from workshop_utils.answers import CannotRestore, definitions, python_only, with_what_it_needs

MARKER = re.compile(r"^\s*### (BEGIN|END) SOLUTION\s*$")
STUB = re.compile(r"^(\s*)# ?~ ?(.*)$")  # `ruff format` turns `#~` into `# ~`; both are read
HEADING = re.compile(r"^#+ Exercise (\d+\.\d+) · (.+?)\s*(?:\(([^()]*)\))?\s*$", re.MULTILINE)
EXERCISE_ID = r"\d+\.\d+"


class SourceError(Exception):
    """A source that cannot be built; the text begins with file:line."""

    def __init__(self, path, line, message):
        super().__init__(f"{path.name}:{line}: {message}")


@dataclass
class Cell:
    kind: str
    source: str
    tags: list
    line: int  # of its `# %%` in the source file
    learner: str = field(default="")
    solution: str = field(default="")

    def tagged(self, prefix):
        """The exercise ids in tags like "exercise-2.3"."""
        return [tag[len(prefix) + 1 :] for tag in self.tags if re.fullmatch(f"{prefix}-{EXERCISE_ID}", tag)]


def read_source(path: Path) -> list[Cell]:
    """The cells of a source, each with its learner and solution text."""
    text = path.read_text(encoding="utf-8")
    starts = [i for i, line in enumerate(text.split("\n"), start=1) if re.match(r"# %%(\s|$)", line)]
    notebook = jupytext.reads(text, fmt="py:percent")
    if len(starts) != len(notebook.cells):
        raise SourceError(
            path, 1, "there is text before the first cell; begin the file with `# %% [markdown]`"
        )
    cells = []
    for line, cell in zip(starts, notebook.cells, strict=True):
        line += len(cell.source) - len(cell.source.lstrip("\n"))
        cell = Cell(cell.cell_type, cell.source.strip("\n"), list(cell.metadata.get("tags", [])), line)
        if cell.kind == "code":
            cell.learner, cell.solution = split_solution(path, cell)
        else:
            cell.learner = cell.solution = cell.source
            if cell.tagged("hints"):
                cell.learner = cell.solution = details(read_hints(path, cell))
        cells.append(cell)
    return cells


def split_solution(path: Path, cell: Cell) -> tuple[str, str]:
    """(learner's text, solution's text) of a code cell."""
    learner, solution, begun = [], [], None
    for number, line in enumerate(cell.source.split("\n"), start=cell.line + 1):
        marker, stub = MARKER.match(line), STUB.match(line)
        if marker and marker[1] == "BEGIN":
            if begun:
                raise SourceError(path, number, f"BEGIN SOLUTION inside the one of line {begun}")
            begun = number
            solution.append(line[: len(line) - len(line.lstrip())] + "# Solution")
        elif marker:
            if not begun:
                raise SourceError(path, number, "END SOLUTION without BEGIN SOLUTION")
            begun = None
        elif stub and not begun:
            raise SourceError(path, number, "`#~` outside BEGIN SOLUTION ... END SOLUTION")
        elif stub:
            learner.append((stub[1] + stub[2]).rstrip())
        else:
            solution.append(line)
            if not begun:
                learner.append(line)
    if begun:
        raise SourceError(path, begun, "BEGIN SOLUTION without END SOLUTION in its cell")
    versions = "\n".join(learner), "\n".join(solution)
    for name, text in zip(("learner's", "solution's"), versions, strict=True):
        try:
            compile(
                python_only(text), path.name, "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            )
        except SyntaxError as error:
            raise SourceError(path, cell.line, f"the {name} version of this cell: {error.msg}") from None
    return versions


def read_hints(path: Path, cell: Cell) -> list[str]:
    """The three hints of a hints cell, a numbered list."""
    hints = re.split(r"^\d+\.\s+", cell.source, flags=re.MULTILINE)
    if len(hints) != 4 or hints[0].strip():
        found = len(hints) - 1
        raise SourceError(
            path, cell.line, f"{cell.tags[0]} must be a numbered list of three hints, found {found}"
        )
    return [re.sub(r"^ {3}", "", hint, flags=re.MULTILINE).strip() for hint in hints[1:]]


def details(hints: list[str]) -> str:
    """Folded hints that open on GitHub and Colab, where nothing runs."""
    block = "<details>\n<summary>Hint {}</summary>\n\n{}\n\n</details>"
    return "\n\n".join(block.format(number, hint) for number, hint in enumerate(hints, start=1))


def collect_exercises(path: Path, cells: list[Cell], root: Path) -> dict:
    """{"definitions": [...], "exercises": {id: {...}}} of one notebook, as exercises.json keeps it."""
    titles = {m[1]: m[2] for cell in cells if cell.kind == "markdown" for m in HEADING.finditer(cell.source)}
    hints = {id_: (cell, read_hints(path, cell)) for cell in cells for id_ in cell.tagged("hints")}
    checked = registered_checks(root / f"workshop_utils/checks/nb{path.stem[:2]}.py")
    earlier, exercises = [], {}
    for cell in (cell for cell in cells if cell.kind == "code"):
        for id_ in cell.tagged("exercise"):
            problem = exercise_problem(path.stem[:2], id_, exercises, titles, hints, checked)
            if problem:
                raise SourceError(path, cell.line, f"exercise {id_} {problem}")
            exercises[id_] = {
                "notebook": path.stem,
                "title": titles[id_],
                "name": checked_name(path, cell, id_),
                "hints": hints[id_][1],
                "after": len(earlier),
                "stub": cell.learner,
                "solution": cell.solution,
            }
            try:
                with_what_it_needs("\n".join(definitions(cell.solution)), earlier)
            except CannotRestore as error:
                advice = "import it, define it in this cell, or pass it as an argument"
                raise SourceError(path, cell.line, f"solution of {id_}: {error}; {advice}") from None
        earlier += definitions(cell.solution)
    for id_ in hints.keys() - exercises.keys():
        raise SourceError(path, hints[id_][0].line, f"hints-{id_} without a cell tagged exercise-{id_}")
    return {"definitions": earlier, "exercises": exercises}


def exercise_problem(notebook, id_, exercises, titles, hints, checked) -> str | None:
    """What keeps an exercise from being built, None if nothing does."""
    if int(id_.split(".")[0]) != int(notebook):
        return f"is in notebook {notebook}, so its id must begin with {int(notebook)}."
    if id_ in exercises:
        return "appears twice"
    if id_ not in titles:
        return f"has no heading `### Exercise {id_} · Title  (★, 5 min)`"
    if id_ not in hints:
        return f'has no cell tagged "hints-{id_}"'
    if id_ not in checked:
        return f'has no check: no @exercise("{id_}") in workshop_utils/checks/nb{notebook}.py'
    return None


def registered_checks(module: Path) -> set[str]:
    """Ids that a checks module registers, read from its text: building needs no torch."""
    if not module.exists():
        return set()
    return set(
        re.findall(rf'^@exercise\(\s*"({EXERCISE_ID})"', module.read_text(encoding="utf-8"), re.MULTILINE)
    )


def checked_name(path: Path, cell: Cell, id_: str) -> str:
    """`f` of the cell's `check("2.3", f)`."""
    for node in ast.walk(ast.parse(python_only(cell.solution))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "check" and len(node.args) == 2:
            first, second = node.args
            if isinstance(second, ast.Name) and getattr(first, "value", None) == id_:
                return second.id
    raise SourceError(path, cell.line, f'no `check("{id_}", name)` in the cell tagged exercise-{id_}')
