"""What says the same thing in several places agrees: pyproject, environment.yml, lock, Makefile, doctor."""

import importlib.metadata
import os
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import workshop_utils
from workshop_utils.doctor import environment

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {
    "torch": "pytorch-cpu",
    "huggingface-hub": "huggingface_hub",
    "jupyter-client": "jupyter_client",
    "matplotlib": "matplotlib-base",
}


def lock_lines() -> list[str]:
    return [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
    ]


def test_conda_environment_agrees_with_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    needs = [Requirement(entry) for entry in conda["dependencies"] if isinstance(entry, str)]
    listed = {need.name: need.specifier for need in needs}
    assert listed.pop("python") == Requirement(f"python{PYPROJECT['requires-python']}").specifier
    listed.pop("pip")
    stated = map(Requirement, PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["lab"])
    assert listed == {CONDA_NAMES.get(need.name, need.name): need.specifier for need in stated}
    assert {"pip": ["-e ."]} in conda["dependencies"]


def test_lab_is_part_of_dev():
    extras = PYPROJECT["optional-dependencies"]
    assert set(extras["lab"]) <= set(extras["dev"])


def test_lock_pins_every_dependency_within_its_bounds():
    pins = {}
    for line in lock_lines():
        need = Requirement(line)
        (pin,) = need.specifier
        assert pin.operator == "==", line
        pins.setdefault(need.name, []).append(pin.version)
    stated = map(Requirement, PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["dev"])
    for need in stated:
        assert need.name in pins, f"{need.name} is not in requirements.lock: run make lock"
        assert all(need.specifier.contains(version) for version in pins[need.name]), need


def test_lock_holds_no_address_and_no_cuda_package():
    for line in lock_lines():
        assert not re.search(r"://|@|--|^(nvidia-|cuda-|triton)", line), line


def test_locked_torch_and_torchvision_belong_together():
    pins = dict(line.split(" ")[0].split("==") for line in lock_lines() if line.startswith("torch"))
    if importlib.metadata.version("torchvision").split("+")[0] == pins["torchvision"]:
        stated = map(Requirement, importlib.metadata.requires("torchvision"))
        assert all(need.specifier.contains(pins["torch"]) for need in stated if need.name == "torch")
    assert environment.check_torch().status == "ok"


def test_python_range_is_the_same_everywhere():
    oldest, after = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PYPROJECT["requires-python"]).groups()
    first, last = int(oldest), int(after) - 1
    assert (environment.OLDEST_PYTHON, environment.NEWEST_PYTHON) == ((3, first), (3, last))
    assert f"OLDEST, NEWEST = (3, {first}), (3, {last})" in (ROOT / "bootstrap.py").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert f"(3, {first}) <= sys.version_info < (3, {last + 1})" in makefile
    assert all(f"python3.{number}" in makefile for number in range(first, last + 1))


def test_version_is_the_same_everywhere():
    assert workshop_utils.__version__ == PYPROJECT["version"]


def test_ci_script_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
