"""The blocking client: streams, cancelling, callers who were away."""

import time

import pytest
from fake_broker import WORDS, FakeBroker, Scripted, accepted, answer, delta, done, endless

import tetri
from tests.client.script import FAST
from tetri.client import TetriError


def test_streaming_and_the_conversation_form():
    with FakeBroker(answer) as broker, tetri.Client(broker.address, **FAST) as client:
        stream = client.stream(messages=[{"role": "user", "content": "hi"}])
        assert stream.result is None
        assert list(stream) == WORDS
        assert stream.result.text == "one two three" and stream.rid == "r1"
    assert broker.seen[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_what_came_while_the_caller_was_away_counts_as_an_answer():
    """The caller came back later than the time-out, and all replies were waiting for it."""
    options = {**FAST, "timeout": 0.2}
    with FakeBroker(answer) as broker, tetri.Client(broker.address, **options) as client:
        for act in (list, lambda s: [s.wait().text], lambda s: [s.cancel().text]):
            stream = client.stream("hi")
            time.sleep(0.3)
            assert "".join(act(stream)) == "one two three"
        first = client.stream("hi")
        time.sleep(0.3)
        client.stream("another")
        assert list(first) == WORDS


def test_a_reply_that_was_waiting_is_given_at_once():
    """Although another request of the same client, whose turn to speak is far off, is open."""
    script = Scripted(submit=[answer, lambda m: [accepted(m, "r2")]])
    with FakeBroker(script) as broker, tetri.Client(broker.address, silence_s=5.0) as client:
        first, second = client.stream("hi"), client.stream("another")
        time.sleep(0.2)
        began = time.monotonic()
        assert list(first) == WORDS and second.result is None
        assert time.monotonic() - began < 2


def test_cancelling_a_stream_keeps_what_there_was():
    with FakeBroker(endless) as broker, tetri.Client(broker.address, **FAST) as client:
        stream = client.stream("hi")
        assert next(stream) == "one "
        client.cancel(stream.rid)
        assert stream.result.finish_reason == "cancelled" and stream.result.text == "one two "
        with client.stream("again") as second:
            assert next(second) == "one "
        assert second.result.finish_reason == "cancelled"


def test_cancelling_before_any_answer_came_asks_for_what_was_missed():
    end = done(reason="cancelled", tokens=2)
    replies = {"attach": [delta(0), delta(1), end], "cancel": [end]}  # both deltas get lost
    with (
        FakeBroker(lambda m: replies.get(m["type"]) or [accepted(m)]) as broker,
        tetri.Client(broker.address, **FAST) as client,
    ):
        assert client.stream("hi").cancel().text == "one two "
    script = Scripted(submit=[lambda m: [], lambda m: [accepted(m)]])
    fake = FakeBroker(lambda m: script(m) if m["type"] != "cancel" else [done(reason="cancelled", tokens=0)])
    with fake as broker, tetri.Client(broker.address, **FAST) as client:
        assert client.stream("hi").cancel().finish_reason == "cancelled"


def test_a_bad_address_and_a_closed_client_are_one_line():
    with pytest.raises(TetriError, match="not a valid broker address"):
        tetri.Client("nowhere")
    with FakeBroker(endless) as broker:
        client = tetri.Client(broker.address, **FAST)
        stream = client.stream("hi")
        client.close()
        for use in (lambda: list(stream), lambda: client.generate("hi")):
            with pytest.raises(TetriError, match="closed"):
                use()
