"""When the buckets of one step of data parallelism leave and arrive, by formula. Notebook 03's widget moves it.

    t_i   when the gradients of layer i are ready: forward, then the backward of the layers from the last down to i
    r_b   when bucket b is complete: the t of the last gradient in it (without overlap: when the backward has ended)
    b_b   = max(r_b, e_(b-1)): one bucket after another, on every rank in the same order
    e_b   = b_b + the ring's all-reduce of its bytes: 2(n-1) alpha + 2(n-1)/n bytes beta
    step  = max(end of the backward, e of the last bucket)

Left out: that ranks share cores, copying into buckets, and the waiting of one rank for another.
"""

from collections.abc import Sequence

from workshop_utils.gradient_buckets import FIRST_BUCKET_BYTES
from workshop_utils.network import Link, ring_all_reduce_s

# Bytes of each parameter's gradient, a row for each layer in the order of the forward: notebook 03's eight
# Linear(512, 512) in float32.
NOTEBOOK_LAYERS = ((512 * 512 * 4, 512 * 4),) * 8


def predict_timeline(
    layers: Sequence[Sequence[int]],
    compute_s: float,
    *,
    bucket_bytes: int,
    overlap: bool,
    world_size: int,
    link: Link,
) -> list[tuple[str, float, float]]:
    """(label, began_s, ended_s) of forward, backward and each bucket, as `DataParallel.timeline` has them.

    layers: bytes of each gradient, layer by layer; all layers compute equally long, and a backward takes twice a
    forward: one product for the gradient of the weight, one for that of the input. The first layer needs the former
    only. compute_s: forward and backward together. Raises ValueError for a time or a bucket below 0.
    """
    if not layers or compute_s < 0 or bucket_bytes < 0:
        raise ValueError(
            f"at least one layer, and compute_s and bucket_bytes of 0 or more: got {len(layers)} layers, {compute_s} s "
            f"and {bucket_bytes} bytes"
        )
    product_s = compute_s / (3 * len(layers) - 1)
    forward_s = len(layers) * product_s
    spans = [("forward", 0.0, forward_s), ("backward", forward_s, compute_s)]
    free_s = 0.0  # when the link has done the bucket before
    for number, (size_bytes, last_layer) in enumerate(_buckets(layers, bucket_bytes)):
        complete_s = forward_s + 2 * product_s * (len(layers) - last_layer) - (0 if last_layer else product_s)
        began_s = max(complete_s if overlap else compute_s, free_s)
        free_s = began_s + ring_all_reduce_s(size_bytes, world_size, link)
        spans.append((f"bucket {number}", began_s, free_s))
    return spans


def step_s(timeline: Sequence[tuple[str, float, float]]) -> float:
    """Seconds from the start of the forward until compute and all buckets are through."""
    return max(ended_s for _, _, ended_s in timeline)


def _buckets(layers: Sequence[Sequence[int]], bucket_bytes: int) -> list[tuple[int, int]]:
    """(bytes, layer of its last gradient) of each bucket, filled from the last gradient on as `make_buckets` does."""
    buckets, size_bytes = [], 0
    for layer in reversed(range(len(layers))):
        for gradient_bytes in reversed(layers[layer]):
            size_bytes += gradient_bytes
            limit = bucket_bytes if buckets else min(FIRST_BUCKET_BYTES, bucket_bytes)
            if size_bytes >= limit:
                buckets.append((size_bytes, layer))
                size_bytes = 0
    if size_bytes:
        buckets.append((size_bytes, 0))
    return buckets
