"""README, changelog, citation and gallery say what the rest of the repository says."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = README[README.index("## The map") : README.index("## What is measured")]
ROWS = re.findall(
    r"^\| \[(\d\d) .*?\]\(notebooks/(\w+)\.ipynb\) \| (.*?) \| (\d+) \| (.*?) \|$", MAP, re.MULTILINE
)

_spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
gallery = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gallery)


def test_the_map_has_every_notebook():
    assert [stem for _, stem, *_ in ROWS] == sorted(path.stem for path in ROOT.glob("notebooks/src/0*.py"))


@pytest.mark.parametrize(
    ("number", "stem", "question", "minutes", "needs"), ROWS, ids=[row[1] for row in ROWS]
)
def test_the_map_says_what_the_notebook_says(number, stem, question, minutes, needs):
    source = (ROOT / "notebooks" / "src" / f"{stem}.py").read_text(encoding="utf-8")
    top = re.sub(r"\s+", " ", source[: source.index("# %%", 10)].replace("\n# ", " "))
    assert f"**{question}**" in top
    assert re.search(rf"\b{minutes} minutes\b", top)
    sentence = re.search(r"It builds on (?:.*?)(?:\. |\.$|$)", top)[0]
    sentence = re.sub(r"\(\w+\.ipynb\)", "", sentence)
    named = set(re.findall(r"\b0\d\b", sentence)) - {number}
    assert set(re.findall(r"\b0\d\b", needs)) == named, sentence


def test_version_and_date_are_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(
        r"^## \[(.*?)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert newest.groups() == (version, citation["date-released"]) and citation["version"] == version
    assert citation["title"] == README.splitlines()[0].removeprefix("# ")
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation[
        "license"
    ] == "Apache-2.0"


def test_the_figures_of_the_last_notebooks_are_those_recorded():
    kept = json.loads((ROOT / "workshop_utils" / "recorded_qlora.json").read_text(encoding="utf-8"))
    said = " ".join(README.split())
    count, runs = kept["settings"]["test_records"], kept["runs"]
    before, after = (
        round(count * row["exact_match"]["test"]) for row in (kept["base"], runs["qlora seed 0"])
    )
    assert after == round(count * runs["lora seed 0"]["exact_match"]["test"])
    assert f"Of {count} held-out records, {before} are right before and {after} after" in said
    assert f"{kept['settings']['steps']} steps of QLoRA, a minute and a half" in said
    assert 80 <= kept["settings"]["steps"] * runs["qlora seed 0"]["step_s"] <= 100
    for run, words in (("qlora seed 0", "in 4 bits"), ("lora seed 0", "in float32")):
        size_mb = (runs[run]["model_bytes"] - runs[run]["adapter_bytes"]) / 1e6
        assert f"{words} ({size_mb:.0f} MB)" in said


def test_the_short_table_has_its_place():
    begin, end = README.index("<!-- bench:begin -->\n"), README.index("<!-- bench:end -->\n")
    assert begin < end and README.count("<!-- bench:") == 2


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_the_gallery_shows_what_the_notebooks_show(name):
    kept = (gallery.FOLDER / f"{name}.png").read_bytes()
    assert kept == gallery.picture(*gallery.PICTURES[name]), "run: python docs/gallery.py"


def test_the_gallery_is_complete_and_small():
    files = {path.stem: path.stat().st_size for path in gallery.FOLDER.iterdir()}
    shown = re.findall(
        r"^!\[(.+)\]\(gallery/(\w+)\.png\)$", (ROOT / "docs/GALLERY.md").read_text(), re.MULTILINE
    )
    assert set(files) == set(gallery.PICTURES) == {name for _, name in shown}
    assert all(len(words) > 30 for words, _ in shown)  # what somebody hears who does not see
    assert sum(path.stat().st_size for path in ROOT.glob("docs/**/*.png")) < 1_500_000
