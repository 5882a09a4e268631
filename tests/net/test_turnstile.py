"""A burst of connections does not end the process, whatever its limit of open files."""

import contextlib
import logging
import os
import select
import socket
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import zmq
from live import wait_until

from tests.net.hubs import hubs, ipc, plain, some, until
from tetri.net import NetError, descriptors, turnstile
from tetri.wire.clients import ClientMessage, Inspect
from tetri.wire.codec import encode
from tetri.wire.events import Arrived
from tetri.wire.messages import InboxMessage, LoadReport

LIMIT, BURST = 256, 2000
SERVER = """
import logging, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {limit}))
from tetri.net import Hub, descriptors
from tetri.wire.clients import ClientMessage, Refused
logging.basicConfig(level=logging.WARNING)
assert descriptors.raise_limit() == {limit}
hub = Hub()
{bind}
print("bound", flush=True)
while True:
    for event in hub.poll(None):
        if getattr(event, "client", None) is not None:
            hub.reply(event.client, Refused(key="k", reason=str(descriptors.used())))
"""


def full(path, kept, process):
    """Connect in bursts, and stay, until the process says that it has no room. A full queue refuses some."""

    def said():
        burst(path, kept)
        return bool(select.select([process.stderr], [], [], 0)[0])

    wait_until(said, "there was always room")
    assert "no room for more connections" in process.stderr.readline()


def burst(path, kept):
    """Connect up to BURST times without waiting."""
    for _ in range(BURST):
        made = socket.socket(socket.AF_UNIX)
        made.setblocking(False)
        try:
            made.connect(path)
        except BlockingIOError:
            made.close()
        else:
            kept.callback(made.close)


@contextlib.contextmanager
def server(bind):
    program = [sys.executable, "-c", SERVER.format(limit=LIMIT, bind=bind)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "bound\n"
            yield process
        finally:
            process.kill()
            process.stdout.close()
            process.stderr.close()


def ask(client):
    """How many files the server has open."""
    client.send(encode(Inspect()))
    assert client.poll(20_000), "no answer"
    return client.recv()


def test_open_connections_go_on_and_new_ones_wait_while_a_process_has_no_descriptors_left(run_folder, context):
    path = f"{run_folder}/clients"
    with server(f"hub.bind_clients('ipc://{path}', ClientMessage)") as process:
        early = context.socket(zmq.DEALER)
        early.connect(f"ipc://{path}")
        ask(early)
        with contextlib.ExitStack() as kept:
            full(path, kept, process)
            for _ in range(3):
                ask(early)
                burst(path, kept)
            late = context.socket(zmq.DEALER)
            late.connect(f"ipc://{path}")
            late.send(encode(Inspect()))
            ask(early)
        assert late.poll(20_000), "who waited does not enter when others have left"
        assert process.poll() is None


@pytest.mark.parametrize(
    "bind", ["bind_inbox('{}', ClientMessage)", "bind_subscriber('{}', ClientMessage)", "bind_publisher('{}')"]
)
def test_no_socket_of_a_hub_ends_the_process(run_folder, bind):
    path = f"{run_folder}/s"
    with server("hub." + bind.format(f"ipc://{path}")) as process, contextlib.ExitStack() as kept:
        full(path, kept, process)
        burst(path, kept)
        assert process.poll() is None


def test_clients_beyond_the_limit_wait_until_others_have_left(run_folder, context):
    address = ipc(run_folder, "clients")
    with hubs(1) as (hub,):
        hub.bind_clients(address, ClientMessage, most=1)
        first, second = (context.socket(zmq.DEALER) for _ in range(2))
        for client in (first, second):
            client.connect(address)
            if client is first:
                client.send(encode(Inspect()))
                assert [type(event) for event in some(hub, 1)] == [Arrived]
        second.send(encode(Inspect()))
        assert hub.poll(0.3) == []
        first.close(0)
        assert [type(event) for event in some(hub, 1)] == [Arrived]


def test_without_descriptors_no_link_is_opened_and_a_later_send_opens_it(run_folder, monkeypatch):
    with hubs(2) as (worker, broker):
        address = worker.bind_inbox(ipc(run_folder, "w"), InboxMessage)
        monkeypatch.setattr(descriptors, "RESERVE", 1 << 30)
        with pytest.raises(NetError, match="too many open files"):
            broker.connect("w", address)
        assert not broker.send("w", None)
        monkeypatch.undo()
        assert not broker.send("w", None)
        assert [event.peer for event in some(broker, 1)] == ["w"]


def test_a_path_that_another_process_took_over_is_left_to_it(run_folder, caplog):
    caplog.set_level(logging.WARNING)
    address, path = ipc(run_folder, "loads"), run_folder / "loads"
    with hubs(1) as (hub,):
        hub.bind_subscriber(address, LoadReport)
        at_first = path.stat().st_ino
        with plain(address):
            until(lambda: path.stat().st_ino != at_first)  # it has entered: nobody puts anything at the path now
        path.rename(run_folder / "old")
        with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as late:
            other.bind(str(path))
            late.connect(str(run_folder / "old"))
            until(lambda: "has taken the path over" in caplog.text)
    assert path.exists()


def test_the_permissions_of_a_path_stay_when_connections_enter(run_folder):
    address, path = ipc(run_folder, "operators"), run_folder / "operators"
    with hubs(1) as (hub,):
        hub.bind_clients(address, ClientMessage)
        path.chmod(0o600)
        at_first = path.stat().st_ino
        with plain(address):
            until(lambda: path.stat().st_ino != at_first)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("whole", [False, True], ids=["file", "folder"])
def test_a_removed_path_comes_back_with_its_permissions_and_connections_stay(run_folder, whole, context, monkeypatch):
    monkeypatch.setattr(turnstile, "CHECK_S", 0.05)
    folder = run_folder / "run"
    folder.mkdir()
    address, path = ipc(folder, "clients"), folder / "clients"
    early, late = (context.socket(zmq.DEALER) for _ in range(2))
    with hubs(1) as (hub,):
        hub.bind_clients(address, ClientMessage)
        path.chmod(0o600)
        early.connect(address)
        early.send(encode(Inspect()))
        assert [type(event) for event in some(hub, 1)] == [Arrived]
        for number in range(2):
            if whole:
                folder.rename(run_folder / f"removed {number}")
                folder.mkdir()
            else:
                path.unlink()
            until(path.exists)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        late.connect(address)
        for client in (early, late):
            client.send(encode(Inspect()))
            assert [type(event) for event in some(hub, 1)] == [Arrived]
    assert list(folder.iterdir()) == []


def test_no_path_is_made_in_a_folder_that_another_user_put_there(run_folder, monkeypatch, caplog):
    monkeypatch.setattr(turnstile, "CHECK_S", 0.05)
    folder = run_folder / "run"
    folder.mkdir()
    with hubs(1) as (hub,):
        hub.bind_subscriber(ipc(folder, "loads"), LoadReport)
        owned = os.stat
        others = SimpleNamespace(st_uid=os.getuid() + 1)
        monkeypatch.setattr(os, "stat", lambda path, **more: others if path == str(folder) else owned(path, **more))
        (folder / "loads").unlink()
        until(lambda: "the folder now belongs to another user" in caplog.text)
        assert list(folder.iterdir()) == []
