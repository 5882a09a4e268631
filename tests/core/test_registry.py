"""The instances as the broker knows them: the pools of prefill instances."""

import time
from random import Random

import pytest

from tests.core.build import capacity, fingerprint, ready
from tetri.core.actions import Disconnect, Submitted
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.core.broker.membership import FORGET_S, Members
from tetri.cost import Cost
from tetri.policy.rules import PREFILL_ROUTES, Rules
from tetri.request import Sampling
from tetri.wire.events import PeerUp

OTHER = fingerprint(dtype="f32")


def members(*workers):
    """Of (iid, role, changes of the Ready), all connected."""
    made = Members(1)
    for iid, role, *changes in workers:
        made.ready(ready(iid, role, **(changes[0] if changes else {})), 0.0)
        made.connected(iid)
    return made


def pool(made, tokens=1, work=None):
    return made.pool(tokens, work or {}).iids


def test_a_pool_takes_prefill_and_mixed_instances_that_can_be_reached():
    made = members(("p0", "prefill"), ("m0", "mixed"), ("d0", "decode"), ("p1", "prefill"))
    assert pool(made) == ["p0", "m0", "p1"]
    made.disconnected("p0")
    made.lose(made.by_iid["p1"], "gone")
    assert pool(made) == ["m0"]
    made.connected("p0")
    made.lose(made.by_iid["p1"], None)
    made.turn(made.by_iid["m0"], "decode")
    assert pool(made) == ["p0", "p1"]


def test_a_prompt_goes_only_where_it_fits():
    """By memory, and by the context that the engine knows."""
    made = members(
        ("small", "prefill", {"capacity": capacity(blocks=2)}),
        ("large", "prefill", {"capacity": capacity(blocks=9)}),
        ("short", "prefill", {"capacity": capacity(context=12)}),
    )
    assert pool(made, 8) == ["small", "large", "short"]
    assert pool(made, 9) == pool(made, 11) == ["large", "short"]
    assert pool(made, 12) == pool(made, 36) == ["large"]
    assert pool(made, 37) == []


def test_what_only_its_own_prefill_instance_can_decode_must_fit_there_twice():
    made = members(("m0", "mixed"), ("p0", "prefill"))
    assert pool(made, 20) == ["m0", "p0"] and pool(made, 21) == ["p0"]
    made.turn(made.by_iid["p0"], "mixed")
    assert pool(made, 21) == ["m0", "p0"]
    assert pool(members(("m0", "mixed")), 21) == ["m0"]  # its KV store may be large enough


def test_only_those_whose_kv_somebody_takes():
    made = members(("p0", "prefill"), ("p1", "prefill", {"fingerprint": OTHER}))
    assert pool(made) == ["p0", "p1"]  # whoever comes may take it
    made.ready(ready("d0", "decode"), 0.0)  # not connected yet, and there all the same
    assert pool(made) == ["p0"]
    made.ready(ready("m0", "mixed", fingerprint=OTHER), 0.0)
    made.connected("m0")
    assert pool(made) == ["p0", "p1", "m0"]


def test_work_is_told_in_seconds_and_the_last_choice_is_remembered():
    made = members(("p0", "prefill"), ("p1", "prefill"))
    first = made.pool(1, {"p1": 2_500_000_000})
    assert first.queued_s == [0.0, 2.5]
    first.last = 1
    assert made.pool(1, {"p0": 10**9}) is first and (first.queued_s, first.last) == ([1.0, 0.0], 1)


def test_what_fits_nowhere_counts_mixed_instances_for_both_phases():
    four, three = ({"capacity": capacity(blocks=blocks)} for blocks in (4, 3))
    made = members(("m0", "mixed", four), ("d0", "decode", three))
    assert made.too_long(16, 16) is None
    assert made.too_long(17, 17) == "17 tokens fit into no prefill instance: the largest holds 16"
    assert made.too_long(16, 17) == "17 tokens fit into no decode instance: the largest holds 16"
    made.turn(made.by_iid["m0"], "prefill")
    assert made.too_long(12, 13) == "13 tokens fit into no decode instance: the largest holds 12"
    made.lose(made.by_iid["d0"], "gone")
    assert made.too_long(12, 13) is None


@pytest.mark.parametrize(
    "one, other, apart",
    [
        ("prefill", "decode", True),
        ("mixed", "mixed", True),
        ("mixed", "prefill", True),
        ("prefill", "prefill", False),
        ("decode", "decode", False),
    ],
)
def test_strangers_are_named_where_kv_would_have_to_move(one, other, apart):
    made = members(("a", one), ("b", other, {"fingerprint": OTHER}))
    notes = [status.note for status in made.status()]
    assert [bool(note) for note in notes] == [apart, apart]
    if apart:
        assert notes[0].startswith("never paired with b: dtype differs")


def test_a_worker_that_harms_its_kv_on_purpose_is_named():
    made = members(("p0", "prefill"), ("d0", "decode"))
    made.by_iid["d0"].counters = {"injected_drop": 0}
    made.by_iid["p0"].counters = {"duplicate": 3}
    assert [status.note for status in made.status()] == ["a rehearsal: faults are injected here (transfer.faults)", ""]


def test_a_roster_is_made_when_there_is_news_or_silence():
    made = members(("p0", "prefill"))
    assert len(made.refresh(1.0)) == 1 and made.refresh(1.1) == []
    made.turn(made.by_iid["p0"], "mixed")
    (send,) = made.refresh(1.2)
    assert [entry.role for entry in send.message.instances] == ["mixed"] and made.refresh(1.9) == []
    assert len(made.refresh(2.0)) == 1


def test_whoever_is_given_up_is_no_longer_written_to():
    made = members(("p0", "prefill"), ("d0", "decode"))
    made.lose(made.by_iid["d0"], "silent")  # its connection stands all the same
    assert made.prune(FORGET_S + 1) == [Disconnect("d0")]
    assert [send.peer for send in made.publish(FORGET_S + 1)] == ["p0"]


def broker(route, workers, **options):
    limits = Limits(context=4096, vocabulary=10, max_open=10**6)
    core = Broker(limits, Rules(prefill_route=route), epoch=1, rng=Random(1), now=0.0, **options)
    for number in range(workers):
        core.handle(ready(f"p{number}", "prefill", capacity=capacity(blocks=900, context=4096)), 0.0)
        core.handle(PeerUp(f"p{number}"), 0.0)
    return core


def place(core, number, tokens):
    core.handle(Submitted(b"c", f"k{number}", (1,) * tokens, Sampling(max_tokens=1)), 0.0)
    return core.table.rows[f"000001-{number + 1}"].prefill


def test_round_robin_takes_turns():
    core = broker("round_robin", 3)
    assert [place(core, number, 3) for number in range(5)] == ["p0", "p1", "p2", "p0", "p1"]


@pytest.mark.parametrize("route", PREFILL_ROUTES)
def test_a_place_among_many_is_found_fast(route):
    """By no scan of the requests, nor of anything else but the pool's columns. It takes about 10 us."""
    core = broker(route, 64, cost=Cost(prefill=((1.0, 0.01), (512.0, 0.1)), prefill_start_s=1e-8))
    for number in range(2000):
        place(core, number, 1 + number % 1000)
    rows = list(core.table.active())[-500:]
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        for row in rows:
            core.lifecycle.place(row, 1.0)
        best = min(best, (time.thread_time() - start) / len(rows))
    assert best < 100e-6
    core.check()
