"""The raw client must notice what a live test would not: a lost token, a refusal, an answer that never came."""

import pytest
from fake_broker import FakeBroker, Scripted, accepted, answer, delta, done

from tests.raw_client import NoAnswer, RawClient

REFUSED = {"type": "refused", "key": "nobody", "reason": "no request nobody is known here"}
OTHERS = delta(1, "slow", "other")  # other requests go on in between


def test_a_stream_is_put_together_and_others_are_kept():
    script = Scripted(submit=[lambda m: [OTHERS, *answer(m)]], cancel=[lambda m: [delta(2, m["rid"]), done(m["rid"])]])
    with FakeBroker(script) as broker, RawClient(broker.address, timeout=5) as client:
        ids, text, end = client.generate("Hi", key="k", max_tokens=3, deadline_s=2.5)
        assert (ids, text, end["reason"]) == ([10, 11, 12], "one two three", "length")
        client.generate([{"role": "user", "content": "Hi"}], key="b")
        assert client.receive(rid="slow")["text"] == "other"
        assert client.cancel("slow")["type"] == "done"
    first, second, _ = broker.seen
    fields = {"type": "submit", "key": "k", "prompt": "Hi", "deadline_s": 2.5, "sampling": {"max_tokens": 3}}
    assert first == fields and second["messages"] == [{"role": "user", "content": "Hi"}] and "prompt" not in second


def test_what_is_wrong_is_an_error():
    script = Scripted(
        submit=[lambda m: [accepted(m), delta(1)], lambda m: [{**REFUSED, "key": m["key"]}]],
        cancel=[lambda m: [REFUSED]],
    )
    with FakeBroker(script) as broker, RawClient(broker.address, timeout=5) as client:
        with pytest.raises(AssertionError):
            list(client.stream(client.submit("a token is lost")["rid"]))
        with pytest.raises(AssertionError, match="no request nobody"):
            client.generate("refused")
        assert client.cancel("nobody")["type"] == "refused"
        client.timeout = 0.05
        client.attach("r", 4)
        with pytest.raises(NoAnswer, match="'rid': 'other'"):
            client.receive(rid="other")
