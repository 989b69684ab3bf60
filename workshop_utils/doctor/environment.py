"""Checks of the Python environment: the interpreter, the packages, and whether they fit together."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from workshop_utils.doctor.check import ROOT, SETUP_CURE, Check, first_line, short

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
PAIR_CURE = (
    "install both anew from one place: `rm -rf .venv && make setup` "
    "(elsewhere: pip install --force-reinstall torch torchvision)"
)


def check_python() -> Check:
    """Which Python this kernel is."""
    where = f"{platform.python_version()}, {short(sys.executable)}"
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return Check("python", "fail", where, f"the workshop needs Python 3.11 to 3.13: {SETUP_CURE}")
    expected = ROOT / ".venv"
    if expected.is_dir() and Path(sys.prefix) != expected:
        return Check("python", "warn", f"{where}, not this folder's .venv", SETUP_CURE)
    return Check("python", "ok", where)


def check_versions() -> list[Check]:
    """Each dependency of the package against the range that pyproject.toml gives."""
    try:
        stated = importlib.metadata.requires("workshop-utils") or []
    except importlib.metadata.PackageNotFoundError:
        return [
            Check(
                "versions", "fail", "the package workshop-utils is not installed in this Python", SETUP_CURE
            )
        ]
    needed = [
        need
        for need in map(Requirement, stated)
        if need.marker is None or need.marker.evaluate({"extra": ""})
    ]
    problems = [problem for need in needed if (problem := _version_problem(need))]
    if problems:
        return [Check("versions", "fail", problem, SETUP_CURE) for problem in problems]
    shown = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ipykernel", "numpy")
    )
    return [Check("versions", "ok", f"{len(needed)} packages in the supported ranges ({shown})")]


def _version_problem(need: Requirement) -> str | None:
    try:
        found = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{need.name} is missing, {need.name}{need.specifier} is needed"
    if need.specifier.contains(Version(found), prereleases=True):
        return None
    return f"{need.name} is {found}, {need.name}{need.specifier} is needed"


def check_torch() -> Check:
    """torch and torchvision can be imported and belong together."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", f"torch cannot be imported: {first_line(error)}", PAIR_CURE)
    try:
        import torchvision

        _ = torchvision.ops.nms
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Check(
            "torch",
            "fail",
            f"torchvision does not fit torch {torch.__version__}: {first_line(error)}",
            PAIR_CURE,
        )
    pair = f"torch {torch.__version__} and torchvision {torchvision.__version__}"
    stated = map(Requirement, importlib.metadata.requires("torchvision") or [])
    if any(need.name == "torch" and not need.specifier.contains(torch.__version__) for need in stated):
        return Check("torch", "fail", f"{pair} are of different releases", PAIR_CURE)
    return Check("torch", "ok", f"{pair} fit together")


def check_widgets() -> Check:
    """ipywidgets and its JupyterLab half are of matching releases."""
    try:
        found = importlib.metadata.version("ipywidgets")
    except importlib.metadata.PackageNotFoundError:
        return Check("widgets", "fail", "ipywidgets is missing", SETUP_CURE)
    if "COLAB_RELEASE_TAG" in os.environ:
        return Check("widgets", "ok", f"ipywidgets {found}, Colab's own")
    halves = map(Requirement, importlib.metadata.requires("ipywidgets") or [])
    halves = [
        need for need in halves if need.name.replace("_", "-") in ("jupyterlab-widgets", "widgetsnbextension")
    ]
    problems = [problem for need in halves if (problem := _version_problem(need))]
    if problems:
        return Check("widgets", "fail", f"ipywidgets {found}: {'; '.join(problems)}", SETUP_CURE)
    return Check("widgets", "ok", f"ipywidgets {found} and its JupyterLab half agree")
