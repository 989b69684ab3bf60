"""The widget of notebook 06: where the recorded curve crosses which line."""

import json
from importlib import resources

import ipywidgets

from workshop_utils.intrinsic_dimension import DEFINITIONS, IntrinsicDimension
from workshop_utils.plotting.subspace import crossing_figure, describe_crossing
from workshop_utils.widgets.common import choice, follow, whole_numbers

MEANT = {"1.0 (global)": "global", "full training (local)": "local"}


def intrinsic_dimension(percent: int = 90, definition: str = "global") -> ipywidgets.VBox:
    """The recorded measurement on 60,000 images: choose the threshold, what it is a share of, and the projection.

    Reads the recording that the package ships. Raises ValueError for a threshold outside of 50 to 99%, or another
    definition than "global" and "local".
    """
    if not 50 <= percent <= 99 or definition not in DEFINITIONS:
        raise ValueError(
            f'percent must lie between 50 and 99, and definition be "global" or "local", got {percent} and {definition!r}'
        )
    recorded = json.loads(
        resources.files("workshop_utils").joinpath("recorded_intrinsic_dimension.json").read_text("utf-8")
    )
    authors = dict(zip(recorded["authors"]["dims"], recorded["authors"]["accuracy"], strict=True))
    rows = recorded["parts"]["mnist"]["rows"]
    curves = [IntrinsicDimension.from_json(json.dumps(row["result"])) for row in rows]
    by_projection = {curve.settings["projection"]: curve for curve in curves}
    controls = {
        "percent": whole_numbers("threshold, %", 50, 99, percent),
        "definition": choice("of", list(MEANT.items()), definition),
        "projection": choice("projection", list(by_projection), next(iter(by_projection))),
    }

    def draw(projection: str, **chosen):
        return crossing_figure(by_projection[projection], authors, **chosen)

    def tell(projection: str, **chosen):
        return describe_crossing(by_projection[projection], **chosen)

    return follow(controls, draw, tell)
