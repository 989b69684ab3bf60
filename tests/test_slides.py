"""The decks of slides/, built and measured in Chromium as `make slides` does it, and the check itself, with bad decks."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("slides_build", ROOT / "slides" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

LACKING = build.missing_tools()
needs_marp = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # a minute on an idle machine
    pytest.mark.skipif(bool(LACKING) and "CI" not in os.environ, reason=f"{LACKING} (CI must have it)"),
]


NOTES = "\n<!--\n1 min. Say it.\n-->\n"
GOOD = f"# Good\n\nShort.\n{NOTES}"
BAD = [
    (
        "# Too much\n\n" + "A sentence that is here to fill the slide.\n\n" * 20 + NOTES,
        "slide {number}, 'Too much': needs",
    ),
    ("# Broad\n\n```\n" + "wide " * 60 + f"\n```\n{NOTES}", "slide {number}, 'Broad': needs"),
    (
        f"# Broken\n\n![a figure](broken.svg)\n{NOTES}",
        "slide {number}, 'Broken': a figure is not loaded: a figure",
    ),
    ("# Silent\n\nNo notes here.\n", 'slide {number}: no notes that begin with "N min."'),
    (f"# Calls\n\n![far](https://192.0.2.1/a.png)\n{NOTES}", "asks the network for https://192.0.2.1/a.png"),
]


@pytest.fixture(scope="module")
def made():
    return subprocess.run(
        [sys.executable, ROOT / "slides" / "build.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )


@pytest.fixture(scope="module")
def chromium(made):
    """After `made`, which installs Marp where it is not there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = build.start_chromium(playwright)
        yield browser
        browser.close()


class TestMade:
    pytestmark = needs_marp

    def test_every_slide_has_room_and_every_figure_is_there(self, made):
        assert made.returncode == 0, made.stderr

    def test_each_deck_is_one_html_file_and_one_pdf(self, made):
        for deck in build.decks():
            html = (build.OUT / f"{deck.stem}.html").read_text()
            assert "../build/figures" not in html and 'src="http' not in html
            assert (build.OUT / f"{deck.stem}.pdf").read_bytes().startswith(b"%PDF")

    def test_each_bad_slide_is_named(self, chromium, tmp_path):
        problems = self.problems_of(chromium, tmp_path, GOOD, *(slide for slide, _ in BAD))
        for number, (_, complaint) in enumerate(BAD, start=2):
            assert any(complaint.format(number=number) in problem for problem in problems), (
                complaint,
                problems,
            )
        assert not any("slide 1," in problem for problem in problems), problems

    def test_a_good_slide_passes(self, chromium, tmp_path):
        assert self.problems_of(chromium, tmp_path, GOOD, GOOD) == []

    def problems_of(self, chromium, folder, *slides):
        deck = folder / "deck.md"
        deck.write_text(
            f"---\nmarp: true\ntheme: workshop\nminutes: {len(slides)}\n---\n\n" + "\n---\n\n".join(slides)
        )
        (folder / "broken.svg").write_text("<svg")
        return build.check_deck(deck, build.make_html(deck, folder), chromium)


def test_a_figure_that_is_not_there_is_named(tmp_path):
    with pytest.raises(build.SlidesError, match=r"bad\.md shows \.\./build/figures/no_such\.svg"):
        build.inlined('<img src="../build/figures/no_such.svg">', tmp_path / "bad.md")


def test_without_node_a_line_says_what_to_do():
    done = subprocess.run(
        [sys.executable, ROOT / "slides" / "build.py"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": str(Path(sys.executable).parent)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("slides: node and npm are not installed") and done.stderr.count("\n") == 1


def test_a_deck_whose_minutes_do_not_add_up_is_named(tmp_path):
    deck = tmp_path / "deck.md"
    deck.write_text("---\nmarp: true\nminutes: 3\n---\n\n# One\n\n<!--\n1 min. So.\n-->\n")
    assert build.note_problems(deck) == ["the notes add up to 1 minutes, the front matter says 3"]


def test_decks_take_the_minutes_of_their_talks():
    promised = {deck.stem: deck.read_text().partition("\nminutes: ")[2].split()[0] for deck in build.decks()}
    assert promised["scatter_the_learning"] == "180" and promised["geometry_of_fine_tuning"] == "30"
    assert all(build.note_problems(deck) == [] for deck in build.decks())


def test_the_lock_names_versions_and_no_addresses():
    lock = (ROOT / "slides" / "package-lock.json").read_text()
    assert '"integrity"' in lock and '"resolved"' not in lock


def recorded(name: str) -> dict:
    return json.loads((ROOT / "workshop_utils" / f"recorded_{name}.json").read_text())


def rows_about_sharding() -> dict[str, list[str]]:
    strategies = recorded("fsdp_qlora")["strategies"]
    sent = {(row["strategy"], row["method"]): row["sent_bytes"] / 1e6 for row in strategies}
    slow = {row[0]: f"{1e3 * row[1]:.0f}" for row in recorded("fsdp")["mitigations"]}
    return {
        "fsdp_and_qlora": [
            f"| full | {sent['ddp', 'full']:.0f} | {sent['fsdp', 'full']:.0f} |",
            f"| LoRA | {sent['ddp', 'lora']:.1f} | {sent['fsdp', 'lora']:.0f} |",
            f"| QLoRA | {sent['ddp', 'qlora']:.1f} | {sent['fsdp', 'qlora']:.0f} |",
        ],
        "scatter_the_learning": [
            f"| FSDP, a unit per layer | {slow['nothing']} |",
            f"| keep units whole after forward | {slow['reshard_after_forward=False']} |",
            f"| units of 4 layers | {slow['units of 4 layers']} |",
            f"| one unit | {slow['one unit']} |",
            f"| data parallel, if it fits | {slow['DataParallel']} |",
        ],
    }


def rows_about_parameters() -> list[str]:
    before, merging = recorded("lora")["before"], recorded("inference")["merging"]
    rows = [
        f"| is it an 8 or a 9? | {before['8 or 9']:.1%} |",
        f"| is it even or odd? | {before['even or odd']:.1%} |",
    ]
    for label, name in (
        ("not merged", "unmerged"),
        ("merged into bfloat16", "merged, bfloat16"),
        ("merged, then NF4 again", "merged, NF4 again"),
    ):
        rows.append(f"| {label} | {merging[name]['exact_match']['test']:.0%} |")
    for label, name in (
        ("LoRA on float32", "lora seed 0"),
        ("QLoRA", "qlora seed 0"),
        ("QLoRA, PEFT + bitsandbytes", "peft bitsandbytes seed 0"),
    ):
        run = recorded("qlora")["runs"][name]
        base_mb = (run["model_bytes"] - run["adapter_bytes"]) / 1e6
        rows.append(
            f"| {label} | {base_mb:.0f} MB | {run['step_s']:.1f} s | {run['exact_match']['test']:.0%} |"
        )
    return rows


def rows_about_subspaces() -> list[str]:
    labels = {
        "LoRA": "LoRA, r = 1",
        "subspace of factors": "subspace of LoRA's factors",
        "full": "all 199,210 trained",
    }
    return [
        f"| {labels.get(row['method'], row['method'])} | {row['flops_per_step'] / 1e6:.1f} | {1e3 * row['step_s']:.1f} "
        f"| {mean(curve[-1] for curve in row['curve']):.1%} |"
        for row in recorded("lora_as_subspace")["rows"]
        if row["start"] == "pre-trained"
        and row["budget"] in (1594, 199_210)
        and "scales" not in row["method"]
    ]


def test_tables_show_the_recorded_numbers():
    """So that a new recording is not forgotten on the slides."""
    shown = rows_about_sharding() | {
        "fewer_parameters": rows_about_parameters(),
        "geometry_of_fine_tuning": rows_about_subspaces(),
    }
    for deck, rows in shown.items():
        text = (ROOT / "slides" / f"{deck}.md").read_text().replace("**", "")
        assert [row for row in rows if row not in text] == [], deck
