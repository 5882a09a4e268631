"""What heartbeats tell of what an instance did and of what happened to its choices."""

import pytest

from tests.core.build import (
    assign,
    capacity,
    chunk,
    close,
    defer,
    drop,
    grant,
    instance,
    offer,
    reach,
    refuse,
    resend,
    siblings,
)
from tests.core.driver import working
from tests.core.reading import sent
from tetri.core.actions import Exported
from tetri.core.decode.kv_receive import LOST_PAUSE_S
from tetri.request import Sampling
from tetri.wire.events import PeerDown
from tetri.wire.messages import Tokens
from tetri.wire.observation import EngineStep, TraceEvent, Transferred

ROOMY = {"capacity": capacity(blocks=40, context=100, max_batch=4), "slots": 30, "heartbeat_s": 1000.0}


def traced(told, *kinds):
    """What the next heartbeat traces, of these kinds."""
    return [event for event in told.heartbeat().traced if not kinds or event.kind in kinds]


def steps(actions):
    return [each.step for each in sent(actions, kind=Tokens)]


def step(told, seconds=1.0, **how):
    """A step that takes so long."""
    planned = told.later()
    told.now += seconds
    return planned + told.step(**how)


# ---------------------------------------------------------------- prefill


def test_chunks_exports_and_hand_over_of_a_prompt():
    told = working("p1", "d1", **ROOMY)
    told.tell(assign("r", prompt=14))
    assert steps(step(told, 2.0)) == []
    told.now += 0.5
    told.answer("r", grant)
    assert steps(step(told)) == [EngineStep(at=3.5, seconds=1.0, batch=0, chunk_tokens=6)]
    heartbeat = told.heartbeat()
    assert heartbeat.traced == [
        TraceEvent("offered", "r", 1, at=0.0, peer="d1"),
        TraceEvent("chunk", "r", 1, at=0.0, seconds=2.0, last=8, size=8),
        TraceEvent("export", "r", 1, at=2.0, last=2, size=0),
        TraceEvent("granted", "r", 1, at=2.5, peer="d1"),
        TraceEvent("chunk", "r", 1, at=2.5, seconds=1.0, first=8, last=14, size=6),
        TraceEvent("export", "r", 1, at=3.5, first=2, last=4, size=1),
    ]
    assert heartbeat.at == told.now
    activity = heartbeat.activity
    assert (activity.steps, activity.step_s, activity.decode_steps) == (2, 3.0, 0)
    assert (activity.chunk_steps, activity.chunk_tokens, activity.chunk_space) == (2, 14, 16)
    told.take("r")
    assert traced(told) == [] and told.heartbeat().activity == activity


def test_a_prompt_that_stays_says_so_and_exports_nothing():
    told = working("m1", **ROOMY)
    told.tell(assign("r", prompt=8))
    step(told, 2.0)
    step(told)
    assert told.heartbeat().traced == [
        TraceEvent("offered", "r", 1, at=0.0, peer="m1"),
        TraceEvent("granted", "r", 1, at=0.0, peer="m1", note="its KV stays in its place"),
        TraceEvent("chunk", "r", 1, at=0.0, seconds=2.0, last=8, size=8),
    ]


def test_an_export_lasts_until_its_chunk_is_in_the_slab_if_it_is_still_wanted():
    told = working("p1", "d1", **ROOMY)
    told.exports = False
    told.tell(assign("r", prompt=8), assign("x", prompt=8))
    step(told)
    step(told)
    told.now = 5.0
    told.tell(close("x"))
    for rid in "rx":
        told.tell(Exported(f"p:{rid}:1", 0, 0, 2, chunk(rid, 0, 0, 2, src="p1").handle, 9))
    assert traced(told, "export") == [TraceEvent("export", "r", 1, at=1.0, seconds=4.0, last=2)]


def test_offers_that_come_to_nothing_say_why():
    told = working("p1", "d1", "d2", "d3", **ROOMY)
    told.tell(assign("r", prompt=14))
    step(told)
    told.answer("r", defer)
    told.answer("r", defer)  # again: nothing new
    told.answer("r", lambda *who: refuse(*who, why="no memory " * 99))
    told.tell(PeerDown("d2"))
    told.answer("r", grant)
    told.answer("r", grant)
    found = traced(told, "offered", "deferred", "refused", "granted")
    assert [(each.kind, each.peer) for each in found] == [
        ("offered", "d1"),
        ("deferred", "d1"),
        ("refused", "d1"),
        ("offered", "d2"),
        ("refused", "d2"),
        ("offered", "d3"),
        ("granted", "d3"),
    ]
    assert found[2].note == ("no memory " * 99)[:200] and found[4].note == "it was lost"


def test_choices_that_share_a_prefill_are_traced_by_the_first_that_goes_on():
    told = working("p1", "d1", **ROOMY)
    told.tell(assign("a", prompt=14, siblings=("a.1", "a.2"), temperature=1.0, seed=0))
    step(told)
    told.tell(close("a"))
    step(told)
    assert [(each.rid, each.first, each.last) for each in traced(told, "chunk")] == [("a", 0, 8), ("a.1", 8, 14)]


def test_a_prompt_that_loses_its_memory_is_computed_again():
    told = working("p1", "d1", **ROOMY)
    told.tell(assign("r", prompt=20))
    step(told)
    step(told, preempted=["r"], spans=[])
    told.answer("r", grant)
    step(told)
    found = traced(told, "chunk", "preempted")
    assert [(each.kind, each.rid, each.first, each.last) for each in found] == [
        ("chunk", "r", 0, 8),
        ("preempted", "r", 0, 0),
        ("chunk", "r", 0, 8),
    ]
    assert told.heartbeat().activity.preempted == 0  # no decode request was


def test_a_prompt_that_gives_its_memory_to_a_decode_request_says_so():
    small = {"capacity": capacity(blocks=12, context=48), "slots": 6, "reserve_share": 1.0, "heartbeat_s": 1000.0}
    told = working("m1", "d1", role="prefill", **small)
    told.tell(assign("a", prompt=32, max_tokens=4))
    step(told)
    told.answer("a", refuse)
    told.later()
    told.tell(offer("x", prompt=32, src="d9"))
    note = "its memory was given to a request that decodes here"
    assert traced(told, "preempted") == [TraceEvent("preempted", "a", 1, at=1.0, note=note)]


# ---------------------------------------------------------------- KV receive


def receiving():
    """Two chunks of a prompt of three blocks are on their way, since 2.0."""
    far = {"paths": ["stream"]}
    told = working("d1", instance("p1", "prefill", reach=reach("p1", **far)), reach=reach("d1", **far), **ROOMY)
    told.far = True
    told.tell(offer("r", prompt=12), chunk("r", 0, 0, 2))
    step(told, 2.0)  # allocates the blocks
    told.tell(chunk("r", 1, 2, 3, token=7))
    return told


def test_a_fetch_lasts_from_when_chunk_and_blocks_are_there():
    told = receiving()
    told.now = 2.5
    told.come(0)
    told.now = 4.0
    told.come(1)
    heartbeat = told.heartbeat()
    assert heartbeat.traced == [
        TraceEvent("fetch", "r", 1, at=2.0, seconds=0.5, peer="p1", first=0, last=2, size=64, note="stream"),
        TraceEvent("fetch", "r", 1, at=2.0, seconds=2.0, peer="p1", first=2, last=3, size=32, note="stream"),
    ]
    assert heartbeat.activity.received == {"stream": Transferred(chunks=2, bytes=96, seconds=2.5)}
    assert heartbeat.activity.steps == 0  # a pass that only allocates computes nothing


def test_each_try_of_a_fetch_is_traced_and_the_pause_before_it_is_no_part_of_it():
    told = receiving()
    told.come(1)
    told.now = 3.0
    told.come(0, "flipped")
    told.now = 4.0
    told.come(0, "lost")
    told.later(LOST_PAUSE_S * 2)
    again = told.now
    told.now += 1.0
    told.come(0)
    heartbeat = told.heartbeat()
    assert [(each.at, each.seconds, each.size, each.note) for each in heartbeat.traced[1:]] == [
        (2.0, 1.0, 0, "stream: flipped"),
        (3.0, 1.0, 0, "stream: lost"),
        (again, 1.0, 64, "stream"),
    ]
    assert heartbeat.activity.received == {"stream": Transferred(chunks=2, bytes=96, seconds=1.0, failed=2)}


def test_what_comes_for_a_request_that_is_gone_does_not_count():
    told = receiving()
    told.tell(drop("r"))
    told.come(0, "lost")
    told.come(1)
    heartbeat = told.heartbeat()
    assert (heartbeat.traced, heartbeat.activity.received) == ([], {})


# ---------------------------------------------------------------- decode


def test_tokens_name_the_step_that_wrote_them():
    told = working("d1", **ROOMY).running("x", "y", src="d9", max_tokens=20)
    assert steps(step(told)) == [EngineStep(at=1.0, seconds=1.0, batch=2)]
    assert steps(told.tell(resend("x", 0))) == [None]
    activity = told.heartbeat().activity
    assert (activity.steps, activity.decode_steps, activity.decode_tokens) == (2, 2, 4)


def test_tokens_of_several_steps_name_the_last_one():
    told = working("d1", stream_interval=4, view_s=9000.0, **ROOMY).running("x", src="d9", max_tokens=20)
    assert steps(step(told, passes=2)) == []
    assert steps(step(told, passes=3)) == [EngineStep(at=2.0, seconds=1.0, batch=1, passes=3)]
    activity = told.heartbeat().activity
    assert (activity.steps, activity.step_s, activity.decode_tokens) == (6, 2.0, 6)


def test_a_step_of_both_phases_counts_for_both():
    told = working("m1", **ROOMY).running("x", src="d9", max_tokens=20)
    told.tell(assign("r", prompt=4))
    both = EngineStep(at=1.0, seconds=1.0, batch=1, chunk_tokens=4)
    assert steps(step(told)) == [both, both]  # a message of each phase
    (computed,) = traced(told, "chunk")
    assert (computed.first, computed.last, computed.size) == (0, 4, 5)
    activity = told.heartbeat().activity
    assert (activity.steps, activity.decode_steps, activity.decode_tokens) == (2, 2, 2)
    assert (activity.chunk_steps, activity.chunk_tokens, activity.chunk_space) == (1, 4, 7)


def test_a_preempted_decode_is_computed_again():
    told = working("d1", **ROOMY).running("x", "y", src="d9", max_tokens=20)
    step(told, preempted=["x"])
    step(told, part={"x": 3})
    step(told)
    heartbeat = told.heartbeat()
    found = [each for each in heartbeat.traced if each.kind != "fetch"]
    assert [(each.kind, each.rid, each.at, each.first, each.last, each.size) for each in found] == [
        ("preempted", "x", 1.0, 0, 0, 0),
        ("recompute", "x", 1.0, 0, 3, 4),
        ("recompute", "x", 2.0, 3, 10, 9),
    ]
    assert (heartbeat.activity.preempted, heartbeat.activity.recomputed) == (1, 10)


@pytest.mark.parametrize(("gone", "lead"), [((), "r"), (("r",), "r.1")])
def test_choices_that_share_a_transfer_are_traced_by_the_first_that_is_still_here(gone, lead):
    told = working("d1", "p1", **ROOMY)
    told.far = True
    shared = offer("r", 8, sampling=Sampling(max_tokens=8, temperature=1.0, seed=0), siblings=siblings("r.1"))
    told.tell(shared, chunk("r", 0, 0, 2, tokens=[5, 6]))
    step(told)
    told.tell(*map(close, gone))
    told.come(0)
    heartbeat = told.heartbeat()
    assert [(each.kind, each.rid, each.size) for each in heartbeat.traced] == [("fetch", lead, 64)]
    assert heartbeat.activity.received == {"shm": Transferred(chunks=1, bytes=64)}
