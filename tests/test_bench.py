"""The benchmarks' report: everything that shows their numbers is rendered from results.json, in one structure."""

import copy
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

ROOT = Path(__file__).resolve().parents[1]
import cells
import live_ranks
import report
import run
import series
import turns


@pytest.fixture(scope="module")
def results():
    return report.load()


def masked(text: str) -> str:
    """With every number as one sign, so that two texts are equal where only numbers differ."""
    return re.sub(r"\d[\d,.]*\d|\d", "#", text)


def with_other_numbers(value):
    """Everything measured, five times as large and a bit."""
    if isinstance(value, list):
        return [with_other_numbers(each) for each in value]
    if isinstance(value, dict):
        measured = ("value", "median", "low", "high")
        return {k: v * 5.43 + 0.21 if k in measured else with_other_numbers(v) for k, v in value.items()}
    return value


def test_what_is_committed_is_what_results_json_renders_to(results):
    cure = "do not edit it: python benchmarks/report.py writes it from benchmarks/results.json"
    assert (ROOT / "benchmarks/RESULTS.md").read_text() == report.full_text(results), f"RESULTS.md: {cure}"
    readme = (ROOT / "README.md").read_text()
    assert readme == report.with_block(readme, report.short_text(results)), f"README.md's table: {cure}"


def test_every_comparison_was_measured_and_every_ratio_of_the_short_table_is_there(results):
    assert list(results) == run.COMPARISONS
    assert all("median" in cell for _, _, cell in report.short_rows(results))
    assert len({(name, what, beside) for name, what, beside in report.SHORT}) == len(report.SHORT)


def test_other_numbers_change_nothing_but_numbers(results):
    other = with_other_numbers(copy.deepcopy(results))
    for render in (report.full_text, report.short_text):
        assert render(results) == render(copy.deepcopy(results))
        assert render(results) != render(other)
        assert masked(render(results)) == masked(render(other))


@pytest.mark.parametrize("absent", [None, "live_ranks", "series"])
def test_a_comparison_without_numbers_leaves_the_short_table_its_rows(results, absent):
    fewer = {name: section for name, section in results.items() if absent and name != absent}
    lines, whole = report.short_text(fewer).splitlines(), report.short_text(results).splitlines()
    assert len(lines) == len(whole)
    assert [line.split("|")[1:3] for line in lines[:-2]] == [line.split("|")[1:3] for line in whole[:-2]]
    assert "not measured" in report.short_text(fewer)


def test_a_name_that_no_cell_has_is_said(results):
    renamed = copy.deepcopy(results)
    renamed["lora"]["tables"] = []
    with pytest.raises(KeyError, match="no ratio of 'our LoRA.* in lora: correct SHORT"):
        report.short_text(renamed)


def test_the_block_replaces_itself_and_nothing_else():
    text = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    once = report.with_block(text, "| new |")
    assert once == f"above\n{report.BEGIN}\n| new |\n{report.END}\nbelow\n"
    assert report.with_block(once, "| new |") == once


@pytest.mark.parametrize(
    "text", ["", f"{report.BEGIN}", f"{report.END}\n{report.BEGIN}", report.BEGIN * 2 + report.END]
)
def test_a_readme_without_a_place_for_the_block_is_refused(text):
    with pytest.raises(ValueError, match="README.md needs one line <!-- bench:begin -->"):
        report.with_block(text, "")


def test_cells_as_text():
    assert cells.text_of("ring") == "ring"
    assert cells.text_of(cells.number(1234567.0)) == "1,234,570"  # six digits are kept
    assert cells.text_of(cells.number(0.5, 1, " ms")) == "0.5 ms"
    assert cells.text_of(cells.spread([4.0, 1.0, 3.0, 2.0, 5.0], 1, " s")) == "3.0 s (1.5 to 4.5)"
    assert (
        cells.text_of(cells.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 2.0], "ours", "theirs"))
        == "2.00 (2.00 to 3.00)"
    )
    assert cells.text_of(cells.missing("no model")) == "not measured: no model"


def test_turns_alternate_and_the_warm_up_is_left_out():
    calls = []
    steps = [lambda: calls.append("a"), lambda: calls.append("b"), lambda: calls.append("c")]
    times_s = turns.take_turns(steps, 2, repeats=2, before=lambda: calls.append("|"))
    assert [len(times) for times in times_s] == [2, 2, 2] and min(map(min, times_s)) > 0
    rounds = ["|aa|bb|cc", "|bb|cc|aa", "|cc|aa|bb"]
    assert "".join(calls) == "".join((rounds * 2)[: turns.WARM_UP + 2])


def test_the_slowest_rank_counts():
    assert turns.slowest([[[1, 5], [2, 2]], [[3, 4], [1, 9]]]) == [[3, 5], [2, 9]]


def test_the_plot_has_a_dot_for_each_ratio_and_its_labels_do_not_overlap(results):
    rows = [row for row in report.short_rows(results) if "median" in row[2]]
    figure = report.draw([*rows, ("what was not measured", "anything", {"missing": "no network"})])
    (ax,) = figure.axes
    assert list(ax.lines[-1].get_xdata()) == [cell["median"] for _, _, cell in rows]
    (numbers,) = ax.child_axes
    assert numbers.get_yticklabels()[-1].get_text() == "not measured"
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for texts in (ax.get_yticklabels(), numbers.get_yticklabels(), ax.get_xticklabels()):
        boxes = sorted(
            (text.get_window_extent(renderer) for text in texts if text.get_text()),
            key=lambda b: (b.y0, b.x0),
        )
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """run.py and report.py read and write in this folder."""
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    load, save, write = report.load, report.save, report.write
    monkeypatch.setattr(report, "load", lambda: load(tmp_path))
    monkeypatch.setattr(report, "save", lambda results: save(results, tmp_path))
    monkeypatch.setattr(report, "write", lambda results: write(results, tmp_path, tmp_path / "README.md"))
    return tmp_path


def test_named_comparisons_replace_their_sections_and_an_interrupted_run_keeps_what_it_has(
    results, elsewhere, monkeypatch, capsys
):
    (elsewhere / "results.json").write_text(json.dumps(results))

    def again(name):
        if name == "qlora":
            raise KeyboardInterrupt
        return results[name] | {"measured": "Measured just now."}

    monkeypatch.setattr(run, "measured", again)
    with pytest.raises(KeyboardInterrupt):
        run.main(["subspace", "all_reduce", "qlora"])
    after = json.loads((elsewhere / "results.json").read_text())
    assert list(after) == list(results)
    assert {name for name in after if after[name] != results[name]} == {"subspace", "all_reduce"}
    assert (elsewhere / "RESULTS.md").read_text().count("Measured just now.") == 2
    assert (elsewhere / "README.md").read_text().count("gloo") > 0
    assert (elsewhere / "results.png").stat().st_size > 10_000


def test_a_section_says_when_where_and_under_which_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "lora", type("Lora", (), {"run": staticmethod(dict)}))
    assert re.fullmatch(
        r"Measured \d{4}-\d\d-\d\d \d\d:\d\d in 0 s on \d+ cores \(.+\), \w+, Python 3\.\d+\.\d+, torch \S+\. "
        r"Load average before: \d+\.\d\.",
        run.measured("lora")["measured"],
    )


def test_an_unknown_comparison_is_named():
    with pytest.raises(SystemExit, match="unknown comparison gloo: choose from all_reduce, data_parallel"):
        run.main(["lora", "gloo"])


def test_a_contender_that_cannot_be_had_keeps_its_row(monkeypatch):
    trial = {"first_s": 6.0, "empty_s": [0.02], "processes": 5, "left_over": 0}
    monkeypatch.setattr(live_ranks, "trial", lambda *_, **__: trial)
    monkeypatch.setattr(live_ranks, "has_ipyparallel", lambda: True)
    whole = live_ranks.run(rounds=2)
    monkeypatch.setattr(live_ranks, "has_ipyparallel", lambda: False)
    without = live_ranks.run(rounds=2)
    columns = [[row[0] for row in section["tables"][0]["rows"]] for section in (whole, without)]
    assert columns == [["start_ranks", "mp.spawn", "ipyparallel"]] * 2
    assert report.table_text(without["tables"][0]).count("not measured: could not be installed") == 5


def test_a_package_registry_out_of_reach_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(live_ranks, "PACKAGES", tmp_path)
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    assert live_ranks.has_ipyparallel() is False


def test_a_failed_notebook_has_its_row_in_the_series(monkeypatch, tmp_path):
    def run_all(solutions, out):
        return [
            series.run_all.Result("01 · One", "01.html", 20.4, "", ""),
            series.run_all.Result("02 · Two", "02.html", 30.3, "", "DeadKernelError: it died"),
        ]

    monkeypatch.setattr(series.run_all, "run_all", run_all)
    monkeypatch.setenv("WORKSHOP_PROGRESS", str(tmp_path))
    text = report.table_text(series.run()["tables"][0])
    assert "| 01 · One | 20 s |" in text and "| 02 · Two | not measured: DeadKernelError: it died |" in text
    assert "| all | 51 s |" in text
    assert series.os.environ["WORKSHOP_PROGRESS"] == str(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["start_ranks", "mp.spawn"])
def test_a_contender_of_live_ranks(name):
    trial = live_ranks.trial(name, 2, count_orphans=False)
    assert trial["first_s"] > min(trial["empty_s"]) > 0
    assert trial["processes"] >= 3  # the one that starts two others


@pytest.mark.slow
def test_what_a_contender_leaves_is_counted_and_ended(monkeypatch):
    """A contender whose child outlives it, in a session of its own."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    code = child + "start_new_session=True); print('[3.0, 3.0]'); print('[0.1]', flush=True); time.sleep(60)"
    tokens = []

    def start(name, world_size, token, scratch):
        tokens.append(token)
        environment = live_ranks.os.environ | {live_ranks.MARK: token}
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )

    monkeypatch.setattr(live_ranks, "start", start)
    monkeypatch.setattr(live_ranks, "ORPHANS_AFTER_S", 0.5)
    assert live_ranks.trial("anything", 2, count_orphans=True)["left_over"] == 1
    assert not live_ranks.carrying(tokens[0])
