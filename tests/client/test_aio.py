"""The client for asyncio: many requests at once, and tasks that are cancelled."""

import asyncio
import itertools
import threading

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


async def breaks(client):
    async for _ in client.stream("hi"):
        break


async def breaks_and_keeps(client):
    client.kept = client.stream("hi")
    async for _ in client.kept:
        break


async def breaks_events(client):
    async for event in client.events("hi"):
        assert event.tokens[0] == 10
        break


async def closes_events(client):
    client.kept = client.events("hi")
    assert (await anext(client.kept)).tokens[0] == 10
    client.kept.close()


async def raises(client):
    with pytest.raises(ZeroDivisionError):
        async for _ in client.stream("hi"):
            1 / 0  # noqa: B018


async def drops(client):
    stream = client.stream("hi")
    assert await anext(stream) == "one "
    del stream


async def drops_unread(client):
    client.stream("hi")


async def is_cancelled(client):
    task = asyncio.create_task(client.generate("hi"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


async def is_cancelled_in_a_loop(client):
    async def read():
        async for _ in client.stream("hi"):
            begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])


async def closes(client):
    client.kept = client.stream("hi")
    assert await anext(client.kept) == "one "
    await client.close()


ENDS = [breaks, breaks_and_keeps, breaks_events, closes_events, raises, drops, drops_unread, closes]
ENDS += [is_cancelled, is_cancelled_in_a_loop]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("goes_on", [True, False], ids=["the loop goes on", "the loop ends"])
def test_a_request_that_nobody_reads_any_more_is_cancelled(end, goes_on):
    cancelled = threading.Event()

    def reply(message):
        if message["type"] == "cancel":
            cancelled.set()
        return endless(message)

    async def main(client):
        await end(client)
        if goes_on:
            assert await asyncio.to_thread(cancelled.wait, 20)

    async def started(address):
        clients.append(tetri.AsyncClient(address))
        await main(clients[0])

    clients = []
    with FakeBroker(reply) as broker:
        asyncio.run(started(broker.address))
        assert cancelled.wait(20)
        asyncio.run(clients[0].close())
    (submit,) = (message for message in broker.seen if message["type"] == "submit")
    assert all(each["rid"] in ("r1", submit["key"]) for each in broker.seen if each["type"] == "cancel")


def test_a_request_of_a_loop_that_ends_is_cancelled():
    async def main(address):
        client = tetri.AsyncClient(address)
        kept.extend((client, client.stream("hi")))
        assert await anext(kept[1]) == "one "

    kept = []
    with FakeBroker(endless) as broker:
        asyncio.run(main(broker.address))
        wait_until(lambda: "cancel" in broker.types(), "no Cancel")
        with pytest.raises(TetriError, match="stopped"):
            asyncio.run(kept[1].wait())


def test_after_a_break_what_had_arrived_can_be_read_and_anext_reads_on_without_an_end():
    async def main(address):
        async with tetri.AsyncClient(address, **FAST) as client:
            stream = client.stream("hi")
            assert [await anext(stream), await anext(stream)] == ["one ", "two "] and "cancel" not in broker.types()
            stream = client.stream("hi")
            async for piece in stream:
                assert piece == "one "
                break
            assert [piece async for piece in stream] in ([], ["two "]) and stream.result.text == "one two "

    with FakeBroker(endless) as broker:
        asyncio.run(main(broker.address))


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
