"""Helpers for the workshop's notebooks. Each module teaches, or serves, one idea.

The names below are what a notebook's first cell imports. They are loaded on first use, so that a rank,
which needs few of them, starts quickly.
"""

import importlib
import sys

__version__ = "0.9.0"

_HOME = {
    "check": "learning",
    "compare_guess": "learning",
    "guess": "learning",
    "hint": "learning",
    "mine": "learning",
    "progress": "learning",
    "solution": "learning",
    "cheat_sheet": "teaching.cheatsheet",
    "large_fonts": "teaching.fonts",
    "RankError": "ranks",
    "current_ranks": "ranks",
    "start_ranks": "ranks",
    "sub_world": "ranks",
    "use_style": "plotting",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'workshop_utils' has no attribute {name!r}")
    return getattr(importlib.import_module(f"workshop_utils.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


def load_ipython_extension(shell) -> None:
    """`%load_ext workshop_utils` makes `%%ranks` known, as `start_ranks` does, and `%catchup` and `%reveal`."""
    from workshop_utils.ranks.magic import register_magic
    from workshop_utils.teaching import magics

    register_magic(shell)
    magics.register(shell)


def _register_line_magics() -> None:
    """In a notebook, an import of this package makes `%catchup` and `%reveal` known. Elsewhere nothing happens."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    shell = get_ipython()
    if shell is not None:
        from workshop_utils.teaching import magics

        magics.register(shell)


_register_line_magics()
