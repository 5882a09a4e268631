"""A request of several choices: each is a stream of its own, and any message of it may be lost."""

import asyncio
from random import Random

import msgpack
import pytest
from fake_broker import FakeBroker, accepted, choices, delta, done, likely, pack

import tetri
from tests.client.script import FAST
from tetri.client import BadRequest, Event, RequestFailed, Unreachable
from tetri.client.conversation import Patience, Request
from tetri.client.frames import submit
from tetri.client.session import Session

PATIENCE = Patience(timeout=10.0, silence_s=2.0, resend_s=1.0)


@pytest.fixture
def talk():
    return Talk()


class Talk:
    """A session with one accepted request of three choices."""

    def __init__(self):
        self.session = Session()
        frame = submit("k", "s", "hi", None, {"temperature": 1.0}, n=3)
        self.request = Request("k", "s", frame, PATIENCE, 0.0, n=3)
        self.session.add(self.request)
        self.session.tick(0.0)
        self.receive(0.0, accepted({"key": "k"}))

    def receive(self, now, *messages):
        for message in messages:
            self.session.receive([pack(**message)], now)

    def sent(self, now):
        """Of each message sent now: its type, and for an Attach its choice and start."""
        bodies = [msgpack.unpackb(frame[1:]) for frame in self.session.tick(now)]
        return [tuple(body[name] for name in ("type", "choice", "start") if name in body) for body in bodies]

    def events(self):
        found = []
        while self.request.has_event():
            found.append(self.request.event())
        return found


def test_only_a_choice_that_lacks_tokens_is_asked_for(talk):
    talk.receive(1.0, delta(0, choice=1), delta(1, choice=0), delta(0, choice=2))
    assert talk.session.deadline() == 1.0 and talk.sent(1.0) == [("attach", 0, 0)]
    talk.receive(1.1, delta(2, choice=0))
    assert talk.sent(1.1) == []  # asked for already
    talk.receive(1.2, delta(0), delta(1), delta(2))
    assert talk.session.deadline() == 3.0
    assert [len(choice.tokens) for choice in talk.request.choices] == [3, 1, 1]


def test_an_overlap_is_asked_for_too(talk):
    """Its text cannot be separated from the text that is here."""
    talk.receive(1.0, delta(0), delta(1), {**delta(1), "ids": [11, 12], "text": "two three"})
    assert talk.sent(1.0) == [("attach", 0, 2)] and talk.events() == [Event(0, "one two ", (10, 11))]


def test_each_choice_has_its_own_silence(talk):
    """The others' output shows that the broker is there, but not that nothing of this one was lost."""
    for now in (1, 2, 3, 4):
        talk.receive(now, delta(now - 1, word="x", choice=1))
        talk.receive(now, delta(now - 1, word="x", choice=0))
        assert talk.sent(now) == ([("attach", 2, 0)] if now > 1 else [])


def test_all_that_are_due_are_asked_for_one_in_each_turn(talk):
    assert talk.session.deadline() == 2.0 and talk.sent(2.0) == [("attach", 0, 0)]
    assert talk.session.deadline() == 2.0 and talk.sent(2.0) == [("attach", 1, 0)]
    assert talk.sent(2.0) == [("attach", 2, 0)] and talk.session.deadline() == 3.0


def test_an_end_without_all_tokens_is_not_the_end(talk):
    talk.receive(1.0, delta(0, choice=2), done(tokens=2, choice=2), done(tokens=0, choice=0), done(tokens=0, choice=1))
    assert talk.sent(1.0) == [("attach", 2, 1)] and not talk.request.ended
    talk.receive(1.1, delta(1, choice=2), done(tokens=2, choice=2), done(tokens=2, choice=2))
    assert talk.request.ended and talk.session.open == 0
    assert [each.token_ids for each in talk.request.outcome().choices] == [[], [], [10, 11]]


def test_a_choice_that_was_not_asked_for_is_ignored(talk):
    talk.receive(1.0, delta(0, choice=3), done(tokens=0, choice=3), done(tokens=0, choice=1), delta(0, choice=1))
    assert [len(choice.tokens) for choice in talk.request.choices] == [0, 0, 0] and talk.sent(1.0) == []


def test_one_cancel_is_for_all_and_an_end_without_all_tokens_is_asked_for(talk):
    talk.session.cancel(talk.request)
    assert talk.sent(0.5) == [("cancel",)] and talk.session.deadline() == 1.5
    talk.receive(0.6, delta(0, choice=1), done(reason="cancelled", tokens=0), delta(0, choice=2))
    talk.receive(0.6, done(reason="cancelled", tokens=2, choice=1))
    assert talk.sent(0.6) == [("attach", 1, 1)]
    assert talk.sent(1.5) == [("cancel",)]  # for the third
    talk.receive(1.5, delta(1, choice=1), done(tokens=2, choice=1), done(reason="cancelled", tokens=1, choice=2))
    assert [each.finish_reason for each in talk.request.outcome().choices] == ["cancelled", "length", "cancelled"]
    assert talk.sent(9.0) == []


def test_a_cancelled_choice_is_asked_for_once_its_end_is_known_and_not_before(talk):
    talk.receive(1.0, done(tokens=0, choice=1), done(tokens=0, choice=2))
    talk.session.cancel(talk.request)
    assert talk.sent(1.0) == [("cancel",)]
    talk.receive(1.5, delta(1))
    assert [talk.sent(now) for now in (1.5, 2.0, 3.9, 3.9)] == [[], [("cancel",)], [("cancel",)], []]
    talk.receive(4.0, done(reason="cancelled", tokens=2))
    assert talk.sent(4.0) == [("attach", 0, 0)] and talk.session.deadline() == 5.0


def test_an_end_restarts_the_silence_of_a_token_that_was_just_asked_for(talk):
    talk.receive(1.0, delta(1), done(tokens=0, choice=1), done(tokens=0, choice=2))
    assert talk.sent(1.0) == [("attach", 0, 0)]
    talk.session.cancel(talk.request)
    talk.receive(1.5, done(reason="cancelled", tokens=2))
    assert talk.sent(1.5) == [] and talk.session.deadline() == 3.5 and talk.sent(3.5) == [("attach", 0, 0)]


def test_a_choice_whose_end_is_known_is_asked_for_beside_the_cancel(talk):
    talk.receive(1.0, done(tokens=1, choice=1))
    assert talk.sent(1.0) == [("attach", 1, 0)]
    talk.session.cancel(talk.request)
    assert [talk.sent(1.5), talk.sent(2.0), talk.sent(2.5)] == [[("cancel",)], [("attach", 1, 0)], [("cancel",)]]


def test_no_cancel_once_all_ends_are_known(talk):
    talk.session.cancel(talk.request)
    talk.receive(0.5, *(done(reason="cancelled", tokens=1, choice=choice) for choice in range(3)))
    assert [talk.sent(0.5) for _ in range(4)] == [[("attach", choice, 0)] for choice in range(3)] + [[]]


def test_a_cancel_of_a_request_that_has_ended_changes_nothing(talk):
    talk.receive(0.5, *(done(tokens=0, choice=choice) for choice in range(3)))
    talk.session.cancel(talk.request)
    assert talk.sent(0.5) == [] and talk.session.deadline() is None
    assert [each.finish_reason for each in talk.request.outcome().choices] == ["length"] * 3


def test_the_first_choice_that_fails_ends_the_request_and_the_others_are_cancelled(talk):
    talk.receive(1.0, done(tokens=0, choice=0), delta(0, choice=1), delta(0, choice=2))
    talk.receive(1.0, done(reason="error", tokens=1, error="d0 was lost", choice=1))
    assert talk.sent(1.0) == [("cancel",)] and talk.session.open == 0
    assert [event.choice for event in talk.events()] == [0, 1, 2]
    with pytest.raises(RequestFailed, match="d0 was lost") as caught:
        talk.request.outcome()
    assert caught.value.result.choice == 1 and caught.value.result.text == "one "


def test_silence_of_all_ends_in_an_error_and_a_cancel(talk):
    while not talk.request.ended:
        now = talk.session.deadline()
        found = talk.sent(now)
    assert now == 12.0 and found == [("cancel",)] and isinstance(talk.request.error, Unreachable)


def test_what_arrives_before_the_caller_reads_is_one_event_of_each_choice(talk):
    talk.receive(1.0, delta(0, choice=2), delta(0, choice=1), delta(1, choice=2), delta(1, word="", choice=1))
    assert talk.events() == [Event(2, "one two ", (10, 11)), Event(1, "one ", (10, 11))]
    talk.receive(1.0, delta(2, word="", choice=1))
    assert talk.events() == [Event(1, "", (12,))]
    talk.receive(1.0, done(choice=1), delta(2, choice=2))
    last, other = talk.events()
    assert (last.choice, last.text, last.tokens, last.result.text) == (1, "", (), "one ")
    assert other == Event(2, "three", (12,))


# ------------------------------------------------------------ both clients


@pytest.fixture(params=["sync", "async"])
def events(request):
    """The events of a request, by either client."""

    def run(address, **asked):
        if request.param == "sync":
            with tetri.Client(address, **FAST) as client:
                return list(client.events("hi", **asked))

        async def main():
            async with tetri.AsyncClient(address, **FAST) as client:
                return [event async for event in client.events("hi", **asked)]

        return asyncio.run(main())

    return run


def test_events_name_the_choice_of_each_text(events):
    with FakeBroker(choices) as broker:
        found = events(broker.address, n=3, temperature=1.0, default_tokens=16)
    for choice in range(3):
        mine = [event for event in found if event.choice == choice]
        assert "".join(event.text for event in mine) == f"{choice}one {choice}two {choice}three"
        assert [token for event in mine for token in event.tokens] == [100 * choice + index or 10 for index in range(3)]
        assert [event.result is not None for event in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].result.choice == choice and mine[-1].result.others == ()
    assert broker.seen[0]["n"] == 3 and broker.seen[0]["default_tokens"] == 16


def test_events_of_a_failed_request_end_in_its_error(events):
    with FakeBroker(lambda m: [accepted(m), done(reason="error", tokens=0, error="d0 lost")]) as broker:
        with pytest.raises(RequestFailed, match="d0 lost"):
            events(broker.address)
        assert "cancel" not in broker.types()


def test_an_answer_of_several_choices_is_the_first_with_all(generate):
    with FakeBroker(choices) as broker:
        result = generate(broker.address, n=2, temperature=1.0)
    assert [each.text for each in result.choices] == ["0one 0two 0three", "1one 1two 1three"]
    assert result.choices[0] is result and [each.choice for each in result.choices] == [0, 1]
    plain = result.to_json()
    assert plain["rid"] == "r1" and [each["text"] for each in plain["choices"]] == [e.text for e in result.choices]


def test_a_stream_of_several_choices_names_events(tmp_path):
    with tetri.Client(f"ipc://{tmp_path}/none") as client, pytest.raises(BadRequest, match="n = 1: use events"):
        client.stream("hi", n=2, temperature=1.0)


def test_log_probabilities_come_with_their_tokens(generate):
    def reply(message):
        return [accepted(message), *({**delta(index), "ids": [likely(index)]} for index in range(3)), done()]

    with FakeBroker(reply) as broker:
        result = generate(broker.address, logprobs=2, logit_bias={5: 1}, stop_token_ids=(7,))
    assert broker.seen[0]["sampling"] == {"logprobs": 2, "logit_bias": {5: 1.0}, "stop_token_ids": [7]}
    assert result.token_ids == [10, 11, 12] and [token.logprob for token in result.logprobs] == [-0.5, -1.0, -1.5]
    assert result.to_json()["logprobs"][1] == {"id": 11, "logprob": -1.0, "top": {"11": -1.0, "12": None}}


# ------------------------------------------------------------ a network that loses messages


class LossyBroker:
    """Streams three choices of 5 tokens, one token of each in a turn, and loses every third message either way."""

    def __init__(self, seed):
        self.chance, self.reached, self.cancelled = Random(seed), [0, 0, 0], False

    def kept(self, messages):
        return [message for message in messages if self.chance.random() > 1 / 3]

    def turn(self):
        """Make a token of each choice, some slower than others; return what the client gets."""
        replies = []
        for choice in range(3):
            if not self.cancelled and self.reached[choice] < 5 and self.chance.random() < 0.5:
                self.reached[choice] += 1
                replies += self.rest(choice, self.reached[choice] - 1)
        return self.kept(replies)

    def rest(self, choice, start):
        reached = self.reached[choice]
        deltas = [delta(at, word=f"{at} ", choice=choice, token=10 * choice + at + 1) for at in range(start, reached)]
        ended = reached == 5 or self.cancelled
        reason = "length" if reached == 5 else "cancelled"
        return [*deltas, *([done(reason=reason, tokens=reached, choice=choice)] if ended else [])]

    def answer(self, message):
        """What the client gets for a message."""
        if message["type"] == "submit":
            replies = [accepted(message), *(reply for choice in range(3) for reply in self.rest(choice, 0))]
        elif message["type"] == "attach":
            replies = self.rest(message["choice"], message["start"]) or [
                {**delta(0, word="", choice=message["choice"]), "ids": []}
            ]
        else:
            self.cancelled = True
            replies = [reply for choice in range(3) for reply in self.rest(choice, self.reached[choice])]
        return self.kept(replies)


@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_arrives_once_whatever_is_lost(seed, cancels):
    broker, session, now = LossyBroker(seed), Session(), 0.0
    request = Request("k", "s", submit("k", "s", "hi", None, {"temperature": 1.0}, n=3), PATIENCE, 0.0, n=3)
    session.add(request)
    events = []
    while not request.ended:
        assert now < 60.0, "nothing is due any more"
        if cancels and now > 1.0 and not request.cancelling:
            session.cancel(request)
        asked = broker.kept(msgpack.unpackb(frame[1:]) for frame in session.tick(now))
        for reply in [reply for message in asked for reply in broker.answer(message)] + broker.turn():
            session.receive([pack(**reply)], now)
        while request.has_event():
            events.append(request.event())
        now += 0.1
    for choice, result in enumerate(request.outcome().choices):
        assert result.token_ids == [10 * choice + at + 1 for at in range(broker.reached[choice])]
        assert result.text == "".join(f"{at} " for at in range(broker.reached[choice]))
        mine = [event for event in events if event.choice == choice]
        assert [token for event in mine for token in event.tokens] == result.token_ids
        assert [event.result is not None for event in mine] == [False] * (len(mine) - 1) + [True]
    assert session.open == 0 and session.deadline() is None
