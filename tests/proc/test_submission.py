"""What the broker's process adds to a Submit: equal digests for what is the same, and ids that nobody guesses."""

import msgpack
import pytest

from tetri.proc.submission import content, submitted
from tetri.request import AskedSampling, Slo, Turn
from tetri.wire import codec
from tetri.wire.clients import ClientMessage, Submit

ASKED = {"type": "submit", "key": "k", "secret": "s", "prompt": "hi", "sampling": {"max_tokens": 8, "temperature": 1}}


def read(**changes):
    message = codec.decode(b"\x04" + msgpack.packb({**ASKED, **changes}), ClientMessage)
    assert isinstance(message, Submit)
    return message


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"key": "other", "secret": "other"},
        {"messages": None, "deadline_s": None, "slo": {"tpot_s": None}},
        {"sampling": {"temperature": 1.0, "stop": [], "max_tokens": 8}},
    ],
)
def test_who_asks_and_how_it_is_written_does_not_count(same):
    assert content(read(**same)) == content(read())


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "hi "},
        {"prompt": [104, 105]},
        {"prompt": None, "messages": [{"role": "user", "content": "hi"}]},
        {"prompt": None, "messages": [{"role": "system", "content": "hi"}]},
        {"deadline_s": 1.0},
        {"n": 2},
        {"slo": {"ttft_s": 1.0}},
        *({"sampling": {**ASKED["sampling"], **more}} for more in ({"max_tokens": 9}, {"seed": 0}, {"stop": ["x"]})),
    ],
)
def test_whatever_is_asked_for_counts(other):
    assert content(read(**other)) != content(read())
    assert len(content(read(**other))) == 16


def test_each_gets_an_id_of_its_own_and_the_rest_as_it_came():
    turns, slo = [Turn(role="user", content="x")], Slo(tpot_s=0.5)
    message = Submit(key="k", secret="s", messages=turns, deadline_s=2.0, slo=slo)
    made = [submitted(b"c", message, content(message), [1, 2], 0.5) for _ in range(50)]
    assert len({each.rid for each in made}) == 50 and all(len(bytes.fromhex(each.rid)) == 16 for each in made)
    assert made[0].fields() == {
        **{"client": b"c", "key": "k", "secret": "s", "content": content(message), "rid": made[0].rid},
        **{"prompt": (1, 2), "sampling": AskedSampling(), "deadline_s": 2.0, "waited_s": 0.5, "n": 1},
        **{"default_tokens": 128, "slo": slo},
    }
