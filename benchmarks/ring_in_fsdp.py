"""torch's fully_shard with our ring reduce-scatter plugged in, beside its default: 8 x Linear(1024), 4 ranks."""

import torch.distributed as dist
from cells import milliseconds, number, ratio, section, table
from fully_sharded import ABOUT, NUM_LAYERS, ROUNDS, WIDTH, WORLD_SIZE, torchs_step
from turns import slowest, take_turns

from workshop_utils import start_ranks
from workshop_utils.fully_sharded import use_ring_reduce_scatter
from workshop_utils.point_to_point import wire_bytes

TITLE = "The ring plugged into torch's fully_shard"


def run() -> dict:
    """A row for gloo's reduce-scatter and one for ours."""
    with start_ranks(WORLD_SIZE) as ranks:
        times_by_rank, sent_by_rank = zip(*ranks.run(measure), strict=True)
    ring, default = slowest(times_by_rank)
    ring_sent, default_sent = (number(sent, 2) for sent in sent_by_rank[0])
    times = ratio(ring, default, "fully_shard with our ring reduce-scatter", "with gloo's")
    return section(
        TITLE,
        f"{ABOUT} {ROUNDS} rounds as above. Sent: what rank 0's connections carried in one step, in units of "
        "S (n-1)/n with S the bytes of the parameters.",
        table(
            ["reduce-scatter", "step", "times the default's", "sent"],
            [
                ["gloo's, the default", milliseconds(default, 1), "", default_sent],
                ["our ring", milliseconds(ring, 1), times, ring_sent],
            ],
        ),
    )


def measure() -> tuple[list[list[float]], list[float]]:
    """On a rank: seconds of each round with our ring and with the default, and what a step of each sends."""
    steps = [torchs_step(True, use_ring_reduce_scatter), torchs_step(True)]
    return take_turns(steps, ROUNDS, before=dist.barrier), [sent(step) for step in steps]


def sent(step) -> float:
    """What one step sends, in units of S (n-1)/n."""
    dist.barrier()
    with wire_bytes() as wire:
        step()
    parameters_bytes = NUM_LAYERS * (WIDTH * WIDTH + WIDTH) * 4
    return wire.bytes_sent / (parameters_bytes * (WORLD_SIZE - 1) / WORLD_SIZE)
