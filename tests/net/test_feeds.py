"""PUB and SUB: loads from many to one (the reader binds), views from one to many (the writer binds)."""

import contextlib
import logging
import os
import resource
import signal
import socket as plain_socket
import subprocess
import sys
import time

import pytest
import zmq

from tests.net.hubs import PATIENCE, events, hubs, ipc, until
from tests.net.test_garbage import GARBAGE, NOT_ZMTP, context, plain, readable
from tetri.net import NetError
from tetri.net.hub import RETRY_S
from tetri.net.intake import MAX_MESSAGES
from tetri.wire import codec
from tetri.wire.events import Arrived
from tetri.wire.messages import Close, ClusterView, InboxMessage, Load, LoadReport

__all__ = ["context"]  # a fixture


def report(iid="p0", free=7):
    return LoadReport(iid=iid, incarnation=1, role="prefill", load=Load(free_blocks=free))


def view(number, epoch=1):
    return ClusterView(epoch=epoch, number=number, loads=[])


def say(hub, message, heard, enough):
    """Publish again and again until `enough(all that `heard` has heard)`: what comes too early is lost."""
    seen = []
    end = time.monotonic() + PATIENCE
    while not enough(seen):
        assert time.monotonic() < end, seen
        hub.publish(message)
        seen += [event.message for event in heard.poll(0.01)]
    return seen


def test_loads_of_several_publishers_reach_the_one_that_binds(run_folder):
    with hubs(3) as (monitor, first, second):
        address = monitor.bind_subscriber(ipc(run_folder, "loads"), LoadReport)
        for hub, iid in ((first, "p0"), (second, "d0")):
            hub.connect_publisher(address)
            say(hub, report(iid), monitor, bool)
        first.publish(report("p0", 1))
        for free in range(10):
            second.publish(report("d0", free))
        seen = events(monitor, lambda seen: len(seen) == 11)  # nobody hides what another said
        assert [e.message.load.free_blocks for e in seen if e.message.iid == "d0"] == list(range(10))
        assert first.poll(0) == second.poll(0) == []  # no news of peers: nobody needs them


def test_views_reach_all_subscribers(run_folder):
    with hubs(3) as (monitor, first, second):
        address = monitor.bind_publisher(ipc(run_folder, "views"))
        for hub in (first, second):
            hub.subscribe(address, ClusterView)
            assert say(monitor, view(1), hub, bool)[0] == view(1)
        events(first, lambda seen: seen == [Arrived(view(1))])
        monitor.publish(view(2))
        for hub in (first, second):
            assert events(hub, bool)[-1] == Arrived(view(2))
        assert monitor.counters["published"] >= 3 and monitor.counters["published_bytes"] > 0


def test_a_subscriber_may_come_before_the_publisher(run_folder):
    with hubs(1) as (early,):
        early.subscribe(ipc(run_folder, "views"), ClusterView)
        assert early.poll(0.05) == []
        with hubs(1) as (monitor,):
            monitor.bind_publisher(ipc(run_folder, "views"))
            say(monitor, view(3), early, lambda seen: view(3) in seen)


def test_publishing_to_nobody_waits_for_nobody_and_keeps_nothing(run_folder):
    with hubs(2) as (bound, connected):
        bound.bind_publisher(ipc(run_folder, "views"))
        connected.connect_publisher(ipc(run_folder, "nowhere"))
        start = time.monotonic()
        for number in range(10_000):
            bound.publish(view(number))
            connected.publish(report())
        assert time.monotonic() - start < 3
        with hubs(1) as (late,):
            late.subscribe(ipc(run_folder, "views"), ClusterView)
            assert say(bound, view(10_000), late, bool) == [view(10_000)]


PUBLISHER = """
import sys
from tetri.net import Hub
from tetri.wire.messages import ClusterView
hub = Hub()
hub.bind_publisher(sys.argv[1])
number = 0
while True:
    number += 1
    hub.publish(ClusterView(epoch=int(sys.argv[2]), number=number, loads=[]))
    hub.poll(0.01)
"""


def test_a_publisher_that_was_killed_and_started_again_is_heard_again(run_folder):
    address = ipc(run_folder, "views")
    with hubs(1) as (worker,):
        worker.subscribe(address, ClusterView)
        for epoch in (1, 2):
            child = subprocess.Popen([sys.executable, "-c", PUBLISHER, address, str(epoch)])
            try:
                events(worker, lambda seen, epoch=epoch: any(event.message.epoch == epoch for event in seen))
            finally:
                child.send_signal(signal.SIGKILL)
                child.wait()


def test_a_reader_that_is_started_again_is_told_again(run_folder):
    address = ipc(run_folder, "loads")
    with hubs(1) as (worker,):
        worker.connect_publisher(address)
        for free in (1, 2):
            with hubs(1) as (monitor,):
                monitor.bind_subscriber(address, LoadReport)
                assert report(free=free) in say(worker, report(free=free), monitor, bool)


def test_a_slow_subscriber_holds_nobody_up_and_then_hears_the_newest(run_folder):
    with hubs(3) as (monitor, slow, quick):
        address = monitor.bind_publisher(ipc(run_folder, "views"))
        for hub in (slow, quick):
            hub.subscribe(address, ClusterView)
            say(monitor, view(0), hub, bool)
        start = time.monotonic()
        for number in range(1, 20_001):
            monitor.publish(view(number))
        assert time.monotonic() - start < 3
        monitor.publish(view(20_001))
        say(monitor, view(20_002), quick, lambda seen: view(20_002) in seen)
        seen = events(slow, lambda seen: Arrived(view(20_002)) in seen)
        assert len(seen) <= 3  # and not twenty thousand old ones first


def test_a_flood_of_loads_is_bounded_and_leaves_other_sockets_their_turn(run_folder):
    with hubs(3) as (monitor, flooder, broker):
        monitor.bind_subscriber(ipc(run_folder, "loads"), LoadReport)
        monitor.bind_inbox(ipc(run_folder, "inbox"), InboxMessage)
        flooder.connect_publisher(ipc(run_folder, "loads"))
        say(flooder, report(), monitor, bool)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(100_000):
            flooder.publish(report())
        broker.connect("m", ipc(run_folder, "inbox"))
        events(broker, bool)
        assert broker.send("m", Close(rid="r", attempt=1))
        until(lambda: all(socket.poll(0) for socket in monitor._intakes))
        batch = monitor.poll(0)
        assert Arrived(Close(rid="r", attempt=1)) in batch and len(batch) <= MAX_MESSAGES + 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 30 << 10, f"{grown} kB more"


@pytest.fixture(params=["loads", "views"])
def target(request, run_folder, context):
    """(hub that hears, socket of a stranger that it hears, a good message)"""
    with hubs(1) as (hub,):
        incompatibility = context.socket(zmq.PUB)
        incompatibility.linger = 0
        if request.param == "loads":
            incompatibility.connect(hub.bind_subscriber(ipc(run_folder, "s"), LoadReport))
            good = report()
        else:
            incompatibility.bind(ipc(run_folder, "s"))
            hub.subscribe(ipc(run_folder, "s"), ClusterView)
            good = view(1)
        still_hears(hub, incompatibility, good)
        yield hub, incompatibility, good


def still_hears(hub, incompatibility, good):
    end = time.monotonic() + PATIENCE
    while good not in [event.message for event in hub.poll(0.01)]:
        assert time.monotonic() < end
        incompatibility.send(codec.encode(good))
    while hub.poll(0.02):  # what was sent in vain
        pass


@pytest.mark.parametrize(("frames", "counted"), GARBAGE)
def test_garbage_is_counted_logged_once_and_dropped(target, caplog, frames, counted):
    hub, incompatibility, good = target
    with caplog.at_level(logging.WARNING):
        for times in range(1, 4):
            incompatibility.send_multipart(frames)
            until(lambda times=times: hub.poll(0.01) == [] and sum(garbage(hub).values()) >= times)
        still_hears(hub, incompatibility, good)
    kinds = garbage(hub)
    if isinstance(good, LoadReport):
        assert kinds == {f"garbage_{counted}": 3}
    else:  # only the newest is kept, of a message of several frames the last: it is garbage all the same
        assert sum(kinds.values()) >= 3
    assert len(caplog.records) == len(kinds)
    assert all(len(record.getMessage()) < 300 for record in caplog.records)


def garbage(hub):
    return {kind: count for kind, count in hub.counters.items() if kind.startswith("garbage_")}


def test_a_message_for_another_receiver_is_garbage(target):
    hub, incompatibility, good = target
    other = view(1) if isinstance(good, LoadReport) else report()
    incompatibility.send(codec.encode(other))
    until(lambda: hub.poll(0.01) == [] and hub.counters["garbage_unexpected"] == 1)
    still_hears(hub, incompatibility, good)


def test_a_frame_over_the_limit_ends_the_connection_and_not_the_process(target):
    hub, incompatibility, good = target
    cut = incompatibility.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    incompatibility.send(bytes(codec.limit(type(good)) + 1))
    assert hub.poll(0.05) == []
    assert cut.poll(PATIENCE * 1000), "the connection was not cut"
    still_hears(hub, incompatibility, good)  # it comes back by itself
    incompatibility.disable_monitor()
    cut.close(0)


@pytest.mark.parametrize("noise", [*NOT_ZMTP[:4], os.urandom(300)], ids=range(5))
def test_bytes_that_are_no_zeromq_at_all(run_folder, context, noise):
    with hubs(1) as (monitor,):
        loads = monitor.bind_subscriber(ipc(run_folder, "loads"), LoadReport)
        views = monitor.bind_publisher(ipc(run_folder, "views"))
        with plain(loads) as one, plain(views) as other:
            one.sendall(noise)
            other.sendall(noise)
            incompatibility = context.socket(zmq.PUB)
            incompatibility.connect(loads)
            still_hears(monitor, incompatibility, report())
            with hubs(1) as (worker,):
                worker.subscribe(views, ClusterView)
                say(monitor, view(1), worker, bool)


@pytest.mark.parametrize("side", ["subscribe", "connect_publisher"])
def test_a_listener_that_is_no_publisher_is_left_for_a_real_one(run_folder, side, monkeypatch):
    """libzmq gives up a connection that was answered with garbage: the hub opens a new one after RETRY_S."""
    path, address = run_folder / "feed", ipc(run_folder, "feed")
    monkeypatch.setattr("tetri.net.hub.RETRY_S", 0.05)
    assert RETRY_S >= 0.1  # no flood of connections
    with hubs(2) as (worker, monitor):
        worker.subscribe(address, ClusterView) if side == "subscribe" else worker.connect_publisher(address)
        with plain_socket.socket(plain_socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            for noise in NOT_ZMTP[:3]:
                until(lambda: worker.poll(0.01) == [] and readable(listener))
                connection, _ = listener.accept()
                with connection, contextlib.suppress(BrokenPipeError):
                    connection.sendall(noise)
        path.unlink()
        if side == "subscribe":
            monitor.bind_publisher(address)
            say(monitor, view(1), worker, bool)
        else:
            monitor.bind_subscriber(address, LoadReport)
            seen = []
            end = time.monotonic() + PATIENCE
            while not seen:
                assert time.monotonic() < end
                worker.publish(report())
                worker.poll(0)
                seen = monitor.poll(0.01)


def test_sockets_of_another_pattern_are_refused(run_folder, context):
    with hubs(1) as (monitor,):
        push = context.socket(zmq.PUSH)
        push.immediate = 1
        push.connect(monitor.bind_subscriber(ipc(run_folder, "loads"), LoadReport))
        assert not push.poll(100, zmq.POLLOUT)


def test_only_one_publisher_and_none_without_an_address(run_folder):
    with hubs(1) as (hub,):
        with pytest.raises(NetError, match="without bind_publisher"):
            hub.publish(report())
        with pytest.raises(NetError, match="is no address"):
            hub.connect_publisher("nowhere")
        with pytest.raises(NetError, match="is no address"):
            hub.subscribe("nowhere", ClusterView)
        hub.bind_publisher(ipc(run_folder, "views"))
        for again in (hub.bind_publisher, hub.connect_publisher):
            with pytest.raises(NetError, match="already publishes"):
                again(ipc(run_folder, "other"))


def test_a_live_owner_is_not_robbed_and_close_removes_the_files(run_folder):
    with hubs(2) as (first, second):
        first.bind_publisher(ipc(run_folder, "views"))
        first.bind_subscriber(ipc(run_folder, "loads"), LoadReport)
        with pytest.raises(NetError, match="address in use"):
            second.bind_publisher(ipc(run_folder, "views"))
        with pytest.raises(NetError, match="address in use"):
            second.bind_subscriber(ipc(run_folder, "loads"), LoadReport)
        first.close()
        assert list(run_folder.iterdir()) == []
        second.bind_publisher(ipc(run_folder, "views"))


def test_wait_lets_the_time_pass_and_says_whether_something_is_there(run_folder):
    with hubs(2) as (worker, broker):
        worker.bind_inbox(ipc(run_folder, "w"), InboxMessage)
        start = time.monotonic()
        assert worker.wait(0.0205) is False
        assert 0.0205 <= time.monotonic() - start < 1
        broker.connect("w", ipc(run_folder, "w"))
        events(broker, bool)
        broker.send("w", Close(rid="r", attempt=1))
        until(lambda: worker.wait(0))
        start = time.monotonic()
        assert worker.wait(0.02) is True
        assert time.monotonic() - start >= 0.02  # a step takes its time whoever waits
        assert worker.poll(0) == [Arrived(Close(rid="r", attempt=1))]
        assert worker.wait(-1.0) is False
        worker.wake()
        assert worker.wait(0) is True


def test_what_is_published_is_nothing_to_wait_for(run_folder):
    with hubs(2) as (worker, monitor):
        worker.bind_inbox(ipc(run_folder, "w"), InboxMessage)
        worker.subscribe(monitor.bind_publisher(ipc(run_folder, "views")), ClusterView)
        say(monitor, view(1), worker, bool)
        monitor.publish(view(2))
        assert worker.wait(0.2) is False  # time enough for it to arrive
        assert events(worker, bool)[-1] == Arrived(view(2))
