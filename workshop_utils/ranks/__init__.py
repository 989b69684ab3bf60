"""Live ranks: `start_ranks(4)`, then cells that begin with `%%ranks` run on four real processes.

Introduced in notebook 00, used in every later one. In the notebook: `driver` starts, stops and runs a set of
ranks, `kernel` is one rank seen from outside, `cell_run` follows one cell to its end and says what failed,
`display` shows it, `magic` is `%%ranks`. Inside a rank: `process` runs the cells, `monitor` answers while one
hangs, `group` holds what concerns the process group.
"""

from workshop_utils.ranks.errors import RankError

__all__ = ["RankError", "Ranks", "current_ranks", "start_ranks", "sub_world"]


def __getattr__(name: str):
    """Load the notebook's side and the rank's side only where they are used."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'workshop_utils.ranks' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'group' if name == 'sub_world' else 'driver'}"), name)
