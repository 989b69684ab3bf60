"""What a comparison returns: a section of tables whose cells are numbers, so that all texts and the plot come from them.

A cell is a string, or one of these dictionaries (results.json keeps them as they are):

    {"value", "digits", "unit"}                     a number
    {"median", "low", "high", "digits", "unit"}     a number measured in rounds; low to high is their middle half
    {"missing"}                                     why there is no number

A ratio has "what" and "beside" too, also where it is missing: whose time was divided by whose.
"""

import statistics
from collections.abc import Sequence

Cell = str | dict


def section(title: str, about: str, *tables: dict) -> dict:
    """What `run()` of a comparison returns."""
    return {"title": title, "about": about, "tables": list(tables)}


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> dict:
    """The first column is text, the others are numbers. `caption` stands above."""
    return {"caption": caption, "columns": list(columns), "rows": [list(row) for row in rows]}


def number(value: float, digits: int = 0, unit: str = "") -> dict:
    """`unit` brings its own blank: " ms". Counts stay exact."""
    kept = value if isinstance(value, int) else float(f"{value:.6g}")
    return {"value": kept, "digits": digits, "unit": unit}


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> dict:
    """The median of the rounds, and the two values between which the middle half lies."""
    quartiles = statistics.quantiles(values, n=4)
    low, median, high = (float(f"{quartile:.6g}") for quartile in quartiles)
    return {"median": median, "low": low, "high": high, "digits": digits, "unit": unit}


def milliseconds(times_s: Sequence[float], digits: int = 2) -> dict:
    """The median."""
    return number(statistics.median(times_s) * 1e3, digits, " ms")


def ratio(ours_s: Sequence[float], theirs_s: Sequence[float], what: str, beside: str) -> dict:
    """Our time divided by theirs, round by round. `what` and `beside` name the two where the table is not around."""
    ratios = [ours / theirs for ours, theirs in zip(ours_s, theirs_s, strict=True)]
    digits = 2 if statistics.median(ratios) >= 0.2 else 3
    return {"what": what, "beside": beside, **spread(ratios, digits)}


def missing(why: str, what: str = "", beside: str = "") -> dict:
    """In place of a number; with `what` and `beside`, of a ratio."""
    return {"missing": why} | ({"what": what, "beside": beside} if what else {})


def text_of(cell: Cell) -> str:
    """A cell as Markdown."""
    if isinstance(cell, str):
        return cell
    if "missing" in cell:
        return f"not measured: {cell['missing']}"
    digits, unit = cell["digits"], cell["unit"]
    if "value" in cell:
        return f"{cell['value']:,.{digits}f}{unit}"
    low, median, high = (f"{cell[key]:,.{digits}f}" for key in ("low", "median", "high"))
    return f"{median}{unit} ({low} to {high})"
