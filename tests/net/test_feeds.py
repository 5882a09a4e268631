"""PUB and SUB: loads from many to one (the reader binds), views from one to many (the writer binds)."""

import time

from tests.net.hubs import events, hubs, ipc, linked, plain, until
from tetri.wire.events import Arrived
from tetri.wire.load import Load
from tetri.wire.messages import Close, ClusterView, InboxMessage, LoadReport


def report(iid="p0", free=7):
    return LoadReport(iid=iid, incarnation=1, role="prefill", load=Load(free_blocks=free))


def view(number, epoch=1):
    return ClusterView(epoch=epoch, number=number, loads=[])


def say(hub, message, heard, enough):
    """Publish again and again until `enough(all that `heard` has heard)`: what comes too early is lost."""
    seen = []

    def again():
        hub.publish(message)
        seen.extend(event.message for event in heard.poll(0.01))
        return enough(seen)

    until(again)
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
        with plain(address) as outsider:
            outsider.sendall(bytes(300))
        events(first, lambda seen: seen == [Arrived(view(1))])
        monitor.publish(view(2))
        for hub in (first, second):
            assert events(hub, bool)[-1] == Arrived(view(2))
        assert monitor.counters["published"] >= 3 and monitor.counters["published_bytes"] > 0


def test_publishing_to_nobody_waits_for_nobody_and_keeps_nothing(run_folder):
    with hubs(2) as (bound, connected):
        bound.bind_publisher(ipc(run_folder, "views"))
        connected.connect_publisher(ipc(run_folder, "nowhere"))
        for number in range(10_000):
            bound.publish(view(number))
            connected.publish(report())
        with hubs(1) as (late,):
            late.subscribe(ipc(run_folder, "views"), ClusterView)
            assert say(bound, view(10_000), late, bool) == [view(10_000)]


def test_a_publisher_that_comes_later_or_is_started_again_is_received(run_folder):
    address = ipc(run_folder, "views")
    with hubs(1) as (worker,):
        worker.subscribe(address, ClusterView)
        assert worker.poll(0.05) == []
        for epoch in (1, 2):
            with hubs(1) as (monitor,):
                monitor.bind_publisher(address)
                assert view(1, epoch) in say(monitor, view(1, epoch), worker, bool)


def test_a_reader_that_is_started_again_receives_again(run_folder):
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
        for number in range(1, 20_001):
            monitor.publish(view(number))
        monitor.publish(view(20_001))
        say(monitor, view(20_002), quick, lambda seen: view(20_002) in seen)
        seen = events(slow, lambda seen: Arrived(view(20_002)) in seen)
        assert len(seen) <= 3  # and not twenty thousand old ones first


def test_loads_that_nobody_reads_are_few(run_folder):
    with hubs(2) as (monitor, flooder):
        monitor.bind_subscriber(ipc(run_folder, "loads"), LoadReport)
        flooder.connect_publisher(ipc(run_folder, "loads"))
        say(flooder, report(), monitor, bool)
        for _ in range(50_000):
            flooder.publish(report())
        batches = [monitor.poll(0.1)]
        until(lambda: batches.append(monitor.poll(0.1)) or not batches[-1])
        assert sum(map(len, batches)) < 5000


def test_wait_lets_the_time_pass_and_says_whether_something_is_there(run_folder):
    with linked(run_folder) as (worker, broker):
        start = time.monotonic()
        assert worker.wait(0.0205) is False
        assert 0.0205 <= time.monotonic() - start < 1
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
