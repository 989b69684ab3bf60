"""`large_fonts()`: figures, code, text and outputs for the back of a room. `large_fonts(False)` takes it back.

In JupyterLab a style sheet of its own does it, for all notebooks of the page until it is loaded again or switched back.
Figures are drawn larger by the kernel. Elsewhere (Colab) only the figures grow: use the browser's zoom there.
"""

import json

from workshop_utils.plotting import enlarge
from workshop_utils.showing import in_notebook

FACTOR = 1.5
STYLE_ID = "workshop-large-fonts"

# JupyterLab's own sizes, in pixels; a notebook's letters, lines and controls are derived from these
LAB_SIZES_PX = {
    "--jp-code-font-size": 13,
    "--jp-content-font-size1": 14,
    "--jp-ui-font-size1": 13,  # tables
    "--jp-widgets-font-size": 13,
    "--jp-widgets-inline-height": 28,
    "--jp-widgets-inline-label-width": 100,
    "--jp-widgets-inline-width": 300,
    "--jp-widgets-slider-handle-size": 16,
}


def large_fonts(on: bool = True) -> None:
    """Everything in the notebooks one and a half times as large, or, with False, as it was."""
    enlarge(FACTOR if on else 1.0)
    if in_notebook():
        from IPython.display import Javascript, display

        display(Javascript(_script(on)))
    print("Large fonts are on: large_fonts(False) switches back." if on else "Fonts are as they were.")


def style_sheet() -> str:
    """The rules for JupyterLab's notebooks."""
    sizes = "".join(f"{name}: {FACTOR * px:g}px; " for name, px in LAB_SIZES_PX.items())
    pictures = (
        f".jp-Notebook .widget-image {{ zoom: {FACTOR:g}; }}"  # widgets' pictures have a size of their own
    )
    return f".jp-Notebook {{ {sizes}}}\n{pictures}"


def _script(on: bool) -> str:
    remove = f"document.getElementById({json.dumps(STYLE_ID)})?.remove();"
    if not on:
        return remove
    return f"""{remove}
const style = document.createElement("style");
style.id = {json.dumps(STYLE_ID)};
style.textContent = {json.dumps(style_sheet())};
document.head.append(style);"""
