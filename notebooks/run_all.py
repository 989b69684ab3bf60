"""Execute the whole series, solutions filled in, and write build/run/index.html (`make run`).

Per notebook: its time, its key figures (the printed text of cells tagged "key-figures"), a link to the executed
page. A notebook that fails does not stop the others; the exit status is then 1.
"""

import datetime
import html
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[1]
CELL_LIMIT_S = 600

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>The workshop, executed</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .6rem .8rem; border-bottom: 1px solid #ddd; }}
td.time {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
pre {{ margin: 0; font-size: 13px; white-space: pre-wrap; }}
.failed {{ color: #b00020; font-weight: 600; }}
</style>
<h1>The workshop, executed</h1>
<p>{when} · {profile} profile · {total}</p>
<table><tr><th>notebook</th><th>time</th><th>key figures</th></tr>
{rows}
</table></html>
"""
ROW = """<tr><td><a href="{page}">{title}</a>{failure}</td><td class="time">{elapsed_s:.0f} s</td>
<td><pre>{figures}</pre></td></tr>"""


@dataclass(frozen=True)
class Result:
    """One executed notebook. figures: the text of its key-figures cells. failure: "" if it ran through."""

    title: str
    page: str
    elapsed_s: float
    figures: str
    failure: str


def run_all(solutions: Path, out: Path, profile: str = "quick") -> list[Result]:
    """Execute `solutions`/NN_*.ipynb one after the other; the pages and index.html go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(solutions.glob("[0-9][0-9]_*.ipynb"))
    results = []
    for number, path in enumerate(paths, start=1):
        print(f"[{number}/{len(paths)}] {path.stem} ... ", end="", flush=True)
        result = run_one(path, out, profile)
        print(f"{result.elapsed_s:.0f} s {result.failure}".rstrip(), flush=True)
        results.append(result)
    (out / "index.html").write_text(index(results, profile), encoding="utf-8")
    return results


def run_one(path: Path, out: Path, profile: str) -> Result:
    executed, failure, start_s = out / path.name, "", time.monotonic()
    executed.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            path,
            executed,
            parameters={"PROFILE": profile},
            cwd=path.parent,
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=CELL_LIMIT_S,
            extra_arguments=["--log-level=ERROR"],  # ipykernel 7.4 warns about every kernel, on loopback too
        )
    except Exception as error:  # noqa: BLE001  whatever a notebook fails with, the next one runs
        name, text = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))
        failure = f"{name}: {(text.strip().splitlines() or ['no message'])[0]}"
    elapsed_s = time.monotonic() - start_s
    notebook = nbformat.read(executed if executed.exists() else path, as_version=4)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    page = re.sub(
        r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', page
    )  # the page of the other notebook, beside it
    (out / f"{path.stem}.html").write_text(page, encoding="utf-8")
    return Result(title(notebook, path.stem), f"{path.stem}.html", elapsed_s, key_figures(notebook), failure)


def title(notebook, stem: str) -> str:
    """The first heading of the notebook, with its number."""
    lines = [
        line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
    ]
    heading = next((line.lstrip("# ") for line in lines if line.startswith("# ")), stem)
    return heading if heading[:2] == stem[:2] else f"{stem[:2]} {heading}"


def key_figures(notebook) -> str:
    """What the cells tagged "key-figures" printed."""
    cells = [cell for cell in notebook.cells if "key-figures" in cell.metadata.get("tags", [])]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    outputs = [
        output for output in outputs if "image/png" not in output.get("data", {})
    ]  # the page shows those
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(text.rstrip() for text in texts if text.strip())


def index(results: list[Result], profile: str) -> str:
    rows = []
    for result in results:
        failure = (
            f' <span class="failed">failed: {html.escape(result.failure)}</span>' if result.failure else ""
        )
        rows.append(
            ROW.format(
                page=result.page,
                title=html.escape(result.title),
                failure=failure,
                elapsed_s=result.elapsed_s,
                figures=html.escape(result.figures),
            )
        )
    total_s = sum(result.elapsed_s for result in results)
    failed = sum(bool(result.failure) for result in results)
    total = f"{len(results)} notebooks in {total_s:.0f} s" + (f", {failed} failed" if failed else "")
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return PAGE.format(when=when, profile=profile, total=total, rows="\n".join(rows))


def main() -> int:
    out = ROOT / "build" / "run"
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["WORKSHOP_PROGRESS"] = scratch  # the reader's own progress is not touched
        results = run_all(ROOT / "notebooks" / "solutions", out)
    print(f"the report: {out.relative_to(ROOT)}/index.html")
    if not results:
        print("no notebooks in notebooks/solutions: run make solutions", file=sys.stderr)
    return int(not results or any(result.failure for result in results))


if __name__ == "__main__":
    sys.exit(main())
