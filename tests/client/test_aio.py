"""The client for asyncio: many requests at once, and tasks that are cancelled."""

import asyncio
import itertools

import pytest
from fake_broker import STATUS, FakeBroker, accepted, delta, done, endless
from live import wait_until

import tetri
from tests.client.script import FAST
from tetri.client import TetriError


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

            texts = await asyncio.gather(*(streamed(f"<{i}>") for i in range(200)))
            assert texts == [f"<{i}>" * 3 for i in range(200)]

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
        wait_until(lambda: "cancel" in broker.types(), "no cancel")


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
