"""Every link, anchor and picture of the documents resolves, and so do the commands that they name.

External addresses are only looked at. With WORKSHOP_CHECK_URLS=1 each is asked for, too, which needs the internet.
"""

import json
import os
import re
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb")]
MARKDOWN = [
    path
    for folder in (".", "docs", "cluster", "slides", "benchmarks")
    for path in (ROOT / folder).glob("*.md")
]
DOCUMENTS = sorted(MARKDOWN) + sorted(NOTEBOOKS)
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+\"[^\"]*\")?\s*\)")
ATTRIBUTE = re.compile(r"<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")
BARE = re.compile(r"https?://[^\s<>)\"'\]|`]+")


@cache
def text_of(path: Path) -> str:
    """The Markdown of a document; of a notebook, that of its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose(text: str) -> str:
    """Without code blocks, comments and code in the line: nothing there is a link."""
    return CODE.sub("", COMMENT.sub("", FENCE.sub("", text)))


def links(text: str) -> list[str]:
    return LINK.findall(prose(text)) + ATTRIBUTE.findall(prose(text))


@cache
def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces, -1 for the second."""
    found: dict[str, int] = {}
    result = set()
    for line in FENCE.sub("", COMMENT.sub("", text_of(path))).splitlines():
        heading = re.match(r" {0,3}#{1,6}\s+(.*?)\s*#*$", line)
        if heading:
            words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").replace("*", "")
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            count = found[slug] = found.get(slug, -1) + 1
            result.add(slug if count == 0 else f"{slug}-{count}")
    return result


def problem(path: Path, target: str) -> str | None:
    """What is wrong with a link that leads to another file or place of the repository."""
    place, _, anchor = target.partition("#")
    file = (path.parent / unquote(place)).resolve() if place else path
    drawn = re.search(r"build/figures/(\w+)\.svg$", place)
    if drawn:  # `make figures` draws it: a function of that name
        known = "".join(
            (ROOT / "slides" / name).read_text() for name in ("figures.py", "fine_tuning_figures.py")
        )
        return None if f"def {drawn[1]}()" in known else "no function of that name draws it"
    if not file.is_relative_to(ROOT):
        return "leads out of the repository"
    if not file.exists():
        return "no such file"
    if anchor and file.suffix in (".md", ".ipynb") and anchor not in anchors(file):
        return f"no such heading; near: {sorted(a for a in anchors(file) if a[:4] == anchor[:4])}"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_link_resolves(path):
    wrong = []
    for target in links(text_of(path)):
        if not urlsplit(target).scheme and (said := problem(path, target)):
            wrong.append(f"{target}: {said}")
    assert not wrong, "\n".join(wrong)


def addresses(path: Path) -> set[str]:
    text = COMMENT.sub("", FENCE.sub("", text_of(path)))
    outside = {target for target in links(text) if urlsplit(target).scheme}
    return outside | {found.rstrip(".,;:") for found in BARE.findall(CODE.sub("", text))}


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_address_is_well_formed(path):
    for address in addresses(path):
        parts = urlsplit(address)
        assert parts.scheme == "https" and re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), address


@pytest.mark.skipif(
    "WORKSHOP_CHECK_URLS" not in os.environ, reason="asks the internet: WORKSHOP_CHECK_URLS=1"
)
def test_every_address_answers():
    dead = []
    for address in sorted(set().union(*map(addresses, DOCUMENTS))):
        request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
        try:
            urllib.request.urlopen(request, timeout=20).close()
        except (OSError, urllib.error.URLError) as error:
            if getattr(error, "code", None) not in (403, 429):  # it is there, and does not like programs
                dead.append(f"{address}: {error}")
    assert not dead, "\n".join(dead)


MAKE = re.compile(r"(?:^[ `]*|&& |\w=\S+ )make (?:[A-Z]+=\S+ )*([a-z][a-z-]*)", re.MULTILINE)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", sorted(MARKDOWN), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_code_exists(path):
    """`make x` is a target; the file of `python path.py` is there."""
    text = text_of(path)
    code = [match[0] for match in FENCE.finditer(text)] + [
        match[0] for match in CODE.finditer(FENCE.sub("", text))
    ]
    for piece in code:
        for target in re.findall(MAKE, "" if piece.startswith("```text") else piece):
            assert target in TARGETS, f"make {target}"
        for file in re.findall(r"\bpython3? ([\w./]+\.py)\b", piece):
            assert (ROOT / file).exists(), f"python {file}"


def test_the_parsing_of_links():
    text = (
        'See [a](b.md#c), ![d](e.png "f"), [![badge](g.svg)](h.md), `[no](code.md)`.\n```\n[no](x.md)\n```\n'
    )
    assert links(text) == ["b.md#c", "e.png", "g.svg", "h.md"]
    assert problem(ROOT / "README.md", "docs/NOWHERE.md") == "no such file"
    assert "no such heading" in problem(ROOT / "README.md", "#nowhere")
    assert problem(ROOT / "README.md", "#the-map") is None
