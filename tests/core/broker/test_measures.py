"""Histograms and counts."""

import pytest

from tetri.core.broker.measures import BOUNDS, LABELS, Buckets, Meters
from tetri.request import Receipt, Usage
from tetri.wire.clients import Done

RECEIPT = Receipt(prompt_tokens=8, local=1, adopted=4, recomputed=3, continued=2)
DONE = Done(
    rid="r1",
    reason="stop",
    usage=Usage(prompt_tokens=8, completion_tokens=5),
    timeline={"queued": 0.5, "decode": 2.0},
    ttft_s=0.75,
    jct_s=2.5,
    receipt=RECEIPT,
    slo_result="tpot",
)


@pytest.mark.parametrize(("value", "bucket"), [(0.0, 0), (1.0, 0), (1.001, 1), (2.0, 1), (4.0, 2), (4.1, 3), (1e9, 3)])
def test_a_value_is_in_the_first_bucket_whose_bound_is_not_below_it(value, bucket):
    buckets = Buckets([1.0, 2.0, 4.0])
    buckets.add(value)
    buckets.add(value, 2)
    assert buckets.counts[bucket] == sum(buckets.counts) == 3
    assert buckets.total == pytest.approx(3 * value)


def test_bounds_ascend():
    for name, bounds in BOUNDS.items():
        assert list(bounds) == sorted(set(bounds)), name


def test_an_ended_choice_is_in_each_histogram_that_it_has_a_value_for():
    meters = Meters()
    meters.ended(DONE, 0.4)
    cancelled = DONE.changed(reason="cancelled", ttft_s=None, timeline={"queued": 1.0}, jct_s=1.0, slo_result="")
    meters.ended(cancelled, None)
    measures = meters.measures()
    found = {name: (sum(each.counts), each.total) for name, each in measures.histograms.items() if any(each.counts)}
    assert found == {
        "tpot": (1, 0.4),
        "jct": (2, 3.5),
        "stage_queued": (2, 1.5),
        "stage_decode": (1, 2.0),
        "prompt_tokens": (2, 16.0),
        "output_tokens": (2, 10.0),
    }
    assert {label: count for label, count in measures.counts["requests_ended"].items() if count} == {
        "stop": 1,
        "cancelled": 1,
    }
    assert measures.counts["slo_requests"] == {"met": 0, "ttft": 0, "tpot": 1, "both": 0, "failed": 0}
    assert measures.counts["tokens"] == {
        **{"prompt": 16, "output": 10, "local": 2, "adopted": 8, "recomputed": 6, "continued": 4},
    }


def test_every_label_is_there_from_the_start():
    assert Meters().measures().counts == {name: dict.fromkeys(labels, 0) for name, labels in LABELS.items()}


def test_measures_do_not_change_once_they_are_taken():
    meters = Meters()
    before = meters.measures()
    meters.count("retries", "not_held")
    meters.histograms["itl"].add(0.1)
    assert before == Meters().measures()


def test_every_label_is_counted_from_the_start():
    counts = Meters().measures().counts
    roles = ("prefill", "decode", "mixed", "auto")
    assert counts["role_changes"].keys() == {f"{was}>{role}" for was in roles for role in roles if was != role}
    assert all(labels and not any(labels.values()) for labels in counts.values())
