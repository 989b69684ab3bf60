"""How the ranks' output looks: in rank order, one colour per rank, with plain text underneath.

Jupyter shows the HTML; GitHub's diff, nbval and a terminal see the plain text.
"""

import html
import re

from IPython import get_ipython
from IPython.display import display

from workshop_utils.plotting import rank_color
from workshop_utils.ranks.errors import strip_ansi

MAX_CHARS = 100_000
_OVERWRITTEN = re.compile(r"[^\n]*\r(?!\n)")


def settle(text: str) -> str:
    """Text as a terminal would leave it: progress bars keep their last state, colours are dropped."""
    text = _OVERWRITTEN.sub("", strip_ansi(text).replace("\r\n", "\n"))
    if len(text) > MAX_CHARS:
        left_out = len(text) - MAX_CHARS
        half = MAX_CHARS // 2
        text = f"{text[:half]}\n... {left_out:,} characters left out ...\n{text[-half:]}"
    return text.rstrip("\n")


def blocks(outputs: list) -> list:
    """One rank's Jupyter messages as a list of text (str) and rich outputs (dict: data, metadata), in order."""
    result: list = []
    for kind, content in outputs:
        if kind == "clear_output":
            result.clear()
            continue
        if kind == "update_display_data":
            _update(result, content)
            continue
        data = {"text/plain": content["text"]} if kind == "stream" else content["data"]
        if set(data) == {"text/plain"}:
            text = data["text/plain"] + ("" if kind == "stream" else "\n")
            if result and isinstance(result[-1], str):
                result[-1] += text
            else:
                result.append(text)
        else:
            result.append({key: content.get(key) or {} for key in ("data", "metadata", "transient")})
    return [settle(block) if isinstance(block, str) else block for block in result]


def _update(result: list, content: dict) -> None:
    wanted = content.get("transient", {}).get("display_id")
    for block in result:
        if isinstance(block, dict) and block["transient"].get("display_id") == wanted:
            block["data"], block["metadata"] = content["data"], content.get("metadata", {})


def _rank_html(rank: int, text: str, note: str = "") -> str:
    note = f' <span style="opacity:.65">{html.escape(note)}</span>' if note else ""
    body = (
        f'<pre style="margin:0;padding:0;background:none;color:inherit;white-space:pre-wrap">'
        f"{html.escape(text)}</pre>"
        if text
        else ""
    )
    return (
        f'<div style="border-left:4px solid {rank_color(rank)};padding:1px 0 1px 8px;margin:2px 0">'
        f'<span style="border-bottom:2px solid {rank_color(rank)}"><b>rank {rank}</b></span>{note}{body}</div>'
    )


def _rank_plain(rank: int, text: str) -> str:
    return "\n".join(f"[rank {rank}] {line}" for line in text.split("\n"))


def show_outputs(outputs_by_rank: dict[int, list]) -> None:
    """Show what each rank printed, drew and returned, in rank order."""
    for rank in sorted(outputs_by_rank):
        shown_label = False
        for block in blocks(outputs_by_rank[rank]):
            if isinstance(block, str):
                if block:
                    _show(_rank_html(rank, block), _rank_plain(rank, block))
                    shown_label = True
                continue
            if not shown_label:
                _show(_rank_html(rank, ""), f"[rank {rank}]")
                shown_label = True
            display(block["data"], metadata=block["metadata"], raw=True)


def show_footer(seconds: float, sent_bytes: list[int | None]) -> None:
    """The quiet line under a cell: how long it took, and what each rank sent."""
    text = f"{seconds:.2f} s"
    if any(sent_bytes) and None not in sent_bytes:
        amounts = [format_bytes(n) for n in sent_bytes]
        text += " · sent per rank: " + (amounts[0] if len(set(amounts)) == 1 else ", ".join(amounts))
    _show(f'<div style="opacity:.6;font-size:85%">{text}</div>', f"({text})")


def format_bytes(n: int) -> str:
    """Decimal units, as for network links: 1 kB = 1000 bytes."""
    value = float(n)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            break
        value /= 1000
    else:
        unit = "GB"
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def show_text(text: str) -> None:
    """A report as ordinary output, colours dropped."""
    text = strip_ansi(text)
    _show(
        f'<pre style="margin:2px 0;white-space:pre-wrap;border-left:4px solid #b3261e;padding-left:8px">{html.escape(text)}</pre>',
        text,
    )


def _show(markup: str, plain: str) -> None:
    display({"text/html": markup, "text/plain": plain}, raw=True)


class Live:
    """One display that is redrawn in place while something runs, and emptied or replaced at its end."""

    def __init__(self):
        self.handle = None
        self.possible = get_ipython() is not None

    def draw(self, markup: str, plain: str) -> None:
        if not self.possible:
            return
        bundle = {"text/html": markup, "text/plain": plain}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)

    def clear(self) -> None:
        if self.handle is not None:
            self.handle.update({"text/html": "", "text/plain": ""}, raw=True)

    def progress(self, done: int, total: int, label: str) -> None:
        bar = f'<progress value="{done}" max="{total}" style="width:16em"></progress> {html.escape(label)}'
        self.draw(bar, f"[{'#' * done}{'.' * (total - done)}] {label}")

    def status(self, seconds: float, rows: list[tuple[int, str, list]]) -> None:
        """Rows of (rank, what it is doing, its output so far)."""
        parts = [f'<div style="opacity:.6;font-size:85%">running for {seconds:.0f} s</div>']
        for rank, doing, outputs in rows:
            texts = [block for block in blocks(outputs) if isinstance(block, str)]
            tail = "\n".join("\n".join(texts).split("\n")[-6:])
            parts.append(_rank_html(rank, tail, doing))
        plain = "\n".join(f"[rank {rank}] {doing}" for rank, doing, _ in rows)
        self.draw("".join(parts), plain)
