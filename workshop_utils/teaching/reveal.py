"""`%reveal`: the solution of a cell that is typed live, put into the next cell, so that nobody gets lost on a stage.

In the instructor's notebooks such a cell holds a comment only, `# live 2.3: ...`. It is found by that comment.
"""

import re

from IPython import get_ipython
from IPython.core.error import UsageError

from workshop_utils.answers import load_exercises
from workshop_utils.teaching.catchup import load_cells

LIVE = re.compile(r"^# live (\S+):", re.MULTILINE)


def reveal_next(line: str) -> None:
    """What `%reveal [id] [lines]` does. Without an id: the cell with a `# live` comment that ran last."""
    shell, words = get_ipython(), line.split()
    count = int(words.pop()) if words and words[-1].isdigit() else None
    if len(words) > 1 or count == 0:
        raise UsageError("write %reveal, %reveal 2.3, or %reveal 2.3 5 for the first 5 lines")
    id_ = words[0] if words else _last_live(shell)
    solution = _solution(id_).split("\n")
    shell.set_next_input("\n".join(solution[:count]))
    shown = len(solution[:count])
    part = f"the first {shown} of its {len(solution)} lines" if shown < len(solution) else "all of it"
    print(f"{id_}: {part} in the next cell")


def _last_live(shell) -> str:
    for source in reversed(shell.history_manager.input_hist_raw):
        found = LIVE.findall(source)
        if found:
            return found[-1]
    raise UsageError("no cell with a `# live` line has run yet; name one: %reveal 2.3")


def _solution(id_: str) -> str:
    """The cell's source, by exercise (2.3), or by the name that it defines."""
    exercises = load_exercises()["exercises"]
    by_name = {entry["name"]: entry for entry in exercises.values()}
    entry = exercises.get(id_) or by_name.get(id_)
    if entry:
        lines = entry["solution"].split("\n")
        return "\n".join(line for line in lines if line.strip() != "# Solution")
    cells = [cell for notebook in load_cells().values() for cell in notebook["cells"]]
    live = {cell["live"]: cell["source"] for cell in cells if "live" in cell}
    if id_ in live:
        return live[id_]
    raise UsageError(f"nothing to reveal under {id_}; there are {', '.join([*exercises, *live])}")
