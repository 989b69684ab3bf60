"""A Python like Colab's, in a folder of build/: its versions (requirements.txt), and a stand-in for its module google.colab."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bootstrap

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
FOLDER = bootstrap.ROOT / "build" / os.environ.get("COLAB_ENV", "colab-env")
PYTHON = FOLDER / "bin" / "python"
STAMP = FOLDER / "made-from"
UV = [sys.executable, "-m", "uv"]


def find_python() -> str:
    """A Python 3.13, as Colab's, or 3.12 where that is missing."""
    for minor in (13, 12):
        pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for candidate in (sys.executable, shutil.which(f"python3.{minor}"), *pyenv):
            question = f"import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, {minor}))"
            if candidate and not bootstrap.quiet_run([candidate, "-c", question]).returncode:
                return str(candidate)
    raise FileNotFoundError("the tests of the Colab notebooks need a Python 3.13 or 3.12; none was found")


def make() -> None:
    """Make the environment, unless it is there already. CPU torch where torch's own index can be reached."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    uv(["venv", "--quiet", "--python", find_python(), str(FOLDER)])
    install = ["pip", "install", "--quiet", "--python", str(PYTHON), "--requirements", str(REQUIREMENTS)]
    quick = {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "8"}
    if uv([*install, "--torch-backend=cpu"], check=False, **quick):
        uv(install)
    STAMP.write_text(wanted)


def uv(arguments: list[str], check: bool = True, **env) -> int:
    """uv's exit status. With check, what it said is raised where it failed."""
    env = os.environ | bootstrap.registry() | env
    done = subprocess.run([*UV, *arguments], check=False, capture_output=True, text=True, env=env)
    if check and done.returncode:
        raise RuntimeError(f"uv {' '.join(arguments[:2])} failed: {done.stderr.strip()[-2000:]}")
    return done.returncode
