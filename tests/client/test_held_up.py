"""Clients that were held up (stopped, starved of CPU, kept busy by their caller) while the broker said all that there
was to say: nothing of it is lost, and nobody is found silent."""

import asyncio
import signal
import subprocess
import sys
import threading
import time

import pytest
from fake_broker import WORDS, FakeBroker, accepted, delta, done

import tetri

BRIEF = {"timeout": 0.6, "silence_s": 0.2, "resend_s": 0.2}
HELD_UP_S = 0.8  # longer than all of these
PROGRAM = {
    "sync": """
import sys, tetri
with tetri.Client(sys.argv[1], timeout=0.6, silence_s=0.2, resend_s=0.2) as client:
    for piece in client.stream("hi"):
        print(piece, flush=True)
""",
    "async": """
import asyncio, sys, tetri
async def main():
    async with tetri.AsyncClient(sys.argv[1], timeout=0.6, silence_s=0.2, resend_s=0.2) as client:
        async for piece in client.stream("hi"):
            print(piece, flush=True)
asyncio.run(main())
""",
}


class Holding:
    """Gives one token; keeps the rest back until `go`, and says `asked` when it is asked for it. After that it has
    forgotten the request."""

    def __init__(self, asks_first: bool) -> None:
        self.asks_first = asks_first
        self.asked, self.go, self.said = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, message):
        rid = message.get("rid") or message["prompt"]
        if message["type"] == "submit":
            yield accepted(message, rid)
            yield delta(0, rid)
        if (message["type"] == "attach") is self.asks_first and not self.said.is_set():
            self.asked.set()
            assert self.go.wait(20)
            yield from (delta(1, rid), delta(2, rid), done(rid))
            self.said.set()
        elif message["type"] == "attach":
            yield {"type": "refused", "key": rid, "reason": f"no request {rid} is known here", "retry_after_s": None}


@pytest.mark.parametrize("kind", PROGRAM)
@pytest.mark.parametrize("asks_first", [False, True], ids=["while it listens", "after it asked"])
def test_a_stopped_process_reads_what_waits_for_it(kind, asks_first):
    script = Holding(asks_first)
    with FakeBroker(script) as broker:
        command = [sys.executable, "-c", PROGRAM[kind], broker.address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline().strip() == WORDS[0].strip()
            assert script.asked.wait(20)
            process.send_signal(signal.SIGSTOP)
            script.go.set()
            assert script.said.wait(20)
            time.sleep(HELD_UP_S)
            process.send_signal(signal.SIGCONT)
            rest, errors = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
            script.go.set()
    assert (rest.split(), errors) == (WORDS[1].split() + WORDS[2].split(), "")


def test_a_busy_event_loop_is_no_silence():
    """What waits for the other request is read, too, before anyone is found silent."""
    asking: set[str] = set()
    asked, go = threading.Event(), threading.Event()

    def reply(message):
        """Answers when both have asked, both at once."""
        if message["type"] == "submit":
            return [accepted(message, message["prompt"]), delta(0, message["prompt"])]
        asking.add(message["rid"])
        if len(asking) < 2:
            return []
        asked.set()
        assert go.wait(20)
        return [reply for rid in ("r1", "r2") for reply in (delta(1, rid), delta(2, rid), done(rid))]

    async def main(address):
        async with tetri.AsyncClient(address, **BRIEF) as client:
            streams = [client.stream("r1"), client.stream("r2")]
            assert [await anext(stream) for stream in streams] == [WORDS[0]] * 2
            assert await asyncio.to_thread(asked.wait, 20)
            go.set()
            time.sleep(HELD_UP_S)  # the loop is busy
            return [await stream.wait() for stream in streams]

    with FakeBroker(reply) as broker:
        results = asyncio.run(main(broker.address))
    assert [result.text for result in results] == ["one two three"] * 2


def test_a_caller_who_was_away_asks_only_when_nothing_comes():
    def reply(message):
        return [accepted(message), delta(0)] if message["type"] == "submit" else [delta(1), delta(2), done()]

    with FakeBroker(reply) as broker, tetri.Client(broker.address, timeout=0.5, silence_s=0.3) as client:
        stream = client.stream("hi")
        assert next(stream) == WORDS[0]
        time.sleep(0.6)
        assert broker.types() == ["submit"]
        assert list(stream) == WORDS[1:]
        assert broker.types() == ["submit", "attach"]


def test_a_cancel_of_one_stream_leaves_no_message_of_another_unread():
    """Sending uses up the signal that messages have arrived."""
    go = threading.Event()

    def reply(message):
        if message["type"] == "submit":
            rid = message["prompt"]
            yield from (accepted(message, rid), delta(0, rid))
            if rid == "r2":
                assert go.wait(20)
                yield delta(1, rid)

    async def main(address):
        async with tetri.AsyncClient(address, silence_s=30.0) as client:
            dropped, kept = client.stream("r1"), client.stream("r2")
            assert [await anext(stream) for stream in (dropped, kept)] == [WORDS[0]] * 2
            await asyncio.sleep(0.05)  # until the client waits
            go.set()
            time.sleep(0.2)  # the loop is busy while the message arrives
            del dropped
            return await asyncio.wait_for(anext(kept), 5)

    with FakeBroker(reply) as broker:
        assert asyncio.run(main(broker.address)) == WORDS[1]
