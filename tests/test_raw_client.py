"""The raw client against a broker that is nothing but a ROUTER and a script."""

import threading

import pytest
import zmq

from tests.raw_client import NoAnswer, RawClient
from tetri.request import Receipt, Usage
from tetri.wire import codec
from tetri.wire.clients import (
    Accepted,
    Attach,
    BrokerReply,
    Cancel,
    ClientMessage,
    Delta,
    Done,
    Inspect,
    Refused,
    Status,
    Submit,
)


def done(rid, count, reason="length"):
    return Done(
        rid=rid,
        reason=reason,
        usage=Usage(prompt_tokens=1, completion_tokens=count),
        timeline={},
        ttft_s=None,
        jct_s=0.0,
        receipt=Receipt(prompt_tokens=1),
    )


class FakeBroker(threading.Thread):
    """Answers what it is asked; every message must be right to the letter, or the codec raises."""

    def __init__(self):
        super().__init__()
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self.heard = []

    def run(self):
        while True:
            client, frame = self.router.recv_multipart()
            if frame == b"stop":
                return
            message = codec.decode(frame, ClientMessage)
            self.heard.append(message)
            for reply in self.replies(message):
                self.router.send_multipart((client, codec.encode(reply)))

    def replies(self, message: ClientMessage) -> list[BrokerReply]:
        match message:
            case Submit(prompt=""):
                return [Refused(key=message.key, reason="the prompt is empty")]
            case Submit(key="slow"):
                return [Accepted(key="slow", rid="slow", prompt_tokens=1), delta("slow", 0, [1], "x")]
            case Submit(key="gap"):
                return [Accepted(key="gap", rid="gap", prompt_tokens=1), delta("gap", 1, [1], "x")]
            case Submit(key=key):
                return [
                    delta("slow", 1, [9], "other"),  # other requests go on in between
                    Accepted(key=key, rid="r-" + key, prompt_tokens=3),
                    delta("r-" + key, 0, [5, 6], "He"),
                    delta("r-" + key, 2, [7], "llo"),
                    done("r-" + key, 3),
                ]
            case Cancel(rid="nobody"):
                return [Refused(key="nobody", reason="no request nobody is known here")]
            case Cancel(rid=rid):
                return [delta(rid, 1, [2], "y"), done(rid, 2, "cancelled")]
            case Attach(rid=rid, start=start):
                return [delta(rid, start, [8], "z"), done(rid, start + 1)]
            case Inspect():
                return [Status(instances=[], requests={}, counters={"accepted": 1}, model="m")]


def delta(rid, start, ids, text):
    return Delta(rid=rid, start=start, ids=ids, text=text)


@pytest.fixture
def broker():
    fake = FakeBroker()
    fake.start()
    yield fake
    with RawClient(fake.address) as last:
        last.send_frames(b"stop")
        fake.join(5)
    fake.router.close(0)
    fake.context.term()


@pytest.fixture
def client(broker):
    with RawClient(broker.address, timeout=5) as made:
        yield made


def test_generate_puts_the_stream_together(broker, client):
    ids, text, end = client.generate("Hi", key="k", max_tokens=3, stop=["."], temperature=1)
    assert (ids, text, end["reason"]) == ([5, 6, 7], "Hello", "length")
    (submit,) = broker.heard
    assert (submit.prompt, submit.sampling.max_tokens, submit.sampling.stop) == ("Hi", 3, ["."])


def test_token_ids_and_conversations_go_where_they_belong(broker, client):
    client.generate([1, 2, 3], key="a")
    client.generate([{"role": "user", "content": "Hi"}], key="b", deadline_s=2.5)
    ids, turns = broker.heard
    assert (ids.prompt, ids.messages, ids.deadline_s) == ([1, 2, 3], None, None)
    assert (turns.prompt, turns.messages[0].content, turns.deadline_s) == (None, "Hi", 2.5)


def test_a_refusal_is_an_answer(client):
    assert client.submit("")["reason"] == "the prompt is empty"
    with pytest.raises(AssertionError, match="the prompt is empty"):
        client.generate("")


def test_cancel_returns_the_end_and_leaves_other_requests_alone(client):
    slow = client.submit("x", key="slow")["rid"]
    answer = client.submit("y", key="fast")
    assert client.cancel(slow)["reason"] == "cancelled"
    assert [one["type"] for one in client.stream(answer["rid"])] == ["delta", "delta", "done"]
    assert client.cancel("nobody")["type"] == "refused"


def test_a_lost_token_is_an_error(client):
    rid = client.submit("x", key="gap")["rid"]
    with pytest.raises(AssertionError):
        list(client.stream(rid))


def test_attach_and_inspect(client):
    client.attach("r", 4)
    assert client.receive(rid="r")["start"] == 4
    assert client.receive(type="done", rid="r")["usage"]["completion_tokens"] == 5
    assert client.inspect()["counters"] == {"accepted": 1}


def test_no_answer_is_an_error_that_says_what_came_instead(broker):
    with RawClient(broker.address, timeout=0.05) as hasty:
        hasty.attach("r", 4)
        with pytest.raises(NoAnswer, match="'rid': 'other'"):
            hasty.receive(rid="other")
