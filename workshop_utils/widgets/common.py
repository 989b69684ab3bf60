"""What all widgets share: controls that the arrow keys move, and a picture that follows them.

A picture has a white ground of its own, so it reads the same in JupyterLab's dark theme. The words under it have the
theme's colours, and say the same to those who do not see the picture.
"""

import io
from collections.abc import Callable, Mapping, Sequence

import ipywidgets
from matplotlib.figure import Figure

DPI = 100
_KEPT = 300  # pictures of one widget; each has 20 to 60 KB
_LABELS = {"description_width": "90px"}


def choice(description: str, options: Sequence, value) -> ipywidgets.Dropdown:
    """A list to choose from. An option may be a pair (what is shown, value)."""
    return ipywidgets.Dropdown(options=options, value=value, description=description, style=_LABELS)


def stops(description: str, options: Sequence, value) -> ipywidgets.SelectionSlider:
    """A slider with these stops. An option may be a pair (what is shown, value)."""
    return ipywidgets.SelectionSlider(
        options=options, value=value, description=description, style=_LABELS, layout=_wide()
    )


def whole_numbers(description: str, low: int, high: int, value: int, step: int = 1) -> ipywidgets.IntSlider:
    """A slider of whole numbers from `low` to `high`."""
    return ipywidgets.IntSlider(
        min=low, max=high, step=step, value=value, description=description, style=_LABELS, layout=_wide()
    )


def follow(
    controls: Mapping[str, ipywidgets.Widget],
    draw: Callable[..., Figure],
    tell: Callable[..., str] | None = None,
) -> ipywidgets.VBox:
    """The controls in a column, and under them what `shown_for` gives."""
    return ipywidgets.VBox([*controls.values(), *shown_for(controls, draw, tell)])


def shown_for(controls, draw, tell=None) -> list[ipywidgets.Widget]:
    """The picture of draw(**values of the controls) and the words of tell(**values), which follow the controls.

    Each setting is drawn once: what was seen before comes back at once.
    """
    fitting = ipywidgets.Layout(max_width="100%", object_fit="contain", align_self="flex-start")
    picture = ipywidgets.Image(format="png", layout=fitting)
    words = ipywidgets.HTML()
    kept: dict[tuple, tuple[bytes, str]] = {}

    def show(change=None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        key = tuple(chosen.values())
        if key not in kept:
            if len(kept) == _KEPT:
                kept.pop(next(iter(kept)))
            kept[key] = png(draw(**chosen)), tell(**chosen) if tell else ""
        picture.value, words.value = kept[key]

    for control in controls.values():
        control.observe(show, names="value")
    show()
    return [picture, words] if tell else [picture]


def png(figure: Figure) -> bytes:
    """The figure as a PNG, packed quickly rather than tightly."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def _wide() -> ipywidgets.Layout:
    return ipywidgets.Layout(width="460px")
