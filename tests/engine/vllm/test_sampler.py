"""The sampler's pure functions: what may be drawn, how often, and that a hand-over changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from tetri.engine.vllm.sampler import RowSampler, candidates, draw, gumbel, invalid_rows, nucleus, penalize, stream_key
from tetri.request import Sampling, Token, TokenLogprob, token_ids

VOCAB = 1000


def logits_row(seed: int = 0, spread: float = 2.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def all_ids(vocab: int = VOCAB) -> torch.Tensor:
    return torch.arange(vocab, dtype=torch.int32)


# ---------------------------------------------------------------- noise


def test_noise_is_pinned():
    """A change of these numbers changes every seeded text: it must be meant."""
    assert stream_key(0, 0) != stream_key(0, 1) != stream_key(1, 0)
    found = [round(float(x), 4) for x in gumbel(7, 123, torch.tensor([0, 1, 49151], dtype=torch.int32))]
    assert found == [-0.5168, -0.6594, -0.8284]


def test_noise_of_a_token_does_not_depend_on_the_other_candidates():
    few = torch.tensor([5, 77, 999], dtype=torch.int32)
    assert torch.equal(gumbel(3, 9, few), gumbel(3, 9, all_ids())[few.long()])


def test_noise_is_finite_and_follows_the_gumbel_distribution():
    noise = torch.cat([gumbel(11, position, all_ids(49152)) for position in range(40)])
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_noise_of_neighbours_is_unrelated():
    """Peers in token id, in position and in seed."""
    base = gumbel(11, 500, all_ids(49152))
    others = [base.roll(1), base.roll(2), gumbel(11, 501, all_ids(49152)), gumbel(12, 500, all_ids(49152))]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 0.02


def test_draws_follow_the_probabilities():
    row = torch.tensor([0.0, 1.0, 2.0, float("-inf")])
    counts = torch.zeros(4)
    for position in range(6000):
        counts[draw(row, Sampling(temperature=1.0), position, [5])[0]] += 1
    assert torch.allclose(counts / 6000, torch.softmax(row, 0), atol=0.02)


def test_a_draw_needs_a_seed():
    with pytest.raises(ValueError, match="seed"):
        RowSampler(Sampling(temperature=1.0), [1], 1, (), VOCAB)


# ---------------------------------------------------------------- candidates


def kept(row: torch.Tensor, **sampling) -> list[int]:
    ids, values = candidates(row, Sampling(temperature=sampling.pop("temperature", 1.0), seed=1, **sampling))
    assert ids.dtype == torch.int32 and len(ids) == len(values) >= 1
    return sorted(ids.tolist())


def test_top_k_keeps_the_most_likely():
    row = logits_row()
    assert kept(row, top_k=7) == sorted(row.topk(7).indices.tolist())
    assert kept(row, top_k=0) == kept(row, top_k=VOCAB) == kept(row, top_k=5 * VOCAB) == list(range(VOCAB))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 20.0])
def test_top_p_keeps_the_fewest_that_hold_the_mass(top_p: float, spread: float):
    row = logits_row(spread=spread, vocab=4000)
    mass = torch.softmax(row.double(), 0)[torch.tensor(kept(row, top_p=top_p))].sort().values
    assert float(mass.sum()) >= top_p - 1e-4
    assert float(mass[1:].sum()) < top_p + 1e-4  # without the least likely one it would not do


def test_nucleus_sorts_by_falling_probability():
    row = logits_row()
    values = row[nucleus(row, 0.8)]
    assert torch.equal(values, values.sort(descending=True).values)


def test_min_p_is_relative_to_the_most_likely():
    row = torch.log(torch.tensor([0.5, 0.3, 0.06, 0.04, 0.1]))
    assert kept(row, min_p=0.1) == [0, 1, 2, 4]
    assert kept(row, min_p=1.0) == [0]


def test_filters_work_one_after_the_other():
    """top_p counts the mass of what min_p and top_k left over."""
    row = torch.log(torch.tensor([0.4, 0.2, 0.2001, 0.1, 0.0999]))
    assert kept(row, top_k=3, top_p=0.7) == [0, 2]
    assert kept(row, min_p=0.3, top_k=2, top_p=0.99) == [0, 2]


def test_extreme_temperatures():
    row = logits_row()
    for position in range(50):
        assert draw(row, Sampling(temperature=1e-5), position, [1]) == [int(row.argmax())]
    assert len({draw(row, Sampling(temperature=100.0), position, [1])[0] for position in range(200)}) > 100


# ---------------------------------------------------------------- penalties


def test_penalties_by_hand():
    row = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])
    seen = torch.tensor([True, True, True, True, False])
    counts = torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0])
    sampling = Sampling(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    penalize(row, seen, counts, sampling)
    assert row.tolist() == [1.0, -4.0, 1.0 - 1.5 - 0.25, -4.0 - 0.5 - 0.25, 1.0]


SAMPLINGS = {
    "greedy": Sampling(max_tokens=32),
    "drawn": Sampling(max_tokens=32, temperature=1.0, seed=17),
    "filtered": Sampling(max_tokens=32, temperature=0.8, seed=3, top_p=0.9, top_k=50, min_p=0.02),
    "penalties": Sampling(
        max_tokens=32, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.6, min_tokens=20
    ),
    "everything": Sampling(max_tokens=32, temperature=1.1, seed=2**62, top_p=0.8, frequency_penalty=1.0, min_tokens=25),
}


SAMPLINGS["biased"] = Sampling(max_tokens=32, logit_bias={0: -9.0, 8: 3.0}, min_tokens=9, stop_token_ids=[3])
SAMPLINGS["biased draws"] = SAMPLINGS["everything"].changed(logit_bias={8: 6.0, 9: 5.5}, repetition_penalty=1.4)


def continue_text(sampling: Sampling, tokens: list[int], output_from: int, until: int) -> list[int]:
    """Tokens up to `until` output tokens from one engine; its logits depend on the length only."""
    stop_ids = (0, 3)
    row = RowSampler(sampling, tokens, output_from, stop_ids, VOCAB)
    outputs: list[int] = []
    while len(tokens) + len(outputs) - output_from < until:
        logits = logits_row(len(tokens) + len(outputs), spread=1.0)
        logits[[0, 3]] += 3.0  # the ends of text would often win
        if not row.idle:
            row.apply(logits, outputs)
        outputs.append(int(logits.argmax()))
    return outputs


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("cut", [1, 2, 19, 31])
def test_handing_over_changes_nothing(name: str, cut: int):
    sampling, prompt = SAMPLINGS[name], [5, 9, 9, 200, 731]
    whole = continue_text(sampling, prompt, len(prompt), 32)
    assert continue_text(sampling, prompt + whole[:cut], len(prompt), 32) == whole[cut:]
    if sampling.min_tokens:
        assert not {0, 3} & set(whole[: sampling.min_tokens])


def test_another_seed_or_position_gives_another_text():
    first, second = (Sampling(temperature=1.0, seed=seed, max_tokens=32) for seed in (1, 2))
    assert continue_text(first, [4], 1, 32) != continue_text(second, [4], 1, 32)
    assert continue_text(first, [4], 1, 32) != continue_text(first, [4, 4], 2, 32)


def test_a_drawn_token_is_the_only_finite_logit():
    logits = logits_row()
    RowSampler(Sampling(temperature=1.0, seed=9), [1, 2], 2, (0,), VOCAB).apply(logits, [])
    assert int(torch.isfinite(logits).sum()) == 1


def test_prompt_tokens_count_for_repetition_only():
    prompt = [7] * 5
    for sampling in (Sampling(frequency_penalty=2.0), Sampling(presence_penalty=2.0)):
        logits = logits_row()
        RowSampler(sampling, prompt, 5, (), VOCAB).apply(logits, [])
        assert torch.equal(logits, logits_row())
    logits = logits_row()
    RowSampler(Sampling(repetition_penalty=2.0), prompt, 5, (), VOCAB).apply(logits, [])
    assert logits[7] != logits_row()[7]


def test_min_tokens_is_nothing_to_do_when_no_token_ends_a_text():
    assert RowSampler(Sampling(min_tokens=5), [1], 1, (), VOCAB).idle
    assert not RowSampler(Sampling(min_tokens=5, stop_token_ids=[3]), [1], 1, (), VOCAB).idle
    assert not RowSampler(Sampling(min_tokens=5), [1], 1, (0,), VOCAB).idle
    assert RowSampler(Sampling(min_tokens=5), [1, 2, 3, 4, 5, 6], 1, (0,), VOCAB).idle


def test_the_first_token_that_may_end_a_text_is_the_one_after_min_tokens():
    for outputs, allowed in (([5], False), ([5, 6], True)):
        logits = logits_row()
        RowSampler(Sampling(min_tokens=2), [1], 1, (0,), VOCAB).apply(logits, outputs)
        assert bool(torch.isfinite(logits[0])) == allowed


@pytest.mark.parametrize("ignored", [False, True])
def test_min_tokens_forbids_all_ends_of_a_text_also_those_that_are_ignored(ignored: bool):
    logits = logits_row()
    sampling = Sampling(min_tokens=2, stop_token_ids=[7, 9], ignore_eos=ignored)
    RowSampler(sampling, [1], 1, (0,), VOCAB).apply(logits, [5])
    assert (~torch.isfinite(logits)).nonzero().squeeze(1).tolist() == [0, 7, 9]


def test_a_bias_is_added_before_the_penalties():
    logits = torch.tensor([1.0, 1.0, 1.0])
    sampler = RowSampler(Sampling(logit_bias={0: 3.0, 1: -3.0}, repetition_penalty=2.0), [0, 1], 2, (), 3)
    assert not sampler.idle and sampler.apply(logits, []) is None
    assert logits.tolist() == [2.0, -4.0, 1.0]


# ---------------------------------------------------------------- log probabilities, siblings

CHANGED = {"repetition_penalty": 1.4, "logit_bias": {8: 3.0}, "min_tokens": 5, "stop_token_ids": [11]}


@pytest.mark.parametrize("sampling", [Sampling(**CHANGED), Sampling(temperature=0.7, seed=3, top_p=0.9, **CHANGED)])
def test_log_probabilities_are_those_of_the_unchanged_row(sampling: Sampling):
    raw = logits_row().log_softmax(0)
    right = RowSampler(sampling, [1, 8], 2, (0,), VOCAB)
    sampler = RowSampler(sampling.changed(logprobs=4), [1, 8], 2, (0,), VOCAB)
    for outputs in ([], [5], [5, 8]):
        logits, same = logits_row(), logits_row()
        right.apply(same, outputs)
        (token,) = sampler.apply(logits, outputs)
        assert token.id == int(same.argmax()) == int(logits.argmax()) and int(torch.isfinite(logits).sum()) == 1
        assert token.logprob == float(raw[token.id])
        values, ids = raw.topk(4)
        assert list(token.top.items()) == list(zip(ids.tolist(), values.tolist(), strict=True))


def test_no_likely_tokens_are_asked_for():
    sampler = RowSampler(Sampling(logprobs=0), [1], 1, (), VOCAB)
    row = logits_row()
    assert not sampler.idle
    best = int(row.argmax())
    assert sampler.apply(row.clone(), []) == (TokenLogprob(best, float(row.log_softmax(0)[best])),)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_siblings_get_what_a_single_request_with_their_seed_gets(logprobs: int | None):
    sampling = Sampling(temperature=1.0, seed=5, top_k=50, frequency_penalty=0.5, logprobs=logprobs, **CHANGED)
    prompt, seeds = [3, 8, 200], range(5, 13)

    def first(seed: int, *siblings: int) -> tuple[Token, ...] | None:
        sampler = RowSampler(sampling.changed(seed=seed), prompt, 2, (0,), VOCAB, siblings)
        return sampler.apply(logits_row(spread=0.5), [])

    together = first(*seeds)
    assert together == tuple(token for seed in seeds for token in first(seed))
    assert len(set(token_ids(together))) > 4


def test_siblings_of_a_greedy_request_get_the_same():
    row = logits_row()
    assert RowSampler(Sampling(), [1], 1, (), VOCAB, [1, 2]).apply(row.clone(), []) == (int(row.argmax()),) * 3


# ---------------------------------------------------------------- rows without a valid number


def test_rows_from_which_no_token_can_be_chosen():
    logits = torch.stack([logits_row(), *(torch.zeros(VOCAB) for _ in range(5))])
    logits[1, 7] = float("nan")
    logits[2, :] = float("nan")
    logits[3, 5] = float("inf")
    logits[4, :] = float("-inf")
    logits[5, 1:] = float("-inf")  # one token is left
    assert invalid_rows(logits) == [1, 2, 3, 4]
    assert invalid_rows(logits[:1]) == []
