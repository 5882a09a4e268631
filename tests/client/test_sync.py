"""The blocking client: streams, cancelling, callers who were away."""

import gc
import os
import signal
import threading
import time

import pytest
from fake_broker import WORDS, FakeBroker, Scripted, accepted, answer, delta, done, endless
from live import wait_until

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


def in_a_loop(client, end):
    for piece in client.stream("hi"):
        assert piece == "one "
        end()


def breaks(client):
    for _ in client.stream("hi"):
        break


def breaks_and_keeps(client):
    client.kept = client.stream("hi")
    for _ in client.kept:
        break


def raises(client):
    with pytest.raises(ZeroDivisionError):
        in_a_loop(client, lambda: 1 / 0)


def is_interrupted(client):
    with pytest.raises(KeyboardInterrupt):
        in_a_loop(client, lambda: signal.raise_signal(signal.SIGINT))


def is_interrupted_while_it_waits(client):
    """Both pieces are read, and a signal comes in the wait for the third."""
    client.kept = client.stream("interrupt")
    with pytest.raises(KeyboardInterrupt):
        list(client.kept)


def is_interrupted_in_generate(client):
    with pytest.raises(KeyboardInterrupt):
        client.generate("interrupt")


def drops(client):
    stream = client.stream("hi")
    assert next(stream) == "one "
    del stream


def drops_unread(client):
    client.stream("hi")


def drops_a_cycle(client):
    streams = [client.stream("hi")]
    streams.append(streams)
    del streams
    gc.collect()


def leaves_a_generator(client):
    pieces = (piece.upper() for piece in client.stream("hi"))
    assert next(pieces) == "ONE "
    pieces.close()


def breaks_events(client):
    for event in client.events("hi"):
        assert event.tokens[0] == 10
        break


def closes_events(client):
    client.kept = client.events("hi")
    assert next(client.kept).tokens[0] == 10
    client.kept.close()


def closes(client):
    client.kept = client.stream("hi")
    assert next(client.kept) == "one "
    client.close()


ENDS = [breaks, breaks_and_keeps, raises, is_interrupted, is_interrupted_while_it_waits, is_interrupted_in_generate]
ENDS += [drops, drops_unread, drops_a_cycle, leaves_a_generator, breaks_events, closes_events, closes]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_a_request_that_nobody_reads_any_more_is_cancelled_at_once(end):
    """Without any further use of the client, which stays open, and with the id if it is known, else the key."""

    def reply(message):
        """A client that waits for "interrupt" asks, and gets a signal."""
        asked = [each["type"] for each in broker.seen].count("attach") == 1 and message["type"] == "attach"
        if asked and broker.seen[0]["prompt"] == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return endless(message)

    with FakeBroker(reply) as broker, tetri.Client(broker.address, silence_s=0.1) as client:
        end(client)
        wait_until(lambda: "cancel" in broker.types(), "no Cancel")
        (submit,) = (message for message in broker.seen if message["type"] == "submit")
        cancel = next(message for message in broker.seen if message["type"] == "cancel")
        assert cancel["rid"] in ("r1", submit["key"]) and cancel["secret"] == submit["secret"]


def test_what_had_arrived_before_a_break_can_still_be_read_and_next_reads_on_without_an_end():
    with FakeBroker(endless) as broker, tetri.Client(broker.address, **FAST) as client:
        stream = client.stream("hi")
        assert next(stream) == "one " and next(stream) == "two " and "cancel" not in broker.types()
        stream = client.stream("hi")
        for piece in stream:
            assert piece == "one "
            break
        assert "".join(stream) in ("", "two ") and stream.result.finish_reason == "cancelled"
        assert stream.result.text == "one two " and list(stream) == []


def test_a_stream_that_has_ended_is_not_cancelled():
    with FakeBroker(answer) as broker, tetri.Client(broker.address, **FAST) as client:
        assert list(client.stream("hi")) == WORDS
        assert client.generate("hi").text == "one two three"
    assert set(broker.types()) == {"submit"}


def test_a_stream_dropped_in_another_thread_is_cancelled_when_the_client_is_used_again():
    with FakeBroker(endless) as broker, tetri.Client(broker.address, **FAST) as client:
        streams = [client.stream("hi")]
        assert next(streams[0]) == "one "
        thread = threading.Thread(target=streams.clear)
        thread.start()
        thread.join()
        assert next(client.stream("again")) == "one "
        wait_until(lambda: "cancel" in broker.types(), "no Cancel")


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
