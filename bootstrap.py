"""Make .venv and install the workshop into it. Called by `make`; `python3 bootstrap.py` does the same.

Only the standard library, Python 3.11 to 3.13. A run with nothing to do takes a fraction of a second. Every
failure ends in one line that names the cure; what the installer said is in build/setup.log. Where the variable BUNDLE
names a folder that `make bundle` wrote, all comes from there and nothing from a network.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".workshop-setup"
LOCK = ROOT / "requirements.lock"
LOG = ROOT / "build" / "setup.log"
LAB_SETTINGS = VENV / "share" / "jupyter" / "lab" / "settings" / "overrides.json"

# JupyterLab in this .venv asks nobody for news, and does not ask the reader whether it may.
QUIET_LAB = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}

OLDEST, NEWEST = (3, 11), (3, 13)  # a test compares them with pyproject.toml and the Makefile
GB = 10**9
CUDA_INSTALL_GB, CPU_INSTALL_GB = 6.5, 1.8  # measured: 5.9 and 1.3 GB in .venv; the rest is room to work
PROBE_LIMIT_S = 20.0

# What to say when an installer's output matches; the first match wins.
NO_DISK = (
    "no disk space left in {root} or in the package cache {cache}. Free about "
    f"{CUDA_INSTALL_GB:.0f} GB, or point UV_CACHE_DIR at a larger disk, and run make again."
)
NO_TRUST = (
    "the package registry's certificate is not trusted here (a company proxy?). Set SSL_CERT_FILE to your "
    "organisation's certificate bundle and run make again."
)
NO_NETWORK = (
    "the package registry cannot be reached. Check the network (and HTTPS_PROXY, if you need a proxy), then run "
    "make again; finished downloads are kept. In a room without a network: make lab BUNDLE=/path/to/a/bundle"
)
NO_WRITE = "cannot write to {root} or to the package cache {cache}. Work in a folder that is yours."
FAILURES = {
    r"No space left on device|os error 28\b|Errno 28|Disk quota exceeded": NO_DISK,
    r"invalid peer certificate|CERTIFICATE_VERIFY_FAILED|UnknownIssuer|SSLError": NO_TRUST,
    r"dns error|failed to lookup|error sending request|NewConnectionError|name ?resolution": NO_NETWORK,
    r"Network is unreachable|timed out|Connection refused|ConnectTimeout|ProxyError": NO_NETWORK,
    r"Permission denied|os error 13\b|Read-only file system": NO_WRITE,
}


def quiet_run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def fail(message: str):
    sys.exit(f"setup: {message}")


def run_logged(what: str, command: list, **env):
    """Run an installer and show for how long: None when it worked, what it said when it failed."""
    LOG.parent.mkdir(exist_ok=True)
    free_before = shutil.disk_usage(ROOT).free
    start_s, shown_s = time.monotonic(), 0.0
    with LOG.open("a+", errors="replace") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        log.flush()
        offset = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=os.environ | env
        )
        while process.poll() is None:
            time.sleep(0.1)
            elapsed_s = time.monotonic() - start_s
            if elapsed_s - shown_s >= (1.0 if sys.stdout.isatty() else 20.0):
                shown_s = elapsed_s
                used_gb = max(0.0, (free_before - shutil.disk_usage(ROOT).free) / GB)
                end = "\r" if sys.stdout.isatty() else "\n"
                print(f"setup: {what}: {elapsed_s:.0f} s, {used_gb:.1f} GB written", end=end, flush=True)
        if sys.stdout.isatty() and shown_s:
            print(" " * 79, end="\r")
        log.seek(offset)
        output = log.read()
    return output if process.returncode else None


def explain(output: str, what: str):
    """End with the one line that fits an installer's output."""
    for pattern, message in FAILURES.items():
        if re.search(pattern, output, re.IGNORECASE):
            fail(message.format(root=ROOT, cache=os.environ.get("UV_CACHE_DIR", "~/.cache/uv")))
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in lines if re.match(r"error|×", line, re.IGNORECASE)), lines[-1:] or "?")
    fail(f"{what} failed: {reason} (everything it said: {LOG.relative_to(ROOT)})")


def fingerprint() -> str:
    """What an installation depends on: the pins, the package's metadata, the place, the Python."""
    digest = hashlib.sha256(f"{ROOT} {sys.version_info[:2]}".encode())
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def venv_version():
    """The (major, minor) of .venv's Python; None if there is none that runs."""
    try:
        found = quiet_run([VENV_PYTHON, "-c", "import sys; print(*sys.version_info[:2])"], timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return tuple(map(int, found.stdout.split())) if found.returncode == 0 else None


def check_machine():
    """Refuse early what could not end well."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        fail(
            f"this is Python {platform.python_version()}; the workshop needs 3.{OLDEST[1]} to 3.{NEWEST[1]}. "
            "Install one and run make PYTHON=/path/to/python3.13"
        )
    if os.name != "posix":
        fail("on Windows, use WSL2 (https://aka.ms/wsl): torch's multi-process tools do not work without it.")
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        fail("torch has no builds for Intel Macs any more: use Colab, or a Linux machine.")
    if not os.access(ROOT, os.W_OK):
        fail(f"cannot write to {ROOT}. Clone the workshop into a folder that is yours.")


def check_disk(needed_gb: float):
    """Compare free space with what the install will take (nothing to check once torch is there)."""
    if any(VENV.glob("lib/python3*/site-packages/torch/__init__.py")):
        return
    free_gb = shutil.disk_usage(ROOT).free / GB
    if free_gb < needed_gb:
        fail(
            f"the disk that holds {ROOT} has {free_gb:.1f} GB free; this needs about {needed_gb:.1f} GB. "
            "Free some, or clone the workshop to a larger disk."
        )


def make_venv():
    """A .venv with a Python of our version that runs, and pip in it."""
    version = venv_version()
    if version != sys.version_info[:2]:
        if VENV.exists() and not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
            fail(f"{VENV} is there but is no virtual environment. Move it away and run make again.")
        try:
            import ensurepip  # noqa: F401  (Debian and Ubuntu ship Python without it)
            import venv
        except ImportError as error:
            fail(
                f"this Python cannot make a virtual environment ({error}). On Debian or Ubuntu: "
                f"apt-get install python3.{sys.version_info[1]}-venv; then run make again."
            )
        if VENV.exists():
            print(f"setup: .venv holds {describe(version)}; making it anew")
        print(f"setup: making .venv with Python {platform.python_version()}")
        try:
            venv.create(VENV, clear=True, symlinks=True, with_pip=False)
        except OSError as error:
            explain(str(error), "making .venv")
    if quiet_run([VENV_PYTHON, "-c", "import pip"]).returncode:
        output = run_logged("pip", [VENV_PYTHON, "-m", "ensurepip", "--default-pip"])
        if output:
            explain(output, "installing pip into .venv")


def describe(version) -> str:
    return "a Python that does not run" if version is None else f"Python {version[0]}.{version[1]}"


def open_bundle():
    """The folder that BUNDLE names, read and found to fit this machine; None where it names none."""
    if not os.environ.get("BUNDLE"):
        return None
    sys.path.insert(0, str(ROOT))
    from bundle.folder import BundleError, read_bundle

    folder = Path(os.environ["BUNDLE"]).expanduser().resolve()
    try:
        bundle = read_bundle(folder, LOCK)
        bundle.verify(bundle.extras if is_set_up() else bundle.wheels + bundle.extras)
    except BundleError as error:
        fail(str(error))
    return bundle


def make_uv(source: list):
    """uv, at the version the lock names, installed with pip. source: options that say from where."""
    pin = next(line for line in LOCK.read_text().splitlines() if line.startswith("uv=="))
    found = quiet_run([VENV_PYTHON, "-m", "uv", "--version"])
    if found.returncode == 0 and found.stdout.split()[1:2] == [pin.removeprefix("uv==")]:
        return
    pip = [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *source]
    output = run_logged("uv", [*pip, "--retries", "1", "--timeout", "15", pin])
    if output:
        explain(output, "installing uv with pip")


def registry() -> dict:
    """uv reads no pip settings: hand it the index that this network's pip is set to, unless uv has its own."""
    if "UV_DEFAULT_INDEX" in os.environ or "UV_INDEX_URL" in os.environ:
        return {}
    listed = quiet_run([VENV_PYTHON, "-m", "pip", "config", "list"]).stdout
    index = re.findall(r"^\S+\.index-url='(.+)'$", listed, re.MULTILINE)
    return {"UV_DEFAULT_INDEX": index[-1]} if index else {}


def torch_backend(uv: list, env: dict) -> tuple:
    """uv's options for this machine's torch build, and whether that build is a CUDA one.

    Asks uv for a dry run against torch's own index; where that index cannot be reached, or does not have the
    pinned versions, the plain registry serves torch and torchvision both.
    """
    auto = ["--torch-backend=auto"]
    pins = [
        line.split(" ")[0] for line in LOCK.read_text().splitlines() if re.match(r"torch(vision)?==", line)
    ]
    command = [*uv, "--dry-run", "--reinstall", "--no-deps", *auto, *pins]
    try:
        env = env | {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "8"}
        tried = quiet_run(command, timeout=PROBE_LIMIT_S, env=os.environ | env)
    except subprocess.TimeoutExpired:
        tried = None
    if tried is None or tried.returncode:
        return [], sys.platform == "linux"  # the registry's Linux builds of torch are CUDA builds
    return auto, "+cu" in tried.stderr


def install(uv: list, env: dict, backend: list):
    """The pinned packages, then this repository's package, and a look whether torch and torchvision fit."""
    steps = [
        ("packages", [*uv, *backend, "--compile-bytecode", "--requirements", LOCK]),
        ("workshop_utils", [*uv, "--no-deps", "--no-build-isolation", "--editable", ROOT]),
    ]
    for what, command in steps:
        output = run_logged(what, command, **env)
        if output:
            explain(output, f"installing the {what}" if what == "packages" else f"installing {what}")
    pair = [VENV_PYTHON, "-c", "import torchvision; torchvision.ops.nms"]
    if run_logged("torch and torchvision", pair):
        # builds from two places (a CPU torch beside the registry's torchvision): take both anew from one
        names = ["--reinstall-package", "torch", "--reinstall-package", "torchvision"]
        run_logged("torch and torchvision again", [*uv, *backend, *names, "--requirements", LOCK], **env)
        output = run_logged("torch and torchvision", pair)
        if output:
            explain(output, "importing torchvision")


def set_up(bundle):
    """.venv with everything in it, from the bundle or, where that is None, from the network."""
    start_s = time.monotonic()
    LOG.unlink(missing_ok=True)
    check_disk(CPU_INSTALL_GB)
    STAMP.unlink(missing_ok=True)
    source = ["--no-index", "--find-links", bundle.folder / "wheels"] if bundle else []
    make_venv()
    make_uv(source)
    uv = [VENV_PYTHON, "-m", "uv", "pip", "install", "--python", VENV_PYTHON, *source]
    env = {"UV_OFFLINE": "1"} if bundle else registry()
    backend, is_cuda = ([], bundle.is_cuda) if bundle else torch_backend(uv, env)
    check_disk(CUDA_INSTALL_GB if is_cuda else CPU_INSTALL_GB)
    size = "about 6 GB unpacked, CUDA included" if is_cuda else "about 1.3 GB unpacked"
    print(f"setup: installing the pinned packages ({size})", flush=True)
    install(uv, env, backend)
    LAB_SETTINGS.parent.mkdir(parents=True, exist_ok=True)
    LAB_SETTINGS.write_text(json.dumps(QUIET_LAB, indent=2))
    STAMP.write_text(fingerprint())
    print(f"setup: ready after {time.monotonic() - start_s:.0f} s", flush=True)


def is_set_up() -> bool:
    return STAMP.exists() and venv_version() == sys.version_info[:2] and STAMP.read_text() == fingerprint()


def main():
    check_machine()
    bundle = open_bundle()
    if not is_set_up():
        set_up(bundle)
    if bundle and bundle.extras:
        sys.exit(subprocess.call([VENV_PYTHON, "-m", "bundle.unpack", bundle.folder], cwd=ROOT))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; run make again to go on where it stopped")
    except OSError as error:
        explain(str(error), "set-up")
