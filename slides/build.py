"""`make slides`: every deck of slides/*.md as one HTML file and one PDF in build/slides, checked in a browser.

Marp turns Markdown into HTML; the figures are put into it as data; Chromium measures every slide and prints the PDF from
the very page that was measured. Nothing comes from the network after `npm ci`, and a page that asks for it fails.
"""

import base64
import mimetypes
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SLIDES = Path(__file__).resolve().parent
ROOT = SLIDES.parent
OUT = ROOT / "build" / "slides"
MARP = SLIDES / "node_modules" / ".bin" / "marp"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class SlidesError(Exception):
    """What is missing or wrong, and what to do."""


def decks() -> list[Path]:
    """All files with Marp's front matter."""
    return [path for path in sorted(SLIDES.glob("*.md")) if path.read_text().startswith("---\nmarp: true\n")]


def missing_tools() -> str:
    """What this machine lacks, with its cure; "" where nothing is missing."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return (
            "node and npm are not installed: install Node.js 18 or newer (Debian: apt-get install nodejs npm)"
        )
    if CHROMIUM is None:
        return "no Chromium or Chrome is installed (Debian: apt-get install chromium)"
    return ""


def install_marp() -> None:
    """`npm ci`, unless what the lock names is there already."""
    lock, installed = SLIDES / "package-lock.json", SLIDES / "node_modules" / ".package-lock.json"
    if MARP.exists() and installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return
    print("slides: installing Marp with npm ci", flush=True)
    done = subprocess.run(["npm", "ci"], cwd=SLIDES, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlidesError(f"npm ci failed; is the npm registry reachable? It said:\n{done.stderr.strip()}")


def draw_figures() -> None:
    done = subprocess.run([sys.executable, SLIDES / "figures.py"], cwd=ROOT, check=False)
    if done.returncode:
        raise SlidesError("the figures could not be drawn")


# Source


def source_slides(deck: Path) -> list[str]:
    """The text of each slide: what stands between lines of three hyphens, code blocks and front matter aside."""
    _, _, text = deck.read_text().removeprefix("---\n").partition("\n---\n")
    slides, in_code = [""], False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if line == "---" and not in_code:
            slides.append("")
        else:
            slides[-1] += line + "\n"
    return slides


def note_problems(deck: Path) -> list[str]:
    """Slides without notes that begin with their minutes, and a sum that is not the deck's."""
    problems, total = [], 0
    for number, slide in enumerate(source_slides(deck), start=1):
        found = re.search(r"<!--\n(\d+) min\. \S", slide)
        if found:
            total += int(found[1])
        else:
            problems.append(f'slide {number}: no notes that begin with "N min."')
    promised = int(re.search(r"^minutes: (\d+)$", deck.read_text(), re.MULTILINE)[1])
    if total != promised and not problems:
        problems.append(f"the notes add up to {total} minutes, the front matter says {promised}")
    return problems


# HTML


def make_html(deck: Path, folder: Path = OUT) -> Path:
    """One self-contained file in `folder`."""
    html = folder / f"{deck.stem}.html"
    command = [MARP, "--no-stdin", deck, "--output", html]
    done = subprocess.run(command, cwd=SLIDES, capture_output=True, text=True, check=False)
    if done.returncode or not html.exists():
        raise SlidesError(f"Marp failed on {deck.name}: {done.stderr.strip()}")
    html.write_text(inlined(html.read_text(), deck))
    return html


def inlined(html: str, deck: Path) -> str:
    """The same with each picture as a data URI. Raises SlidesError for a figure that is not there."""

    def as_data(found: re.Match) -> str:
        path = (deck.parent / found[1]).resolve()
        if not path.is_file():
            raise SlidesError(
                f"{deck.name} shows {found[1]}, which is not there: is it in slides/figures.py?"
            )
        kind = mimetypes.guess_type(path.name)[0]
        return f'src="data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"'

    return re.sub(r'src="((?!data:|https?:)[^"]+)"', as_data, html)


# The browser


def check_and_print(html: Path, browser) -> tuple[list[str], int, int]:
    """(problems, pages of the PDF that is printed, slides in the page) of one deck."""
    asked = []
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    context.route(
        re.compile(r"^(?!file:|data:|blob:|about:)"),
        lambda route: (asked.append(route.request.url), route.abort()),
    )
    page = context.new_page()
    page.emulate_media(media="print")
    page.goto(html.as_uri())
    page.evaluate("() => Promise.all([...document.images].map((image) => image.decode().catch(() => null)))")
    slides = page.evaluate((SLIDES / "measure.js").read_text())
    problems = [
        f"slide {number}, {slide['title']!r}: {problem}"
        for number, slide in enumerate(slides, start=1)
        for problem in slide["problems"]
    ]
    problems += [f"asks the network for {url}" for url in asked]
    pdf = html.with_suffix(".pdf")
    page.pdf(path=pdf, prefer_css_page_size=True, print_background=True)
    context.close()
    return problems, len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf.read_bytes())), len(slides)


def check_deck(deck: Path, html: Path, browser) -> list[str]:
    """Everything that is wrong with one deck."""
    problems, pages, sections = check_and_print(html, browser)
    wanted = len(source_slides(deck))
    for what, count in (("HTML has {} slides", sections), ("PDF has {} pages", pages)):
        if count != wanted:
            problems.append(f"the {what.format(count)}, the source has {wanted}")
    notes = len(re.findall(r'class="bespoke-marp-note"', html.read_text()))
    if notes != wanted:
        problems.append(f"Marp found notes on {notes} of {wanted} slides")
    return [f"{deck.name}: {problem}" for problem in [*note_problems(deck), *problems]]


def start_chromium(playwright):
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    return playwright.chromium.launch(executable_path=CHROMIUM, args=flags)


def main() -> int:
    began_s = time.perf_counter()
    try:
        lacking = missing_tools()
        if lacking:
            raise SlidesError(lacking)
        install_marp()
        draw_figures()
        OUT.mkdir(parents=True, exist_ok=True)
        from playwright.sync_api import sync_playwright

        problems = []
        with sync_playwright() as playwright:
            browser = start_chromium(playwright)
            for deck in decks():
                problems += check_deck(deck, make_html(deck), browser)
            browser.close()
    except SlidesError as error:
        print(f"slides: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"slides: {problem}", file=sys.stderr)
    count = sum(len(source_slides(deck)) for deck in decks())
    print(
        f"slides: {len(decks())} decks, {count} slides in build/slides ({time.perf_counter() - began_s:.0f} s)"
    )
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
