"""The exercises' reference solutions, and answers kept as source text that later notebooks can run again.

`exercises.json` is written by notebooks/build.py from the notebooks' sources, so no notebook is needed at
run time. An answer is kept as source: the imports, functions, classes and plain assignments of the cell that
defines it. It is run again in a namespace that holds what the notebook itself had defined by then.
"""

import ast
import builtins
import inspect
import json
import linecache
import symtable
from functools import cache
from pathlib import Path

EXERCISES_FILE = Path(__file__).with_name("exercises.json")


class CannotRestore(Exception):
    """The answer does not stand by itself. The text says why, to be read after "because"."""


@cache
def load_exercises() -> dict:
    """exercises.json: {"notebooks": {stem: {"definitions"}}, "exercises": {id: {...}}}."""
    return json.loads(EXERCISES_FILE.read_text(encoding="utf-8"))


def python_only(cell_source: str) -> str:
    """The cell's source with magics (%, %%, !) blanked, so that it parses and lines keep their numbers."""
    lines = cell_source.split("\n")
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def definitions(cell_source: str) -> list[str]:
    """What a cell defines: its imports, functions, classes and plain assignments, one string each."""
    return [ast.unparse(node) for node in ast.parse(python_only(cell_source)).body if _is_definition(node)]


def _is_definition(node) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return True
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    plain = all(isinstance(n, (ast.Name, ast.Tuple, ast.Store)) for t in targets for n in ast.walk(t))
    return plain and not _calls_something(node.value)


def _calls_something(node) -> bool:
    if isinstance(node, ast.Lambda):
        return False
    if isinstance(node, (ast.Call, ast.Await, ast.NamedExpr)):
        return True
    return any(_calls_something(child) for child in ast.iter_child_nodes(node))


def bound_names(source: str) -> set[str]:
    """Names that the source binds at its top level."""
    table = symtable.symtable(source, "<answer>", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def free_names(source: str) -> set[str]:
    """Global names that the source reads but neither binds nor finds among Python's builtins."""
    top = symtable.symtable(source, "<answer>", "exec")
    read, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        at_top = table is top
        read |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (at_top or s.is_global())}
    return read - bound_names(source) - set(dir(builtins))


def with_what_it_needs(source: str, earlier: list[str]) -> str:
    """`source` preceded by those of the `earlier` definitions that it reads, directly or through another.

    Raises CannotRestore, naming them, where names stay open.
    """
    latest = {name: position for position, text in enumerate(earlier) for name in bound_names(text)}
    chosen, unknown, to_do = set(), set(), sorted(free_names(source))
    while to_do:
        name = to_do.pop()
        position = latest.get(name)
        if position is None:
            unknown.add(name)
        elif position not in chosen:
            chosen.add(position)
            to_do += free_names(earlier[position])
    if unknown:
        names = ", ".join(f"`{name}`" for name in sorted(unknown))
        raise CannotRestore(f"it uses {names} from another cell")
    return "\n".join([*(earlier[position] for position in sorted(chosen)), source])


def run_source(source: str, name: str, label: str):
    """Execute `source` and return what it binds to `name`.

    The namespace is called `__main__`, so cloudpickle carries the function to the ranks by value.
    """
    filename = f"<{label}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102  the reader's own code, or ours
    return namespace[name]


def earlier_definitions(entry: dict) -> list[str]:
    """What the exercise's notebook had imported and defined before the exercise."""
    return load_exercises()["notebooks"][entry["notebook"]]["definitions"][: entry["after"]]


def reference(exercise_id: str):
    """The reference solution of an exercise, ready to call."""
    entry = load_exercises()["exercises"][exercise_id]
    return restore(exercise_id, entry["solution"], entry["name"], f"reference solution of {exercise_id}")


def stub(exercise_id: str):
    """What the learner starts from: it raises NotImplementedError, or is None or `...`."""
    entry = load_exercises()["exercises"][exercise_id]
    return restore(exercise_id, entry["stub"], entry["name"], f"stub of {exercise_id}")


def restore(exercise_id: str, cell_source: str, name: str, label: str):
    """Run a kept answer again. Raises CannotRestore, or whatever the source itself raises."""
    entry = load_exercises()["exercises"].get(exercise_id)
    if entry is None:
        raise CannotRestore(f"exercises.json does not have {exercise_id}: run notebooks/build.py")
    source = "\n".join(definitions(cell_source))
    return run_source(with_what_it_needs(source, earlier_definitions(entry)), name, label)


def keepable_source(exercise_id: str, answer) -> tuple[str, str]:
    """(name, source) from which `restore` rebuilds `answer`: the cell that defines it, reduced.

    Raises CannotRestore where the answer needs more than its own cell.
    """
    function = inspect.unwrap(answer) if callable(answer) else answer
    name = getattr(function, "__name__", None)
    filename = _file_of(function)
    lines = linecache.getlines(filename) if filename else []
    if name is None or not lines:
        raise CannotRestore("its source cannot be found; define it with `def` in a cell")
    if "<locals>" in function.__qualname__:
        raise CannotRestore("it is made inside another function")
    source = "\n".join(definitions("".join(lines)))
    if name not in bound_names(source):
        name = load_exercises()["exercises"].get(exercise_id, {}).get("name", name)  # a lambda has no name
        if name not in bound_names(source):
            raise CannotRestore(f"its cell does not define `{name}` with `def`, `class` or a lambda")
    try:
        restore(exercise_id, source, name, f"your answer to {exercise_id}")
    except CannotRestore:
        raise
    except Exception as error:  # noqa: BLE001  whatever the reader's cell raises
        raise CannotRestore(f"its cell does not run by itself ({type(error).__name__}: {error})") from None
    return name, source


def _file_of(function) -> str | None:
    if inspect.isclass(function):
        members = [getattr(member, "__func__", member) for member in vars(function).values()]
        methods = [member for member in members if inspect.isfunction(member)]
        return methods[0].__code__.co_filename if methods else None
    code = getattr(function, "__code__", None)
    return code.co_filename if code else None
