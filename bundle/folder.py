"""What bootstrap.py asks of a bundle: does it fit this machine, and is what will be used whole? Standard library only."""

import hashlib
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

SUMS, PLAN = "SHA256SUMS", "bundle.json"
PLAIN = {"linux-x86_64": "Linux x86-64 (also inside WSL)", "darwin-arm64": "macOS arm64"}
CURE = "Copy the bundle again; where it was made, make bundle TO='{folder}' replaces what is damaged."


class BundleError(Exception):
    """One line that says what is wrong with a bundle and what to do."""


@dataclass(frozen=True)
class Bundle:
    """sums: path inside the folder -> SHA-256. wheels: the paths that this system and Python need."""

    folder: Path
    sums: dict[str, str]
    wheels: list[str]

    @property
    def extras(self) -> list[str]:
        """The paths of data and model."""
        return [name for name in self.sums if name.startswith(("data/", "model/"))]

    @property
    def is_cuda(self) -> bool:
        return any(name.startswith("wheels/nvidia_") for name in self.wheels)

    def verify(self, names: list[str]):
        """Compare files with SHA256SUMS. Raises BundleError for the first that is missing or damaged."""
        print(f"setup: checking {len(names)} files of {self.folder}", flush=True)
        for name in names:
            check(self.folder, name, self.sums.get(name))


def this_machine() -> str:
    """ "linux-x86_64 3.12", say: a key of the plan's wheels."""
    return f"{sys.platform}-{platform.machine()} {sys.version_info[0]}.{sys.version_info[1]}"


def read_bundle(folder: Path, lock: Path) -> Bundle:
    """The bundle in `folder`. Raises BundleError where it is none, does not fit this machine or has other pins."""
    if lock.parent == folder / "workshop":
        raise BundleError(
            f'this is the workshop inside the bundle. Copy it to your disk, cp -R "{lock.parent}" ~, and run make there'
        )
    sums = read_sums(folder)
    check(folder, PLAN, sums.get(PLAN))
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if plan["lock"] != sha256_of(lock):
        raise BundleError(
            f"{folder} holds other package versions than {lock}. Take the workshop of the same bundle: "
            f'cp -R "{folder}/workshop" to a folder of yours, and run make there'
        )
    machine = this_machine()
    if machine not in plan["wheels"]:
        systems = " and ".join(
            PLAIN.get(name, name) for name in sorted({key.split()[0] for key in plan["wheels"]})
        )
        pythons = ", ".join(sorted({key.split()[1] for key in plan["wheels"]}))
        raise BundleError(
            f"{folder} has packages for {systems} with Python {pythons}; this is {machine.replace(' ', ' with Python ')}. "
            "Name a Python that fits, make PYTHON=/path/to/python3.12, or set up with a network"
        )
    return Bundle(folder, sums, [f"wheels/{name}" for name in plan["wheels"][machine]])


def read_sums(folder: Path) -> dict[str, str]:
    """The lines of SHA256SUMS: path -> SHA-256. Raises BundleError where there is none, or one that cannot be read."""
    path = folder / SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if (folder / PLAN).exists():
            raise BundleError(
                f"{folder} is not finished: where it was made, make bundle TO='{folder}' goes on"
            ) from None
        inside = next((f" (did you mean {found.parent}?)" for found in folder.glob(f"*/{SUMS}")), "")
        raise BundleError(
            f"{folder} is no bundle: it has no {SUMS}{inside}. Name the folder that make bundle wrote: "
            "it holds wheels, workshop and SHA256SUMS"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({error}). {CURE.format(folder=folder)}") from None
    sums = {}
    for number, line in enumerate(lines, start=1):
        sha256, _, name = line.partition("  ")
        if len(sha256) != 64 or not name:
            raise BundleError(f"line {number} of {path} cannot be read. {CURE.format(folder=folder)}")
        sums[name] = sha256
    return sums


def check(folder: Path, name: str, sha256: str | None):
    """Raises BundleError unless the file `name` of the bundle is there and has this SHA-256."""
    if sha256 is None:
        problem = f"is not listed in {SUMS}"
    else:
        try:
            got = sha256_of(folder / name)
            problem = "" if got == sha256 else f"is damaged: its SHA-256 is not the one in {SUMS}"
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
    if problem:
        raise BundleError(f"{folder / name} {problem}. {CURE.format(folder=folder)}")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
