"""Where a reader's progress is kept: one JSON file that survives restarts, damage and two notebooks at once.

    {"version": 1,
     "exercises": {"2.3": {"attempts": 3, "passed_at": "2026-11-22T10:31:05+01:00", "hints": 1,
                           "solution_seen_at": "...", "answer": {"name": "f", "source": "def f(): ..."}}},
     "guesses": {"ring or naive": {"value": 1.5, "at": "..."}}}

Keys that this version does not know are kept as they are, so an older or a newer workshop loses nothing.
"""

import json
import os
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_data_dir

VERSION = 1
LOCK_S = 5.0
_KINDS = {"attempts": int, "hints": int, "passed_at": str, "solution_seen_at": str, "answer": dict}

_memory: dict[
    Path, dict
] = {}  # files that cannot be written: their content, for as long as this process lives


def progress_folder() -> Path:
    """$WORKSHOP_PROGRESS, or this user's data folder."""
    chosen = os.environ.get("WORKSHOP_PROGRESS")
    return Path(chosen).expanduser() if chosen else Path(user_data_dir("training-workshop", appauthor=False))


def progress_path() -> Path:
    return progress_folder() / "progress.json"


def now() -> str:
    """The local time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def read() -> dict:
    """What is kept; an empty record if there is none. Never raises."""
    path = progress_path()
    if path in _memory:
        return _memory[path]
    try:
        return _read_file(path)
    except OSError:
        return _empty()


def update(change: Callable[[dict], None]) -> dict:
    """Read, `change(data)` in place, write; one process at a time. Returns the data.

    Where the folder cannot be written, it says so once and keeps the data in memory.
    """
    path = progress_path()
    if path in _memory:
        change(_memory[path])
        return _memory[path]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_S):
            data = _read_file(path)
            change(data)
            _write_file(path, data)
            return data
    except (OSError, Timeout) as error:
        data = _memory[path] = read()
        change(data)
        print(
            f"Your progress cannot be written to {path} ({_reason(error)}). It is kept in memory until this kernel"
            " ends. To keep it, set WORKSHOP_PROGRESS to a folder that you can write to and restart the kernel."
        )
        return data


def _reason(error: Exception) -> str:
    if isinstance(error, Timeout):
        return f"another notebook has held its lock for {LOCK_S:.0f} s"
    return getattr(error, "strerror", None) or str(error)


def _empty() -> dict:
    return {"version": VERSION, "exercises": {}, "guesses": {}}


def _read_file(path: Path) -> dict:
    """The file's content. A damaged file is put aside, which is said, and an empty record returned."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return _empty()
    try:
        data = json.loads(text)
        return _checked(data)
    except (ValueError, TypeError, RecursionError):
        aside = path.with_name(f"{path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S-%f}")
        path.replace(aside)
        print(f"Your progress file was damaged. It is kept as {aside}; a new one is started.")
        return _empty()


def _checked(data) -> dict:
    """`data` with the parts that this version needs, or ValueError where they have another form."""
    good = isinstance(data, dict) and isinstance(data.get("version", VERSION), int)
    for part in ("exercises", "guesses") if good else ():
        entries = data.setdefault(part, {})
        good = (
            good and isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
        )
    for entry in data["exercises"].values() if good else ():
        good = good and all(isinstance(entry.get(key, kind()), kind) for key, kind in _KINDS.items())
    if not good:
        raise ValueError("not a progress record")
    data["version"] = max(VERSION, data.get("version", VERSION))
    return data


def _write_file(path: Path, data: dict) -> None:
    """Replace the file in one step: a reader sees the old or the new one, never half of one."""
    descriptor, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
