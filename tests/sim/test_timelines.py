"""The timelines and measures of simulated deployments, against the Dones of the same requests."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from tests.sim.shapes import some_faults, some_shape, story, tight_shape
from tetri.core.actions import FromClient
from tetri.request import Stage
from tetri.sim.faulty.chance import Faults
from tetri.wire.clients import Explain, Observe

LOST = Faults(kill=1.5, until=0.5)
LOSSY = range(6, 10)  # the cases in which messages may get lost
CASES = [
    *((seed, LOST, some_shape(seed)) for seed in range(6)),
    # A process that is frozen has a clock that stops too: it is then of no use for a while.
    *((seed, replace(some_faults(seed), freeze=0.0), some_shape(seed)) for seed in range(100, 104)),
    *((seed, Faults(until=0.0), tight_shape(seed)) for seed in range(3)),
]


def asked(world, message):
    (reply,) = world.broker.core.handle(FromClient(b"onlooker", message), world.kernel.now)
    return reply.message


@cache
def told(number):
    """The measures of a deployment, and each of its Dones with the timeline of its choice."""
    world = story(*CASES[number])
    outputs = [(client.rid, output.done) for client in world.clients.clients for output in client.outputs]
    pairs = [(done, asked(world, Explain(rid=rid, choice=done.choice))) for rid, done in outputs]
    return asked(world, Observe()).measures, pairs


each_case = pytest.mark.parametrize("number", range(len(CASES)))


@each_case
def test_a_timeline_is_what_the_done_says(number):
    for done, timeline in told(number)[1]:
        assert (timeline.reason, timeline.error, timeline.receipt) == (done.reason, done.error, done.receipt)
        assert timeline.outputs == done.usage.completion_tokens
        assert timeline.left_out == 0 or number in LOSSY  # tokens that were sent again come without their steps
        spent, end = Counter(), 0.0
        for span in timeline.stages:
            assert span.start_s == pytest.approx(end) and span.seconds >= 0.0
            spent[span.stage] += span.seconds
            end = span.start_s + span.seconds
        assert end == pytest.approx(done.jct_s)
        assert {stage.value: seconds for stage, seconds in spent.items()} == pytest.approx(
            {stage: seconds for stage, seconds in done.timeline.items() if stage in spent}
        )
        retries = [event for event in timeline.events if event.kind == "retry"]
        assert [event.attempt for event in retries] == [*range(2, done.receipt.attempts + 1)]
        assert all(event.note for event in retries)


@each_case
def test_events_and_steps_lie_in_the_time_of_the_request_and_where_it_was(number):
    """Simulated processes have one clock."""
    for done, timeline in told(number)[1]:
        holders = {span.iid for span in timeline.stages}
        for step in timeline.steps:
            assert step.start_s >= -1e-6 and step.start_s + step.seconds <= done.jct_s + 1e-6
            assert step.iid in holders and step.tokens > 0
        # What comes after a stop text is cut off. What is sent again is sent without its step.
        assert sum(step.tokens for step in timeline.steps) + timeline.left_out >= timeline.outputs
        assert all(event.at >= -1e-6 for event in timeline.events)


def test_each_thing_that_happens_is_named():
    """What these stories are worth: among their requests are some that were retried, migrated, preempted, refused."""
    kinds = Counter(event.kind for number in range(len(CASES)) for _, each in told(number)[1] for event in each.events)
    named = {"chunk", "export", "fetch", "offered", "granted", "refused", "deferred"}
    assert named | {"recompute", "preempted", "retry", "migrated"} == set(kinds), kinds


@each_case
def test_histograms_agree_with_the_dones(number):
    measures, pairs = told(number)
    dones = [done for done, _ in pairs]
    values = {
        "ttft": [done.ttft_s for done in dones if done.ttft_s is not None],
        "jct": [done.jct_s for done in dones],
        "prompt_tokens": [done.usage.prompt_tokens for done in dones],
        "output_tokens": [done.usage.completion_tokens for done in dones],
    }
    for stage in (Stage.QUEUED, Stage.PREFILL, Stage.MOVING, Stage.WAITING, Stage.DECODE):
        values[f"stage_{stage}"] = [done.timeline[stage] for done in dones if stage in done.timeline]
    for name, found in values.items():
        histogram = measures.histograms[name]
        assert sum(histogram.counts) == len(found), name
        assert histogram.total == pytest.approx(sum(found)), name
        for bound, below in zip(histogram.bounds, _sums(histogram.counts), strict=False):
            assert below == sum(value <= bound for value in found), name
    assert {label: count for label, count in measures.counts["requests_ended"].items() if count} == Counter(
        done.reason for done in dones
    )
    assert sum(measures.counts["retries"].values()) == sum(done.receipt.attempts - 1 for done in dones)
    tokens, receipts = measures.counts["tokens"], [done.receipt for done in dones]
    assert tokens == {
        "prompt": sum(values["prompt_tokens"]),
        "output": sum(values["output_tokens"]),
        "local": sum(each.local or 0 for each in receipts),
        "adopted": sum(each.adopted or 0 for each in receipts),
        "recomputed": sum(each.recomputed or 0 for each in receipts),
        "continued": sum(each.continued for each in receipts),
    }


def _sums(counts):
    total = 0
    for count in counts:
        total += count
        yield total
