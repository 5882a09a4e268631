import msgspec
import pytest

from tetri.request import AskedSampling, Turn
from tetri.wire.openai.asked import Asked

SAMPLING = AskedSampling(temperature=0.5, stop=["x"], logprobs=2)


def test_each_prompt_is_a_request_of_its_own():
    asked = Asked(model="m", prompts=["a", [1, 2]], sampling=SAMPLING, n=3, default_tokens=16)
    first, second = asked.submits()
    assert (first.pop("prompt"), second.pop("prompt")) == ("a", [1, 2]) and first == second
    assert (first.pop("n"), first.pop("default_tokens")) == (3, 16)
    assert msgspec.convert(first, AskedSampling) == SAMPLING and not asked.chat


def test_a_conversation_is_one_request():
    turns = [Turn(role="user", content="a")]
    (submit,) = (asked := Asked(model="m", turns=turns, sampling=SAMPLING, default_tokens=9)).submits()
    assert submit["messages"] == [{"role": "user", "content": "a"}] and "prompt" not in submit and asked.chat


@pytest.mark.parametrize("name", ["prompts", "turns"])
def test_what_was_asked_does_not_change(name):
    asked = Asked(model="m", sampling=SAMPLING, default_tokens=9)
    with pytest.raises(AttributeError):
        setattr(asked, name, [])
