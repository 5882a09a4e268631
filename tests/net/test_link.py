"""A peer that dies, comes back, or is none: heard of in milliseconds, not after missed heartbeats."""

import contextlib
import select
import socket as plain_socket
from functools import partial

import pytest
import zmq

from tests.net.hubs import hubs, ipc, some, until
from tests.net.test_intake import GOOD, NOT_ZMTP
from tetri.net.hub import RETRY_S
from tetri.wire.events import Arrived, PeerDown, PeerUp
from tetri.wire.messages import Close, ClusterView, InboxMessage, LoadReport

CLOSE = Close(rid="r", attempt=1)


def test_a_peer_that_ends_is_noticed_at_once_and_its_return_too(run_folder):
    with hubs(1) as (broker,):
        broker.connect("w", ipc(run_folder, "w"))
        for _ in range(3):
            assert broker.send("w", CLOSE) is False
            with hubs(1) as (worker,):
                worker.bind_inbox(ipc(run_folder, "w"), InboxMessage)
                assert some(broker, 1) == [PeerUp("w")]
                assert broker.send("w", CLOSE)
                assert some(worker, 1) == [Arrived(CLOSE)]
            assert some(broker, 1) == [PeerDown("w")]


def readable(socket):
    return bool(select.select([socket], [], [], 0)[0])


def tried(hub, again, seen, listener=None):
    """Do it again; whether the listener has a connection, which is none of a peer's: nothing can be sent."""
    sent = again()
    seen.extend(hub.poll(0.01))
    assert listener is None or not sent
    return listener is not None and readable(listener)


@pytest.mark.parametrize("how", ["connect", "send", "subscribe", "connect_publisher"])
def test_a_listener_that_is_none_of_ours_is_left_for_a_real_one(run_folder, how, monkeypatch):
    """libzmq gives a connection that was answered with garbage up for good. The hub opens a new one: to a peer whenever
    the core tries again, of a feed after RETRY_S."""
    path, address = run_folder / "w", ipc(run_folder, "w")
    monkeypatch.setattr("tetri.net.hub.RETRY_S", 0.05)
    assert RETRY_S >= 0.1  # no flood of connections
    report, view = GOOD["loads"][2], GOOD["views"][2]
    with hubs(3) as (hub, late, other):
        other.bind_inbox(ipc(run_folder, "other"), InboxMessage)
        hub.connect("other", ipc(run_folder, "other"))
        some(hub, 1)
        connect, inbox = partial(hub.connect, "w", address), partial(late.bind_inbox, address, InboxMessage)
        send, publish = partial(hub.send, "w", CLOSE), partial(hub.publish, report)
        begin, again, bind, then, right = {
            "connect": (connect, connect, inbox, connect, PeerUp("w")),
            "send": (connect, send, inbox, send, PeerUp("w")),
            "subscribe": (
                *(partial(hub.subscribe, address, ClusterView), lambda: None),
                *(partial(late.bind_publisher, address), partial(late.publish, view), Arrived(view)),
            ),
            "connect_publisher": (
                *(partial(hub.connect_publisher, address), lambda: None),
                *(partial(late.bind_subscriber, address, LoadReport), publish, Arrived(report)),
            ),
        }[how]
        begin()
        seen = []
        with plain_socket.socket(plain_socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            for noise in NOT_ZMTP[:3]:
                until(partial(tried, hub, again, seen, listener))
                connection, _ = listener.accept()
                with connection, contextlib.suppress(BrokenPipeError):
                    connection.sendall(noise)
        assert seen == [] and hub.send("other", CLOSE)
        assert some(other, 1) == [Arrived(CLOSE)]
        path.unlink()
        bind()
        until(lambda: tried(hub, then, seen) or seen.extend(late.poll(0)) or seen)
        assert seen[0] == right


def test_a_listener_of_another_pattern_takes_nothing(run_folder, context):
    """A PUSH that finds a ROUTER, or another's PUSH a SUB: libzmq refuses the pair in the handshake."""
    router = context.socket(zmq.ROUTER)
    router.bind(ipc(run_folder, "r"))
    push = context.socket(zmq.PUSH)
    push.immediate = 1
    with hubs(1) as (broker,):
        broker.connect("r", ipc(run_folder, "r"))
        push.connect(broker.bind_subscriber(ipc(run_folder, "loads"), LoadReport))
        assert not router.poll(100) and not push.poll(0, zmq.POLLOUT)
        assert broker.poll(0) == []
        assert broker.send("r", CLOSE) is False
        assert broker.counters == {"no_peer": 1}
