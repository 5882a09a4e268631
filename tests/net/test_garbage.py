"""Whatever a stranger sends, to whichever socket: counted, logged once, dropped; the others are served."""

import logging
import os
import resource
import select
import socket as plain_socket
import subprocess
import sys
from typing import ClassVar

import pytest
import zmq

from tests.net.hubs import PATIENCE, events, hubs, ipc, some, until
from tetri.net import Hub
from tetri.wire import codec
from tetri.wire.clients import Attach, ClientMessage
from tetri.wire.events import Arrived, PeerUp
from tetri.wire.messages import Close, InboxMessage, WorkerEvent

GOOD = {"inbox": Close(rid="good", attempt=1), "clients": Attach(rid="good")}
SENDER = {"inbox": zmq.PUSH, "clients": zmq.DEALER}


class Strangers(zmq.Context):
    """Keeps its sockets until it is destroyed, so that a test need not close them."""

    def socket(self, kind):
        made = super().socket(kind)
        self.kept.append(made)
        return made

    kept: ClassVar[list] = []

    def destroy(self, linger=None):
        super().destroy(linger)
        self.kept.clear()


@pytest.fixture
def context():
    made = Strangers()
    yield made
    made.destroy(linger=0)


@pytest.fixture(params=["inbox", "clients"])
def target(request, run_folder):
    """(hub, kind of socket, its address)"""
    with hubs(1) as (hub,):
        bind = {"inbox": hub.bind_inbox, "clients": hub.bind_clients}[request.param]
        union = {"inbox": InboxMessage, "clients": ClientMessage}[request.param]
        yield hub, request.param, bind(ipc(run_folder, "s"), union)


def incompatibility(context, kind, address):
    socket = context.socket(SENDER[kind])
    socket.linger = 0
    socket.connect(address)
    return socket


def still_serves(hub, kind, socket):
    """A good message sent after everything before it arrives, alone."""
    socket.send(codec.encode(GOOD[kind]))
    (event,) = some(hub, 1)
    assert event.message == GOOD[kind]


GARBAGE = [
    ([b""], "empty"),
    ([b"\x01"], "unreadable"),
    ([b"\xff" * 100], "version"),
    ([b"\x01\x93\x01\x02\x03"], "unexpected"),
    ([b"\x02" + codec.encode(GOOD["inbox"])[1:]], "version"),
    ([codec.encode(GOOD["inbox"]), b"more"], "frames"),
    ([b"", codec.encode(GOOD["clients"])], "frames"),  # what a REQ socket sends
    ([b"x"] * 2000, "frames"),
]


@pytest.mark.parametrize(("frames", "counted"), GARBAGE)
def test_garbage_is_counted_logged_once_and_dropped(target, context, caplog, frames, counted):
    hub, kind, address = target
    socket = incompatibility(context, kind, address)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            socket.send_multipart(frames)
        still_serves(hub, kind, socket)
    assert hub.counters[f"garbage_{counted}"] == 3
    (record,) = caplog.records
    assert len(record.getMessage()) < 300
    assert ("client" in record.getMessage()) == (kind == "clients")


def test_a_message_for_another_receiver_is_garbage(target, context):
    hub, kind, address = target
    socket = incompatibility(context, kind, address)
    other = {"inbox": "clients", "clients": "inbox"}[kind]
    socket.send(codec.encode(GOOD[other]))
    still_serves(hub, kind, socket)
    assert hub.counters["garbage_unexpected"] == 1


def test_an_identity_without_a_frame_is_garbage(run_folder, context):
    """A ROUTER hears from a REQ that sends nothing: identity, delimiter, empty; and from a bare DEALER."""
    with hubs(1) as (hub,):
        address = hub.bind_clients(ipc(run_folder, "s"), ClientMessage)
        request = context.socket(zmq.REQ)
        request.connect(address)
        request.send(b"")
        socket = incompatibility(context, "clients", address)
        events(hub, lambda seen: hub.counters["garbage_frames"] == 1)
        still_serves(hub, "clients", socket)


def test_inventing_identities_does_not_fill_memory_or_the_log(run_folder, context, caplog):
    with hubs(1) as (hub,):
        address = hub.bind_clients(ipc(run_folder, "s"), ClientMessage)
        for start in range(0, 600, 50):
            crowd = [incompatibility(context, "clients", address) for _ in range(50)]
            for socket in crowd:
                socket.send(b"junk")
            events(hub, lambda seen, start=start: hub.counters["garbage_version"] == start + 50)
            for socket in crowd:
                socket.close(0)
        assert len(caplog.records) == 256


def test_a_frame_over_the_limit_cuts_the_peer_and_not_the_others(target, context):
    hub, kind, address = target
    limit = codec.limit({"inbox": InboxMessage, "clients": ClientMessage}[kind])
    bystander = incompatibility(context, kind, address)
    still_serves(hub, kind, bystander)
    offender = incompatibility(context, kind, address)
    cut = offender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    offender.send(bytes(limit + 1))
    assert cut.poll(PATIENCE * 1000), "the connection was not cut"
    still_serves(hub, kind, bystander)
    assert hub.counters["received"] == 2
    offender.disable_monitor()
    cut.close(0)


SEND_100_MB = """
import sys, zmq
context = zmq.Context()
socket = context.socket(int(sys.argv[1]))
socket.linger = 0
socket.connect(sys.argv[2])
cut = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
socket.send(bytes(100 << 20))
print("cut" if cut.poll(5000) else "not cut")
socket.disable_monitor(); cut.close(); socket.close(); context.term()
"""


def test_a_hundred_megabytes_are_never_held_in_memory(target, context):
    hub, kind, address = target
    bystander = incompatibility(context, kind, address)
    still_serves(hub, kind, bystander)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with subprocess.Popen(
        [sys.executable, "-c", SEND_100_MB, str(SENDER[kind]), address], stdout=subprocess.PIPE
    ) as child:
        while child.poll() is None:
            assert hub.poll(0.05) == []
        assert child.stdout.read() == b"cut\n"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30 << 10, f"{grown} kB more"
    still_serves(hub, kind, bystander)


NOT_ZMTP = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x00" * 64,
    b"\xff" * 64,
    b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 48 + b"\x04\xff" + b"\xff" * 8,  # a greeting, then 2^64
    b"\x01\x00" + b"\x0c\x00" + b"z" * 11,  # the protocol of ZeroMQ 2
    os.urandom(500),
]


def plain(address):
    socket = plain_socket.socket(plain_socket.AF_UNIX)
    socket.connect(address.removeprefix("ipc://"))
    return socket


@pytest.mark.parametrize("noise", NOT_ZMTP, ids=range(len(NOT_ZMTP)))
def test_bytes_that_are_no_zeromq_at_all(target, context, noise):
    hub, kind, address = target
    with plain(address) as socket:
        socket.sendall(noise)
        still_serves(hub, kind, incompatibility(context, kind, address))
    still_serves(hub, kind, incompatibility(context, kind, address))


@pytest.mark.parametrize("again", ["connect", "send"])
def test_a_listener_that_is_no_worker_harms_no_other_and_is_left_for_a_real_one(run_folder, again):
    """The other direction: an inbox address at which a stranger answers with garbage. libzmq gives such a
    connection up for good, so the hub opens a new one whenever the core tries again."""
    path, address = run_folder / "w", ipc(run_folder, "w")
    with hubs(3) as (broker, late, other):
        other.bind_inbox(ipc(run_folder, "other"), InboxMessage)
        broker.connect("other", ipc(run_folder, "other"))
        some(broker, 1)

        def try_again():
            assert broker.poll(0.01) == []
            if again == "connect":
                broker.connect("w", address)
            else:
                assert broker.send("w", GOOD["inbox"]) is False

        broker.connect("w", address)
        with plain_socket.socket(plain_socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            for noise in NOT_ZMTP[:4]:
                until(lambda: try_again() or readable(listener))
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(noise)
        assert broker.send("other", GOOD["inbox"])
        assert some(other, 1) == [Arrived(GOOD["inbox"])]
        path.unlink()
        late.bind_inbox(address, InboxMessage)
        seen = []
        while not seen:
            broker.connect("w", address) if again == "connect" else broker.send("w", GOOD["inbox"])
            seen = broker.poll(0.01)
        assert seen == [PeerUp("w")]


def readable(socket):
    return bool(select.select([socket], [], [], 0)[0])


def test_a_listener_of_another_pattern_takes_nothing(run_folder, context):
    """A PUSH that finds a ROUTER: libzmq refuses the pair in the handshake, so no request goes there."""
    router = context.socket(zmq.ROUTER)
    router.bind(ipc(run_folder, "r"))
    with hubs(1) as (broker,):
        broker.connect("r", ipc(run_folder, "r"))
        watched = broker._links["r"]
        assert not router.poll(100)
        assert broker.poll(0) == [] and not watched.up
        assert broker.send("r", GOOD["inbox"]) is False


def test_the_default_log_is_named_after_the_room(run_folder, context, caplog):
    hub = Hub()
    try:
        socket = incompatibility(context, "inbox", hub.bind_inbox(ipc(run_folder, "e"), WorkerEvent))
        socket.send(b"")
        until(lambda: not hub.poll(0) and hub.counters["garbage_empty"] == 1)
    finally:
        hub.close()
    assert caplog.records[0].name == "tetri.net"
    assert caplog.records[0].getMessage() == f"ipc://{run_folder}/e: dropped a message: empty frame"
