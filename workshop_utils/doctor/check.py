"""What a check returns, and how its lines are worded."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
SETUP_CURE = "run `make setup` in the workshop's folder and choose its kernel (.venv)"


@dataclass(frozen=True)
class Check:
    """status: "ok", "warn" (works, with a limit), "fail" or "skip". cure: what to do, "" if nothing."""

    name: str
    status: str
    detail: str
    cure: str = ""


def short(path) -> str:
    """A path as a person would write it: relative to the workshop's folder, or with ~."""
    path = Path(path)
    for base, prefix in ((ROOT, ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return f"{prefix}{path.relative_to(base)}"
    return str(path)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
