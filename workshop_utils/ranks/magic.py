"""`%%ranks`: the cell magic that sends a cell to the ranks (notebook 00 introduces it)."""

from IPython import get_ipython
from IPython.core.error import UsageError
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from workshop_utils.ranks import driver
from workshop_utils.ranks.display import show_text
from workshop_utils.ranks.errors import RankError


@magic_arguments()
@argument("--only", metavar="RANKS", help="run on these ranks only, for instance 0 or 0,2")
@argument("--here", action="store_true", help="then run the cell in this notebook's kernel, too")
@argument("--deadline", type=float, metavar="SECONDS", help="stop the cell after so many seconds")
@argument("--expect-error", action="store_true", help="a failure is the point: show the report, and go on")
def ranks_magic(line: str, cell: str) -> None:
    """Run the cell on every rank. There, `torch`, `dist`, `rank` and `world_size` are defined."""
    options = parse_argstring(ranks_magic, line)
    ranks = driver.current_ranks()
    if ranks is None:
        raise UsageError("No ranks are running. Start some first: ranks = start_ranks(4)")
    only = _rank_list(options.only, len(ranks)) if options.only else None
    if options.deadline is not None and options.deadline <= 0:
        raise UsageError(f"--deadline takes seconds, more than 0, not {options.deadline:g}")
    try:
        ranks.run_cell(cell, only=only, deadline_s=options.deadline)
    except RankError as error:
        if not options.expect_error:
            raise
        show_text("\n".join(error._render_traceback_()))
    else:
        if options.expect_error:
            show_text("This cell was expected to fail, and did not.")
    if options.here:
        get_ipython().run_cell(cell).raise_error()


def _rank_list(text: str, world_size: int) -> list[int]:
    try:
        chosen = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--only takes rank numbers separated by commas, like 0,2; not {text!r}") from None
    if not chosen or chosen[0] < 0 or chosen[-1] >= world_size:
        raise UsageError(f"--only {text}: the ranks are 0 to {world_size - 1}")
    return chosen


def register_magic(shell=None) -> None:
    """Make `%%ranks` known to IPython; without IPython, do nothing."""
    shell = shell or get_ipython()
    if shell is not None:
        shell.register_magic_function(ranks_magic, magic_kind="cell", magic_name="ranks")
