"""A page to keep: collectives and what they cost, the bill of training, LoRA's and NF4's arithmetic.

Every number on it is computed by the modules that the notebooks teach. `cheat_sheet()` shows it in a notebook;
`python -m workshop_utils.teaching.cheatsheet FILE.pdf` (`make cheatsheet`) prints it on one sheet of A4.
"""

import html
import shutil
import sys
from pathlib import Path

import torch

from workshop_utils import network
from workshop_utils.lora import apply_lora, lora_parameters
from workshop_utils.memory import zero_bytes
from workshop_utils.memory_plan import plan_memory
from workshop_utils.models import MLP
from workshop_utils.network import LINKS, Link
from workshop_utils.quantization import nf4_levels, quantize_nf4

EXAMPLE_BYTES, EXAMPLE_RANKS = 100e6, 8
EXAMPLE_LINKS = ("10 Gb/s Ethernet", "NVLink 4")


def _one_to_all_s(size_bytes: float, world_size: int, link: Link) -> float:
    """Scatter and gather: one rank's link carries n - 1 parts, one after another."""
    return (world_size - 1) * link.message_s(size_bytes / world_size)


# (name, before, after, bytes that the busiest rank sends, seconds, the function that computes them)
COLLECTIVES = [
    ("broadcast, tree", "one has S", "all have S", "⌈lg n⌉ S", "⌈lg n⌉ (α + S β)", network.broadcast_s),
    ("reduce, tree", "all have S", "one has the sum", "S", "⌈lg n⌉ (α + S β)", network.reduce_s),
    ("scatter", "one has S", "each has its S/n", "(n-1)/n S", "(n-1) (α + S/n β)", _one_to_all_s),
    ("gather", "each has S/n", "one has S", "S/n", "(n-1) (α + S/n β)", _one_to_all_s),
    (
        "all-gather, ring",
        "each has S/n",
        "all have S",
        "(n-1)/n S",
        "(n-1) (α + S/n β)",
        network.all_gather_s,
    ),
    (
        "reduce-scatter, ring",
        "all have S",
        "each S/n of the sum",
        "(n-1)/n S",
        "(n-1) (α + S/n β)",
        network.reduce_scatter_s,
    ),
]
COLLECTIVES += [
    (f"all-reduce, {name}", "all have S", "all have the sum", sent, seconds, network.ALL_REDUCE_S[name])
    for name, sent, seconds in (
        ("naive", "(n-1) S", "2 (n-1) (α + S β)"),
        ("tree", "⌈lg n⌉ S", "2 ⌈lg n⌉ (α + S β)"),
        ("ring", "2 (n-1)/n S", "2 (n-1) (α + S/n β)"),
        ("halving-doubling", "2 (n-1)/n S", "2 ⌈lg n⌉ α + 2 (n-1)/n S β"),
    )
]


def collectives_table() -> str:
    heads = ["collective", "before", "after", "sent, at most", "seconds", *EXAMPLE_LINKS]
    rows = []
    for name, before, after, sent, seconds, cost_s in COLLECTIVES:
        times_s = [cost_s(EXAMPLE_BYTES, EXAMPLE_RANKS, LINKS[link]) for link in EXAMPLE_LINKS]
        rows.append([name, before, after, sent, seconds, *(_milliseconds(time_s) for time_s in times_s)])
    return _table(heads, rows, numbers=2)


def links_table() -> str:
    rows = [
        [name, f"{1e6 * link.latency_s:g} µs", f"{link.bandwidth_bytes_per_s / 1e9:g} GB/s"]
        for name, link in LINKS.items()
    ]
    return _table(["link, one direction", "α", "1/β"], rows, numbers=2)


def bill_table(num_parameters: float = 7.5e9, world_size: int = 64) -> str:
    """Bytes on each rank by ZeRO stage, for one parameter and for a model."""
    names = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3, FSDP")
    rows = []
    for stage, name in enumerate(names):
        whole, divided = zero_bytes(stage, 1, 1), zero_bytes(stage, 1, 2)
        parts = [f"{whole[kind]:g}{'/n' if divided[kind] < whole[kind] else ''}" for kind in whole]
        held_bytes = sum(zero_bytes(stage, int(num_parameters), world_size).values())
        rows.append([name, *parts, f"{held_bytes / 1e9:.1f} GB"])
    heads = ["bytes per parameter", "weights", "gradients", "Adam, master"]
    return _table([*heads, f"{num_parameters / 1e9:g} B, n = {world_size}"], rows, numbers=4)


def plans_table(model: str = "llama-8b", world_size: int = 2) -> str:
    """What `plan_memory` predicts for one model, by method and strategy."""
    rows = []
    for method, name in (("full", "full"), ("lora", "LoRA, r = 8"), ("qlora", "QLoRA, r = 8")):
        plans = [
            plan_memory(model, strategy, world_size, method=method, length=512, checkpointing=True)
            for strategy in ("ddp", "fsdp")
        ]
        held = [f"{plan.total_bytes / 2**30:.1f} GiB" for plan in plans]
        rows.append([name, *held, *(f"{plan.traffic_bytes / 1e9:.2f} GB" for plan in plans)])
    return _table(["method", "DDP holds", "FSDP holds", "DDP sends", "FSDP sends"], rows, numbers=4)


def lora_lines() -> list[str]:
    model = MLP()
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in lora_parameters(apply_lora(model, "all-linear", r=1, lora_alpha=1)))
    n, r = 1024, 16
    operations = (2 * n * n + 6 * n * r) / (3 * n * n)
    return [
        "y = W x + b + (lora_alpha / r) B A x. W is frozen, A [r, in] random, B [out, r] zero at the start.",
        f"Trained per layer: r (in + out). The MLP of {whole:,} with r = 1: {trained:,}, {trained / whole:.1%}.",
        "Gradients and Adam in float32: 12 bytes for each trained number, none for the frozen ones.",
        f"Multiply-adds of a step, N x N layer: 3 N² becomes 2 N² + 6 N r. N = {n:,}, r = {r}: {operations:.2f} of full.",
        "Merged, W + (lora_alpha / r) B A costs what W costs. Only a kept copy brings W back bit for bit.",
    ]


def nf4_lines() -> list[str]:
    weight = torch.randn(1024, 1024)
    bits, single = (quantize_nf4(weight, double_quant=d).bits_per_parameter for d in (True, False))
    sizes = [f"{n} B: {n * 4:g}, {n * 2:g}, {n * bits / 8:.1f} GB" for n in (7, 70)]
    levels = ", ".join(f"{level:.3f}" for level in nf4_levels().tolist())
    return [
        f"4 bits of code + 8/64 of the scale + 32/(64 · 256) of the scale's scale = {bits:.3f} bits per weight.",
        f"Scales kept in float32: 4 + 32/64 = {single:.3f} bits.",
        f"Weights in float32, bfloat16, NF4: {'; '.join(sizes)}.",
        f"Levels: {levels}.",
        "Code of a weight: the level nearest to weight / absmax of its block of 64.",
    ]


@torch.random.fork_rng(devices=[])  # models and weights are drawn: the reader's own numbers go on as before
def cheat_sheet_html() -> str:
    """The page as HTML: no address in it, nothing is loaded."""
    example = f"Last two columns: S = {EXAMPLE_BYTES / 1e6:g} MB, n = {EXAMPLE_RANKS}."
    total = network.all_reduce_total_bytes("ring", 1, EXAMPLE_RANKS) / (2 * (EXAMPLE_RANKS - 1))
    words = (
        "n ranks, S bytes, each rank with a full-duplex link of its own: α seconds before the first byte, β seconds per"
        f" byte. lg is the logarithm to base 2; halving-doubling for powers of two. {example} All-reduces of all kinds"
        f" send {2 * total:g} (n-1) S in all."
    )
    blocks = [
        f"<h2>Collectives</h2><p>{words}</p>{collectives_table()}",
        _columns(
            "<h2>16 bytes per parameter</h2><p>Adam in mixed precision, n ranks, without activations.</p>"
            + bill_table()
            + "<h2>Llama 8B on 2 GPUs</h2><p>512 tokens on each, checkpointing; sent by a GPU in a step.</p>"
            + plans_table(),
            "<h2>Links</h2>" + links_table(),
        ),
        _columns("<h2>LoRA</h2>" + _list(lora_lines()), "<h2>NF4</h2>" + _list(nf4_lines())),
    ]
    return f"<style>{STYLE}</style><div class='cheat-sheet'>{''.join(blocks)}</div>"


def cheat_sheet():
    """The page, to be shown by a notebook."""
    from IPython.display import HTML

    return HTML(cheat_sheet_html())


def write_pdf(path: Path) -> None:
    """Print the page on A4 with a Chromium that is installed. RuntimeError where there is none."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        raise RuntimeError(f"no browser to print with: install one of {', '.join(names)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    title = "<h1 class=on-paper>Distributed training and efficient fine-tuning: a cheat sheet</h1>"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content(f"<!doctype html><meta charset='utf-8'><body>{title}{cheat_sheet_html()}</body>")
        page.pdf(path=path, format="A4", margin=dict.fromkeys(("top", "bottom", "left", "right"), "11mm"))
        browser.close()


# JupyterLab has rules of its own for tables in outputs, hence `!important`
STYLE = """
.cheat-sheet, h1.on-paper { font-family: "DejaVu Sans", Verdana, sans-serif; }
h1.on-paper { font-size: 17px; margin: 0 0 10px; }
.cheat-sheet { font-size: 0.8em; line-height: 1.45; max-width: 70em; }
.cheat-sheet h2 { font-size: 1.27em; font-weight: bold; margin: 16px 0 3px; }
.cheat-sheet p { margin: 0 0 5px; }
.cheat-sheet ul { margin: 0; padding-left: 14px; }
.cheat-sheet li { margin-bottom: 3px; }
.cheat-sheet table { border-collapse: collapse; font-size: 94%; width: 100%; margin: 0; table-layout: auto !important; }
.cheat-sheet th, .cheat-sheet td { padding: 3px 6px 3px 0; border-bottom: 1px solid #8a8a9466; }
.cheat-sheet th, .cheat-sheet td { text-align: left !important; }
.cheat-sheet .number { text-align: right !important; white-space: nowrap; }
.cheat-sheet .columns { display: grid; grid-template-columns: 3fr 2fr; gap: 0 24px; }
@media print { body { font-size: 13.75px; } .cheat-sheet td + td { white-space: nowrap; } }
"""


def _table(heads: list[str], rows: list[list[str]], numbers: int) -> str:
    """The last `numbers` columns are set to the right."""
    first = len(heads) - numbers

    def line(cells, tag):
        marked = [
            f"<{tag}{' class=number' if i >= first else ''}>{html.escape(c)}" for i, c in enumerate(cells)
        ]
        return f"<tr>{f'</{tag}>'.join(marked)}</{tag}></tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _milliseconds(time_s: float) -> str:
    return f"{1e3 * time_s:,.0f} ms" if time_s >= 0.1 else f"{1e3 * time_s:.3g} ms"


def _list(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _columns(left: str, right: str) -> str:
    return f"<div class='columns'><div>{left}</div><div>{right}</div></div>"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/cheatsheet.pdf")
    write_pdf(target)
    print(f"wrote {target}")
