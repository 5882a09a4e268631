"""One request to its end, over a network that loses, repeats and damages what is said, by either client."""

import time

import msgpack
import pytest
from fake_broker import FakeBroker, Scripted, accepted, answer, delta, done, pack

from tests.client.script import FAST, GARBAGE, refused
from tetri.client import RequestFailed, RequestLost, RequestRefused, Unreachable
from tetri.client.conversation import Patience, Request
from tetri.client.frames import submit
from tetri.client.session import Session


def test_a_whole_answer(generate):
    with FakeBroker(answer) as broker:
        result = generate(broker.address, "hi", max_tokens=3, temperature=1, stop="END", seed=None)
    assert result.text == "one two three" and result.token_ids == [10, 11, 12]
    assert (result.rid, result.finish_reason, result.ttft_s, result.jct_s) == ("r1", "length", 0.2, 0.3)
    assert result.usage.completion_tokens == 3 and result.receipt.adopted == 2
    assert result.to_json()["receipt"]["chunks"] == 1 and result.to_json()["usage"]["prompt_tokens"] == 2
    [message] = broker.seen
    assert message["sampling"] == {"max_tokens": 3, "temperature": 1.0, "stop": ["END"]}
    assert message["prompt"] == "hi" and len(message["key"]) == 16 and len(bytes.fromhex(message["secret"])) == 16


def test_a_lost_submit_is_sent_again_with_its_key_and_garbage_is_skipped(generate):
    with FakeBroker(Scripted(submit=[lambda m: [], lambda m: [], answer])) as broker:
        assert generate(broker.address).text == "one two three"
    assert len(broker.seen) >= 3 and len({m["key"] for m in broker.seen}) == 1
    with FakeBroker(lambda m: GARBAGE + answer(m)[:2] + GARBAGE + answer(m)[2:]) as broker:
        assert generate(broker.address).text == "one two three"


def test_lost_deltas_are_asked_for_by_index(generate):
    def rest(message):
        return [*map(delta, range(message["start"], 3)), done()]

    for came, start in (([delta(0), delta(2), done()], 1), ([*map(delta, range(3))], 3)):  # or the end alone is lost
        script = Scripted(submit=[lambda m, came=came: [accepted(m), *came]], attach=[lambda m: [], rest])
        with FakeBroker(script) as broker:
            assert generate(broker.address).text == "one two three"
        assert {m["start"] for m in broker.seen if m["type"] == "attach"} == {start}
        assert len({m["secret"] for m in broker.seen}) == 1


def test_duplicates_and_overlaps_change_nothing(generate):
    both = {"type": "delta", "rid": "r1", "start": 0, "ids": [10, 11], "text": "one two "}
    wide = {"type": "delta", "rid": "r1", "start": 1, "ids": [11, 12], "text": "two three"}
    tail = {"type": "delta", "rid": "r1", "start": 3, "ids": [], "text": "!"}

    def mess(message):
        return [accepted(message), both, both, delta(0), delta(1), wide, accepted(message)]

    def rest(message):
        return [delta(2), delta(2), tail, tail, done(), done()]

    with FakeBroker(Scripted(submit=[mess], attach=[rest])) as broker:
        result = generate(broker.address)
    assert result.text == "one two three!" and result.token_ids == [10, 11, 12]


@pytest.mark.parametrize("replies", [[], GARBAGE, [delta(0)]], ids=["silence", "garbage", "silence after the start"])
def test_silence_ends_in_an_error(generate, replies):
    script = Scripted(submit=[lambda m: [accepted(m), *replies] if replies == [delta(0)] else replies])
    with FakeBroker(script) as broker:
        with pytest.raises(Unreachable, match=r"no answer .* for 0\.3 s"):
            generate(broker.address, options={**FAST, "timeout": 0.3})
        assert broker.types().count("attach" if replies == [delta(0)] else "submit") >= 3


def test_a_slow_answer_is_waited_for_while_the_broker_answers(generate):
    """Longer than the time-out, in silence but for the answers to Attach."""
    begin = time.monotonic()

    def later(message):
        empty = {"type": "delta", "rid": "r1", "start": 0, "ids": [], "text": ""}
        return [*map(delta, range(3)), done()] if time.monotonic() - begin > 0.8 else [empty]

    with FakeBroker(Scripted(submit=[lambda m: [accepted(m)]], attach=[later])) as broker:
        assert generate(broker.address, options={**FAST, "timeout": 0.4}).text == "one two three"


def test_a_refused_and_a_failed_request_say_why_and_keep_what_there_was(generate):
    fake = FakeBroker(lambda m: [refused(m["key"], "full", 2.5)])
    with fake as broker, pytest.raises(RequestRefused, match=r"full \(retry in 2.5 s\)") as caught:
        generate(broker.address)
    assert caught.value.retry_after_s == 2.5
    fake = FakeBroker(lambda m: [accepted(m), delta(0), done(reason="error", tokens=1, error="d0 lost")])
    with fake as broker, pytest.raises(RequestFailed, match="d0 lost") as caught:
        generate(broker.address)
    assert caught.value.result.text == "one "


def test_an_end_that_cannot_be_read_is_spoken_of(generate):
    """As when the broker is of a newer version: what it says of the end has a field that this client does not know."""
    end = {**done(), "receipt": {"prompt_tokens": 2, "magic": 1}}
    script = Scripted(
        submit=[lambda m: [accepted(m), *map(delta, range(3)), end]],
        attach=[lambda m: [end], lambda m: [refused(m["rid"])]],
    )
    with FakeBroker(script) as broker, pytest.raises(RequestLost) as caught:
        generate(broker.address)
    why = "(2 messages could not be decoded: are this client and the broker of the same version?)"
    assert str(caught.value) == f"no such request {why}"


def test_a_cancel_is_sent_and_repeated_however_many_deltas_come():
    """Many wait in the socket of a client that has not read for a while, and are read first."""
    session, patience = Session(), Patience(timeout=10, silence_s=5, resend_s=1)
    request = Request("k", "s", submit("k", "s", "hi", None, {}), patience, now=0.0)
    session.add(request)
    session.tick(0.0)
    session.receive([pack(type="accepted", key="k", rid="r1", prompt_tokens=1, max_tokens=3)], 0.1)
    session.cancel(request)
    sent = []
    for step in range(25):
        now = 0.2 + 0.1 * step
        session.receive([pack(**delta(0) | {"start": step})], now)
        sent += [(round(now, 1), msgpack.unpackb(frame[1:])["type"]) for frame in session.tick(now)]
    assert [each for each in sent if each[1] == "cancel"] == [(0.2, "cancel"), (1.2, "cancel"), (2.2, "cancel")]


@pytest.mark.parametrize("accepted", [False, True])
def test_a_request_that_is_given_up_is_cancelled_for_a_broker_that_wakes_up(accepted):
    def sent(frame):
        return msgpack.unpackb(frame[1:])

    session, patience = Session(), Patience(timeout=1, silence_s=1, resend_s=1)
    session.add(Request("k", "s", submit("k", "s", "hi", None, {}), patience, now=0.0))
    assert [sent(f)["type"] for f in session.tick(0.0)] == ["submit"]
    if accepted:
        session.receive([pack(type="accepted", key="k", rid="r7", prompt_tokens=1, max_tokens=3)], 0.0)
        assert [sent(f)["type"] for f in session.tick(1.0)] == ["attach"]
    last = session.tick(2.0)
    assert [sent(f) for f in last] == [{"type": "cancel", "rid": "r7" if accepted else "k", "secret": "s"}]
    assert session.open == 0 and session.deadline() is None


def test_a_message_of_several_frames_is_ignored():
    session = Session()
    session.receive([b"x", b"y"], 2.0)
    assert session.ignored == 1
