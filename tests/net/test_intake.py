"""Whatever anybody sends, to whichever socket: counted, logged once, dropped; the others are served."""

import logging
import os

import pytest
import zmq

from tests.net.hubs import PATIENCE, events, hubs, ipc, plain, until
from tetri.net.intake import MAX_CLIENT_BYTES, MAX_MESSAGES
from tetri.wire import codec
from tetri.wire.clients import Attach, ClientMessage, Submit
from tetri.wire.load import Load
from tetri.wire.messages import Close, ClusterView, InboxMessage, LoadReport

GOOD = {
    "inbox": (zmq.PUSH, InboxMessage, Close(rid="good", attempt=1)),
    "clients": (zmq.DEALER, ClientMessage, Attach(rid="good", secret="s")),
    "loads": (zmq.PUB, LoadReport, LoadReport(iid="p0", incarnation=1, role="prefill", load=Load(free_blocks=7))),
    "views": (zmq.PUB, ClusterView, ClusterView(epoch=1, number=1, loads=[])),
}
ANOTHERS = {"inbox": "clients", "clients": "inbox", "loads": "views", "views": "loads"}


class Target:
    """A hub that reads one kind of socket, and strangers that write to it."""

    def __init__(self, hub, kind, folder, context):
        self.hub, self.kind, self.context = hub, kind, context
        self.type, self.union, self.good = GOOD[kind]
        self.address = ipc(folder, "s")
        if kind == "views":
            self.publisher = context.socket(zmq.PUB)
            self.publisher.bind(self.address)
            hub.subscribe(self.address, self.union)
        else:
            bind = {"inbox": hub.bind_inbox, "clients": hub.bind_clients, "loads": hub.bind_subscriber}[kind]
            bind(self.address, self.union)

    def sender(self):
        """A socket that has been heard."""
        if self.kind == "views":
            return self.serves(self.publisher)
        socket = self.context.socket(self.type)
        socket.connect(self.address)
        return self.serves(socket)

    def serves(self, socket):
        """A good message arrives after everything before it, as it is; what is published too early gets lost."""
        data, seen, again = codec.encode(self.good), [], self.type == zmq.PUB
        socket.send(data)

        def settled():
            if again and not seen:
                socket.send(data)
            new = self.hub.poll(0.02)
            seen.extend(new)
            return seen and not new

        until(settled)
        assert all(event.message == self.good for event in seen) and (again or len(seen) == 1)
        return socket

    def garbage(self):
        return {kind: count for kind, count in self.hub.counters.items() if kind.startswith("garbage_")}


@pytest.fixture(params=GOOD)
def target(request, run_folder, context):
    with hubs(1) as (hub,):
        yield Target(hub, request.param, run_folder, context)


GARBAGE = [
    ([b""], "empty"),
    ([b"\x04"], "unreadable"),
    ([b"\xff" * 100], "version"),
    ([b"\x04\x93\x01\x02\x03"], "unexpected"),
    ([b"\x01" + codec.encode(GOOD["inbox"][2])[1:]], "version"),
    ([codec.encode(GOOD["inbox"][2]), b"more"], "frames"),
    ([b"", codec.encode(GOOD["clients"][2])], "frames"),  # what a REQ socket sends
    ([b"", b""], "frames"),
    ([b"x"] * 2000, "frames"),
    ("another's", "unexpected"),
]


@pytest.mark.parametrize(("frames", "counted"), GARBAGE)
def test_garbage_is_counted_logged_once_and_dropped(target, caplog, frames, counted):
    socket = target.sender()
    frames = [codec.encode(GOOD[ANOTHERS[target.kind]][2])] if frames == "another's" else frames
    with caplog.at_level(logging.WARNING):
        for times in range(1, 4):
            socket.send_multipart(frames)
            until(lambda times=times: target.hub.poll(0.01) == [] and sum(target.garbage().values()) >= times)
        target.serves(socket)
    kinds = target.garbage()
    if target.kind == "views":  # only the newest is kept, of a message of several frames the last
        assert sum(kinds.values()) >= 3
    else:
        assert kinds == {f"garbage_{counted}": 3}
    assert len(caplog.records) == len(kinds)
    sender = " from client " if target.kind == "clients" else ": "
    for record in caplog.records:
        assert record.name == "tetri.net" and len(record.getMessage()) < 300
        assert record.getMessage().startswith(f"{target.address}: dropped a message{sender}")


def test_inventing_identities_does_not_fill_memory_or_the_log(run_folder, context, caplog):
    with hubs(1) as (hub,):
        address = hub.bind_clients(ipc(run_folder, "s"), ClientMessage)
        for start in range(0, 600, 50):
            crowd = [context.socket(zmq.DEALER) for _ in range(50)]
            for socket in crowd:
                socket.connect(address)
                socket.send(b"junk")
            events(hub, lambda seen, start=start: hub.counters["garbage_version"] == start + 50)
            for socket in crowd:
                socket.close(0)
        assert len(caplog.records) == 256


def test_a_frame_over_the_limit_cuts_the_peer_and_not_the_others(target):
    bystander, offender = target.sender(), target.sender()
    cut = offender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    offender.send(bytes(codec.limit(target.union) + 1))
    assert target.hub.poll(0.05) == []
    assert cut.poll(PATIENCE * 1000), "the connection was not cut"
    target.serves(bystander)
    offender.disable_monitor()
    cut.close(0)


NOT_ZMTP = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x00" * 64,
    b"\xff" * 64,
    # A greeting, then 2^64.
    b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 48 + b"\x04\xff" + b"\xff" * 8,
    b"\x01\x00" + b"\x0c\x00" + b"z" * 11,  # the protocol of ZeroMQ 2
    os.urandom(500),
]


@pytest.mark.parametrize("noise", NOT_ZMTP, ids=range(len(NOT_ZMTP)))
@pytest.mark.parametrize("target", ["inbox", "clients", "loads"], indirect=True)
def test_bytes_that_are_no_zeromq_at_all(target, noise):
    with plain(target.address) as socket:
        socket.sendall(noise)
        target.sender()
    target.sender()


def test_large_messages_of_clients_leave_the_others_their_turn(run_folder, context):
    """One that is decoded slowly is the last of its poll, however many wait."""
    large = Submit(key="k", secret="s", prompt="x" * MAX_CLIENT_BYTES)
    with hubs(1) as (hub,):
        client = context.socket(zmq.DEALER)
        client.connect(hub.bind_clients(ipc(run_folder, "clients"), ClientMessage))
        for message in (GOOD["clients"][2], large, large, large, GOOD["clients"][2]):
            client.send(codec.encode(message))
        batches = []
        until(lambda: batches.append(hub.poll(0.05)) or sum(map(len, batches)) == 5)
        assert all(event.message != large for batch in batches for event in batch[:-1])


@pytest.mark.parametrize("flooded", ["inbox", "loads"])
def test_a_flood_on_one_socket_leaves_the_others_their_turn(run_folder, flooded, context):
    with hubs(1) as (hub,):
        flooder = Target(hub, flooded, run_folder, context).sender()
        client = context.socket(zmq.DEALER)
        client.connect(hub.bind_clients(ipc(run_folder, "clients"), ClientMessage))
        client.send(codec.encode(Attach(rid="me", secret="s")))
        until(lambda: hub.wait(0))
        for _ in range(4 * MAX_MESSAGES):
            flooder.send(codec.encode(GOOD[flooded][2]))
        batches, more = [hub.poll(0)], [hub.more]
        assert [event.message for event in batches[0] if event.client is not None] == [Attach(rid="me", secret="s")]
        until(lambda: batches.append(hub.poll(0.05)) or more.append(hub.more) or not batches[-1])
        assert sum(map(len, batches)) > MAX_MESSAGES and max(map(len, batches)) <= MAX_MESSAGES + 1
        floods = [sum(event.client is None for event in batch) for batch in batches]
        assert more == [count == MAX_MESSAGES for count in floods]
