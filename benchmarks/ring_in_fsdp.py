"""torch's fully_shard with our ring reduce-scatter plugged in, beside its default: 8 x Linear(1024), 4 ranks."""

import torch.distributed as dist
from fully_sharded import BATCH, NUM_LAYERS, ROUNDS, WIDTH, WORLD_SIZE, compare, spread, torchs_step

from workshop_utils import start_ranks
from workshop_utils.fully_sharded import use_ring_reduce_scatter
from workshop_utils.point_to_point import wire_bytes

TITLE = "The ring plugged into torch's fully_shard"


def run() -> str:
    """The comparison as text and a table in Markdown."""
    with start_ranks(WORLD_SIZE) as ranks:
        results = ranks.run(measure)
    times_s, (default_sent, ring_sent) = [result[0] for result in results], results[0][1]
    default_s, ratio = spread(times_s, "ring", "default")
    return (
        f"{WORLD_SIZE} ranks with one thread each, {NUM_LAYERS} x Linear({WIDTH}), float32, {BATCH} samples per rank, "
        f"SGD; forward, backward and step, {ROUNDS} rounds as above. Sent: what rank 0's connections carried in one "
        "step, in units of S (n-1)/n with S the bytes of the parameters.\n\n"
        "| reduce-scatter | step | sent |\n|---|---:|---:|\n"
        f"| gloo's, the default | {default_s * 1e3:.1f} ms | {default_sent:.2f} |\n"
        f"| our ring | {ratio} of it | {ring_sent:.2f} |"
    )


def measure() -> tuple[dict[str, list[float]], tuple[float, float]]:
    """On a rank: seconds of each round for both, and what a step of each sends."""
    steps = {"default": torchs_step(True), "ring": torchs_step(True, use_ring_reduce_scatter)}
    times_s = compare(steps)
    return times_s, (sent(steps["default"]), sent(steps["ring"]))


def sent(step) -> float:
    """What one step sends, in units of S (n-1)/n."""
    dist.barrier()
    with wire_bytes() as wire:
        step()
    parameters_bytes = NUM_LAYERS * (WIDTH * WIDTH + WIDTH) * 4
    return wire.bytes_sent / (parameters_bytes * (WORLD_SIZE - 1) / WORLD_SIZE)
