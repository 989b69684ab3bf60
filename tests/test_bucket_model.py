"""The predicted timeline: by hand for two layers, by brute force for many, and buckets as `make_buckets` makes them."""

import pytest
from torch import nn

from workshop_utils.bucket_model import NOTEBOOK_LAYERS, predict_timeline, step_s
from workshop_utils.gradient_buckets import FIRST_BUCKET_BYTES, make_buckets
from workshop_utils.network import Link, ring_all_reduce_s

LINK = Link(1.0, 1e3)  # 1 s, then 1 KB/s


def spans(**settings):
    settings = {"bucket_bytes": 1, "overlap": True, "world_size": 2, "link": LINK} | settings
    timeline = predict_timeline(((4000,), (2000,)), 10.0, **settings)
    return {label: (began_s, ended_s) for label, began_s, ended_s in timeline}


def test_two_layers_by_hand():
    """Five products of 2 s: two forward, two backward through layer 1, one through layer 0. On two ranks S bytes
    take 2 (1 + S / 2 / 1000) s: 4 s for layer 1's 2,000, 6 s for layer 0's 4,000."""
    assert spans() == {"forward": (0, 4), "backward": (4, 10), "bucket 0": (8, 12), "bucket 1": (12, 18)}
    late = spans(overlap=False)
    assert (late["bucket 0"], late["bucket 1"]) == ((10, 14), (14, 20))
    together = spans(bucket_bytes=10_000)
    assert together["bucket 0"] == (10, 18) and "bucket 1" not in together
    assert spans(world_size=1)["bucket 1"] == (10, 10)


def test_a_step_ends_with_the_last_of_compute_and_buckets():
    assert step_s([("forward", 0, 1), ("backward", 1, 3), ("bucket 0", 2, 2.5)]) == 3
    assert step_s([("forward", 0, 1), ("backward", 1, 3), ("bucket 0", 2, 5)]) == 5


@pytest.mark.parametrize("bucket_bytes", [1, 2**20, 2 * 2**20, 3 * 2**20, 25 * 2**20])
def test_buckets_are_those_of_data_parallel(bucket_bytes):
    layers = [part for _ in range(8) for part in (nn.Linear(512, 512), nn.ReLU())]
    parameters = list(nn.Sequential(*layers).parameters())
    assert [p.nbytes for p in parameters] == [size for layer in NOTEBOOK_LAYERS for size in layer]
    link = Link(0.0, 1.0)  # seconds are bytes
    timeline = predict_timeline(
        NOTEBOOK_LAYERS, 0.0, bucket_bytes=bucket_bytes, overlap=True, world_size=4, link=link
    )
    expected = [
        ring_all_reduce_s(sum(p.nbytes for p in bucket.parameters), 4, link)
        for bucket in make_buckets(reversed(parameters), bucket_bytes, FIRST_BUCKET_BYTES)
    ]
    assert [ended - began for label, began, ended in timeline[2:]] == pytest.approx(expected)


def test_overlap_hides_no_more_than_the_backward():
    for bucket_bytes in (1, 2**20, 25 * 2**20):
        settings = {"bucket_bytes": bucket_bytes, "world_size": 4, "link": Link(5e-5, 1.25e8)}
        off, on = (
            step_s(predict_timeline(NOTEBOOK_LAYERS, 0.075, overlap=overlap, **settings))
            for overlap in (False, True)
        )
        assert on <= off <= on + 0.075 * 15 / 23


def test_what_makes_no_step_is_told():
    with pytest.raises(ValueError, match="at least one layer, .* got 0 layers"):
        predict_timeline((), 1.0, bucket_bytes=1, overlap=True, world_size=2, link=LINK)
    with pytest.raises(ValueError, match="-1.0 s"):
        predict_timeline(((4,),), -1.0, bucket_bytes=1, overlap=True, world_size=2, link=LINK)
