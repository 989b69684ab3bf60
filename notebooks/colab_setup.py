# @title Set-up: run this cell first (about ten seconds; again at once) { display-mode: "form" }
# The first cell of every Colab notebook; `make colab` puts the helper package's wheel into WHEEL.
# It installs that wheel and what it needs and Colab lacks. Nothing that is there already is changed.
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORLD_SIZE = 2  # as many ranks as Colab has cores. The text shows the output of four: 4 works here, slowly

WHEEL_NAME = ""
WHEEL = ""


def installed():
    """{name: version} of every distribution of this Python; without those whose metadata cannot be read."""
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    found = {}
    for distribution in importlib.metadata.distributions():
        try:
            found[canonicalize_name(distribution.metadata["Name"])] = Version(distribution.version).public
        except (InvalidVersion, TypeError, KeyError, AttributeError):
            continue
    return found


def wheel_is_installed(digest):
    """Whether the package here came from this very wheel: pip keeps the wheel's hash."""
    try:
        text = importlib.metadata.distribution("workshop-utils").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return digest in (text or "")


def pip_install(*arguments):
    """Run pip; what it said if it failed, else None."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


def install_package(folder):
    """Install the wheel of this notebook, without its dependencies."""
    wheel = folder / WHEEL_NAME
    wheel.write_bytes(base64.b64decode(WHEEL))
    problem = pip_install("--no-deps", "--no-index", "--force-reinstall", str(wheel))
    if problem:
        raise RuntimeError(f"The workshop's own package could not be installed. pip said:\n{problem}")
    importlib.invalidate_caches()


def install_what_is_missing(folder):
    """Install what the package needs and is not here. All that is here keeps its version. Returns the names."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    here = installed()
    needs = [Requirement(text) for text in importlib.metadata.requires("workshop-utils")]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    missing = [str(need) for need in needs if canonicalize_name(need.name) not in here]
    for need in needs:
        version = here.get(canonicalize_name(need.name))
        if version and not need.specifier.contains(version, prereleases=True):
            print(
                f"{need.name} {version} is here, and the workshop was made for {need.specifier}. It is left as it is."
            )
    if not missing:
        return []
    kept = folder / "constraints.txt"
    kept.write_text("".join(f"{name}=={version}\n" for name, version in here.items()))
    problem = pip_install("--constraint", str(kept), *missing)
    if problem:
        print(f"Could not install {', '.join(missing)}; pip said: {problem.splitlines()[-1]}")
        print("Notebooks 00 to 06 work without. Is there a network? Run this cell again.")
        return []
    importlib.invalidate_caches()
    return missing


def keep_answers_on_drive():
    """Your answers live on this machine, which Colab takes away in the end; on Drive they stay, where it is mounted."""
    drive = Path("/content/drive/MyDrive")
    if drive.is_dir():
        os.environ.setdefault("WORKSHOP_PROGRESS", str(drive / "workshop-progress"))
        return f"Your answers are kept on your Drive, in {os.environ['WORKSHOP_PROGRESS']}."
    return (
        "Your answers are kept on this machine, which Colab takes away in the end. To keep them for longer, mount your "
        "Drive (the folder on the left), then run this cell again."
    )


def set_up():
    began_s = time.perf_counter()
    digest = hashlib.sha256(base64.b64decode(WHEEL)).hexdigest()
    try:
        on_colab = importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        on_colab = False
    if not on_colab:
        if importlib.util.find_spec("workshop_utils") is None:
            raise RuntimeError(
                "This notebook is made for Colab, and this is not Colab. Here, take the notebook of the same name from the "
                "workshop's folder notebooks/, and start it with `make lab`."
            )
        print("This is not Colab: the workshop_utils that is installed here is used.")
        return
    with tempfile.TemporaryDirectory() as folder:
        was_there = wheel_is_installed(digest)
        if not was_there:
            if "workshop_utils" in sys.modules:
                print(
                    "Another version of the workshop was loaded before. Restart the runtime (menu Runtime) after this."
                )
            install_package(Path(folder))
        added = install_what_is_missing(Path(folder))
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(
        f"workshop_utils {importlib.metadata.version('workshop-utils')}",
        "was there" if was_there else "installed",
        end="",
    )
    print(f", and {', '.join(added)}" if added else "", end="")
    print(
        f": {time.perf_counter() - began_s:.0f} s. torch {torch.__version__}, {os.cpu_count()} cores, ",
        end="",
    )
    print(f"{gpu}: used from notebook 05 on." if gpu else "no GPU: none is needed.")
    print(keep_answers_on_drive())


set_up()
