"""Tracebacks reduced to the reader's own lines, from this process and from a rank (used by `check`)."""

import linecache
import re
import sysconfig
import traceback
from pathlib import Path

_LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
_LIBRARIES += [Path(__file__).parent, Path("<frozen importlib")]


def own_lines(error: BaseException) -> str:
    """The error's traceback, reduced to the reader's own lines; "" if it has none."""
    frames = traceback.extract_tb(error.__traceback__)
    return "".join(_frame(frame.filename, frame.lineno, frame.name) for frame in frames)


def own_lines_on_rank(text: str) -> str:
    """The same from a traceback that IPython wrote on a rank; what stands in a cell's line is known here only."""
    frames = re.findall(r"^File (.+):(\d+), in (\w+)", text, re.MULTILINE)  # IPython 8 and later
    older = re.findall(r"^(\S+) in (\w+)\(.*\)\n(?:(?!-+>).*\n)*-+> (\d+)", text, re.MULTILINE)  # IPython 7
    frames += [(file, line, name) for file, name, line in older]
    return "".join(_frame(file, int(line), name) for file, line, name in frames)


def _frame(filename: str, line: int, function: str) -> str:
    """One frame in two lines; "" if it is not the reader's."""
    if any(str(folder) in filename for folder in _LIBRARIES):
        return ""
    in_cell = "ipykernel_" in filename or "ipython-input" in filename
    where = "cell" if in_cell else Path(filename).name
    code = linecache.getline(filename, line).strip()
    return f"{where}, line {line}, in {function}\n" + (f"    {code}\n" if code else "")
