import threading
import time
from contextlib import contextmanager

import pytest
import zmq

from tests.net.hubs import PATIENCE, events, hubs, ipc, linked, some, until
from tetri.net import NetError
from tetri.request import Sampling
from tetri.wire import codec
from tetri.wire.clients import Accepted, Attach, BrokerReply, ClientMessage, Delta, Inspect, OperatorMessage
from tetri.wire.events import Arrived, PeerUp
from tetri.wire.messages import Assign, Close, InboxMessage


@contextmanager
def dealer(address, **options):
    """A client that is nothing but a socket."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        for name, value in {"linger": 0, **options}.items():
            setattr(socket, name, value)
        socket.connect(address)
        yield socket


def heard(socket):
    assert socket.poll(PATIENCE * 1000), "no answer"
    return codec.decode(socket.recv(), BrokerReply)


def close(rid):
    return Close(rid=rid, attempt=1)


def test_a_wait_tells_whether_a_message_has_come_and_reads_nothing(run_folder):
    with linked(run_folder) as (worker, broker):
        assert worker.wait(0.0) is False
        assert broker.send("w", close("r"))
        until(lambda: worker.wait(0.001))
        assert worker.wait(0.0) is True and some(worker, 1) == [Arrived(close("r"))]


def test_messages_reach_an_inbox_in_order_unless_too_long_or_disconnected(run_folder):
    with linked(run_folder) as (worker, broker):
        sent = [close(f"r{n}") for n in range(20)]
        assert all(broker.send("w", message) for message in sent)
        assert some(worker, 20) == [Arrived(message) for message in sent]
        assert broker.counters["sent"] == worker.counters["received"] == 20
        assert broker.counters["sent_bytes"] == worker.counters["received_bytes"] > 0
        huge = Assign(rid="r", attempt=1, prompt=[1 << 31] * (4 << 20), output=[], sampling=Sampling())
        with pytest.raises(codec.WireError, match="at most"):
            broker.send("w", huge)
        for _ in range(2):
            broker.disconnect("w")
        assert broker.send("w", close("r")) is False and broker.unsent == {"away_w": 1}
        assert broker.poll(0) == []


def test_a_send_right_after_peer_up_is_not_refused(run_folder):
    """libzmq looks at new connections only now and then; see Link.send."""
    with hubs(1) as (worker,):
        worker.bind_inbox(ipc(run_folder, "w"), InboxMessage)
        for _ in range(20):
            with hubs(1) as (broker,):
                broker.connect("w", ipc(run_folder, "w"))
                broker.send("w", close("too early"))
                events(broker, lambda seen: PeerUp("w") in seen)
                assert broker.send("w", close("now"))


def test_one_message_to_many_peers_is_the_same_bytes(run_folder):
    """It is encoded once; another one that follows is not taken for it."""
    with linked(run_folder) as (worker, broker):
        messages = [close("r1"), close("r2")]
        sent = [messages[0], messages[0], messages[1], messages[0]]
        assert all(broker.send("w", message) for message in sent)
        assert some(worker, 4) == [Arrived(message) for message in sent]


def test_tcp_works_like_ipc_and_tells_the_port():
    with hubs(2) as (worker, broker):
        address = worker.bind_inbox("tcp://127.0.0.1:*", InboxMessage)
        assert address.startswith("tcp://127.0.0.1:")
        broker.connect("w", address)
        some(broker, 1)
        assert broker.send("w", close("r"))
        assert some(worker, 1) == [Arrived(close("r"))]


def test_send_says_false_when_nobody_is_there(run_folder):
    with hubs(1) as (hub,):
        assert hub.send("outsider", close("r")) is False
        hub.connect("w", ipc(run_folder, "w"))
        assert hub.send("w", close("r")) is False
        assert hub.poll(0) == []
        assert hub.counters == {"no_peer": 2}


def test_send_says_false_when_the_peer_does_not_read(run_folder):
    with linked(run_folder) as (worker, broker):
        bulky = Assign(rid="r", attempt=1, prompt=[70000] * 200, output=[], sampling=Sampling())
        sent = 0
        while broker.send("w", bulky):
            sent += 1
            assert sent < 20_000
        # It goes on as soon as the peer reads, and nothing that was taken is lost.
        received = 0
        while received < sent:
            received += len(worker.poll(PATIENCE))
        until(lambda: broker.send("w", bulky))


def test_another_address_replaces_the_connection(run_folder):
    with hubs(3) as (old, new, broker):
        old.bind_inbox(ipc(run_folder, "old"), InboxMessage)
        new.bind_inbox(ipc(run_folder, "new"), InboxMessage)
        broker.connect("w", ipc(run_folder, "old"))
        some(broker, 1)
        with pytest.raises(NetError):
            broker.connect("w", "nonsense")
        assert broker.send("w", close("to old"))
        broker.connect("w", ipc(run_folder, "new"))
        assert some(broker, 1) == [PeerUp("w")]
        broker.connect("w", ipc(run_folder, "new"))  # the same again: nothing happens
        assert broker.send("w", close("to new"))
        assert some(new, 1) == [Arrived(close("to new"))]
        assert broker.poll(0) == []


def test_a_client_is_answered_and_a_vanished_one_is_gone(run_folder):
    address = ipc(run_folder, "clients")
    with hubs(1) as (broker,):
        broker.bind_clients(address, ClientMessage)
        with dealer(address) as client:
            client.send(codec.encode(Attach(rid="r", secret="s", start=3)))
            (arrived,) = some(broker, 1)
            assert arrived.message == Attach(rid="r", secret="s", start=3)
            answer = Accepted(key="k", rid="r", prompt_tokens=4, max_tokens=8)
            assert broker.reply(arrived.client, answer) == "sent"
            assert heard(client) == answer
        until(lambda: broker.reply(arrived.client, answer) == "gone")
        assert broker.reply(arrived.client[:1] + b"nobody", answer) == "gone"
        assert broker.counters["replies_gone"] >= 2


def test_clients_of_two_addresses_with_the_same_identity_are_each_answered_where_they_asked(run_folder):
    with hubs(1) as (broker,):
        addresses = [
            broker.bind_clients(ipc(run_folder, "clients"), ClientMessage),
            broker.bind_clients(ipc(run_folder, "operators"), OperatorMessage),
        ]
        with dealer(addresses[0], routing_id=b"same") as one, dealer(addresses[1], routing_id=b"same") as other:
            clients = []
            for socket in (one, other):
                socket.send(codec.encode(Inspect()))
                clients += [event.client for event in some(broker, 1)]
            for name, client in zip("ab", clients, strict=True):
                assert broker.reply(client, Accepted(key=name, rid="r", prompt_tokens=4, max_tokens=8)) == "sent"
            assert [heard(one).key, heard(other).key] == ["a", "b"] and len({*clients}) == 2


def test_a_client_that_does_not_read_is_full_and_harms_nobody(run_folder):
    address = ipc(run_folder, "clients")
    with hubs(1) as (broker,), dealer(address, rcvhwm=1) as lazy, dealer(address) as eager:
        broker.bind_clients(address, ClientMessage)
        lazy.send(codec.encode(Attach(rid="lazy", secret="s")))
        eager.send(codec.encode(Attach(rid="eager", secret="s")))
        client = {event.message.rid: event.client for event in some(broker, 2)}
        delta = Delta(rid="r", start=0, ids=[1], text="x" * 5000)
        sent = 0
        while broker.reply(client["lazy"], delta) == "sent":
            sent += 1
            assert sent < 20_000
        assert broker.reply(client["lazy"], delta) == "full"
        assert broker.reply(client["eager"], delta) == "sent"
        assert heard(eager) == delta


def test_poll_waits_as_long_as_asked_and_a_wake_from_another_thread_ends_it_once():
    with hubs(1) as (hub,):
        for timeout in (0, -1.0, 0.03):
            start = time.monotonic()
            assert hub.poll(timeout) == []
            assert max(timeout, 0) <= time.monotonic() - start < 2
        for _ in range(100_000):  # more than the pipe holds
            hub.wake()
        assert hub.poll(None) == []
        assert hub.poll(0) == []
        thread = threading.Thread(target=hub.wake)
        thread.start()
        assert hub.poll(None) == []
        thread.join()
