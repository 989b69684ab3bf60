"""Download MNIST with torchvision, without ever making a reader wait for a dead network.

A short probe asks each of torchvision's mirrors for one small file, all at once, under one deadline, and without
importing torchvision, which takes seconds. The mirror that answers serves the download, which runs in a process
of its own under a time limit, into a temporary folder.
The folder is moved into the cache when all four files are complete and verified, under a file lock.
"""

import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import filelock

from workshop_utils.data import FILES, DataError, read_folder

MIRRORS = [  # torchvision's own, a test says so
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
]
SMALL_FILE = "t10k-labels-idx1-ubyte.gz"
ANSWER_LIMIT_S = 6.0
DOWNLOAD_LIMIT_S = 180  # 11 MB at 60 KB/s
RETRY_AFTER_S = 15 * 60
CHECKSUMS = "sha256.json"

# argv: folder, mirror, limit in seconds. torchvision opens its connections without a time limit.
_CHILD = """
import signal, socket, sys
signal.alarm(int(sys.argv[3]))
socket.setdefaulttimeout(10)
from torchvision.datasets import MNIST
MNIST.mirrors = [sys.argv[2]]
MNIST(sys.argv[1], download=True)
"""


def download_mnist(cache: Path, *, retry: bool = True):
    """Fill `cache`/MNIST. Raises DataError, with the reason in a few words, if that cannot be done.

    retry: False gives up at once if an attempt failed less than a quarter of an hour ago.
    """
    note = cache / "download-failed"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "download.lock"):
            if not retry:
                _respect(note)
                if _is_complete(cache):  # by another process, while this one waited for the lock
                    return
            try:
                _download_into(cache)
            except DataError as error:
                note.write_text(str(error))
                raise
            note.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"the cache {cache} cannot be written: {error.strerror or error}") from None


def damaged_files(cache: Path) -> list[str]:
    """The files of a downloaded `cache`/MNIST that differ from the checksums kept with them."""
    raw = cache / "MNIST" / "raw"
    try:
        expected = json.loads((raw / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return [CHECKSUMS]
    return [name for name in FILES if _sha256(raw / name) != expected.get(name)]


def _locked(path: Path):
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except filelock.Timeout:
        print("MNIST: waiting for another process that is trying to download")
    try:
        return lock.acquire(timeout=DOWNLOAD_LIMIT_S + ANSWER_LIMIT_S)
    except filelock.Timeout:
        raise DataError("another process has been downloading for minutes") from None


def _respect(note: Path):
    """Raise what a recent attempt ended with."""
    try:
        age_s, reason = time.time() - note.stat().st_mtime, note.read_text()
    except FileNotFoundError:
        return
    if 0 <= age_s < RETRY_AFTER_S:
        minutes = f"{age_s / 60:.0f} min ago" if age_s >= 60 else "a moment ago"
        raise DataError(f'{reason}; that was {minutes}, load_mnist("download") tries again')


def _is_complete(cache: Path) -> bool:
    try:
        read_folder(cache, "the cache")
    except DataError:
        return False
    return True


def _download_into(cache: Path):
    mirror = _answering_mirror(MIRRORS, time.monotonic() + ANSWER_LIMIT_S)
    for left_over in cache.glob("download-*/"):  # of a process that was killed; we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="download-", dir=cache))
    try:
        print("MNIST: downloading 11 MB into the cache", flush=True)
        _run_torchvision(folder, mirror)
        read_folder(folder, "the download")
        _publish(folder, cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answering_mirror(mirrors: list[str], deadline_s: float) -> str:
    """The first mirror that begins to send a gzip file before `deadline_s` (time.monotonic())."""
    answers = queue.Queue()

    def ask(mirror):
        try:
            left_s = max(0.1, deadline_s - time.monotonic())
            with urllib.request.urlopen(mirror + SMALL_FILE, timeout=left_s) as response:
                answers.put(
                    (mirror, None if response.read(2) == b"\x1f\x8b" else "answers with something else")
                )
        except (OSError, ValueError) as error:  # URLError is an OSError
            cause = getattr(error, "reason", error)
            answers.put((mirror, getattr(cause, "strerror", None) or str(cause)))

    for mirror in mirrors:
        # a look-up without DNS can hang beyond any time limit: such a thread is left behind, it harms nobody
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    reason = "no answer within seconds"
    for _ in mirrors:
        try:
            mirror, problem = answers.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            break
        if problem is None:
            return mirror
        reason = problem
    raise DataError(f"no network or servers down, {reason}")


def _run_torchvision(folder: Path, mirror: str):
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, folder, mirror, str(DOWNLOAD_LIMIT_S)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"the download was not complete after {DOWNLOAD_LIMIT_S} s") from None
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise DataError(f"the download broke off: {last_line}")


def _publish(folder: Path, cache: Path):
    """Move `folder`/MNIST to `cache`/MNIST, which appears complete or not at all."""
    raw = folder / "MNIST" / "raw"
    for archive in raw.glob("*.gz"):
        archive.unlink()
    (raw / CHECKSUMS).write_text(json.dumps({name: _sha256(raw / name) for name in FILES}, indent=1))
    if (cache / "MNIST").exists():
        os.rename(cache / "MNIST", folder / "old")
    os.rename(folder / "MNIST", cache / "MNIST")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
