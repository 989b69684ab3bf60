"""What a reader sees: JupyterLab, started by `make lab` in a copy of this tree, driven in headless Chromium.

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

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "build" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.alone,
    pytest.mark.browser,
    pytest.mark.timeout(420),
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ, reason="no Chromium here (CI must have one)"
    ),
]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class LabPage:
    """One notebook, open in JupyterLab."""

    def __init__(self, browser, url: str, notebook: str):
        base, token = re.match(r"(http://[^/]+)/.*(token=\w+)", url).groups()
        self.page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        self.page.goto(f"{base}/lab/tree/{notebook}?{token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        self.page.wait_for_selector(".jp-NotebookPanel-toolbar [data-status='idle']", timeout=90_000)
        self.cells = self.page.locator(".jp-Notebook .jp-CodeCell")
        seen = 0  # cells are added to the page bit by bit
        while seen < self.cells.count():
            seen = self.cells.count()
            self.page.wait_for_timeout(1000)

    def index_of(self, text: str) -> int:
        """The number of the first code cell whose source contains `text`."""
        for i in range(self.cells.count()):
            if text in self.source(i):
                return i
        raise AssertionError(f"no code cell contains {text!r}")

    def source(self, i: int) -> str:
        lines = self.cells.nth(i).locator(".cm-line").all_text_contents()
        return "\n".join(lines)

    def replace(self, i: int, source: str) -> None:
        self.cells.nth(i).locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(source)

    def run(self, i: int, timeout_s: float = 90) -> str:
        """Run a cell with Ctrl+Enter and wait for its end; the text of its outputs."""
        cell = self.cells.nth(i)
        cell.locator(".cm-content").click()
        before = cell.locator(".jp-InputPrompt").text_content()
        self.page.keyboard.press("Control+Enter")
        self.wait(i, timeout_s, before)
        self.page.wait_for_timeout(300)  # the number and the last output come by two channels
        return self.output(i)

    def run_all(self, timeout_s: float) -> None:
        self.page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        self.page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        self.wait(self.cells.count() - 1, timeout_s)

    def wait(self, i: int, timeout_s: float, before: str = "") -> None:
        """Until the cell's prompt shows a number again, instead of a star: another one than `before`."""
        prompt = self.cells.nth(i).locator(".jp-InputPrompt")
        end = time.monotonic() + timeout_s
        while (shown := prompt.text_content()) == before or not re.search(r"\d", shown):
            if time.monotonic() > end:
                self.shot("stuck")
                raise AssertionError(f"cell {i} still runs after {timeout_s} s: {self.source(i)}")
            self.page.wait_for_timeout(100)

    def output(self, i: int) -> str:
        return "\n".join(self.cells.nth(i).locator(".jp-OutputArea-output").all_text_contents())

    def shot(self, name: str, i: int | None = None) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        target = self.page if i is None else self.cells.nth(i)
        if i is not None:
            target.scroll_into_view_if_needed()
        target.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture(scope="module")
def start_here(browser, lab_url):
    return LabPage(browser, lab_url, "00_start_here.ipynb")


def test_the_first_notebook_runs_from_top_to_bottom(start_here):
    start_here.run_all(timeout_s=240)
    shown = "\n".join(start_here.output(i) for i in range(start_here.cells.count()))
    assert "I am rank 3 of 4" in shown
    assert "not solved yet" in shown and "rank 2 failed" in shown
    assert (
        start_here.page.locator(
            ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"
        ).count()
        == 0
    )
    start_here.shot("00-ranks", start_here.index_of("I am rank"))
    start_here.shot("00-error", start_here.index_of("1 / 0"))
    start_here.shot("00-check", start_here.index_of('check("0.1"'))


def test_an_exercise_is_solved_wrong_then_right(start_here):
    i = start_here.index_of('check("0.1"')
    start_here.replace(
        i, 'def tensor_bytes(tensor):\n    return 4 * tensor.numel()\ncheck("0.1", tensor_bytes)'
    )
    assert "expected" in start_here.run(i)
    start_here.shot("00-wrong", i)
    right = "def tensor_bytes(tensor):\n    return tensor.nbytes\n"
    start_here.replace(i, f'{right}check("0.1", tensor_bytes)')
    assert "passed" in start_here.run(i).lower()
    start_here.shot("00-right", i)


def test_the_stop_button_frees_a_deadlock(start_here):
    first = start_here.index_of("ranks = start_ranks(4)")
    start_here.run(first)
    i = start_here.index_of("I am rank")
    start_here.replace(i, "%%ranks\nif rank:\n    dist.barrier()")
    start_here.cells.nth(i).locator(".cm-content").click()
    start_here.page.keyboard.press("Control+Enter")
    start_here.page.wait_for_timeout(2500)
    start_here.shot("00-live", i)
    assert "waiting" in start_here.output(i)
    start_here.page.click("[data-command='notebook:interrupt-kernel'], jp-button[title^='Interrupt']")
    start_here.wait(i, timeout_s=15)
    assert "all ranks were stopped" in start_here.output(i)
    start_here.shot("00-interrupted", i)
    start_here.replace(i, "%%ranks\nx = torch.ones(1)\ndist.all_reduce(x)\nx")
    assert "tensor([4.])" in start_here.run(i)


def test_the_memory_bill_follows_the_slider_and_the_model(start_here):
    """Notebook 04's widget, in a cell of notebook 00: the whole of 04 takes a minute."""
    i = 1
    start_here.replace(
        i, "from workshop_utils.widgets import memory_bill\nmemory_bill(7_500_000_000, world_size=64)"
    )
    start_here.run(i)
    cell = start_here.cells.nth(i)
    picture, handle = cell.locator("img.widget-image"), cell.locator(".noUi-handle")
    picture.wait_for(timeout=30_000)
    start_here.shot("04-memory-bill", i)
    before = picture.get_attribute("src")
    start = handle.bounding_box()
    start_here.page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    start_here.page.mouse.down()
    start_here.page.mouse.move(start["x"] - 120, start["y"] + start["height"] / 2, steps=5)
    start_here.page.mouse.up()
    changed(start_here.page, picture, before)
    start_here.page.wait_for_timeout(1000)  # until the last of the steps that it was dragged over is drawn
    before = picture.get_attribute("src")
    cell.locator("select").select_option("70 B")
    changed(start_here.page, picture, before)
    before = picture.get_attribute("src")
    handle.focus()
    start_here.page.keyboard.press("ArrowRight")
    changed(start_here.page, picture, before)
    start_here.shot("04-memory-bill-70B", i)


def test_nothing_asks_the_reader_for_permission_to_phone_home(start_here):
    assert start_here.page.locator(".Toastify__toast").count() == 0


def test_a_wrong_token_is_refused(browser, lab_url):
    page = browser.new_context().new_page()
    page.goto(re.sub(r"token=\w+", "token=wrong", lab_url))
    page.wait_for_selector("input[type=password]", timeout=30_000)
    assert page.locator(".jp-Notebook").count() == 0


@pytest.fixture(scope="module")
def all_reduce(browser, lab_url):
    page = LabPage(browser, lab_url, "02_all_reduce.ipynb")
    page.run_all(timeout_s=300)
    return page


def test_the_all_reduce_notebook_shows_its_cells_and_no_error(all_reduce):
    errors = all_reduce.page.locator("[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0
    i = all_reduce.index_of("dist.send(torch.tensor")
    assert "rank 0 sent tensor([3., 1., 4.])" in all_reduce.output(i)
    all_reduce.shot("02-ranks", i)
    assert "in recv (from rank 3)" in all_reduce.output(all_reduce.index_of("--expect-error"))


def test_the_slider_steps_through_the_ring(all_reduce):
    i = all_reduce.index_of("all_reduce_stepper")
    cell = all_reduce.cells.nth(i)
    cell.scroll_into_view_if_needed()
    picture, handle = cell.locator("img.widget-image"), cell.locator(".noUi-handle")
    before = picture.get_attribute("src")
    all_reduce.shot("02-stepper-start", i)
    start = handle.bounding_box()
    all_reduce.page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    all_reduce.page.mouse.down()
    all_reduce.page.mouse.move(start["x"] + 400, start["y"] + start["height"] / 2, steps=8)
    all_reduce.page.mouse.up()
    changed(all_reduce.page, picture, before)
    all_reduce.page.wait_for_timeout(1500)  # until the last of the steps that it was dragged over is drawn
    assert handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax") == "6.0"
    all_reduce.shot("02-stepper-end", i)
    last = picture.get_attribute("src")
    handle.focus()
    all_reduce.page.keyboard.press("ArrowLeft")
    changed(all_reduce.page, picture, last)
    assert handle.get_attribute("aria-valuenow") == "5.0"


def changed(page, picture, before: str) -> None:
    """Wait until the widget shows another picture; the limit is for a machine that is busy with other things."""
    end = time.monotonic() + 20
    while picture.get_attribute("src") == before:
        assert time.monotonic() < end, "the slider moved, and the picture stayed"
        page.wait_for_timeout(50)


def test_a_wrong_ring_is_told_what_is_wrong_with_it(all_reduce):
    i = all_reduce.index_of('check("2.1"')
    wrong = "def pass_right(tensor):\n    return tensor\ncheck('2.1', pass_right)"
    all_reduce.run(all_reduce.index_of("ranks = start_ranks(4)"))
    all_reduce.replace(i, wrong)
    words = all_reduce.run(i)
    assert "not right yet" in words and "expected" in words and "rank" in words
    all_reduce.shot("02-wrong", i)
