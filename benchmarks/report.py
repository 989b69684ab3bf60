"""results.json as RESULTS.md, as the plot, and as the short table in README.md.

    python benchmarks/report.py

writes all three anew without measuring anything. results.json maps the name of a comparison to its section (cells.py)
with "measured", where and when.
"""

import json
import os
import sys
from pathlib import Path

from cells import text_of

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

# The short table and the plot: comparison, what, beside what, as in the cells.
SHORT = [
    ("all_reduce", "our ring, 1 MB", "gloo"),
    ("all_reduce", "our ring, 8 MB", "gloo"),
    ("all_reduce", "our ring, 64 MB", "gloo"),
    ("data_parallel", "our DataParallel, MLP 784-200-200-10", "DistributedDataParallel"),
    ("data_parallel", "our DataParallel, 8 x Linear(1024)", "DistributedDataParallel"),
    ("data_parallel", "our DataParallel with overlap, 8 x Linear(1024), 1 Gb/s", "without overlap"),
    ("fully_sharded", "our FullyShardedDataParallel, resharding", "fully_shard"),
    ("ring_in_fsdp", "fully_shard with our ring reduce-scatter", "with gloo's"),
    ("lora", "our LoRA, MLP 784-200-200-10", "PEFT"),
    ("subspace", "a step in a one-hot subspace of 750, 1 thread", "ordinary training"),
    ("subspace", "a step in a one-hot subspace of 750, 1 thread", "a dense one"),
    ("quantization", "our NF4 quantise, 2048 x 2048, float32, 1 thread", "bitsandbytes"),
    ("quantization", "our NF4 dequantise, 2048 x 2048, float32, 1 thread", "bitsandbytes"),
    ("quantization", "our NF4 dequantise, 2048 x 2048, bfloat16, 1 thread", "bitsandbytes"),
    ("qlora", "a step of our QLoRA, SmolLM2-135M", "PEFT + bitsandbytes"),
    ("live_ranks", "start_ranks, until the first all-reduced answer", "mp.spawn"),
    ("live_ranks", "start_ranks, until the first all-reduced answer", "ipyparallel"),
]


def load(folder: Path = HERE) -> dict:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(results: dict, folder: Path = HERE) -> None:
    """Whole or not at all, so that an interrupted run loses nothing."""
    scratch = folder / "results.json.part"
    scratch.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, folder / "results.json")


def write(results: dict, folder: Path = HERE, readme: Path = README) -> None:
    """RESULTS.md, results.png and README's block. Raises ValueError where README has no place for its block."""
    (folder / "RESULTS.md").write_text(full_text(results), encoding="utf-8")
    draw(short_rows(results), folder / "results.png")
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), short_text(results)), encoding="utf-8")


def full_text(results: dict) -> str:
    head = (
        "# Benchmarks\n\n`make bench` writes this file from results.json; `python benchmarks/run.py NAME ...` measures "
        "some sections again. The machine should be idle: each section says its load average when it began.\n\n"
        "A ratio is our time divided by the other's in the same round, so below 1 ours is faster: the median of the "
        "rounds and, in parentheses, between which two values the middle half of them lies.\n\n"
        "![The ratios of the short table in the README, on a logarithmic axis](results.png)"
    )
    return "\n\n".join([head, *map(section_text, results.values())]) + "\n"


def section_text(section: dict) -> str:
    return "\n\n".join(
        [f"## {section['title']}", section["about"], section["measured"], *map(table_text, section["tables"])]
    )


def table_text(table: dict) -> str:
    rows = [table["columns"], *([text_of(cell) for cell in row] for row in table["rows"])]
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    text = "\n".join([head, f"|---|{'---:|' * (len(table['columns']) - 1)}", *lines])
    return f"{table['caption']}\n\n{text}" if table["caption"] else text


def short_rows(results: dict) -> list[tuple[str, str, dict]]:
    """What, beside what, and the ratio's cell, in the order of SHORT. Raises KeyError for a name no cell has."""
    rows = []
    for name, what, beside in SHORT:
        cells = [
            cell
            for table in results.get(name, {"tables": []})["tables"]
            for row in table["rows"]
            for cell in row
            if isinstance(cell, dict) and (cell.get("what"), cell.get("beside")) == (what, beside)
        ]
        if name not in results:
            cells = [{"missing": f"`python benchmarks/run.py {name}` does it"}]
        if not cells:
            raise KeyError(
                f"no ratio of {what!r} beside {beside!r} in {name}: correct SHORT in benchmarks/report.py"
            )
        rows.append((what, beside, cells[0]))
    return rows


def short_text(results: dict) -> str:
    rows = [f"| {what} | {beside} | {text_of(cell)} |" for what, beside, cell in short_rows(results)]
    series = results.get("series")
    total = text_of(series["tables"][0]["rows"][-1][1]) if series else "not measured"
    last = f"In parentheses: the middle half of the rounds. The whole series, one notebook after the other: {total}."
    return "\n".join(["| what | beside | ratio |", "|---|---|---:|", *rows, "", last])


def with_block(text: str, block: str) -> str:
    """`text` with `block` between the two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"README.md needs one line {BEGIN} and after it one line {END}: the table goes between them"
        )
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def draw(rows: list[tuple[str, str, dict]], path: Path | None = None):
    """A line for each ratio: a dot at the median, a bar over the middle half. Returns the figure."""
    from matplotlib.figure import Figure
    from matplotlib.style import context
    from matplotlib.ticker import LogLocator, NullLocator

    from workshop_utils.plotting import MUTED, STYLE_FILE, rank_color

    ys = [y for y, (_, _, cell) in enumerate(rows) if "median" in cell]
    lows, medians, highs = ([rows[y][2][key] for y in ys] for key in ("low", "median", "high"))
    with context(STYLE_FILE):
        figure = Figure(figsize=(9, 0.8 + 0.3 * len(rows)))
        ax = figure.add_subplot()
        ax.axvline(1, color=MUTED, linewidth=1)
        ax.hlines(ys, lows, highs, color=rank_color(0), linewidth=6, alpha=0.35)
        ax.plot(medians, ys, "o", color=rank_color(0), markersize=4)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)), [f"{what}  /  {beside}" for what, beside, _ in rows])
        right = ax.secondary_yaxis("right")
        numbers = [text_of(cell) if "median" in cell else "not measured" for _, _, cell in rows]
        right.set_yticks(range(len(rows)), numbers)
        right.spines["right"].set_visible(False)
        for axis in (ax, right):
            axis.tick_params(axis="y", length=0)
        ax.grid()
        ax.set_xlabel("time / the other's time; left of 1 is faster")
        if path:
            figure.savefig(path)
    return figure


if __name__ == "__main__":
    try:
        write(load())
    except (KeyError, ValueError) as error:
        sys.exit(str(error))
