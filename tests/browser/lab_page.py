"""One notebook, open in JupyterLab in a headless Chromium, as a reader handles it: mouse, keys, menus."""

import re
import time
from pathlib import Path

SHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"


IDLE = ".jp-NotebookPanel-toolbar [data-status='idle']"
FORGOTTEN_S = 20  # an idle kernel and a cell without a star for as long: nobody will run it


class NotRun(AssertionError):
    """A cell was never run: an earlier one failed, or the page lost it."""


class LabPage:
    """One notebook, open in JupyterLab. `close` shuts its kernel down, too."""

    def __init__(self, browser, url: str, notebook: str):
        self.stem = notebook.removesuffix(".ipynb")
        base, token = re.match(r"(http://[^/]+)/.*(token=\w+)", url).groups()
        self.page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        self.page.goto(f"{base}/lab/tree/{notebook}?{token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        self.page.wait_for_selector(IDLE, timeout=90_000)
        self.cells = self.page.locator(".jp-Notebook .jp-CodeCell")
        seen = 0  # cells are added to the page bit by bit
        while seen < self.cells.count():
            seen = self.cells.count()
            self.page.wait_for_timeout(1000)

    def close(self) -> None:
        """Shut the kernel down and close the page."""
        self.menu("Kernel", "Shut Down Kernel")
        self.page.wait_for_timeout(500)
        self.page.context.close()

    # -- cells

    def index_of(self, text: str) -> int:
        """The number of the first code cell whose source contains `text`."""
        for i, source in enumerate(self.sources()):
            if text in source:
                return i
        raise AssertionError(f"no code cell contains {text!r}")

    def sources(self) -> list[str]:
        """The source of each code cell."""
        return self.cells.evaluate_all(
            "cells => cells.map(c => [...c.querySelectorAll('.cm-line')].map(l => l.textContent).join('\\n'))"
        )

    def source(self, i: int) -> str:
        return self.sources()[i]

    def replace(self, i: int, source: str) -> None:
        self.cells.nth(i).locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(source)

    def add(self, source: str) -> int:
        """A new cell at the end; its number."""
        self.cells.last.locator(".cm-content").click()
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("b")
        self.page.wait_for_timeout(300)
        last = self.cells.count() - 1
        self.replace(last, source)
        return last

    def start(self, i: int) -> str:
        """Run a cell with Ctrl+Enter, without waiting; what its prompt showed before."""
        cell = self.cells.nth(i)
        cell.locator(".cm-content").click()
        before = cell.locator(".jp-InputPrompt").text_content()
        self.page.keyboard.press("Control+Enter")
        return before

    def run(self, i: int, timeout_s: float = 90) -> str:
        """Run a cell with Ctrl+Enter and wait for its end; the text of its outputs."""
        self.wait(i, timeout_s, self.start(i))
        self.page.wait_for_timeout(300)  # the number and the last output come by two channels
        return self.output(i)

    def wait(self, i: int, timeout_s: float, before: str = "") -> None:
        """Until the cell's prompt shows a number again, instead of a star: another one than `before`."""
        prompt = self.cells.nth(i).locator(".jp-InputPrompt")
        end, forgotten = time.monotonic() + timeout_s, time.monotonic() + FORGOTTEN_S
        while (shown := prompt.text_content()) == before or not re.search(r"\d", shown):
            if "*" in shown or not self.page.locator(IDLE).count():
                forgotten = time.monotonic() + FORGOTTEN_S
            if time.monotonic() > forgotten:
                self.shot("stuck")
                raise NotRun(f"cell {i} was not run. Errors: {self.errors()}")
            if time.monotonic() > end:
                self.shot("stuck")
                raise AssertionError(f"cell {i} still runs after {timeout_s} s: {self.source(i)}")
            self.page.wait_for_timeout(100)

    def output(self, i: int) -> str:
        return "\n".join(self.cells.nth(i).locator(".jp-OutputArea-output").all_text_contents())

    def wait_for_output(self, i: int, text: str, timeout_s: float = 30) -> None:
        """Until the cell's output contains `text`."""
        end = time.monotonic() + timeout_s
        while text not in self.output(i):
            assert time.monotonic() < end, f"cell {i} never showed {text!r}, but: {self.output(i)}"
            self.page.wait_for_timeout(100)

    def errors(self) -> list[str]:
        """The text of each traceback that stands under a cell. JupyterLab 4.6 shows one as it shows stderr."""
        red = "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"
        failed = re.compile(r"^Traceback \(most|^\w*(Error|Exception|Interrupt|Exit)\b", re.MULTILINE)
        return [text for text in self.page.locator(red).all_text_contents() if failed.search(text)]

    # -- menus

    def menu(self, *labels: str) -> None:
        """Choose from the menu bar: menu("Run", "Run All Cells"), with or without the dots at the end."""
        self.page.click(f".lm-MenuBar-itemLabel:text-is('{labels[0]}')")
        for label in labels[1:]:
            entry = self.page.locator(f".lm-Menu-itemLabel:text-matches('^{label}…?$')").last
            entry.hover()
            if label == labels[-1]:
                entry.click()

    def run_all(self, timeout_s: float) -> None:
        self.menu("Run", "Run All Cells")
        try:
            self.wait_for_last(timeout_s)
        except NotRun:  # a busy machine: the page lost its kernel for a moment, and with it what was to run
            if self.errors():
                raise
            print(f"{self.stem}: Run All was lost and is asked for again")
            self.menu("Run", "Run All Cells")
            self.wait_for_last(timeout_s)

    def restart_and_run_all(self, timeout_s: float) -> None:
        """Kernel, Restart Kernel and Run All Cells, and yes."""
        last = self.cells.count() - 1
        before = self.cells.nth(last).locator(".jp-InputPrompt").text_content()
        self.menu("Kernel", "Restart Kernel and Run All Cells")
        self.page.click(".jp-Dialog button.jp-mod-accept")
        self.page.wait_for_timeout(1000)
        self.wait_for_last(timeout_s, before)

    def wait_for_last(self, timeout_s: float, before: str = "") -> None:
        """Until the last cell has run and all output has come: the number and the output come by two channels."""
        self.wait(self.cells.count() - 1, timeout_s, before)
        self.page.wait_for_selector(IDLE, timeout=30_000)
        self.page.wait_for_timeout(1000)

    def theme(self, name: str) -> None:
        """ "JupyterLab Light" or "JupyterLab Dark"."""
        self.menu("Settings", "Theme", name)
        self.page.wait_for_selector(f"body[data-jp-theme-name='{name}']", state="attached", timeout=30_000)
        self.page.wait_for_timeout(500)

    # -- widgets

    def picture(self, i: int):
        """The picture of the widget under cell i."""
        picture = self.cells.nth(i).locator("img.widget-image")
        picture.wait_for(timeout=30_000)
        return picture

    def changes(self, i: int, act, *args) -> float:
        """Do `act(*args)`, wait until the picture under cell i is another one; the seconds that this took."""
        picture = self.picture(i)
        before = picture.get_attribute("src")
        began_s = time.monotonic()
        act(*args)
        while (
            picture.get_attribute("src") == before
        ):  # the limit is for a machine that is busy with other things
            assert time.monotonic() < began_s + 20, f"the picture stayed: {self.source(i)}"
            self.page.wait_for_timeout(20)
        return time.monotonic() - began_s

    def settle(self, i: int) -> None:
        """Until the picture has stayed the same for a while: a drag draws at several places."""
        picture, before = self.picture(i), None
        while before != (before := picture.get_attribute("src")):
            self.page.wait_for_timeout(700)

    def press(self, *keys: str) -> None:
        """One key after the other, with time for a list to open."""
        for key in keys:
            self.page.keyboard.press(key)
            self.page.wait_for_timeout(150)

    def drag(self, handle, dx: float) -> None:
        """Pull a slider's handle with the mouse, `dx` pixels to the right."""
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + dx, y, steps=6)
        self.page.mouse.up()

    def shot(self, name: str, i: int | None = None) -> None:
        """A picture of the page, or of cell i, of which a widget alone is shown if it has one."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        target = self.page if i is None else self.cells.nth(i)
        if i is not None:
            widget = target.locator(
                ".jp-OutputArea-output > .widget-vbox, .jupyter-widgets-view > .widget-vbox"
            )
            target = widget.first if widget.count() else target
            target.scroll_into_view_if_needed()
        target.screenshot(path=SHOTS / f"{name}.png")
