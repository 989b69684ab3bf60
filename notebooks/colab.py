"""`make colab`: the notebooks for Colab, in build/colab; each carries the helper package's wheel in its first cell.

    python notebooks/colab.py                                  learner versions, and solutions/ beside them
    python notebooks/colab.py --repo owner/name --ref tag      with badges, and links from notebook to notebook

A badge opens colab/NN_name.ipynb of that tag of that repository on GitHub: put the content of build/colab there.
"""

import argparse
import base64
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from build import ROOT, as_text, load_sources, render
from workshop_utils.language_model import FETCH_COMMAND

OUT = ROOT / "build" / "colab"
FIRST_CELL = Path(__file__).with_name("colab_setup.py")
COLAB = "https://colab.research.google.com"
BADGE = f"[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({{url}})"
FETCH = """# The language model, once: 93 or 273 MB. Where it cannot be had, a tiny random network stands in.
import sys

!{sys.executable} -m workshop_utils fetch"""
LINK = re.compile(r"\[([^][]*)\]\((\d\d_\w+\.ipynb)\)")  # from a notebook to another
NOTE = (
    "\n\n> **On Colab.** Run the next cell first: it brings what Colab lacks. There are two ranks here, one for each"
    " core; where the text speaks of four, its numbers are those of four. Change `WORLD_SIZE` to have as many."
)


def build_wheel(root: Path, folder: Path) -> Path:
    """The wheel of the helper package. From a copy: setuptools leaves files beside what it builds."""
    source = folder / "source"
    shutil.copytree(
        root / "workshop_utils", source / "workshop_utils", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--disable-pip-version-check", "--wheel-dir", folder, source], check=True)
    return next(folder.glob("*.whl"))


def first_cell(wheel: Path) -> str:
    """colab_setup.py with the wheel in it."""
    encoded = base64.b64encode(wheel.read_bytes()).decode()
    text = FIRST_CELL.read_text(encoding="utf-8")
    for name, value in (("WHEEL_NAME", wheel.name), ("WHEEL", encoded)):
        text, count = re.subn(rf'^{name} = ""$', f'{name} = "{value}"', text, flags=re.MULTILINE)
        assert count == 1, name
    return text.strip()


def for_colab(notebook, setup: str, url):
    """The notebook with the set-up cell after its title. url(name): the address of another one.

    Without `url`, links to other notebooks become plain text: Colab would look for them in the wrong place.
    """
    title, *cells = notebook.cells
    title.source += NOTE
    for cell in (title, *(cell for cell in cells if cell.cell_type == "markdown")):
        cell.source = LINK.sub(
            lambda found: f"[{found[1]}]({url(found[2])})" if url else found[1], cell.source
        )
    for cell in cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace("start_ranks(4)", "start_ranks(WORLD_SIZE)")
    first = nbformat.v4.new_code_cell(setup, id="colab-setup", metadata={"cellView": "form"})
    fetch = [nbformat.v4.new_code_cell(FETCH, id="colab-fetch")] if FETCH_COMMAND in title.source else []
    notebook.cells = [title, first, *fetch, *cells]
    notebook.metadata["colab"] = {"provenance": []}
    return notebook


def build(out: Path = OUT, repo: str | None = None, ref: str | None = None) -> list[Path]:
    """Write every notebook's learner and solution version to `out` and `out`/solutions; returns the files."""
    with tempfile.TemporaryDirectory() as folder:
        setup = first_cell(build_wheel(ROOT, Path(folder)))
    written = []
    for version, place in (("learner", out), ("solutions", out / "solutions")):
        place.mkdir(parents=True, exist_ok=True)
        below = place.relative_to(out.parent).as_posix()  # colab, or colab/solutions
        url = (lambda name, below=below: f"{COLAB}/github/{repo}/blob/{ref}/{below}/{name}") if repo else None
        for stem, cells in load_sources(ROOT, []).items():
            notebook = for_colab(render(stem, cells, version), setup, url)
            if url:
                notebook.cells[0].source = (
                    BADGE.format(url=url(f"{stem}.ipynb")) + "\n\n" + notebook.cells[0].source
                )
            written.append(place / f"{stem}.ipynb")
            written[-1].write_text(as_text(notebook), encoding="utf-8")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repo", help="owner/name on GitHub")
    parser.add_argument("--ref", help="the tag or branch that will hold the folder colab")
    chosen = parser.parse_args()
    if bool(chosen.repo) != bool(chosen.ref):
        parser.error("--repo and --ref belong together: make colab REPO=owner/name REF=tag")
    if chosen.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", chosen.repo):
        parser.error(f"--repo is owner/name as on GitHub, not {chosen.repo!r}")
    written = build(repo=chosen.repo, ref=chosen.ref)
    size_mb = sum(path.stat().st_size for path in written) / 1e6
    print(
        f"{len(written)} notebooks in {OUT.relative_to(ROOT)}, {size_mb:.1f} MB: upload one to Colab and run its first cell"
    )
    if chosen.repo:
        print(
            f"the badges work once the content of {OUT.relative_to(ROOT)} lies in colab/ of {chosen.repo} at {chosen.ref}"
        )


if __name__ == "__main__":
    main()
