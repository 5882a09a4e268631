"""The broker's own /metrics."""

import socket
import threading
import urllib.request
from contextlib import ExitStack

import pytest
from fake_broker import STATUS, FakeBroker, instance
from live import free_port, wait_until

from tetri.net.errors import NetError
from tetri.proc import metrics_server
from tetri.proc.metrics_server import Source, served

OBSERVATION = {"type": "observation", "epoch": 1, "serial": 1, "measures": {"counts": {}, "histograms": {}}}
OBSERVATION |= {"status": {**STATUS, "instances": [instance("p0", "prefill")]}}


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return answer.read().decode().splitlines()


@pytest.mark.parametrize(("fresh_s", "asked"), [(3600, 1), (0, 3)])
def test_scrapes_soon_after_each_other_ask_the_broker_once(fresh_s, asked, monkeypatch):
    monkeypatch.setattr(metrics_server, "FRESH_S", fresh_s)
    port = free_port()
    with FakeBroker(lambda message: [OBSERVATION]) as broker:
        with served(port, Source(broker.address, 16)):
            for _ in range(3):
                assert 'tetri_instance_up{iid="p0",role="prefill"} 1.0' in scraped(port)
        assert broker.types() == ["observe"] * asked
    with socket.create_server(("127.0.0.1", port)):  # it has ended
        pass


def test_without_a_broker_that_is_all_that_is_exposed(monkeypatch):
    monkeypatch.setattr(metrics_server, "BROKER_S", 0.05)
    port = free_port()
    with FakeBroker(lambda message: []) as broker, served(port, Source(broker.address, 16)):
        assert [line for line in scraped(port) if line[0] != "#"] == ["tetri_broker_up 0.0"]


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        says = rf"^http://127.0.0.1:{port} cannot be used .*broker.metrics_port"
        with pytest.raises(NetError, match=says), served(port, Source("ipc:///nowhere", 16)):
            pass


def test_clients_that_send_nothing_take_few_threads_for_a_bounded_time(monkeypatch):
    monkeypatch.setattr(metrics_server.Handler, "timeout", 0.5)
    port, threads = free_port(), threading.active_count()
    with (
        FakeBroker(lambda message: [OBSERVATION]) as broker,
        served(port, Source(broker.address, 16)),
        ExitStack() as stack,
    ):
        for _ in range(3 * metrics_server.MOST_SCRAPES):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)).sendall(b"GET /met")
        most = threads + metrics_server.MOST_SCRAPES + 2  # the broker's and the server's own
        assert threading.active_count() <= most
        wait_until(lambda: threading.active_count() <= threads + 2, "the threads wait for ever")
        assert 'tetri_instance_up{iid="p0",role="prefill"} 1.0' in scraped(port)
