"""Notebooks 01 to 08 in JupyterLab, unsolved: Run All shows no error; every widget follows mouse and keys, in both themes.

This is the run of the learner's versions (tests/test_notebooks.py leaves them out where a browser is). A page is opened
once: all tests of one notebook use it, then it is closed.
"""

import statistics

import pytest
from lab_page import SHOTS, LabPage

from chromium import MARKS
from test_notebooks import STEMS

pytestmark = MARKS

WIDGETS = {
    "02_all_reduce": ("all_reduce_stepper", "alpha_beta"),
    "03_distributed_data_parallel": ("bucket_timeline",),
    "04_fully_sharded_data_parallel": ("memory_bill",),
    "05_lora": ("lora_rank",),
    "06_intrinsic_dimension": ("intrinsic_dimension",),
    "07_qlora": ("quantization_explorer",),
    "08_fsdp_and_qlora": ("planner",),
}
SLIDERS = (
    ".noUi-target:not([disabled]) .noUi-handle"  # the planner's length is an image's own, with a vision model
)
SHOWN = {"02_all_reduce": ("rank 0 sent tensor([3., 1., 4.])", "in recv (from rank 3)")}


@pytest.fixture(scope="module", params=STEMS[1:])
def lab(request, browser, lab_url):
    page = LabPage(browser, lab_url, f"{request.param}.ipynb")
    page.run_all(timeout_s=560)
    yield page
    page.close()


def test_run_all_shows_no_error(lab):
    assert lab.errors() == []
    shown = "\n".join(lab.output(i) for i in range(lab.cells.count()))
    for text in ("not solved yet", *SHOWN.get(lab.stem, ())):
        assert text in shown


def test_each_widget_follows_mouse_and_keys(lab):
    names = WIDGETS.get(lab.stem, ())
    assert lab.page.locator("img.widget-image").count() == len(names)
    cells = {name: lab.index_of(f"\n{name}(") for name in names}
    for name, i in cells.items():
        lab.shot(f"{lab.stem[:2]}-{name}-start", i)
        times_s = [*moved_by_keys(lab, i), *moved_by_mouse(lab, i)]
        print(
            f"{name}: {1e3 * statistics.median(times_s):.0f} ms from key or mouse to picture, in the browser"
        )
        lab.settle(i)
        lab.shot(f"{lab.stem[:2]}-{name}-moved", i)
    if cells:
        lab.theme("JupyterLab Dark")
        for name, i in cells.items():
            lab.shot(f"{lab.stem[:2]}-{name}-dark", i)
        lab.theme("JupyterLab Light")
    assert all((SHOTS / f"{lab.stem[:2]}-{name}-dark.png").exists() for name in names)


def controls(lab, i: int, selector: str) -> list:
    found = lab.cells.nth(i).locator(selector)
    return [found.nth(k) for k in range(found.count())]


def moved_by_keys(lab, i: int) -> list[float]:
    """Every control once; the seconds until the picture changed, where one key does it.

    A slider by its arrow keys, a check box by the space bar. A list opens with the space bar: JupyterLab takes an arrow
    key on a closed one for itself, to go to the next cell.
    """
    times_s = []
    for select in controls(lab, i, ".widget-dropdown select"):
        last = select.evaluate("s => s.selectedIndex == s.options.length - 1")
        select.focus()
        lab.changes(i, lab.press, "Space", "ArrowUp" if last else "ArrowDown", "Enter")
    for handle in controls(lab, i, SLIDERS):
        last = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        handle.focus()
        times_s.append(lab.changes(i, lab.page.keyboard.press, "ArrowLeft" if last else "ArrowRight"))
    for box in controls(lab, i, "input[type=checkbox]"):
        box.focus()
        times_s.append(lab.changes(i, lab.page.keyboard.press, "Space"))
    return times_s


def moved_by_mouse(lab, i: int) -> list[float]:
    """Every control once, by the mouse: lists are chosen from, sliders dragged, boxes clicked."""
    times_s = []
    for select in controls(lab, i, ".widget-dropdown select"):
        other = select.evaluate("s => (s.selectedIndex + 1) % s.options.length")
        times_s.append(lab.changes(i, lambda select=select, index=other: select.select_option(index=index)))
    for handle in controls(lab, i, SLIDERS):
        low, now, high = (float(handle.get_attribute(f"aria-value{end}")) for end in ("min", "now", "max"))
        lab.settle(i)
        lab.changes(i, lab.drag, handle, 90 if now - low < high - now else -90)
        lab.settle(i)
    for box in controls(lab, i, "input[type=checkbox]"):
        times_s.append(lab.changes(i, box.click))
    return times_s
