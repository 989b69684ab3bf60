"""JupyterLab, started by `make lab` in a copy of this tree, and a headless Chromium. Once for all tests of a run.

Screenshots go to build/screenshots, to be looked at.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from chromium import CHROMIUM

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def lab_url(tmp_path_factory):
    """`make lab` in a copy, so that the reader's Ctrl+S in a test cannot change the committed notebooks."""
    tree = tmp_path_factory.mktemp("workshop")
    for name in ("notebooks", "Makefile", "bootstrap.py", "pyproject.toml", "requirements.lock"):
        source = ROOT / name
        shutil.copytree(source, tree / name) if source.is_dir() else shutil.copy(source, tree)
    (tree / "build").mkdir()
    settings = tree / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # All cells stay in the page, so that a test can find those out of sight.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    environment = {
        "BROWSER": "true",  # a browser that opens nothing
        "JUPYTERLAB_SETTINGS_DIR": str(tree / "settings"),
        "JUPYTER_CONFIG_DIR": str(tree / "config"),
        "IPYTHONDIR": str(tree / "ipython"),
        "WORKSHOP_PROGRESS": str(tree / "progress"),
    }
    # The set-up has been done: `make test` begins with it. `-o setup` keeps it from being repeated for the copy.
    (tree / ".venv").symlink_to(ROOT / ".venv")
    log = tree / "lab.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            ["make", "lab", "-o", "setup"],
            cwd=tree,
            stdout=out,
            stderr=out,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        yield _url_in(log, server)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(server.pid, signal.SIGINT)  # the second one means: yes, stop
        try:
            server.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _url_in(log: Path, server) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+/lab\S*token=\w+", log.read_text(errors="replace"))
        if found:
            return found[0]
        assert server.poll() is None, log.read_text(errors="replace")
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab never said where it is:\n{log.read_text(errors='replace')}")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()
