"""The widget of notebook 03: when the buckets of one step leave and arrive."""

import ipywidgets

from workshop_utils.network import LINKS
from workshop_utils.plotting.data_parallel import bucket_timeline_figure, describe_bucket_timeline
from workshop_utils.widgets.common import choice, follow, stops

BUCKET_BYTES = {"each gradient alone": 1, **{f"{mib} MiB": mib * 2**20 for mib in (1, 2, 3, 4, 25)}}
SHOWN = {"off and on": ("off", "on"), "off": ("off",), "on": ("on",)}


def bucket_timeline(compute_s: float, link: str = "1 Gb/s Ethernet", world_size: int = 4) -> ipywidgets.VBox:
    """One step of data parallelism as the formulas see it: choose the buckets' size, overlap, and the link.

    The network is notebook 03's: eight layers, 8.4 MB of gradients. compute_s: forward and backward of one step, as you
    measured them. Raises ValueError for a link that is not in LINKS, or a time that is not above 0.
    """
    if not compute_s > 0:
        raise ValueError(f"compute_s must be above 0 seconds, got {compute_s}")
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}: choose one of {', '.join(LINKS)}")
    controls = {
        "bucket_bytes": stops("bucket size", list(BUCKET_BYTES.items()), 2**20),
        "shown": choice("overlap", list(SHOWN.items()), SHOWN["off and on"]),
        "link": choice("link", list(LINKS), link),
    }
    fixed = {"compute_s": compute_s, "world_size": world_size}
    return follow(
        controls,
        lambda **chosen: bucket_timeline_figure(**fixed, **chosen),
        lambda **chosen: describe_bucket_timeline(**fixed, **chosen),
    )
