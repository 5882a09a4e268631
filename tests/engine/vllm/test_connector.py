"""A request handed from one engine to another gets what one engine alone would have given it: the same KV bytes, the
same tokens. The one engine is plain vLLM without any connector (reference.py)."""

from __future__ import annotations

import pytest
from handover import BLOCK, Mixed, Pair, Request, carry_alone, differences, fill

from tetri.engine.base import EngineError
from tetri.request import Sampling, blocks_for

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

GREEDY = Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture
def texts(float32, prompts):
    return [float32.reference.text(prompt, GREEDY.max_tokens) for prompt in prompts]


def test_one_at_a_time_float32(float32, prompts, texts):
    found: list[str] = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        request = carry_alone(float32, f"alone-{number}", prompt, GREEDY)
        found += differences(text, request)
        assert request.recomputed == 0 and request.preempted == 0
        assert request.chunks == -(-len(prompt) // 512)
        assert request.blocks_moved == blocks_for(len(prompt), BLOCK)
    assert not found


def test_all_at_once_float32(float32, prompts, texts):
    requests = [Request(f"together-{number}", prompt, GREEDY) for number, prompt in enumerate(prompts)]
    Pair(float32.prefill, float32.decode).carry(*requests)
    for request, text in zip(requests, texts, strict=True):
        assert request.recomputed == 0 and request.sent == request.arrived
        assert text.agrees(request.ids), request.key
    assert sum(request.ids == text.ids for request, text in zip(requests, texts, strict=True)) >= 39


def test_some_stay_and_some_move_in_the_same_batches(float32, prompts, texts):
    """As all that moved do, those that stayed go on from the blocks that their prefill filled."""
    chosen = range(0, 40, 4)
    requests = [Request(str(number), prompts[at], GREEDY) for number, at in enumerate(chosen)]
    Mixed(float32.prefill, float32.decode).carry(*requests)
    assert [request.blocks_moved == 0 for request in requests] == 5 * [True, False]
    for request, at in zip(requests, chosen, strict=True):
        assert request.recomputed == 0 and texts[at].agrees(request.ids), request.key


# ---------------------------------------------------------------- these checks can fail


def flip_a_byte(chunk: int, blocks: list[bytearray]) -> list[bytearray]:
    if chunk == 1:
        blocks[0][12345] ^= 1
    return blocks


def swap_two_blocks(chunk: int, blocks: list[bytearray]) -> list[bytearray]:
    return [blocks[1], blocks[0], *blocks[2:]] if chunk == 0 else blocks


def lose_a_chunk(chunk: int, blocks: list[bytearray]) -> list[bytearray] | None:
    return None if chunk == 0 else blocks


@pytest.mark.parametrize(("tamper", "wrong"), [(flip_a_byte, "[4]"), (swap_two_blocks, "[0, 1]")])
def test_a_changed_block_is_seen(float32, prompts, texts, tamper, wrong):
    number = next(i for i, prompt in enumerate(prompts) if len(prompt) == 1000)
    request = carry_alone(float32, tamper.__name__, prompts[number], GREEDY, tamper)
    found = differences(texts[number], request)
    assert f"{request.key}: KV blocks {wrong} arrived differ" in found


def test_a_missing_chunk_is_seen(float32, prompts):
    prompt = next(prompt for prompt in prompts if len(prompt) == 1000)
    with pytest.raises(EngineError, match="4 of its blocks were not adopted"):
        carry_alone(float32, "lost", prompt, GREEDY, lose_a_chunk)
    float32.decode.cancel("dlost")
    assert float32.decode.free_blocks() == float32.decode.facts()[1].blocks


# ---------------------------------------------------------------- KV without valid numbers


def nothing_but_nan(chunk: int, blocks: list[bytearray]) -> list[bytearray]:
    return [bytearray(b"\xff" * len(block)) for block in blocks]


class OneSpoilt(Pair):
    """The KV of one of the requests arrives as NaN."""

    def send_chunk(self, request: Request, stop: int) -> None:
        self.tamper = nothing_but_nan if request.key == "spoilt" else None
        super().send_chunk(request, stop)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)])
def test_nan_ends_its_request_and_neighbours_and_successors_get_their_text(float32, prompts, sampling):
    prompt = next(prompt for prompt in prompts if len(prompt) == 640)
    right = float32.reference.generate(prompt, sampling)
    spoilt, neighbour = Request("spoilt", prompt, sampling), Request("neighbour", prompt, sampling)
    OneSpoilt(float32.prefill, float32.decode).carry(spoilt, neighbour)
    assert (spoilt.ids, spoilt.reason) == (right.ids[:1], "error")
    assert right.agrees(neighbour.ids)
    assert float32.decode.free_blocks() == float32.decode.facts()[1].blocks
    for number in range(30):  # some of them get the blocks that were spoilt
        assert carry_alone(float32, f"after-{number}", prompt, sampling).ids == right.ids


# ---------------------------------------------------------------- sampling across the hand-over

SAMPLINGS = {
    "seeded": Sampling(max_tokens=16, temperature=1.0, seed=42, ignore_eos=True),
    "filtered": Sampling(max_tokens=16, temperature=0.9, seed=1, top_p=0.9, top_k=40, min_p=0.01),
    "penalties": Sampling(
        max_tokens=16, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5, min_tokens=16
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampling_does_not_see_the_hand_over(float32, prompts, name):
    """Of several chunks (where vLLM's own seeded sampling takes the engine down), and handed over again in the middle
    as after the loss of a decode worker."""
    prompt, sampling = next(prompt for prompt in prompts if len(prompt) == 640), SAMPLINGS[name]
    text = float32.reference.generate(prompt, sampling)
    request = carry_alone(float32, name, prompt, sampling)
    assert request.ids == text.ids
    again = Request(f"{name}-again", [*prompt, *text.ids[:7]], sampling, output_from=len(prompt))
    Pair(float32.prefill, float32.decode).carry(again)
    assert again.ids == text.ids[7:] and again.reason == request.reason


# ---------------------------------------------------------------- preemption


def test_preempted_requests_get_the_right_tokens(float32, prompts):
    """Parked legs take the decode engine's memory but for one block more than the prompts need: as soon as two
    requests need another block, one is preempted and computes its prompt again."""
    decode = float32.decode
    prompt = next(prompt for prompt in prompts if len(prompt) == 1000)
    requests = [Request(f"tight-{n}", prompt[n : n + 253 + n], GREEDY) for n in range(3)]
    ballast = fill(decode, leave=7)
    Pair(float32.prefill, decode).carry(*requests)
    for key in ballast:
        decode.cancel(key)
    assert sum(request.preempted for request in requests) >= 1
    for request in requests:
        text = float32.reference.generate(request.tokens, GREEDY)
        assert request.ids == text.ids
        assert request.recomputed == (len(request.tokens) if request.preempted else 0)
    assert decode.free_blocks() == decode.facts()[1].blocks
