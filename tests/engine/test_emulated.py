"""The engine without a model."""

from math import exp

import pytest

from tests.engine.contract import CAPACITY, EngineContract
from tests.engine.driving import adopt, adopt_all, engine_request, prefill, prompt, run, stay
from tests.engine.move_contract import MoveContract
from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.emulated import EOS, EmulatedEngine, logprob_of, next_token, reference, reference_tokens
from tetri.engine_request import INVALID
from tetri.instance import Capacity
from tetri.request import Sampling

VOCABULARY = 64


SMALL = Capacity(blocks=12, block_tokens=4, chunk_tokens=8, max_batch=4, context=32)


def emulated(capacity=SMALL, token_bytes=8, **changes):
    fields = {"vocabulary": VOCABULARY, "cost": Cost(), "wait": no_wait, **changes}
    return EmulatedEngine(capacity=capacity, token_bytes=token_bytes, **fields)


def no_wait(seconds):
    raise AssertionError(f"nothing costs time here, {seconds} s were asked for")


class Watch:
    """A clock that only waiting moves. A message comes at `message_at`."""

    def __init__(self, message_at=float("inf")):
        self.now, self.message_at, self.waited = 100.0, message_at, []

    def clock(self):
        return self.now

    def wait(self, seconds):
        self.waited.append(seconds)
        self.now += seconds
        return self.now >= self.message_at


class TestContract(EngineContract, MoveContract):
    @pytest.fixture
    def engine(self):
        made = emulated(CAPACITY)
        yield made
        owned = [block for content in made.contents.values() for block in content.blocks]
        assert sorted(made.free + owned) == list(range(CAPACITY.blocks)), "each block is somewhere, once"
        assert len(made.free) == made.paged.free and list(made.contents) == list(made.paged.slots)
        made.paged.check()
        made.close()
        assert len(made.free) == CAPACITY.blocks

    def right(self, tokens, sampling):
        return reference(tokens, sampling, VOCABULARY, 8)


@pytest.mark.parametrize("most", [1, 6])
def test_a_request_without_a_valid_number_ends_and_its_neighbour_goes_on(most):
    sampling, prompts = Sampling(max_tokens=8, ignore_eos=True), {"a": prompt(5), "b": prompt(5, 1)}
    right = {key: reference(tokens, sampling, VOCABULARY, 8) for key, tokens in prompts.items()}
    bad = next(token for token in right["a"][1:6] if token not in [*right["b"], *prompt(5), *prompt(5, 1)])
    engine = emulated(nan_token=bad)
    out = {key: [first] for key, first in adopt_all(engine, prompts).items()}
    ends = {}
    while len(ends) < 2:
        for sampled in engine.step(most).tokens:
            out[sampled.key] += sampled.ids
            if sampled.reason:
                ends[sampled.key] = (sampled.reason, sampled.error)
    assert out == {"a": right["a"][: right["a"].index(bad) + 1], "b": right["b"]}
    assert ends == {"a": ("error", INVALID), "b": ("length", None)}
    assert len(engine.free) == SMALL.blocks
    engine.paged.check()


def test_a_prompt_without_a_valid_number_ends_with_no_token():
    engine = emulated(nan_token=prompt(5)[2])
    _, sampled = prefill(engine, "a", prompt(5))
    assert (sampled.ids, sampled.reason, sampled.error) == ((), "error", INVALID)
    assert len(engine.free) == SMALL.blocks


def test_a_prompt_without_a_valid_number_does_not_stay():
    engine = emulated(nan_token=prompt(5)[2])
    assert stay(engine, "p", "d", prompt(5)).error == INVALID
    assert not engine.contents and len(engine.free) == SMALL.blocks
    with pytest.raises(EngineError):
        engine.admit("d", 5)


def test_the_engine_dies_in_the_step_that_computes_the_deadly_token_in_either_phase():
    died, tokens = [], prompt(5)
    right = reference(tokens, Sampling(max_tokens=8, ignore_eos=True), VOCABULARY, 8)
    engine = emulated(deadly_token=right[2], die=lambda: died.append(True))
    assert right[2] not in [*tokens, *right[:2]]
    adopt_all(engine, {"a": tokens})
    counts = []
    for _ in range(3):
        engine.step()
        counts.append(len(died))
    assert counts == [0, 0, 1], "the decode that samples it lives, the next one computes it"
    engine.add(engine_request("b", "prefill", (*tokens, *right[:3]), output_from=5))
    engine.cancel("a")
    engine.step()
    assert len(died) == 2


@pytest.fixture
def engine():
    return emulated()


def right(tokens, token_bytes=8):
    return reference(tokens, Sampling(max_tokens=8, ignore_eos=True), VOCABULARY, token_bytes)


def test_blocks_are_really_paged(engine):
    """Blocks of two legs lie between each other, and a freed one is the next to be used."""
    engine.add(engine_request("a", "decode", prompt(8)))
    engine.add(engine_request("b", "decode", prompt(8)))
    engine.step()
    first = engine.contents["a"].blocks
    engine.cancel("a")
    engine.add(engine_request("c", "decode", prompt(12)))
    engine.step()
    assert set(first) < set(engine.contents["c"].blocks) and not set(engine.contents["b"].blocks) & set(first)


def test_one_swapped_block_or_flipped_byte_changes_the_text(engine):
    tokens = prompt(16)
    copies, first = prefill(engine, "p", tokens)
    flipped = [bytearray(block) for block in copies]
    flipped[1][0] ^= 1
    for key, wrong in (("s", [copies[1], copies[0], *copies[2:]]), ("f", flipped)):
        adopt(engine, key, tokens, wrong, first.token)
        assert run(engine, key)[0][key] != right(tokens)[1:]


def test_missing_kv_changes_the_text(engine):
    copies, first = prefill(engine, "p", prompt(8))
    engine.memory[:] = 0
    adopt(engine, "d", prompt(8), copies[:1], first.token)
    assert run(engine, "d")[0]["d"] != right(prompt(8))[1:]


@pytest.mark.parametrize("most", [1, 15])
def test_an_end_of_sequence_stops_unless_it_is_ignored(most):
    """In a run of several passes too: nobody knows before that it comes."""
    ended = 0
    for salt in range(60):
        right = reference(prompt(5, salt), Sampling(max_tokens=16), VOCABULARY, 8)
        engine = emulated()
        copies, first = prefill(engine, "p", prompt(5, salt), max_tokens=16, ignore_eos=False)
        if first.reason is None:
            adopt(engine, "d", prompt(5, salt), copies, first.token, max_tokens=16, ignore_eos=False)
            outputs, reasons, steps = run(engine, "d", most=most)
            assert [first.token, *outputs["d"]] == right and reasons["d"] == ("stop" if right[-1] == EOS else "length")
            assert [step.steps for step in steps] == ([len(right) - 1] if most == 15 else [1] * len(steps))
            assert not engine.contents
        else:
            assert (right, first.reason) == ([EOS], "stop")
        ended += right[-1] == EOS
    assert 0 < ended < 60
    ignored = reference(prompt(5), Sampling(max_tokens=500, ignore_eos=True), VOCABULARY, 8)
    assert len(ignored) == 500 and EOS not in ignored


def test_the_context_ends_it_by_length():
    engine = emulated(Capacity(blocks=12, block_tokens=4, chunk_tokens=8, max_batch=4, context=9))
    adopt_all(engine, {"d": prompt(6)})
    outputs, reasons, _ = run(engine, "d")
    assert (len(outputs["d"]), reasons["d"]) == (2, "length")


def test_a_seed_matters_only_when_tokens_are_drawn():
    def token(**sampling):
        return next_token(b"kv", 3, 1, Sampling(**sampling), 1 << 30)

    assert token() == token(seed=5) == token(temperature=1.0) == token(temperature=1.0, seed=0)
    assert token(temperature=1.0, seed=5) != token()
    assert token(temperature=1.0, seed=5) == token(temperature=0.5, seed=5)


def test_any_width_of_a_token_gives_the_same_text_as_its_reference():
    engine = emulated(token_bytes=24)
    first = adopt_all(engine, {"d": prompt(8)})["d"]
    assert [first, *run(engine, "d")[0]["d"]] == right(prompt(8), 24)
    assert engine.fingerprint.block_bytes == 4 * 24
    with pytest.raises(EngineError, match=r"chunk_tokens \(8\) .* larger than max_batch \(8\)"):
        emulated(Capacity(blocks=12, block_tokens=4, chunk_tokens=8, max_batch=8, context=32))
    with pytest.raises(EngineError, match="multiple of 8, got 12"):
        emulated(token_bytes=12)


COST = Cost(prefill=((1.0, 1.0), (9.0, 9.0)), decode=((1.0, 10.0),), decode_context_s=0.5)


def timed(watch, **changes):
    return emulated(cost=COST, wait=watch.wait, clock=watch.clock, **changes)


def decoding(watch):
    """An engine that decodes after a prompt of 10 tokens."""
    engine = timed(watch)
    adopt_all(engine, {"d": prompt(10)})
    watch.waited.clear()
    return engine


def test_steps_take_the_time_that_the_table_says():
    watch = Watch()
    engine = timed(watch, time_scale=0.1)
    copies, first = prefill(engine, "p", prompt(10))
    assert watch.waited == pytest.approx([0.8, 0.2])
    adopt(engine, "d", prompt(10), copies, first.token)
    watch.waited.clear()
    engine.step()
    assert watch.waited == pytest.approx([0.1 * (10 + 0.5 * 11)])


def test_what_the_hashes_take_is_part_of_the_step():
    watch = Watch()
    engine = timed(watch)
    engine.add(engine_request("p", "prefill", prompt(8)))
    moments = iter((0.0, 3.0))
    engine.clock = lambda: next(moments)
    engine.step()
    assert watch.waited == [8.0 - 3.0]
    engine.add(engine_request("q", "prefill", prompt(8)))
    moments = iter((0.0, 30.0))
    engine.step()
    assert watch.waited[1:] == [0.0], "late already"


def test_a_run_of_several_passes_takes_their_time():
    watch = Watch()
    engine = decoding(watch)
    assert engine.step(3).steps == 3
    assert watch.waited == pytest.approx([10 + 0.5 * tokens for tokens in (11, 12, 13)])


def test_a_message_ends_a_run_at_the_next_boundary():
    watch = Watch()
    engine = decoding(watch)
    watch.message_at = watch.now + 16  # in the second pass
    step = engine.step(7)
    assert step.steps == 2 and step.tokens[0].ids == tuple(right(prompt(10))[1:3])
    watch.message_at = watch.now + 1000
    assert engine.step(7).tokens[0].ids == tuple(right(prompt(10))[3:]), "and it goes on from there"


def test_one_too_large_for_the_memory_left_waits_alone(engine):
    """The youngest gives its blocks back; the last one that remains waits when others hold the rest."""
    engine.add(engine_request("parked", "decode", prompt(28)))
    adopt_all(engine, {"d": prompt(16)})
    engine.add(engine_request("more", "decode", prompt(4)))
    step = engine.step()
    assert step.allocated == ("more",) and step.preempted == ("d",) and not step.spans
    assert not engine.step().preempted, "it has nothing to give any more"
    engine.cancel("parked")
    assert run(engine, "d")[0]["d"] == right(prompt(16))[1:]


def test_a_prefill_that_has_no_memory_waits(engine):
    engine.add(engine_request("parked", "decode", prompt(31)))
    engine.add(engine_request("other", "decode", prompt(8)))
    engine.step()
    engine.add(engine_request("a", "prefill", prompt(12)))
    engine.add(engine_request("b", "prefill", prompt(1)))
    assert not engine.step().spans, "nor does the next overtake it"
    engine.cancel("parked")
    assert [span.key for span in engine.step().spans] == ["a"]


# ---------------------------------------------------------------- choices, log probabilities, bias and stop ids


def decoded(engine, tokens, **sampling):
    """The output of a request, its two phases on one engine, and why it ended."""
    copies, first = prefill(engine, "p", tokens, **sampling)
    if first.reason is not None:
        return list(first.ids), first.reason
    adopt(engine, "d", tokens, copies, first.token, **sampling)
    outputs, reasons, _ = run(engine, "d", most=3)
    return [*first.ids, *outputs["d"]], reasons["d"]


def wanted(tokens, **sampling):
    return reference_tokens(tokens, Sampling(**{"max_tokens": 8, "ignore_eos": True, **sampling}), VOCABULARY, 8)


def test_the_siblings_of_a_prefill_get_the_first_tokens_of_their_seeds(engine):
    tokens, seeds = prompt(10), range(5, 9)
    siblings = [(f"a.{seed}", seed) for seed in seeds[1:]]
    engine.add(engine_request("a", "prefill", tokens, siblings=siblings, temperature=1.0, seed=5, logprobs=2))
    assert not engine.step().tokens
    step = engine.step()
    assert [each.key for each in step.tokens] == ["a", "a.6", "a.7", "a.8"]
    right = [wanted(tokens, temperature=1.0, seed=seed, logprobs=2)[0] for seed in seeds]
    assert [each.ids for each in step.tokens] == [(token,) for token in right]
    assert len({token.id for token in right}) > 1, "the choices differ"
    assert not engine.contents and not engine.logprobs


def test_each_sibling_ends_by_itself(engine):
    tokens = prompt(5)
    firsts = [next_token_of(tokens, seed) for seed in range(40)]
    last = firsts[3]
    siblings = [(str(seed), seed) for seed in range(1, 40)]
    sampling = {"temperature": 1.0, "seed": 0, "stop_token_ids": [last]}
    engine.add(engine_request("a", "prefill", tokens, siblings=siblings, **sampling))
    reasons = [each.reason for each in engine.step().tokens]
    assert reasons == ["stop" if token == last else None for token in firsts] and set(reasons) == {"stop", None}


def next_token_of(tokens, seed):
    return wanted(tokens, temperature=1.0, seed=seed)[0]


def test_siblings_without_a_valid_number_end_with_an_error():
    engine = emulated(nan_token=prompt(5)[2])
    engine.add(engine_request("a", "prefill", prompt(5), siblings=[("b", 1)]))
    assert [(each.key, each.ids, each.error) for each in engine.step().tokens] == [
        ("a", (), INVALID),
        ("b", (), INVALID),
    ]


def test_log_probabilities_come_with_the_tokens_of_both_phases_and_depend_on_the_kv(engine):
    tokens = prompt(10)
    output, _ = decoded(engine, tokens, logprobs=3)
    assert output == wanted(tokens, logprobs=3)
    assert [token.id for token in output] == right(tokens) and not engine.logprobs
    for token in output:
        best, *others = token.top
        assert [(best + n) % VOCABULARY for n in (1, 2)] == others and sorted(token.top.values())[::-1] == [
            *token.top.values()
        ]
        assert token.logprob == token.top.get(token.id, token.logprob) <= token.top[best] < 0.0
    other = wanted((9, *tokens[1:]), logprobs=3)
    assert all(one.top != another.top for one, another in zip(output, other, strict=True))


def test_log_probabilities_add_up_to_one():
    said = logprob_of(7, b"some KV", 3, VOCABULARY, VOCABULARY)
    assert sum(map(exp, said.top.values())) == pytest.approx(1.0, abs=1e-6) and said.logprob == said.top[7]


def test_a_request_without_them_beside_one_with_them_gets_bare_ids(engine):
    tokens, outputs = prompt(5), {"a": [], "b": []}
    copies, first = prefill(engine, "p", tokens)
    adopt(engine, "a", tokens, copies, first.token)
    engine.hold("a", True)
    adopt(engine, "b", tokens, copies, first.token, logprobs=0)
    engine.hold("a", False)
    while engine.contents:
        for sampled in engine.step(2).tokens:
            outputs[sampled.key] += sampled.ids
    assert outputs == {"a": right(tokens)[1:], "b": wanted(tokens, logprobs=0)[1:]}


@pytest.mark.parametrize(
    "bias", [{9: 100.0}, {9: 100.0, 4: 100.0, 77: 100.0}, dict.fromkeys(range(60), -100.0), {3: 5.0}]
)
def test_a_bias_forces_tokens_and_forbids_them(engine, bias):
    output, _ = decoded(engine, prompt(10), logit_bias=bias)
    forced = {token for token, value in bias.items() if value == 100.0}
    assert output == wanted(prompt(10), logit_bias=bias)
    assert set(output) <= (forced or {*range(VOCABULARY)} - {token for token, value in bias.items() if value == -100.0})
    assert (output == right(prompt(10))) == (bias == {3: 5.0})


@pytest.mark.parametrize("place", [0, 4])
def test_a_stop_id_ends_the_text_also_where_an_end_of_sequence_does_not(engine, place):
    last = right(prompt(10))[place]
    output, reason = decoded(engine, prompt(10), stop_token_ids=[99, last])
    assert (output, reason) == (right(prompt(10))[: right(prompt(10)).index(last) + 1], "stop")
    assert output == wanted(prompt(10), stop_token_ids=[99, last])


FORCED = {"min_tokens": 3, "logit_bias": {EOS: 100.0}}


@pytest.mark.parametrize(
    "sampling, then, why",
    [
        ({"min_tokens": 3, "logit_bias": {9: 100.0}, "stop_token_ids": [9]}, [9], "stop"),
        ({**FORCED, "ignore_eos": False}, [EOS], "stop"),
        (FORCED, [EOS] * 5, "length"),  # vLLM forbids it also where it does not end the text
    ],
    ids=["stop id", "end of sequence", "one that is ignored"],
)
def test_nothing_that_ends_a_text_comes_before_min_tokens(engine, sampling, then, why):
    output, reason = decoded(engine, prompt(10), **sampling)
    assert (output[3:], reason) == (then, why) and then[0] not in output[:3]
    assert output == wanted(prompt(10), **sampling)
    again = {"tokens": (*prompt(10), *output[:2]), "output_from": 10, **sampling}
    assert prefill(engine, "again", **again)[1].token == output[2], "another attempt counts the tokens of the first"
