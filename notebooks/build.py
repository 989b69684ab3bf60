"""Build the notebooks from their sources: src/NN_name.py -> learner, solutions and instructor versions.

    python notebooks/build.py                build every notebook, exercises.json and notebook_cells.json
    python notebooks/build.py 02             only notebook 02
    python notebooks/build.py --execute 02   and run its solutions, keeping their outputs
    python notebooks/build.py --check        change nothing; exit 1 and list what is stale

A source is jupytext's percent format. CONTRIBUTING.md says how to write one.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from sections import ONLY_TO_BUILD, check_live_names, collect_cells, instructor_texts
from source import Cell, SourceError, collect_exercises, read_source

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {
    "learner": {"solution", "instructor"},
    "solutions": {"instructor"},
    "instructor": {"solution"},
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SOLUTIONS_NOTE = (
    "\n\n> **Solutions.** Every exercise is filled in here, and the outputs are those of one run."
    " The version to work in is `{stem}.ipynb`, one folder up."
)


# Writing the versions


def render(stem: str, cells: list[Cell], version: str):
    """The notebook of one version. Ids go by position in the source, so a rebuild changes no byte."""
    notebook = nbformat.v4.new_notebook(metadata=METADATA)
    other_texts = instructor_texts(Path(f"{stem}.py"), cells) if version == "instructor" else {}
    for position, cell in enumerate(cells):
        if LEFT_OUT[version] & set(cell.tags):
            continue
        source = cell.solution if version == "solutions" else other_texts.get(position, cell.learner)
        if position == 0 and version == "solutions":
            source += SOLUTIONS_NOTE.format(stem=stem)
        new = nbformat.v4.new_markdown_cell if cell.kind == "markdown" else nbformat.v4.new_code_cell
        # only the solutions have outputs that nbval could compare
        unwanted = ONLY_TO_BUILD if version == "solutions" else ONLY_TO_BUILD | {"nbval-check-output"}
        tags = [tag for tag in cell.tags if tag not in unwanted]
        metadata = {"tags": tags} if tags else {}
        notebook.cells.append(new(source, id=f"cell-{position:03d}", metadata=metadata))
    return notebook


def as_text(notebook) -> str:
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def keep_outputs(notebook, path: Path) -> bool:
    """Copy the outputs of the notebook at `path` into `notebook` if the code is the same. True if it was."""
    if not path.exists():
        return False
    old = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    new = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.source for cell in old] != [cell.source for cell in new]:
        return False
    for old_cell, new_cell in zip(old, new, strict=True):
        new_cell.outputs, new_cell.execution_count = old_cell.outputs, old_cell.execution_count
    return any(cell.execution_count for cell in old) or not old


# Running the solutions


def execute(notebook, folder: Path):
    """Run `notebook` with papermill, as if it lay in `folder`, and put its outputs into it."""
    import papermill

    with tempfile.TemporaryDirectory() as scratch:
        given, done = Path(scratch, "given.ipynb"), Path(scratch, "done.ipynb")
        given.write_text(as_text(notebook), encoding="utf-8")
        kept = os.environ.get("WORKSHOP_PROGRESS")
        os.environ["WORKSHOP_PROGRESS"] = scratch  # the author's own progress is not touched
        try:
            papermill.execute_notebook(given, done, kernel_name="python3", cwd=folder, progress_bar=False)
        finally:
            os.environ.pop("WORKSHOP_PROGRESS")
            if kept is not None:
                os.environ["WORKSHOP_PROGRESS"] = kept
        ran = {cell.id: cell for cell in nbformat.read(done, as_version=4).cells}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = ran[cell.id].execution_count
            cell.outputs = clean_outputs(ran[cell.id].outputs, {scratch: "<data folder>"})


def clean_outputs(outputs: list, names=None) -> list:
    """Without displays that were cleared; streams that these had cut in two are one again, and a bar is its last state."""
    kept = []
    for output in outputs:
        if "data" in output and not any(output.data.values()):
            continue
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return [cleaned for output in kept if (cleaned := clean_output(output, names)) is not None]


def clean_output(output, names=None):
    """The output without live widgets, overwritten progress bars and paths of this machine; None if empty."""
    output.pop("transient", None)
    if "data" in output:
        was_widget = output.data.pop("application/vnd.jupyter.widget-view+json", None)
        if was_widget and set(output.data) <= {"text/plain"}:
            return None
        if "image/png" in output.data:
            output.data["image/png"] = smaller_png(output.data["image/png"])
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
        if not output.text.strip():
            return None
    text = json.dumps(output, ensure_ascii=False)
    for found, shown in {**(names or {}), str(ROOT): ".", str(Path.home()): "~"}.items():
        text = text.replace(json.dumps(found)[1:-1] + "/", shown + "/")
    text = re.sub(r"/[\w/.-]*/ipykernel_\d+/\d+\.py", "<cell>", text)
    return nbformat.from_dict(json.loads(text))


def smaller_png(encoded: str) -> str:
    """The picture (base64) with a palette of 256 colours, if that is smaller: a third or half of a figure's bytes."""
    from PIL import Image

    data = base64.b64decode(encoded)
    with io.BytesIO() as file:
        Image.open(io.BytesIO(data)).convert("RGB").quantize(256).save(file, "png", optimize=True)
        return base64.b64encode(min(data, file.getvalue(), key=len)).decode()


# The command


def limits(stem: str, cells: list[Cell]) -> list[str]:
    """Where a notebook is longer than a notebook should be."""
    shown = [cell for cell in cells if not LEFT_OUT["learner"] & set(cell.tags)]
    words = sum(len(cell.learner.split()) for cell in shown if cell.kind == "markdown")
    found = [f"{words} words, at most 4000"] if words > 4000 else []
    if len(shown) > 70 or (len(shown) < 40 and stem[:2] != "00"):
        found.append(f"{len(shown)} cells, 40 to 70 are meant")
    for cell in cells:
        lines = cell.solution.count("\n") + 1
        if cell.kind == "code" and lines > 25:
            found.append(f"line {cell.line}: a code cell of {lines} lines, at most 25")
    return [f"{stem}: {text}" for text in found]


def load_sources(root: Path, only: list[str]) -> dict[str, list[Cell]]:
    """{stem: cells} of the chosen sources, all if `only` is empty."""
    paths = sorted((root / "notebooks/src").glob("[0-9][0-9]_*.py"))
    chosen = [path for path in paths if not only or any(path.stem.startswith(name) for name in only)]
    if only and not chosen:
        raise SystemExit(f"no source matches {' '.join(only)}; there are {', '.join(p.stem for p in paths)}")
    return {path.stem: read_source(path) for path in chosen}


def exercises_text(root: Path, sources: dict[str, list[Cell]], everything: bool) -> str:
    """What exercises.json should hold; notebooks that were not chosen keep their entries."""
    target = root / "workshop_utils/exercises.json"
    data = {"notebooks": {}, "exercises": {}}
    if not everything and target.exists():
        data = json.loads(target.read_text(encoding="utf-8"))
        data["exercises"] = {k: v for k, v in data["exercises"].items() if v["notebook"] not in sources}
    for stem, cells in sources.items():
        found = collect_exercises(root / f"notebooks/src/{stem}.py", cells, root)
        data["notebooks"][stem] = {"definitions": found["definitions"]}
        data["exercises"] |= found["exercises"]
    data["notebooks"] = dict(sorted(data["notebooks"].items()))
    data["exercises"] = dict(
        sorted(data["exercises"].items(), key=lambda item: [int(n) for n in item[0].split(".")])
    )
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def cells_text(root: Path, sources: dict[str, list[Cell]], everything: bool) -> str:
    """What notebook_cells.json should hold; notebooks that were not chosen keep their entries."""
    target = root / "workshop_utils/notebook_cells.json"
    data = {} if everything or not target.exists() else json.loads(target.read_text(encoding="utf-8"))
    data |= {stem: collect_cells(Path(f"{stem}.py"), cells) for stem, cells in sources.items()}
    check_live_names(data)
    return json.dumps(dict(sorted(data.items())), indent=1, ensure_ascii=False) + "\n"


def planned_files(root: Path, sources: dict[str, list[Cell]], everything: bool):
    """{path: text} of every file to write, and the solutions that have no outputs of their present code."""
    package = root / "workshop_utils"
    files = {package / "exercises.json": exercises_text(root, sources, everything)}
    files[package / "notebook_cells.json"] = cells_text(root, sources, everything)
    without_outputs = []
    for stem, cells in sources.items():
        files[root / f"notebooks/{stem}.ipynb"] = as_text(render(stem, cells, "learner"))
        files[root / f"notebooks/instructor/{stem}.ipynb"] = as_text(render(stem, cells, "instructor"))
        solved, path = render(stem, cells, "solutions"), root / f"notebooks/solutions/{stem}.ipynb"
        if not keep_outputs(solved, path):
            without_outputs.append(stem)
        files[path] = as_text(solved)
    return files, without_outputs


def find_stale(root: Path, files: dict, without_outputs: list[str], everything: bool) -> list[str]:
    """One line per committed file that is not what its source says."""
    stale = []
    for path, text in files.items():
        if path.parent.name == "instructor":
            continue
        if not path.exists():
            stale.append(f"{path.relative_to(root)} is missing")
        elif path.read_text(encoding="utf-8") != text:
            stale.append(f"{path.relative_to(root)} is not what its source builds")
    stale += [
        f"notebooks/solutions/{stem}.ipynb has no outputs of its present code" for stem in without_outputs
    ]
    if everything:
        for folder in ("notebooks", "notebooks/solutions"):
            orphans = {*(root / folder).glob("[0-9][0-9]_*.ipynb")} - files.keys()
            stale += [f"{path.relative_to(root)} has no source; delete it" for path in sorted(orphans)]
    return stale


def build(root: Path, only=(), execute_them=False):
    """Write every version of the chosen notebooks."""
    sources = load_sources(root, list(only))
    files, without_outputs = planned_files(root, sources, everything=not only)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for stem in sources if execute_them else ():
        began = time.perf_counter()
        notebook = render(stem, sources[stem], "solutions")
        execute(notebook, root / "notebooks/solutions")
        (root / f"notebooks/solutions/{stem}.ipynb").write_text(as_text(notebook), encoding="utf-8")
        print(f"{stem}: solutions ran in {time.perf_counter() - began:.0f} s")
    print(f"built {', '.join(sources)}")
    if without_outputs and not execute_them:
        print(f"solutions without outputs: {', '.join(without_outputs)}; run build.py --execute for these")


def check(root: Path, only=()) -> int:
    """Print what is stale and what is too long; 1 if anything is stale."""
    sources = load_sources(root, list(only))
    files, without_outputs = planned_files(root, sources, everything=not only)
    stale = find_stale(root, files, without_outputs, everything=not only)
    for warning in (line for stem, cells in sources.items() for line in limits(stem, cells)):
        print(f"warning: {warning}")
    for line in stale:
        print(f"stale: {line}")
    print("run: python notebooks/build.py --execute" if stale else f"up to date: {', '.join(sources)}")
    return 1 if stale else 0


def main(arguments=None, root=ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", nargs="*", help="02 or 02_all_reduce; default: all")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if anything is stale")
    parser.add_argument("--execute", action="store_true", help="run the solutions and keep their outputs")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.check:
            return check(root, chosen.notebook)
        build(root, chosen.notebook, execute_them=chosen.execute)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
