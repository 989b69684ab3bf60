"""Notebook 00 in JupyterLab: Run All, check, hint, solution, progress, the stop button, restart; and who may enter.

The tests use one page, in this order: what one has solved or broken, the next one finds.
"""

import re

import pytest
from lab_page import LabPage

from chromium import MARKS

pytestmark = MARKS


@pytest.fixture(scope="module")
def start_here(browser, lab_url):
    page = LabPage(browser, lab_url, "00_start_here.ipynb")
    yield page
    page.close()


def test_the_first_notebook_runs_from_top_to_bottom(start_here):
    start_here.run_all(timeout_s=240)
    shown = "\n".join(start_here.output(i) for i in range(start_here.cells.count()))
    assert "I am rank 3 of 4" in shown
    assert "not solved yet" in shown and "rank 1 failed" in shown
    assert start_here.errors() == []
    start_here.shot("00-ranks", start_here.index_of("I am rank"))
    start_here.shot("00-error", start_here.index_of("1 / 0"))
    start_here.shot("00-check", start_here.index_of('check("0.1"'))


def test_nothing_asks_the_reader_for_permission_to_phone_home(start_here):
    assert start_here.page.locator(".Toastify__toast").count() == 0


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


def test_hints_unfold_and_are_counted_with_the_solution(start_here):
    folded = start_here.page.locator(".jp-MarkdownCell details").first
    words = folded.locator("p").first
    assert not words.is_visible()
    folded.locator("summary").click()
    assert words.is_visible() and "how many elements there are" in words.text_content()
    start_here.shot("00-hint-unfolded")
    i = start_here.add('hint("0.1")')
    assert "Hint 1 of 3." in start_here.run(i)
    start_here.shot("00-hint", i)
    start_here.replace(i, 'solution("0.1")')
    shown = start_here.run(i)
    assert "A solution of exercise 0.1" in shown and "element_size()" in shown
    start_here.shot("00-solution", i)
    start_here.replace(i, "1 / 0")
    start_here.run(i)
    assert [
        text for text in start_here.errors() if "ZeroDivisionError" in text
    ]  # errors() sees what there is to see
    start_here.replace(i, "progress()")
    assert re.search(r"0\.1\s*How many bytes\?\s*passed [\d :-]+, 1 hint, solution seen", start_here.run(i))
    start_here.shot("00-progress", i)


def test_the_stop_button_frees_a_deadlock(start_here):
    start_here.run(start_here.index_of("ranks = start_ranks(4)"))
    i = start_here.index_of("I am rank")
    start_here.replace(i, "%%ranks\nif rank:\n    dist.barrier()")
    before = start_here.start(i)
    start_here.wait_for_output(i, "waiting")
    start_here.shot("00-live", i)
    start_here.page.click("[data-command='notebook:interrupt-kernel'], jp-button[title^='Interrupt']")
    start_here.wait(i, timeout_s=30, before=before)
    told = start_here.output(i)
    assert "all ranks were stopped" in told
    start_here.shot("00-interrupted", i)
    if (
        "had to be killed" in told
    ):  # a busy machine: a rank had no time to answer. The message says what to do
        start_here.replace(i, "ranks.restart()")
        start_here.run(i)
    start_here.replace(i, "%%ranks\nx = torch.ones(1)\ndist.all_reduce(x)\nx")
    assert "tensor([4.])" in start_here.run(i)


def test_a_wrong_answer_on_ranks_is_told_with_its_rank(start_here):
    i = start_here.index_of('check("0.2"')
    wrong = "def ring_neighbours():\n    rank = dist.get_rank()\n    return rank - 1, rank + 1\n"
    start_here.replace(i, f'{wrong}check("0.2", ring_neighbours)')
    told = start_here.run(i)
    assert "not right yet" in told and "expected" in told and "rank 0" in told
    start_here.shot("00-wrong-on-ranks", i)


def test_after_a_restart_run_all_works_again(start_here):
    start_here.restart_and_run_all(timeout_s=240)
    assert start_here.errors() == []
    assert "passed" in start_here.output(start_here.index_of('check("0.1"')).lower()
    assert "your own answer" not in start_here.output(start_here.index_of('mine("ring_neighbours")'))


def test_a_wrong_token_is_refused(browser, lab_url):
    page = browser.new_context().new_page()
    page.goto(re.sub(r"token=\w+", "token=wrong", lab_url))
    page.wait_for_selector("input[type=password]", timeout=30_000)
    assert page.locator(".jp-Notebook").count() == 0
    page.context.close()
