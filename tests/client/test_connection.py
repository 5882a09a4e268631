"""The socket of a client: what goes wrong with it is one TetriError, in its process and in a forked one."""

import asyncio
import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zmq
from fake_broker import FakeBroker, accepted, answer, delta, done, endless
from live import wait_until

import tetri
from tests.client.script import FAST
from tetri.client import Operator, TetriError, Unreachable, connection
from tetri.client.connection import Connection


class Failing:
    """A socket, one method of which fails."""

    def __init__(self, socket, method, number):
        vars(self).update(_socket=socket, _method=method, _number=number)

    def __getattr__(self, name):
        if name == self._method:
            raise zmq.ZMQError(self._number)
        return getattr(self._socket, name)

    def __setattr__(self, name, value):
        setattr(self._socket, name, value)


@pytest.fixture
def failing(monkeypatch):
    """Let this method of every new socket fail with this error number."""

    def fail(method, number):
        context = connection._context()

        class Context:
            def socket(self, kind):
                if method == "socket":
                    raise zmq.ZMQError(number)
                return Failing(context.socket(kind), method, number)

        monkeypatch.setattr(connection, "_context", Context)

    return fail


@pytest.mark.parametrize("number", [errno.EMFILE, zmq.ETERM, zmq.ENOTSOCK])
@pytest.mark.parametrize("method", ["socket", "connect", "send", "recv_multipart", "poll", "get"])
def test_no_error_of_the_socket_leaves_a_client(generate, failing, method, number):
    failing(method, number)
    with FakeBroker(lambda message: []) as broker, pytest.raises(TetriError) as found:
        generate(broker.address, options={**FAST, "timeout": 0.05})
    unused = isinstance(found.value, Unreachable) and method in ("poll", "get")  # each by one of the clients only
    assert zmq.strerror(number) in str(found.value) or unused


def test_only_the_connection_knows_zmq():
    folder = Path(connection.__file__).parent
    assert [path.name for path in folder.glob("*.py") if "import zmq" in path.read_text()] == ["connection.py"]


@pytest.mark.parametrize(
    "address", ["nowhere", "tcp://nohost", "udp://127.0.0.1:1", "ipc://" + "x" * 200, "\ud800", 5]
)
def test_an_invalid_address_is_named(address):
    with pytest.raises(TetriError, match="is not a valid broker address"):
        Connection(address)


@pytest.mark.parametrize("kind", [tetri.Client, tetri.AsyncClient, Operator])
def test_too_many_clients_are_told_to_share(monkeypatch, kind):
    """As the 1,024th of a process is, here the third."""
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 2)
        monkeypatch.setattr(connection, "_context", lambda: context)
        both = [Connection("ipc:///tmp/nobody"), Connection("ipc:///tmp/nobody")]
        with pytest.raises(TetriError, match="Too many open files: close clients .* or share one"):
            kind("ipc:///tmp/nobody")
        for each in both:
            each.close()


def test_after_the_end_a_connection_says_so_and_may_be_closed_again():
    it = Connection("ipc:///tmp/nobody")
    it.close()
    it.close()
    for use in (it.receive, it.waits, lambda: it.send(b"x"), lambda: it.poll(0), lambda: it.readable):
        with pytest.raises(TetriError, match="the client was closed"):
            use()


def test_a_full_queue_is_no_error():
    it = Connection("ipc:///tmp/nobody")
    assert [it.send(b"x") for _ in range(1001)] == [True] * 1000 + [False]
    it.close()


def test_a_client_in_use_by_another_thread_says_so():
    def reply(message):
        began.set()
        return []

    began, found = threading.Event(), []
    with FakeBroker(reply) as broker, tetri.Client(broker.address, timeout=30) as client:

        def use():
            try:
                client.generate("hi")
            except TetriError as error:
                found.append(str(error))

        first = threading.Thread(target=use)
        first.start()
        assert began.wait(20)
        for refused in (lambda: client.generate("hi"), client.status, client.close):
            with pytest.raises(TetriError, match="another thread is using this client"):
                refused()
        (request,) = client._session._due
        request.end(TetriError("enough"))
        first.join(20)
        assert found == ["enough"]


def test_an_async_client_in_another_loop_says_so():
    with FakeBroker(answer) as broker:
        client = tetri.AsyncClient(broker.address, **FAST)

        async def use():
            return (await client.generate("hi")).text

        assert asyncio.run(use()) == "one two three"
        with pytest.raises(TetriError, match="another event loop"):
            asyncio.run(use())
        asyncio.run(client.close())


PROGRAM = """
import asyncio, os, sys, tetri
from tetri.client import TetriError

def says(use):
    try:
        use()
    except TetriError as error:
        assert "belongs to process %d" % parent in str(error), error
    else:
        sys.exit("no error")

def wait(pid):
    assert os.waitpid(pid, 0)[1] == 0

parent = os.getpid()
address = sys.argv[1]
"""
SYNC = """
with tetri.Client(address, silence_s=0.1) as client:
    stream, other = client.stream("hi"), client.stream("hi")
    assert next(stream) == "one "
    if not (child := os.fork()):
        for use in (lambda: next(stream), lambda: list(stream), stream.cancel, stream.cancel_soon, other.wait,
                    client.status, lambda: client.generate("hi"), lambda: client.cancel("r1")):
            says(use)
        with tetri.Client(address) as own:
            assert next(own.stream("hi")) == "one "
        del stream, other
        client.close()
        sys.exit()
    wait(child)
    assert list(stream) == ["two ", "three"] and stream.result.finish_reason == "length"
"""
ASYNC = """
async def child(client, stream, other):
    for use in (lambda: anext(stream), lambda: stream.cancel(), lambda: other.wait(), client.status,
                lambda: client.generate("hi")):
        try:
            await use()
        except TetriError as error:
            assert "belongs to process %d" % parent in str(error), error
        else:
            sys.exit("no error")
    await client.close()

async def main():
    async with tetri.AsyncClient(address, silence_s=0.1) as client:
        stream, other = client.stream("hi"), client.stream("hi")
        assert await anext(stream) == "one "
        if not (pid := os.fork()):
            try:
                child(client, stream, other).send(None)
            except StopIteration:
                os._exit(0)
            os._exit(1)
        wait(pid)
        assert [piece async for piece in stream] == ["two ", "three"] and stream.result.finish_reason == "length"
asyncio.run(main())
"""


def test_after_a_fork_a_client_belongs_to_the_parent_and_the_child_leaves_it_alone():
    def reply(message):
        """A token; the rest when asked for it."""
        rid = message.get("rid") or "r" + message["key"]
        if message["type"] == "submit":
            return [accepted(message, rid), delta(0, rid)]
        return [delta(1, rid), delta(2, rid), done(rid)] if message["type"] == "attach" else []

    with FakeBroker(reply) as broker:
        command = [sys.executable, "-W", "error", "-c", PROGRAM + SYNC + ASYNC, broker.address]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.stderr == "" and ran.returncode == 0


AT_EXIT = """
import sys, threading, tetri
client = tetri.Client(sys.argv[1])
stream = client.stream("hi")
assert next(stream) == "one "
"""
ENDS = {
    "the program's end": "",
    "an error": "1 / 0",
    "a cycle of garbage": "a = [stream]; a.append(a); del stream, client, a; import gc; gc.collect(); input()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_cancels_its_requests(end):
    cancelled = threading.Event()

    def reply(message):
        if message["type"] == "cancel":
            cancelled.set()
        return endless(message)

    with FakeBroker(reply) as broker:
        command = [sys.executable, "-W", "error", "-c", AT_EXIT + ENDS[end], broker.address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert cancelled.wait(60)
            errors = process.communicate("\n", timeout=60)[1]
    assert ("ZeroDivisionError" in errors) if end == "an error" else errors == ""


def test_a_program_ends_while_a_daemon_thread_waits_for_an_answer():
    program = AT_EXIT + "threading.Thread(target=list, args=[stream], daemon=True).start()"
    with FakeBroker(endless) as broker:
        command = [sys.executable, "-W", "error", "-c", program, broker.address]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_client_that_nobody_holds_closes_its_connection():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    with FakeBroker(endless) as broker:
        gc.collect()
        before = descriptors()
        clients = [tetri.Client(broker.address, **FAST) for _ in range(10)]
        assert [next(client.stream("hi")) for client in clients] == ["one "] * 10 and descriptors() > before + 10
        del clients
        wait_until(lambda: descriptors() < before + 10, "the connections are open")
