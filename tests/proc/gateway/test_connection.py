"""What one connection may do: a server in this process, and clients that are slow or hostile."""

import asyncio
import sys
import time
from contextlib import asynccontextmanager, suppress
from fcntl import ioctl
from termios import TIOCOUTQ

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from tetri.proc.gateway.connection import HEAD_BYTES, SPARE, UNSENT_BYTES, Limits, protocol

SOON = Limits(request_s=0.2, stall_s=0.2, connections=50)
LATER = Limits(request_s=20, stall_s=20, connections=50)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope, receive, send):
    """Answers with the size of the body; /endless with bytes without end."""
    if scope["path"] != "/endless":
        size = len(await Request(scope, receive).body())
        return await PlainTextResponse(f"{size} bytes")(scope, receive, send)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    gone = asyncio.ensure_future(receive())
    while not gone.done() or gone.result()["type"] != "http.disconnect":
        gone = asyncio.ensure_future(receive()) if gone.done() else gone
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(limits=SOON, idle_s=60):
    """A server; yields its port and its uvicorn server."""
    settings = {"ws": "none", "lifespan": "off", "log_config": None, "log_level": "error", "access_log": False}
    made = uvicorn.Config(app, "127.0.0.1", 0, http=protocol(limits), timeout_keep_alive=idle_s, **settings)
    server = uvicorn.Server(made)
    made.load()
    server.lifespan = made.lifespan_class(made)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        for connection in [*server.server_state.connections]:
            connection.transport.abort()
        await server.shutdown()


def run(talk, **settings):
    """Run `talk(reader, writer, server)` with a connection to a new server."""

    async def whole():
        async with serving(**settings) as (port, server):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return await asyncio.wait_for(talk(reader, writer, server), 20)
            finally:
                writer.close()

    return asyncio.run(whole())


PARTS = {
    "headers": (b"GET /x HTTP/1.1\r\nX-Y: ", b"z"),
    "body": (b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n", b"x"),
    "chunks": (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "nothing": (b"", b"\r\n"),
    "nothing after an answer": (GET, b"\r\n"),
}


@pytest.mark.parametrize(("begin", "drip"), PARTS.values(), ids=PARTS)
def test_a_request_that_drips_in_is_cut_off(begin, drip):
    async def talk(reader, writer, server):
        began = time.monotonic()
        writer.write(begin)
        answer = asyncio.ensure_future(reader.read())
        for number in range(1000):
            if answer.done():
                break
            writer.write(drip[number % len(drip) :][:1])
            await asyncio.sleep(0.02)
        with suppress(ConnectionError):  # an error that was sent before the last byte arrived may be lost
            await answer
        return time.monotonic() - began

    assert SOON.request_s * 0.9 < run(talk) < 10


@pytest.mark.parametrize("what", ["headers", "body", "chunks"])
def test_a_client_that_stops_in_a_request_is_told(what):
    async def talk(reader, writer, server):
        writer.write(PARTS[what][0])
        return await reader.read()

    answer = run(talk)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the request did not arrive within 0.2 s" in answer


@pytest.mark.parametrize("offer", ["h2c", "websocket"])
@pytest.mark.parametrize(
    "body", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("apart", [True, False])
def test_an_offer_of_another_protocol_is_declined_and_the_body_read(offer, body, apart):
    """Java's client offers HTTP/2 with the first request of a connection."""
    head = b"POST / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\n" % offer.encode()
    data = (head + body) * 2 + head + b"\r\n" + GET

    async def talk(reader, writer, server):
        for part in [data[at : at + 1] for at in range(len(data))] if apart else [data]:
            writer.write(part)
            await asyncio.sleep(0)
        return [(await reader.readuntil(b" bytes")).rpartition(b"\n")[2] for _ in range(4)]

    assert run(talk, limits=LATER) == [b"3 bytes", b"3 bytes", b"0 bytes", b"0 bytes"]


def test_an_idle_connection_is_closed():
    async def never(reader, writer, server):
        return await reader.read()

    async def after(reader, writer, server):
        writer.write(GET)
        await reader.readuntil(b"bytes")
        return await reader.read()

    assert run(never) == b""
    assert run(after, idle_s=0) == b""


def test_each_request_of_a_connection_has_its_own_time():
    async def talk(reader, writer, server):
        while not server.server_state.connections:
            await asyncio.sleep(0.005)
        (connection,) = server.server_state.connections
        for _ in range(3):
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab")
            while connection._arriving is None:
                await asyncio.sleep(0.005)
            writer.write(b"c")
            assert b"3 bytes" in await reader.readuntil(b"bytes")
            assert connection._arriving is None

    run(talk, limits=LATER)


@pytest.mark.parametrize("part", [b"X-A: " + b"a" * 1000 + b"\r\n", b"a" * 1000])
def test_headers_without_end_are_refused(part):
    async def talk(reader, writer, server):
        writer.write((b"GET / HTTP/1.1\r\n" + part * HEAD_BYTES)[: HEAD_BYTES + 1])
        return await reader.read()

    assert run(talk, limits=LATER).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
def test_what_is_no_http_is_refused(data):
    async def talk(reader, writer, server):
        writer.write(data)
        return await reader.read()

    answer = run(talk)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"this is no valid HTTP request" in answer


def test_a_client_that_does_not_read_is_cut_off_and_its_answer_ends():
    async def talk(reader, writer, server):
        writer.write(b"GET /endless HTTP/1.1\r\n\r\n")
        writer.transport.pause_reading()
        while not server.server_state.tasks:
            await asyncio.sleep(0.01)
        while server.server_state.tasks or server.server_state.connections:
            await asyncio.sleep(0.01)

    run(talk)


def test_a_client_that_reads_again_has_all_its_time_again():
    async def talk(reader, writer, server):
        writer.write(b"GET /endless HTTP/1.1\r\n\r\n")
        while not server.server_state.connections:
            await asyncio.sleep(0.005)
        (connection,) = server.server_state.connections
        for _ in range(3):
            writer.transport.pause_reading()
            while connection._stalled is None:
                await asyncio.sleep(0.005)
            writer.transport.resume_reading()
            while connection._stalled is not None:
                await reader.read(1 << 20)

    run(talk, limits=LATER)


def test_little_queues_up_for_a_client_that_does_not_read():
    async def talk(reader, writer, server):
        writer.transport.pause_reading()
        writer.write(b"GET /endless HTTP/1.1\r\n\r\n")
        while not server.server_state.connections:
            await asyncio.sleep(0.005)
        (connection,) = server.server_state.connections
        while connection._stalled is None:
            await asyncio.sleep(0.005)
        connected = connection.transport.get_extra_info("socket")
        return int.from_bytes(ioctl(connected.fileno(), TIOCOUTQ, bytes(4)), sys.byteorder)

    assert run(talk, limits=LATER) <= 4 * UNSENT_BYTES


def test_there_are_only_so_many_connections():
    async def talk(reader, writer, server):
        port = writer.get_extra_info("peername")[1]
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(SPARE + 1)]
        one_more, dropped = idle[-1], await asyncio.open_connection("127.0.0.1", port)
        one_more[1].write(GET)
        answers = [await one_more[0].read(), await dropped[0].read()]
        writer.write(GET)  # the first goes on
        answers.append(await reader.readuntil(b"bytes"))
        for _, each in (*idle, dropped):
            each.close()
        return answers

    refused, nothing, served = run(talk, limits=Limits(request_s=9, stall_s=9, connections=2))
    assert refused.startswith(b"HTTP/1.1 503 ") and b"this gateway has 2 connections" in refused and nothing == b""
    assert served.startswith(b"HTTP/1.1 200 ")


def test_what_is_pipelined_waits_for_the_answer_before():
    async def talk(reader, writer, server):
        writer.write(b"GET /endless HTTP/1.1\r\n\r\n" + b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
        until = time.monotonic() + 3 * SOON.request_s
        size = 0
        while time.monotonic() < until:
            size += len(await reader.readexactly(1 << 18))
        writer.transport.abort()
        while server.server_state.tasks:  # the answer ends, although it is not that of the latest request
            await asyncio.sleep(0.01)
        return size

    assert run(talk, limits=Limits(request_s=0.2, stall_s=20, connections=50))
