"""Which wheels each system and Python needs: requirements.lock as uv resolves it, with address, bytes and SHA-256.

torch and torchvision for Linux come from torch's own index of CPU builds. Where that cannot be reached, the package
registry has CUDA builds only; they do not import without the CUDA packages, so these come along.
"""

import os
import re
import subprocess
import sys
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.tags import compatible_tags, cpython_tags, mac_platforms
from packaging.utils import parse_wheel_filename

import bootstrap
from bundle.folder import BundleError

PYTHONS = ("3.11", "3.12", "3.13")
LINUX, MAC = "linux-x86_64", "darwin-arm64"
MACOS = (14, 0)  # torch's builds need it
UV_PLATFORM = {LINUX: "x86_64-manylinux_2_28", MAC: "aarch64-apple-darwin"}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
IMPATIENT = {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "8"}
OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # of manylinux_2_17 and so on

# A wheel is a dict with name, url, bytes and sha256: bundle.json keeps it.


def cpu_torch(lock: str) -> dict[str, list[dict]] | None:
    """The pinned torch and torchvision for Linux, CPU builds, by Python; None where their index cannot be had."""
    _, pins = split(lock)
    try:
        wheels = {
            python: compiled(pins, LINUX, python, "--no-deps", "--default-index", CPU_INDEX, **IMPATIENT)
            for python in PYTHONS
        }
    except BundleError:
        return None
    names = [wheel["name"] for found in wheels.values() for wheel in found]
    return wheels if all("+cpu" in name for name in names) else None


def all_wheels(lock: str, cpu: dict[str, list[dict]] | None) -> dict[str, list[dict]]:
    """ "linux-x86_64 3.11" and so on -> its wheels. cpu: what `cpu_torch` found. Raises BundleError without a registry."""
    rest, pins = split(lock)
    targets = [(system, python) for system in UV_PLATFORM for python in PYTHONS]

    def of(target) -> list[dict]:
        system, python = target
        if system == MAC:
            return of_lock(rest + pins, system, python)
        torch = cpu[python] if cpu else compiled(pins, system, python, "--constraints", str(bootstrap.LOCK))
        return unique([*of_lock(rest, system, python), *torch])

    with ThreadPoolExecutor(4) as pool:  # each waits for the registry most of the time
        return {" ".join(target): found for target, found in zip(targets, pool.map(of, targets), strict=True)}


def split(lock: str) -> tuple[str, str]:
    """The lock's lines without torch and torchvision, and those two."""
    lines = lock.splitlines(keepends=True)
    pins = [line for line in lines if re.match(r"torch(vision)?==", line)]
    return "".join(line for line in lines if line not in pins), "".join(pins)


def of_lock(lines: str, system: str, python: str) -> list[dict]:
    """All wheels of these lines, for every patch release of a Python: a marker may tell 3.11.4 from 3.11.5."""
    by_patch = "".join(line for line in lines.splitlines(keepends=True) if "python_full_version" in line)
    return unique(
        compiled(lines, system, f"{python}.0", "--no-deps")
        + compiled(by_patch, system, f"{python}.99", "--no-deps")
    )


def compiled(requirements: str, system: str, python: str, *options: str, **env: str) -> list[dict]:
    """The wheels that uv picks for one system and Python. Raises BundleError with what uv said."""
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--only-binary", ":all:"]
    uv += ["--python", sys.executable]  # or uv starts every Python it finds, to choose one
    target = ["--python-version", python, "--python-platform", UV_PLATFORM[system]]
    env = settings() | {"MACOSX_DEPLOYMENT_TARGET": ".".join(map(str, MACOS))} | env
    done = subprocess.run(
        [*uv, *target, "--format", "pylock.toml", *options, "-"],
        input=requirements,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines())
        raise BundleError(
            f"the package registry does not answer as it should. Check the network. uv said: {said[:400]}"
        )
    packages = tomllib.loads(done.stdout).get("packages", [])
    return [best(package["wheels"], system, python) for package in packages]


@cache
def settings() -> dict:
    return bootstrap.registry()


def best(wheels: list[dict], system: str, python: str) -> dict:
    """Of one package's wheels the one whose tags come first on that system."""
    order = {tag: place for place, tag in enumerate(tags(system, python))}

    def place(wheel: dict) -> int:
        return min(order.get(tag, len(order)) for tag in parse_wheel_filename(name_of(wheel))[3])

    wheel = min(wheels, key=place)
    url = wheel.get("url") or Path(wheel["path"]).resolve().as_uri()
    return {
        "name": name_of(wheel),
        "url": url,
        "bytes": wheel.get("size") or asked_size(url),
        "sha256": wheel["hashes"]["sha256"],
    }


def name_of(wheel: dict) -> str:
    return unquote(urlsplit(wheel.get("url") or wheel["path"]).path).rpartition("/")[2]


def tags(system: str, python: str) -> list:
    """Every tag of a wheel that fits, the most fitting first."""
    version = tuple(map(int, python.split(".")[:2]))
    if system == MAC:
        platforms = list(mac_platforms(MACOS, "arm64"))
    else:
        numbers = range(28, 4, -1)  # glibc 2.28 and older
        platforms = [name for n in numbers for name in (f"manylinux_2_{n}", OLD_NAMES.get(n)) if name]
        platforms = [f"{name}_x86_64" for name in platforms]
    interpreter = f"cp{version[0]}{version[1]}"
    return [*cpython_tags(version, platforms=platforms), *compatible_tags(version, interpreter, platforms)]


def asked_size(url: str) -> int:
    """The bytes of a file whose index does not tell (torch's own)."""
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as answer:
        return int(answer.headers["Content-Length"])


def unique(wheels: list[dict]) -> list[dict]:
    return list({wheel["name"]: wheel for wheel in wheels}.values())
