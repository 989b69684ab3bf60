"""The widgets of notebook 02: an all-reduce step by step, and which of the four is fastest where."""

import ipywidgets

from workshop_utils.network import LINKS
from workshop_utils.plotting.all_reduce import all_reduce_step_figure, describe_step
from workshop_utils.plotting.costs import bytes_label, describe_fastest, fastest_figure
from workshop_utils.schedules import ALGORITHMS, schedule
from workshop_utils.widgets.common import choice, follow, stops, whole_numbers

MOST_RANKS = 8


def all_reduce_stepper(algorithm: str = "ring", world_size: int = 4) -> ipywidgets.VBox:
    """Step through an all-reduce, message by message: choose the algorithm, 2 to 8 ranks, and the step.

    Below the chunks, the clock of an emulated link for each rank. Raises ValueError for an unknown algorithm or
    another number of ranks.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}: choose one of {', '.join(ALGORITHMS)}")
    if world_size < 2:
        raise ValueError(
            f"one rank alone has nothing to send: world_size must be at least 2, got {world_size}"
        )
    if world_size > MOST_RANKS:
        raise ValueError(f"the figure has room for {MOST_RANKS} ranks, got world_size {world_size}")
    controls = {
        "algorithm": choice("algorithm", ALGORITHMS, algorithm),
        "world_size": whole_numbers("ranks", 2, MOST_RANKS, world_size),
        "step": whole_numbers("step", 0, len(schedule(algorithm, world_size)), 0),
    }

    def fit_steps(change=None) -> None:
        steps = len(schedule(controls["algorithm"].value, controls["world_size"].value))
        controls["step"].max = steps  # a step beyond the last becomes the last

    for name in ("algorithm", "world_size"):  # before the picture is drawn: observers are called in order
        controls[name].observe(fit_steps, names="value")
    return follow(controls, _step_figure, _step_words)


def _step_figure(algorithm: str, world_size: int, step: int):
    return all_reduce_step_figure(algorithm, world_size, min(step, len(schedule(algorithm, world_size))))


def _step_words(algorithm: str, world_size: int, step: int) -> str:
    return describe_step(algorithm, world_size, min(step, len(schedule(algorithm, world_size))))


WORLD_SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MESSAGE_BYTES = tuple(digit * 10**k for k in range(3, 9) for digit in (1, 2, 5)) + (10**9,)


def alpha_beta(
    world_size: int = 64, link: str = "10 Gb/s Ethernet", size_bytes: int = 100_000
) -> ipywidgets.VBox:
    """Which all-reduce is fastest where: choose the message's size, the ranks and the link.

    Raises ValueError for a size, a number of ranks or a link that cannot be chosen.
    """
    if world_size not in WORLD_SIZES or link not in LINKS or size_bytes not in MESSAGE_BYTES:
        raise ValueError(
            f"choose 1, 2 or 5 times a power of ten from 1,000 to 1,000,000,000 bytes, one of "
            f"{', '.join(map(str, WORLD_SIZES))} ranks, and one of the links {', '.join(LINKS)}; "
            f"got {size_bytes}, {world_size} and {link!r}"
        )
    controls = {
        "size_bytes": stops("message", [(bytes_label(size), size) for size in MESSAGE_BYTES], size_bytes),
        "world_size": stops("ranks", WORLD_SIZES, world_size),
        "link": choice("link", list(LINKS), link),
    }
    return follow(controls, fastest_figure, describe_fastest)
