"""A cancel gives back every block at once, in any state of a leg."""

from __future__ import annotations

import pytest
from handover import TEXT, TOKENS, Pair, Request, adopt_zeros, engine_request, fill

from tetri.engine.base import Span

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]


def waiting(engine) -> None:
    engine.add(engine_request("x", "prefill"))


def half_done(engine) -> None:
    waiting(engine)
    assert ("x", 4) in engine.step().held


def finished(engine) -> None:
    half_done(engine)
    assert engine.step().tokens


def decode_waiting(engine) -> None:
    engine.add(engine_request("x", "decode"))


def parked(engine) -> None:
    decode_waiting(engine)
    assert engine.step().allocated == ("x",)


def adopted(engine) -> None:
    parked(engine)
    adopt_zeros(engine, "x")


def admitted(engine) -> None:
    adopted(engine)
    engine.admit("x", 5)


def running(engine) -> None:
    admitted(engine)
    assert engine.step().spans == (Span("x", 700, 701),)
    assert engine.step().tokens


STATES = (waiting, half_done, finished, decode_waiting, parked, adopted, admitted, running)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("alone", [True, False])
def test_cancel_frees_every_block_at_once(engine, state, alone):
    blocks = engine.facts()[1].blocks
    if not alone:
        engine.add(engine_request("other", "decode", TOKENS[:300]))
        engine.step()
        adopt_zeros(engine, "other", TOKENS[:300])
    others = 0 if alone else 3
    state(engine)
    engine.cancel("x")
    assert engine.free_blocks() == blocks - others
    engine.cancel("x")
    if not alone:
        engine.admit("other", 5)
        assert engine.step().spans == (Span("other", 300, 301),)
        engine.cancel("other")
    assert engine.step().spans == ()


def test_cancel_of_a_preempted_leg(engine):
    """Two legs of one block each, one free block: the second leg to need another one is preempted."""
    blocks = engine.facts()[1].blocks
    ballast = fill(engine, leave=3)
    for key in ("first", "x"):
        engine.add(engine_request(key, "decode", TOKENS[:127]))
        engine.step()
        adopt_zeros(engine, key, TOKENS[:127])
        engine.admit(key, 5)
    preempted: tuple[str, ...] = ()
    while not preempted:
        done = engine.step()
        preempted = done.preempted
    assert preempted == ("x",) and dict(done.held)["x"] == 0
    engine.cancel("x")
    for key in (*ballast, "first"):
        engine.cancel(key)
    assert engine.free_blocks() == blocks


def test_a_key_can_come_back_after_a_cancel(float32, engine):
    reference = float32.reference.generate(list(TOKENS), TEXT, float32.stop_ids)
    for state in (half_done, parked, running):
        state(engine)
        engine.cancel("x")
    request = Request("x", TOKENS, TEXT)
    Pair(float32.prefill, engine).carry(request)
    assert request.ids == reference.ids
