"""The calls of one connection: whom a reply touches, when each is due, and what a thousand open requests cost."""

import msgpack
import pytest
from fake_broker import STATUS, accepted, delta, done, pack

from tests.client.script import refused
from tests.core.broker.work import opcodes
from tetri.client.conversation import Patience, Request
from tetri.client.frames import TetriError, Unreachable, submit
from tetri.client.questions import Cancellation, Inspection
from tetri.client.session import Session

PATIENCE = Patience(timeout=10.0, silence_s=2.0, resend_s=1.0)


def request(number, kind=Request):
    key = f"k{number}"
    return kind(key, "s", submit(key, "s", "hi", None, {}), PATIENCE, 0.0)


def hear(session, message, now=0.0):
    session.receive([pack(**message)], now)


def sent(frames):
    """Each message's type, and whose it is."""
    bodies = [msgpack.unpackb(frame[1:]) for frame in frames]
    return [(body["type"], body.get("rid") or body.get("key")) for body in bodies]


def streaming(count, kind=Request):
    """A session with so many accepted requests k0, k1, ... as r0, r1, ...; and the requests."""
    session = Session()
    requests = [request(number, kind) for number in range(count)]
    for each in requests:
        session.add(each)
    session.tick(0.0)
    for number in range(count):
        hear(session, accepted({"key": f"k{number}"}, f"r{number}"))
    assert session.deadline() == 2.0
    return session, requests


def test_a_delta_of_one_among_1000_is_as_little_work_as_among_10():
    """Here in instructions; tools/bench_clients has the microseconds."""

    def work(count):
        session, requests = streaming(count)
        used = []
        for index in range(3):
            for number in range(10):
                frames = [pack(**delta(index, f"r{number}"))]

                def once(frames=frames):
                    session.receive(frames, 1.0)
                    session.tick(1.0)
                    session.deadline()

                used.append(opcodes(once))
        assert [len(each.choices[0].tokens) for each in requests] == [3] * 10 + [0] * (count - 10)
        return sum(used) / len(used)

    assert work(1000) < 1.1 * work(10) < 1000


def test_each_is_asked_for_after_its_own_silence():
    session, _ = streaming(3)
    hear(session, delta(0, "r1"), now=0.5)
    assert session.deadline() == 2.0 and session.tick(1.9) == []
    assert sent(session.tick(2.0)) == [("attach", "r0"), ("attach", "r2")]
    assert session.deadline() == 2.5
    hear(session, delta(1, "r1"), now=2.4)
    hear(session, delta(1, "r0"), now=2.4)  # a gap: asked for at once
    assert session.deadline() == 2.4 and sent(session.tick(2.4)) == [("attach", "r0")]
    assert session.deadline() == 3.0


def test_an_empty_delta_restarts_the_silence_of_its_request_and_shows_a_gap():
    """The broker's sign of life."""
    session, requests = streaming(1)
    hear(session, {"type": "delta", "rid": "r0", "start": 0, "ids": [], "text": ""}, now=1.5)
    assert session.deadline() == 3.5 and (requests[0].choices[0].tokens, requests[0].choices[0].texts) == ([], [])
    hear(session, {"type": "delta", "rid": "r0", "start": 2, "ids": [], "text": ""}, now=1.6)
    assert sent(session.tick(1.6)) == [("attach", "r0")]


def test_a_reply_goes_to_all_that_it_answers_and_to_nobody_else():
    session, (first, second) = streaming(2)
    asked = [Inspection(PATIENCE, 0.0), Inspection(PATIENCE, 0.0), Cancellation("r1", "s", PATIENCE, 0.0)]
    for each in asked:
        session.add(each)
    hear(session, STATUS)
    assert [each.ended for each in asked] == [True, True, False] and session.open == 3
    hear(session, done("r1", "cancelled", 0))
    assert asked[2].ended and second.ended and not first.ended and session.open == 1
    assert session.request("r0") is first and session.request("r1") is None
    hear(session, done("r1", "cancelled", 0))
    session.fail(TetriError("the client was closed"))
    assert session.open == 0 and session.deadline() is None and session.tick(99.0) == []
    with pytest.raises(TetriError, match="closed"):
        first.outcome()


def test_a_request_that_times_out_does_not_hold_up_the_others():
    session, (first, second) = streaming(2)
    for now in range(1, 30):
        hear(session, {"type": "delta", "rid": "r1", "start": 0, "ids": [], "text": ""}, now=float(now))
        session.tick(float(now))
    assert isinstance(first.error, Unreachable) and not second.ended and session.open == 1


def test_many_requests_one_after_another_leave_nothing_behind():
    """Their entries would keep them, with all their text, until they would have been due."""
    session = Session()
    for number in range(2000):
        session.add(request(number))
        session.tick(0.0)
        hear(session, accepted({"key": f"k{number}"}, f"r{number}"))
        hear(session, done(f"r{number}", tokens=0))
    assert session.open == 0 and session.deadline() is None


def test_a_signal_handler_may_cancel_at_any_time():
    """It comes while the session is busy: the message is sent by the next `tick`, which is due at once."""

    class Interrupted(Request):
        def tick(self, now):
            if self.rid == "r0" and now == 2.0:
                assert session.busy
                session.cancel(requests[1])
            return super().tick(now)

    session, requests = streaming(2, Interrupted)
    hear(session, delta(0, "r1"), now=1.0)
    assert sent(session.tick(2.0)) == [("attach", "r0")] and not session.busy
    assert session.deadline() == 0.0
    assert sent(session.tick(2.0)) == [("cancel", "r1")] and session.deadline() == 3.0


def test_a_request_that_nobody_reads_is_cancelled_by_its_key_until_its_id_is_known():
    session, (known,) = streaming(1)
    unknown = request(7)
    session.add(unknown)
    assert sent(session.tick(0.0)) == [("submit", "k7")]
    assert sent(session.cancels()) == [("cancel", "r0"), ("cancel", "k7")]
    session.abandon(known, None)
    session.abandon(unknown, None)
    assert session.deadline() == 0.0 and sent(session.tick(0.5)) == [("cancel", "k7"), ("cancel", "r0")]
    hear(session, refused("k7"))  # it had not arrived
    hear(session, done("r0", "cancelled", 0))
    assert session.open == 0 and session.cancels() == []


def test_a_cancel_that_was_sent_already_is_sent_again_only_without_an_answer():
    session, (each,) = streaming(1)
    session.abandon(each, 0.5)
    assert session.tick(0.5) == [] and session.deadline() == 1.5
    assert sent(session.tick(1.5)) == [("cancel", "r0")]


def test_an_interrupted_tick_can_be_made_up_for():
    """Ctrl-C may raise its exception at any point of it."""

    class Interrupted(Request):
        interrupt = False

        def tick(self, now):
            if self.interrupt:
                self.interrupt = False
                raise KeyboardInterrupt
            return super().tick(now)

    session, requests = streaming(3, Interrupted)
    requests[1].interrupt = True
    with pytest.raises(KeyboardInterrupt):
        session.tick(2.0)
    assert not session.busy
    for each in requests:
        session.cancel(each)
    assert sorted(sent(session.tick(2.1))) == [("cancel", "r0"), ("cancel", "r1"), ("cancel", "r2")]
