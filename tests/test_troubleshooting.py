"""docs/TROUBLESHOOTING.md quotes what is really said: each quoted message still stands in the code.

Under each quotation stand comments `<!-- where | words -->`. `words` are in the quotation; where `where` is a file of
ours they are in it, too.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
OTHERS = {"bash", "JupyterLab", "IPython", "Python", "docs"}  # "docs": what the reader's own code printed
QUOTED = re.findall(r"```text\n(.*?)```\n((?:<!-- .*? -->\n)*)", TEXT, re.DOTALL)
ROWS = [
    (quotation, *place)
    for quotation, places in QUOTED
    for place in re.findall(r"<!-- (\S+) \| (.*?) -->", places)
]


def one_line(text: str) -> str:
    """White space is one blank; where a literal ends and the next line's begins, nothing: Python joins them."""
    return re.sub(r"\s+", " ", re.sub(r"[\"']\n\s*f?[\"']", "", text))


@pytest.mark.parametrize(("quotation", "where", "words"), ROWS, ids=[row[2] for row in ROWS])
def test_the_message_is_still_said(quotation, where, words):
    assert words in one_line(quotation)
    if where not in OTHERS:
        assert words in one_line((ROOT / where).read_text(encoding="utf-8")), f"{where} no longer says it"


def test_every_quotation_has_its_place():
    assert len(QUOTED) >= 20
    bare = [quotation for quotation, places in QUOTED if not places]
    assert not bare, bare


def test_every_symptom_is_in_the_list_at_the_top():
    top, *sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    listed = set(re.findall(r"\]\(#([\w-]+)\)", top))
    symptoms = re.findall(r"^### (.*)$", "".join(sections), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in symptoms}
    assert slugs <= listed and 20 <= len(symptoms)
