"""The engine without a model."""

import pytest

from tests.engine.contract import CAPACITY, EngineContract, adopt, leg, prefill, prompt, run
from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.emulated import EOS, EmulatedEngine, next_token, reference
from tetri.request import Capacity, Sampling

VOCABULARY = 64


def emulated(capacity=CAPACITY, token_bytes=8, **changes):
    fields = {"vocabulary": VOCABULARY, "cost": Cost(), "clock_sleep": no_sleep, **changes}
    return EmulatedEngine(capacity=capacity, token_bytes=token_bytes, **fields)


def no_sleep(seconds):
    raise AssertionError(f"nothing costs time here, {seconds} s were asked for")


class TestContract(EngineContract):
    @pytest.fixture
    def engine(self):
        made = emulated()
        yield made
        left = [block for slot in made.slots.values() for block in slot.blocks]
        assert sorted(made.free + left) == list(range(CAPACITY.blocks)), "each block is somewhere, once"
        made.close()

    def right(self, tokens, sampling):
        return reference(tokens, sampling, VOCABULARY, 8)


@pytest.fixture
def engine():
    return emulated()


def test_blocks_are_really_paged(engine):
    """Blocks of two legs lie between each other, and a freed one is the next to be used."""
    engine.add(leg("a", "decode", prompt(8)))
    engine.add(leg("b", "decode", prompt(8)))
    engine.step()
    first = engine.slots["a"].blocks
    engine.cancel("a")
    engine.add(leg("c", "decode", prompt(12)))
    engine.step()
    assert set(first) < set(engine.slots["c"].blocks) and not set(engine.slots["b"].blocks) & set(first)


def test_missing_kv_changes_the_text(engine):
    copies, first = prefill(engine, "p", prompt(8))
    engine.memory[:] = 0
    adopt(engine, "d", prompt(8), copies[:1], first.token)
    assert run(engine, "d")[0]["d"] != reference(prompt(8), Sampling(max_tokens=8, ignore_eos=True), VOCABULARY, 8)[1:]


def test_an_end_of_sequence_stops_unless_it_is_ignored():
    ended = 0
    for salt in range(50):
        sampling = Sampling(max_tokens=16)
        right = reference(prompt(5, salt), sampling, VOCABULARY, 8)
        engine = emulated()
        copies, first = prefill(engine, "p", prompt(5, salt), max_tokens=16, ignore_eos=False)
        if first.reason is None:
            adopt(engine, "d", prompt(5, salt), copies, first.token, max_tokens=16, ignore_eos=False)
            outputs, reasons, _ = run(engine, "d")
            assert [first.token, *outputs["d"]] == right and reasons["d"] == ("stop" if right[-1] == EOS else "length")
        else:
            assert (right, first.reason) == ([EOS], "stop")
        ended += right[-1] == EOS
    assert 0 < ended < 50
    ignored = reference(prompt(5), Sampling(max_tokens=500, ignore_eos=True), VOCABULARY, 8)
    assert len(ignored) == 500 and EOS not in ignored


def test_the_context_ends_it_by_length():
    engine = emulated(Capacity(blocks=12, block_tokens=4, chunk_tokens=8, max_batch=4, context=9))
    copies, first = prefill(engine, "p", prompt(6))
    adopt(engine, "d", prompt(6), copies, first.token)
    outputs, reasons, _ = run(engine, "d")
    assert (len(outputs["d"]), reasons["d"]) == (2, "length")


def test_a_seed_matters_only_when_tokens_are_drawn():
    def token(**sampling):
        return next_token(b"kv", 3, Sampling(**sampling), 1 << 30)

    assert token() == token(seed=5) == token(temperature=1.0) == token(temperature=1.0, seed=0)
    assert token(temperature=1.0, seed=5) != token()
    assert token(temperature=1.0, seed=5) == token(temperature=0.5, seed=5)


def test_any_width_of_a_token_gives_the_same_text_as_its_reference():
    engine = emulated(token_bytes=24)
    copies, first = prefill(engine, "p", prompt(8))
    adopt(engine, "d", prompt(8), copies, first.token)
    right = reference(prompt(8), Sampling(max_tokens=8, ignore_eos=True), VOCABULARY, 24)
    assert [first.token, *run(engine, "d")[0]["d"]] == right
    assert engine.fingerprint.block_bytes == 4 * 24
    with pytest.raises(EngineError, match="multiple of 8, got 12"):
        emulated(token_bytes=12)


def test_steps_take_the_time_that_the_table_says():
    slept = []
    cost = Cost(prefill=((1.0, 1.0), (9.0, 9.0)), decode=((1.0, 10.0),), decode_context_s=0.5)
    engine = emulated(cost=cost, time_scale=0.1, clock_sleep=slept.append)
    copies, first = prefill(engine, "p", prompt(10))
    assert slept == pytest.approx([0.8, 0.2])
    adopt(engine, "d", prompt(10), copies, first.token)
    slept.clear()
    engine.step()
    assert slept == pytest.approx([0.1 * (10 + 0.5 * 11)])


def test_what_is_computed_again_costs_like_a_chunk():
    slept = []
    engine = emulated(cost=Cost(prefill=((1.0, 1.0), (9.0, 9.0))), clock_sleep=slept.append)
    copies, first = prefill(engine, "p", prompt(6))
    adopt(engine, "d", prompt(6), copies, first.token)
    slept.clear()
    engine.slots["d"].done = 0  # as after a preemption
    engine.step()
    assert slept == pytest.approx([7.0])


def test_one_too_large_for_the_memory_left_waits_alone(engine):
    """The youngest gives its blocks back; the last one that remains waits when others hold the rest."""
    engine.add(leg("parked", "decode", prompt(28)))
    copies, first = prefill(engine, "p", prompt(16))
    adopt(engine, "d", prompt(16), copies, first.token)
    engine.add(leg("more", "decode", prompt(4)))
    step = engine.step()
    assert step.allocated == ("more",) and step.preempted == ("d",) and not step.spans
    assert not engine.step().preempted, "it has nothing to give any more"
    engine.cancel("parked")
    right = reference(prompt(16), Sampling(max_tokens=8, ignore_eos=True), VOCABULARY, 8)
    assert run(engine, "d")[0]["d"] == right[1:]


def test_a_prefill_that_has_no_memory_waits(engine):
    engine.add(leg("parked", "decode", prompt(31)))
    engine.add(leg("other", "decode", prompt(8)))
    engine.step()
    engine.add(leg("a", "prefill", prompt(12)))
    engine.add(leg("b", "prefill", prompt(1)))
    assert not engine.step().spans, "nor does the next overtake it"
    engine.cancel("parked")
    assert [span.key for span in engine.step().spans] == ["a"]
