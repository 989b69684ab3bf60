"""What can be moved with the mouse or the keyboard. Notebook 02 has the first.

A widget draws nothing itself: it calls a plot function that is tested alone, and that also gives the static
figure for GitHub and paper. Works with ipywidgets 7.7 and 8.
"""

import io

import ipywidgets

from workshop_utils.plotting.all_reduce import all_reduce_step_figure, describe_step
from workshop_utils.schedules import schedule

_DPI = 90


def all_reduce_stepper(algorithm: str = "ring", world_size: int = 4) -> ipywidgets.VBox:
    """Step through an all-reduce with a slider, message by message: "ring", "tree", "naive", "halving-doubling".

    The slider takes the arrow keys. Under the figure the step is told in words. Raises ValueError for an unknown
    algorithm or a world size below 2.
    """
    if world_size < 2:
        raise ValueError(
            f"one rank alone has nothing to send: world_size must be at least 2, got {world_size}"
        )
    last = len(schedule(algorithm, world_size))
    slider = ipywidgets.IntSlider(
        value=0, min=0, max=last, description="step", layout=ipywidgets.Layout(width="420px")
    )
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))
    words = ipywidgets.HTML()
    drawn: dict[int, bytes] = {}

    def show(change=None) -> None:
        step = slider.value
        if step not in drawn:
            drawn[step] = _png(all_reduce_step_figure(algorithm, world_size, step))
        picture.value = drawn[step]
        words.value = describe_step(algorithm, world_size, step)

    slider.observe(show, names="value")
    show()
    return ipywidgets.VBox([slider, picture, words])


def _png(figure) -> bytes:
    """The figure as a PNG. Its ground is white, so it reads the same in JupyterLab's dark theme."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()
