"""What the writer of whole texts promises: a text depends on its prompt and its seed alone, and its hidden states are
kept where they were asked for."""

from __future__ import annotations

import numpy as np
import pytest
from vllm_process import WRITER_LAYERS

from tetri.engine.base import EngineError
from tetri.request import Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

LENGTHS = (1, 30, 118, 119, 120, 121, 300)


def drawn(seed: int, **changes) -> Sampling:
    return Sampling(**{"max_tokens": 14, "temperature": 0.7, "seed": seed, "ignore_eos": True, **changes})


def test_a_text_depends_on_its_prompt_and_seed_alone(writer, prompts):
    """In one batch, alone, and in the other order, with too little memory for all of them: five prompts need
    another block at about the same time. A seed of its own makes another text."""
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    wanted = {
        f"{length}": (source[7 * place : 7 * place + length], drawn(place)) for place, length in enumerate(LENGTHS)
    }
    together, preempted = writer.write(wanted)
    assert preempted, "memory sufficed: nothing was computed again"
    turned, _ = writer.write(dict(reversed(wanted.items())))
    alone = {key: writer.write({key: wanted[key]})[0][key] for key in ("1", min(preempted), "300")}
    assert {key: len(text.ids) for key, text in together.items()} == dict.fromkeys(wanted, 14)
    assert {key: text.ids for key, text in turned.items()} == {key: text.ids for key, text in together.items()}
    for key in alone:
        assert together[key].ids == alone[key].ids
        assert together[key].states.keys() == alone[key].states.keys()
        for known, row in alone[key].states.items():
            np.testing.assert_allclose(together[key].states[known], row, rtol=1e-3, atol=1e-3 * np.abs(row).mean())
    prompt, sampling = wanted["300"]
    other = writer.write({"other": (prompt, drawn(99))})[0]["other"]
    assert other.ids != alone["300"].ids and sampling.seed != 99


def test_states_are_kept_at_the_prompts_end_and_every_four_tokens(writer, prompts):
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    wanted = {
        "length": (source[:300], drawn(1, max_tokens=9)),
        "one": (source[:20], drawn(1, max_tokens=1)),
        "stop": ([2] * 40, Sampling(max_tokens=9, repetition_penalty=0.01)),  # pulls the end of sequence
    }
    texts, _ = writer.write(wanted)
    assert {key: (len(text.ids), text.reason) for key, text in texts.items()} == {
        "length": (9, "length"),
        "one": (1, "length"),
        "stop": (1, "stop"),
    }
    assert {key: sorted(text.states) for key, text in texts.items()} == {"length": [0, 4, 8], "one": [0], "stop": [0]}
    rows = [row for text in texts.values() for row in text.states.values()]
    assert {(row.shape, row.dtype.name) for row in rows} == {((len(WRITER_LAYERS), 576), "float32")}
    assert len({row.tobytes() for row in rows}) == len(rows), "each is its own"


def test_a_prompt_that_leaves_no_room_is_refused_and_the_others_go_on(writer, prompts):
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    for prompt in (source[:632], []):
        with pytest.raises(EngineError, match=f"^{len(prompt)} prompt tokens and up to 9 of output are not within 640"):
            writer.add("long", prompt, drawn(1, max_tokens=9))
    texts, _ = writer.write({"fits": (source[:631], drawn(1, max_tokens=9))})
    assert len(texts["fits"].ids) == 9
