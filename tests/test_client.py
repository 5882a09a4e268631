"""The clients against a fake broker: a ROUTER socket in a thread, scripted by each test."""

import asyncio
import itertools
import time

import msgpack
import pytest
from fake_broker import STATUS, WORDS, FakeBroker, Scripted, accepted, answer, delta, done, endless, pack

import tetri
from tetri.client import BadRequest, RequestFailed, RequestRefused, TetriError, Unreachable
from tetri.client.conversation import Patience, Request, Session
from tetri.client.frames import parse, submit

FAST = {"timeout": 2.0, "silence_s": 0.1, "resend_s": 0.05}


@pytest.fixture(params=["sync", "async"])
def generate(request):
    """Run one request to its end with either client."""

    def run(address, prompt="hi", options=FAST, **sampling):
        if request.param == "sync":
            with tetri.Client(address, **options) as client:
                return client.generate(prompt, **sampling)

        async def main():
            async with tetri.AsyncClient(address, **options) as client:
                return await client.generate(prompt, **sampling)

        return asyncio.run(main())

    return run


def test_a_whole_answer(generate):
    with FakeBroker(answer) as broker:
        result = generate(broker.address, "hi", max_tokens=3, temperature=1, stop="END", seed=None)
    assert result.text == "one two three" and result.token_ids == [10, 11, 12]
    assert (result.rid, result.finish_reason, result.ttft_s, result.jct_s) == ("r1", "length", 0.2, 0.3)
    assert result.usage.completion_tokens == 3 and result.receipt.adopted == 2
    assert result.to_json()["receipt"]["chunks"] == 1 and result.to_json()["usage"]["prompt_tokens"] == 2
    [message] = broker.seen
    assert message["sampling"] == {"max_tokens": 3, "temperature": 1.0, "stop": ["END"]}
    assert message["prompt"] == "hi" and len(message["key"]) == 16


def test_a_lost_submit_is_sent_again_with_its_key(generate):
    with FakeBroker(Scripted(submit=[lambda m: [], lambda m: [], answer])) as broker:
        assert generate(broker.address).text == "one two three"
    assert len(broker.seen) >= 3 and len({m["key"] for m in broker.seen}) == 1


def test_lost_deltas_are_asked_for_by_index(generate):
    def gap(message):
        return [accepted(message), delta(0), delta(2), done()]

    def rest(message):
        return [*map(delta, range(message["start"], 3)), done()]

    with FakeBroker(Scripted(submit=[gap], attach=[lambda m: [], rest])) as broker:
        assert generate(broker.address).text == "one two three"
    assert {m["start"] for m in broker.seen if m["type"] == "attach"} == {1}


def test_a_lost_end_is_asked_for(generate):
    with FakeBroker(
        Scripted(submit=[lambda m: [accepted(m), *map(delta, range(3))]], attach=[lambda m: [done()]])
    ) as broker:
        assert generate(broker.address).text == "one two three"
    assert broker.seen[-1] == {"type": "attach", "rid": "r1", "start": 3}


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


GARBAGE = [
    b"",
    b"\x02" + msgpack.packb(done()),
    b"\x01",
    b"\x01\xc1",
    pack(type="hello"),
    pack(type=3),
    pack(type="delta", rid="r1", start="0", ids=[], text=""),
    pack(type="delta", rid="r1", start=0, ids=["x"], text="no"),
    pack(type="delta", rid="other", start=0, ids=[1], text="no"),
    pack(**{**done(), "usage": {}}),
    pack(**{**done(), "usage": {"prompt_tokens": 1, "completion_tokens": "x"}}),
    pack(**{**done(), "receipt": {"prompt_tokens": 1, "magic": 2}}),
    b"\x01" + msgpack.packb([1, 2]),
    b"\x01" + b"\x81" * 100_000,
]


def test_garbage_is_skipped(generate):
    with FakeBroker(lambda m: GARBAGE + answer(m)[:2] + GARBAGE + answer(m)[2:]) as broker:
        assert generate(broker.address).text == "one two three"


@pytest.mark.parametrize("replies", [lambda m: [], lambda m: GARBAGE])
def test_silence_ends_in_an_error(generate, replies):
    with FakeBroker(replies) as broker, pytest.raises(Unreachable, match=r"no answer .* for 0\.3 s"):
        generate(broker.address, options={**FAST, "timeout": 0.3})


def test_silence_after_the_start_ends_in_an_error(generate):
    begin = time.monotonic()
    with FakeBroker(Scripted(submit=[lambda m: [accepted(m), delta(0)]])) as broker:
        with pytest.raises(Unreachable):
            generate(broker.address, options={**FAST, "timeout": 0.3})
        assert broker.types().count("attach") >= 3
    assert time.monotonic() - begin < 2


def test_nobody_there(generate, tmp_path):
    with pytest.raises(Unreachable):
        generate(f"ipc://{tmp_path}/none", options={**FAST, "timeout": 0.2})


def test_a_slow_answer_is_waited_for_while_the_broker_answers(generate):
    """Longer than the time-out, in silence but for the answers to Attach."""
    begin = time.monotonic()

    def later(message):
        empty = {"type": "delta", "rid": "r1", "start": 0, "ids": [], "text": ""}
        return [*map(delta, range(3)), done()] if time.monotonic() - begin > 0.8 else [empty]

    with FakeBroker(Scripted(submit=[lambda m: [accepted(m)]], attach=[later])) as broker:
        assert generate(broker.address, options={**FAST, "timeout": 0.4}).text == "one two three"


def test_refused(generate):
    def refuse(message):
        return [{"type": "refused", "key": message["key"], "reason": "full", "retry_after_s": 2.5}]

    with FakeBroker(refuse) as broker, pytest.raises(RequestRefused, match=r"full \(retry in 2.5 s\)") as caught:
        generate(broker.address)
    assert caught.value.retry_after_s == 2.5


def test_a_request_that_the_broker_forgot(generate):
    def forgot(message):
        return [{"type": "refused", "key": message["rid"], "reason": "no such request", "retry_after_s": None}]

    fake = FakeBroker(Scripted(submit=[lambda m: [accepted(m)]], attach=[forgot]))
    with fake as broker, pytest.raises(RequestRefused, match="no such request"):
        generate(broker.address)


def test_an_end_that_cannot_be_read_is_spoken_of(generate):
    """As when the broker is of a newer version: what it says of the end has a field that this client does not know."""
    end = {**done(), "receipt": {"prompt_tokens": 2, "magic": 1}}
    forgot = {"type": "refused", "key": "r1", "reason": "no such request", "retry_after_s": None}
    script = Scripted(
        submit=[lambda m: [accepted(m), *map(delta, range(3)), end]], attach=[lambda m: [end], lambda m: [forgot]]
    )
    with FakeBroker(script) as broker, pytest.raises(RequestRefused) as caught:
        generate(broker.address)
    why = "(2 messages made no sense here: are this client and the broker of the same version?)"
    assert str(caught.value) == f"no such request {why}"


def test_a_failed_request_says_why_and_keeps_what_there_was(generate):
    fake = FakeBroker(lambda m: [accepted(m), delta(0), done(reason="error", tokens=1, error="d0 lost")])
    with fake as broker, pytest.raises(RequestFailed, match="d0 lost") as caught:
        generate(broker.address)
    assert caught.value.result.text == "one "


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one of prompt and messages"),
        ({"prompt": "x", "messages": []}, "exactly one"),
        ({"prompt": 3}, "text or a list of token ids"),
        ({"prompt": ["a"]}, "text or a list of token ids"),
        ({"prompt": "\ud800"}, "cannot be encoded"),
        ({"prompt": [1 << 70]}, "cannot be encoded"),
        ({"prompt": "x" * (5 << 20)}, "at most"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"prompt": "x", "max_tokens": "9"}, "max_tokens must be a whole number"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens must be a whole number"),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "x", "stop": [3]}, "stop must be a list of texts"),
        ({"prompt": "x", "stop": [""]}, "stop takes at most"),
        ({"prompt": "x", "heat": 3}, "'heat' is no sampling setting; known: max_tokens"),
        ({"prompt": "x", "deadline_s": 0}, "deadline_s must be"),
        ({"prompt": "x", "deadline_s": 10**400}, "deadline_s is far too large"),
        ({"prompt": "x", "temperature": 10**400}, "temperature is far too large"),
        ({"prompt": "x", "max_tokens": 10**400}, "max_tokens must be from 1 .* many digits"),
        ({"prompt": "x", "seed": 10**5000}, "seed must be from 0 .* many digits"),
        ({"messages": [5]}, "a mapping or a Turn"),
        ({"messages": 5}, "messages must be a list"),
    ],
)
def test_requests_that_make_no_sense_are_not_sent(tmp_path, arguments, says):
    with tetri.Client(f"ipc://{tmp_path}/none") as client, pytest.raises(BadRequest, match=says) as caught:
        client.stream(**arguments)
    assert "\n" not in str(caught.value)


def test_a_bad_address_is_one_line():
    with pytest.raises(TetriError, match="no address to connect to"):
        tetri.Client("nowhere")


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


def test_deltas_missed_before_a_cancel_are_asked_for_after_the_end():
    def reply(message):
        if message["type"] == "submit":
            return [accepted(message)]  # both deltas get lost
        if message["type"] == "attach":
            return [delta(0), delta(1), done(reason="cancelled", tokens=2)]
        return [done(reason="cancelled", tokens=2)]

    with FakeBroker(reply) as broker, tetri.Client(broker.address, **FAST) as client:
        assert client.stream("hi").cancel().text == "one two "


def test_cancelling_before_the_broker_has_answered():
    script = Scripted(submit=[lambda m: [], lambda m: [accepted(m)]], cancel=[lambda m: [], endless])
    broker = FakeBroker(lambda m: script(m) if m["type"] != "cancel" else [done(reason="cancelled", tokens=0)])
    with broker, tetri.Client(broker.address, **FAST) as client:
        assert client.stream("hi").cancel().finish_reason == "cancelled"


def test_cancelling_a_request_of_someone_else():
    def reply(message):
        if message["rid"] == "r9":
            return [done("r9", "cancelled")]
        return [{"type": "refused", "key": message["rid"], "reason": "no such request", "retry_after_s": None}]

    with FakeBroker(reply) as broker, tetri.Client(broker.address, **FAST) as client:
        client.cancel("r9")
        with pytest.raises(RequestRefused, match="no such request"):
            client.cancel("r8")


def test_status():
    fake = FakeBroker(Scripted(inspect=[lambda m: [], lambda m: [STATUS]]))
    with fake as broker, tetri.Client(broker.address, **FAST) as client:
        assert client.status() == {k: v for k, v in STATUS.items() if k != "type"}


def change(message, **changes):
    fields = {"type": "role_changed", "role": message["role"], "was": "decode", "took_s": 0.004}
    return {"key": message["key"], "iid": message["iid"], **fields, **changes}


@pytest.fixture(params=["sync", "async"])
def flip(request):
    """Ask for another role with either client."""

    def run(address, iid="d0", role="mixed"):
        if request.param == "sync":
            with tetri.Client(address, **FAST) as client:
                return client.flip(iid, role)

        async def main():
            async with tetri.AsyncClient(address, **FAST) as client:
                return await client.flip(iid, role)

        return asyncio.run(main())

    return run


def test_a_flip_is_asked_for_with_one_key_until_it_is_answered(flip):
    def wrong(message):
        own = message["key"]
        return [change(message, key="other"), accepted({"key": own}), change(message, took_s="soon")]

    with FakeBroker(Scripted(change_role=[lambda m: [], wrong, lambda m: [change(m)]])) as broker:
        assert flip(broker.address) == {"iid": "d0", "role": "mixed", "was": "decode", "took_s": 0.004}
    assert len(broker.seen) >= 3 and len({message["key"] for message in broker.seen}) == 1
    assert (broker.seen[0]["iid"], broker.seen[0]["role"]) == ("d0", "mixed")


def test_a_flip_that_is_refused(flip):
    def refuse(message):
        return [{"type": "refused", "key": message["key"], "reason": "d0 is the last", "retry_after_s": None}]

    with FakeBroker(refuse) as broker, pytest.raises(RequestRefused, match="d0 is the last"):
        flip(broker.address)


@pytest.mark.parametrize(
    "iid, role, why",
    [("d0", "tea", "role must be prefill, decode or mixed, got 'tea'"), ("d" * 129, "mixed", "1 to 128 characters")],
)
def test_a_flip_that_makes_no_sense_is_not_asked_for(flip, iid, role, why):
    with FakeBroker(answer) as broker:
        with pytest.raises(BadRequest, match=why):
            flip(broker.address, iid, role)
        assert broker.seen == []


def test_a_closed_client_says_so():
    with FakeBroker(endless) as broker:
        client = tetri.Client(broker.address, **FAST)
        stream = client.stream("hi")
        client.close()
        with pytest.raises(TetriError, match="closed"):
            list(stream)
        with pytest.raises(TetriError, match="closed"):
            client.generate("hi")


def test_many_requests_at_once():
    rids = itertools.count()

    def reply(message):
        rid = f"r{next(rids)}"
        word = message["prompt"]
        return [accepted(message, rid), *(delta(i, rid, word) for i in range(3)), done(rid)]

    async def main(address):
        async with tetri.AsyncClient(address, **FAST) as client:

            async def streamed(word):
                return "".join([piece async for piece in client.stream(word)])

            texts = await asyncio.gather(*(streamed(f"<{i}>") for i in range(50)))
            assert texts == [f"<{i}>" * 3 for i in range(50)]

    with FakeBroker(reply) as broker:
        asyncio.run(main(broker.address))


def test_async_cancel_and_status():
    async def main(address):
        async with tetri.AsyncClient(address, **FAST) as client:
            stream = client.stream("hi")
            assert await anext(stream) == "one "
            waiting = asyncio.create_task(stream.wait())
            await client.cancel("r1")
            assert (await waiting).finish_reason == "cancelled"
            assert (await client.stream("hi").cancel()).text in ("", "one ", "one two ")
            assert (await client.status())["model"] == "m"

    with FakeBroker(lambda m: [STATUS] if m["type"] == "inspect" else endless(m)) as broker:
        asyncio.run(main(broker.address))


def test_leaving_an_async_stream_early_cancels_it():
    async def main(address):
        async with tetri.AsyncClient(address, **FAST) as client:
            async with client.stream("hi") as stream:
                assert await anext(stream) == "one "
            assert stream.result.finish_reason == "cancelled"

    with FakeBroker(endless) as broker:
        asyncio.run(main(broker.address))
        assert broker.types().count("cancel") == 1


def test_a_cancelled_task_cancels_its_request():
    async def main(address):
        async with tetri.AsyncClient(address, **FAST) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate("hi"), 0.1)

    with FakeBroker(endless) as broker:
        asyncio.run(main(broker.address))
        time.sleep(0.1)
        assert "cancel" in broker.types()


def test_closing_an_async_client_ends_its_waiters():
    async def main(address):
        client = tetri.AsyncClient(address, **FAST)
        waiting = asyncio.create_task(client.generate("hi"))
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(TetriError, match="closed"):
            await waiting

    with FakeBroker(endless) as broker:
        asyncio.run(main(broker.address))


def test_a_late_accepted_of_a_given_up_request_is_cancelled():
    """Pure: no socket."""
    session, patience = Session(), Patience(timeout=1, silence_s=1, resend_s=1)
    session.calls.append(Request("k", submit("k", "hi", None, None, {}), patience, now=0.0))
    assert [parse_sent(f)["type"] for f in session.tick(0.0)] == ["submit"]
    assert session.deadline() == 1.0
    assert session.tick(1.0) == [] and session.calls == []
    session.receive([pack(type="accepted", key="k", rid="r7", prompt_tokens=1)], 1.5)
    assert [parse_sent(f) for f in session.tick(1.5)] == [{"type": "cancel", "rid": "r7"}]
    session.receive([b"x", b"y"], 2.0)
    assert session.ignored == 1


def parse_sent(frame):
    return msgpack.unpackb(frame[1:])


def test_what_a_reply_looks_like():
    assert parse(pack(**STATUS)) == STATUS
    assert all(parse(frame) is None for frame in GARBAGE if b"other" not in frame)


def test_the_address_comes_from_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    with pytest.raises(Unreachable, match="run tetri-cli up"):
        tetri.Client()
    (tmp_path / "tetri").mkdir()
    (tmp_path / "tetri" / "cluster.json").write_text("{}")
    with pytest.raises(TetriError, match="cannot be used"):
        tetri.Client()
    with FakeBroker(answer) as broker:
        (tmp_path / "tetri" / "cluster.json").write_text(f'{{"clients": "{broker.address}"}}')
        with tetri.Client(**FAST) as client:
            assert client.generate("hi").text == "one two three"
    monkeypatch.setenv("TETRI_CONF", str(tmp_path / "none.toml"))
    with pytest.raises(TetriError, match=r"none\.toml: cannot be read"):
        tetri.Client()
