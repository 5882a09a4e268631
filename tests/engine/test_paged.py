"""The bookkeeping of an engine: what a step runs, how far it goes in one go, and what it costs."""

import random

import pytest

from tests.engine.driving import engine_request, prompt
from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.paged import Paged
from tetri.engine_request import Sampled, Span
from tetri.instance import Capacity

COST = Cost(prefill=((1.0, 1.0), (9.0, 9.0)), decode=((1.0, 10.0), (3.0, 30.0)), decode_context_s=0.5)


def ones(slots, count):
    return [(1,) * count] * len(slots)


def paged(cost=COST, **changes):
    fields = {"blocks": 12, "block_tokens": 4, "chunk_tokens": 8, "max_batch": 4, "context": 32, **changes}
    return Paged(Capacity(**fields), cost)


def step(engine, most=1, ids=ones):
    plan = engine.plan(most)
    done = engine.finish(plan, plan.steps, ids)
    engine.check()
    return done


def decoding(engine, *engine_requests):
    """Bring decode legs into the batch."""
    for made in engine_requests:
        engine.add(made)
    assert step(engine).allocated == tuple(made.key for made in engine_requests)
    for made in engine_requests:
        engine.admit(made.key, 1)


def names(done):
    return [*dict.fromkeys(each.key for each in (*done.tokens, *done.spans))]


# ---------------------------------------------------------------- several passes in one go


def test_a_run_ends_with_the_first_leg_that_ends():
    engine = paged()
    decoding(
        engine,
        engine_request("a", "decode", prompt(3), max_tokens=6),
        engine_request("b", "decode", prompt(5), max_tokens=4),
    )
    done = step(engine, most=10)
    assert done.steps == 3 and done.spans == ()
    assert done.tokens == (Sampled("a", (1, 1, 1), None), Sampled("b", (1, 1, 1), "length"))
    assert done.held == (("a", 2),), "b has ended"
    assert step(engine, most=10).tokens == (Sampled("a", (1, 1), "length"),)
    assert (engine.free, engine.slots) == (12, {})


def test_a_leg_that_was_admitted_in_vain_ends_at_once():
    engine = paged()
    decoding(engine, engine_request("a", "decode", prompt(3), max_tokens=1), engine_request("b", "decode", prompt(3)))
    done = step(engine, most=5)
    assert done.steps == 1 and done.tokens == (Sampled("a", (1,), "length"), Sampled("b", (1,), None))


def test_a_run_ends_before_memory_does():
    engine = paged()
    decoding(engine, *[engine_request(key, "decode", prompt(11), max_tokens=20) for key in "abc"])
    engine.add(engine_request("parked", "decode", prompt(5)))
    assert step(engine).allocated == ("parked",), "11 of 12 blocks, a last one for one of three"
    assert step(engine, most=20).preempted == ("c",), "all three have filled their third block"
    assert step(engine, most=20).steps == 7 and engine.free == 0, "a and b fill the 2 + 2 blocks that c gave back"


def test_prefill_memory_and_hand_overs_make_a_run_one_pass():
    engine = paged()
    decoding(engine, engine_request("a", "decode", prompt(3), max_tokens=20))
    engine.add(engine_request("p", "prefill", prompt(9)))
    assert [step(engine, most=5).steps for _ in range(3)] == [1, 1, 5], "two chunks beside the decode"
    engine.add(engine_request("d", "decode", prompt(3)))
    assert [step(engine, most=5).steps for _ in range(2)] == [1, 5], "the core must hear of the blocks"


def test_an_idle_leg_does_not_shorten_a_run():
    engine = paged()
    decoding(engine, engine_request("a", "decode", prompt(3)), engine_request("waits", "decode", prompt(20)))
    engine.cancel("waits")
    engine.add(engine_request("held", "prefill", prompt(9)))
    engine.hold("held", True)
    engine.add(engine_request("reserved", "decode", prompt(31)))
    step(engine)
    assert step(engine, most=5).steps == 5


@pytest.mark.parametrize("seed", range(20))
def test_runs_do_what_single_passes_do(seed):
    """The same legs, with messages at the same passes, in runs of any length: the same in the end, leg by leg."""
    assert lifecycle(seed, lambda rng: 1) == lifecycle(seed, lambda rng: rng.randint(1, 6))


def lifecycle(seed, length):
    """Legs come, are held and cancelled at passes that only the seed decides. What became of each leg."""
    rng, lengths = random.Random(seed), random.Random(seed + 1)
    engine, told, passes, coming = paged(), {}, 0, 0
    while passes < 80:
        if passes == coming:
            disturb(engine, rng, str(passes))
            coming += rng.randint(1, 9)
        done = step(engine, most=min(min(coming, 80) - passes, length(lengths)))
        passes += done.steps
        for key in done.allocated:
            engine.admit(key, 1)
        for key in done.preempted:
            told.setdefault(key, []).append(("preempted", passes))
        for sampled in done.tokens:
            told.setdefault(sampled.key, []).extend(sampled.ids)
            if f"{sampled.key} stays" in engine.slots:
                engine.admit(f"{sampled.key} stays", 1)
            if sampled.reason:
                told[sampled.key].append((sampled.reason, passes))
    return told


def disturb(engine, rng, key):
    drawn = rng.random()
    if drawn < 0.6:
        engine.add(engine_request(key, "decode", prompt(rng.randint(1, 9)), max_tokens=rng.randint(2, 20)))
    elif drawn < 0.8:
        engine.add(engine_request(key, "prefill", prompt(rng.randint(1, 20))))
        engine.hold(key, rng.random() < 0.5)
        engine.stay(key, f"{key} stays")
    elif engine.slots:
        slot = rng.choice(list(engine.slots.values()))
        if slot.admitted and drawn < 0.9:
            engine.hold(slot.key, not slot.held)
        else:
            engine.cancel(slot.key)


def test_such_lives_see_preemptions():
    legs = [leg for seed in range(20) for leg in lifecycle(seed, lambda rng: 6).values()]
    assert "preempted" in {entry[0] for leg in legs for entry in leg if entry != 1}


def test_decodes_run_several_passes_beside_a_prompt_that_may_not_run():
    engine = paged()
    decoding(engine, engine_request("a", "decode", prompt(3)))
    engine.add(engine_request("p", "prefill", prompt(20)))
    plans = []
    for chunk in (0, 3, None):
        plans.append(engine.plan(4, chunk))
        engine.finish(plans[-1], plans[-1].steps, ones)
    assert [(plan.steps, plan.chunk) for plan in plans] == [(4, ()), (1, (Span("p", 0, 3),)), (1, (Span("p", 3, 10),))]


# ---------------------------------------------------------------- what it costs


def test_seconds_of_a_run_are_those_of_its_passes():
    one, many = paged(), paged()
    for engine in (one, many):
        decoding(engine, engine_request("a", "decode", prompt(3)), engine_request("b", "decode", prompt(6)))
    plan = many.plan(4)
    singles = []
    for _ in range(4):
        single = one.plan()
        singles.append(single.seconds(1))
        one.finish(single, 1, ones)
    assert [plan.seconds(count) for count in (1, 2, 3, 4)] == pytest.approx([sum(singles[:n]) for n in (1, 2, 3, 4)])
    assert singles[0] == 20 + 0.5 * (4 + 7)


def test_a_mixed_step_costs_its_chunk_and_its_decodes():
    engine = paged()
    decoding(engine, engine_request("a", "decode", prompt(3)))
    engine.add(engine_request("p", "prefill", prompt(20)))
    plan = engine.plan()
    assert plan.chunk == (Span("p", 0, 7),) and plan.seconds(1) == COST.step_s(plan.chunk, 1, 4)


def test_what_is_computed_again_costs_and_counts_like_a_chunk():
    engine = paged(chunk_tokens=16)
    decoding(engine, engine_request("a", "decode", prompt(20), max_tokens=20), engine_request("b", "decode", prompt(3)))
    engine.add(engine_request("parked", "decode", prompt(20)))
    step(engine)
    assert step(engine).preempted == ("b",)
    engine.cancel("parked")
    engine.add(engine_request("p", "prefill", prompt(12)))
    plan = engine.plan()
    assert plan.again == (Span("b", 0, 5),) and plan.chunk == (Span("p", 0, 16 - 1 - 5),)
    assert plan.seconds(1) == COST.step_s([Span("b", 0, 5), Span("p", 0, 10)], 2, 23 + 5)
    assert engine.finish(plan, 1, ones).spans == (Span("b", 0, 5), Span("p", 0, 10))


# ---------------------------------------------------------------- who runs


def test_decodes_leave_nothing_for_prefill():
    engine = paged(chunk_tokens=2)
    decoding(engine, *[engine_request(key, "decode", prompt(2), max_tokens=2) for key in "ab"])
    engine.add(engine_request("p", "prefill", prompt(3)))
    assert names(step(engine)) == ["a", "b"] and names(step(engine)) == ["p"]


def test_a_preempted_leg_comes_back_for_nobody_elses_blocks():
    engine = paged()
    decoding(engine, engine_request("a", "decode", prompt(16)), engine_request("b", "decode", prompt(16)))
    engine.add(engine_request("parked", "decode", prompt(12)))
    done = step(engine)
    assert done.allocated == ("parked",) and done.preempted == ("b",) and names(done) == ["a"]
    decoding(engine, engine_request("c", "decode", prompt(4)))
    assert names(step(engine)) == ["a", "c"] and engine.free == 2, "b needs 5 blocks, and c is younger"
    engine.cancel("parked")
    assert step(engine).spans[-1] == Span("b", 0, 17)


def test_what_is_told_of_blocks_is_what_changed():
    engine = paged()
    engine.add(engine_request("a", "decode", prompt(4)))
    assert step(engine).held == (("a", 1),)
    assert step(engine).held == ()
    engine.admit("a", 1)
    assert [step(engine).held for _ in range(5)] == [(("a", 2),), (), (), (), (("a", 3),)]


def test_misuse_is_refused():
    engine = paged()
    with pytest.raises(EngineError, match="too few for one context of 49 tokens"):
        paged(context=49)
    decoding(engine, engine_request("a", "decode", prompt(3)))
    for key in "ax":
        with pytest.raises(EngineError):
            engine.admit(key, 1)


def test_check_sees_a_lost_block():
    engine = paged()
    engine.check()
    engine.free -= 1
    with pytest.raises(AssertionError, match="of 12 blocks"):
        engine.check()


def test_the_siblings_of_a_prefill_end_with_it_and_hold_nothing():
    engine = paged()
    engine.add(engine_request("a", "prefill", prompt(10), siblings=[("b", 1), ("c", 2)]))
    assert not step(engine).tokens
    done = step(engine, ids=lambda slots, count: [(1, 0, -1)[:count]])
    assert [(each.key, each.ids, each.reason) for each in done.tokens] == [
        ("a", (1,), None),
        ("b", (0,), None),  # they ignore the end of sequence
        ("c", (), "error"),
    ]
    assert engine.free == 12 and not engine.slots and done.held == ()


def test_a_stop_id_ends_a_request_in_any_pass():
    engine = paged()
    decoding(engine, engine_request("a", "decode", prompt(5), stop_token_ids=[7]))
    assert step(engine, ids=lambda slots, count: [(6,)]).tokens == (Sampled("a", (6,), None),)
    assert step(engine, ids=lambda slots, count: [(7,)]).tokens == (Sampled("a", (7,), "stop"),)
    assert not engine.slots
