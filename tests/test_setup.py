"""What `make` does before anything else: the right Python, one clear line for each thing that is missing."""

import os
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
import bootstrap


@pytest.fixture
def clone(tmp_path):
    """A folder with what `make setup` reads, whose bootstrap.py only says which Python runs it."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bootstrap.py").write_text("import sys; print('bootstrap with', sys.executable)\n")
    return tmp_path


def make(folder: Path, *arguments: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Run make; path: a folder that is the whole PATH, apart from the shell."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS")}
    if path:
        (path / "sh").symlink_to("/bin/sh")
        variables["PATH"] = str(path)
    return subprocess.run(
        [shutil.which("make"), *arguments],
        cwd=folder,
        env=variables | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def said(done: subprocess.CompletedProcess) -> str:
    """The one line that set-up ended with; make's own line is left out."""
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and lines[0].startswith("setup: "), done.stderr
    return lines[0]


# Finding a Python


def command(folder: Path, name: str, script: str):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_python_that_does_not_run_is_passed_over(clone, tmp_path):
    """pyenv leaves commands that fail; systems leave links to what was removed."""
    commands = tmp_path / "bin"
    command(commands, "python3", "echo 'pyenv: python3: command not found' >&2; exit 127")
    (commands / "python3.13").symlink_to("/nowhere/python3.13")
    command(commands, "python3.12", f'exec "{sys.executable}" "$@"')
    done = make(clone, "setup", path=commands)
    assert done.returncode == 0 and f"bootstrap with {sys.executable}" in done.stdout, done.stderr


def test_no_python_at_all_is_one_line(clone, tmp_path):
    (tmp_path / "bin").mkdir()
    line = said(make(clone, "lab", path=tmp_path / "bin"))
    assert "no Python 3.11 to 3.13 that runs" in line and "make PYTHON=/path/to/python3.13 lab" in line


def test_a_named_python_out_of_range_is_one_line_and_no_other_is_taken(clone, tmp_path):
    command(tmp_path, "python3.10", "exit 1")
    assert "(tried: ./python3.10)" in said(make(clone, "setup", "PYTHON=./python3.10"))


def test_wrong_python_without_make(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(SystemExit, match=r"the workshop needs 3\.11 to 3\.13"):
        bootstrap.check_machine()


def test_systems_without_builds(monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "platform", "darwin")
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: "x86_64")
    with pytest.raises(SystemExit, match="Intel Macs"):
        bootstrap.check_machine()


# What can be missing


def test_no_disk_space(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2e9))
    bootstrap.check_disk(bootstrap.CPU_INSTALL_GB)
    with pytest.raises(SystemExit, match=r"has 2\.0 GB free; this needs about 6\.5 GB"):
        bootstrap.check_disk(bootstrap.CUDA_INSTALL_GB)
    torch = tmp_path / ".venv/lib/python3.11/site-packages/torch/__init__.py"
    torch.parent.mkdir(parents=True)
    torch.write_text("")
    bootstrap.check_disk(bootstrap.CUDA_INSTALL_GB)  # torch is there: what is missing is small


def test_no_ensurepip(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "VENV_PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=r"apt-get install python3\.\d+-venv"):
        bootstrap.make_venv()


def test_a_folder_named_venv_that_is_something_else_is_not_removed(monkeypatch, tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "VENV_PYTHON", tmp_path / ".venv/bin/python")
    with pytest.raises(SystemExit, match="is no virtual environment"):
        bootstrap.make_venv()
    assert (tmp_path / ".venv" / "thesis.txt").exists()


@pytest.mark.slow
def test_no_network(clone):
    """A real virtual environment, and a registry that refuses the connection."""
    shutil.copy(ROOT / "bootstrap.py", clone)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again, and closed, when make runs
    nowhere = f"http://127.0.0.1:{port}/simple"
    done = make(clone, "setup", PIP_INDEX_URL=nowhere, PIP_CONFIG_FILE=os.devnull, PIP_NO_CACHE_DIR="1")
    assert "registry cannot be reached" in said(done)
    assert not (clone / ".venv" / bootstrap.STAMP.name).exists()


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "cause: failed to lookup address information: Name or service not known",
            "registry cannot be reached",
        ),
        (
            "WARNING: Retrying after NewConnectionError\nERROR: No matching distribution",
            "registry cannot be reached",
        ),
        ("error: Failed to install\n cause: No space left on device (os error 28)", "no disk space left"),
        ("[Errno 28] No space left on device", "no disk space left"),
        ("cause: invalid peer certificate: UnknownIssuer", "SSL_CERT_FILE"),
        ("error: failed to create directory: Permission denied (os error 13)", "cannot write to"),
        (
            "Resolved 9 packages\nerror: the moon is full\n",
            "failed: error: the moon is full (everything it said",
        ),
    ],
)
def test_what_an_installer_says_becomes_one_line(output, line):
    with pytest.raises(SystemExit) as ended:
        bootstrap.explain(output, "installing the packages")
    message = str(ended.value)
    assert message.startswith("setup: ") and "\n" not in message and line in message


# Which torch


def fake_uv(tmp_path, script: str) -> list:
    (tmp_path / "uv.py").write_text(script)
    return [sys.executable, tmp_path / "uv.py"]


@pytest.mark.parametrize(
    ("script", "backend", "is_cuda"),
    [
        ("import sys; sys.stderr.write(' + torch==2.15.0+cpu')", ["--torch-backend=auto"], False),
        ("import sys; sys.stderr.write(' + torch==2.15.0+cu130')", ["--torch-backend=auto"], True),
        ("import sys; sys.exit('error: dns error')", [], True),
        ("import time; time.sleep(30)", [], True),
    ],
    ids=["cpu", "cuda", "index out of reach", "index that never answers"],
)
def test_torchs_own_index_or_else_the_registry(monkeypatch, tmp_path, script, backend, is_cuda):
    monkeypatch.setattr(bootstrap, "PROBE_LIMIT_S", 2.0)
    monkeypatch.setattr(bootstrap.sys, "platform", "linux")
    assert bootstrap.torch_backend(fake_uv(tmp_path, script), {}) == (backend, is_cuda)


def test_a_pair_that_does_not_fit_is_installed_anew(monkeypatch):
    ran = []

    def run_logged(what, command, **_):
        ran.append((what, command))
        return "operator torchvision::nms does not exist" if len(ran) == 3 else None

    monkeypatch.setattr(bootstrap, "run_logged", run_logged)
    bootstrap.install(["uv"], {}, [])
    assert [what for what, _ in ran][2:] == ["torch and torchvision", "torch and torchvision again"] + [
        "torch and torchvision"
    ]
    assert ran[3][1][:5] == ["uv", "--reinstall-package", "torch", "--reinstall-package", "torchvision"]


def test_pips_own_index_is_handed_to_uv(monkeypatch):
    listed = (
        ":env:.index-url='https://mirror.example/simple'\nglobal.extra-index-url='https://other.example'\n"
    )
    monkeypatch.setattr(bootstrap, "quiet_run", lambda _: types.SimpleNamespace(stdout=listed))
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    monkeypatch.delenv("UV_INDEX_URL", raising=False)
    assert bootstrap.registry() == {"UV_DEFAULT_INDEX": "https://mirror.example/simple"}
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example/simple")
    assert bootstrap.registry() == {}


# A second run


def test_a_second_run_does_nothing_until_the_pins_change(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(bootstrap, "LOCK", tmp_path / "requirements.lock")
    monkeypatch.setattr(bootstrap, "venv_version", lambda: sys.version_info[:2])
    monkeypatch.setattr(bootstrap, "check_disk", lambda _: pytest.fail("it set out to install"))
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    bootstrap.STAMP.write_text(bootstrap.fingerprint())
    bootstrap.main()
    bootstrap.LOCK.write_text("torch==2.99.0\n")
    with pytest.raises(pytest.fail.Exception, match="set out to install"):
        bootstrap.main()


# What make offers


def test_help_lists_every_command():
    listed = make(ROOT, "help").stdout
    commands = [
        "setup",
        "lab",
        "bundle",
        "run",
        "test",
        "test-fast",
        "notebooks",
        "solutions",
        "bench",
        "doctor",
        "clean",
    ]
    for name in commands:
        assert f"make {name} " in listed


def test_lab_listens_on_loopback_and_keeps_its_token():
    """What JupyterLab is started with; a browser test looks at the running one."""
    recipe = make(ROOT, "--dry-run", "lab").stdout
    assert "--ServerApp.ip=127.0.0.1" in recipe and "token" not in recipe and "password" not in recipe
    assert "doctor --quick" in recipe and "/lab/tree/00_start_here.ipynb" in recipe
