import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.net.hubs import hubs, ipc
from tetri.net import NetError
from tetri.net.address import check
from tetri.wire.clients import ClientMessage
from tetri.wire.messages import InboxMessage


def test_good_addresses():
    assert check("ipc:///run/x") == "/run/x"
    assert check("ipc:///" + "x" * 98) == "/" + "x" * 98
    for address in ("tcp://127.0.0.1:5555", "tcp://127.1.2.3:*", "tcp://localhost:1"):
        assert check(address) is None


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "is no address"),
        ("/run/x", "is no address"),
        ("inproc://x", "is no address"),
        ("tcp://127.0.0.1", "is no address"),
        ("tcp://[::1]:80", "encrypted"),
        ("tcp://0.0.0.0:80", "encrypted"),
        ("tcp://example.org:80", "encrypted"),
        ("ipc://x", "absolute path"),
        ("ipc://@x", "absolute path"),
        ("ipc:///a\0b", "absolute path"),
        ("ipc:///" + "x" * 99, "100 bytes, at most 99"),
        ("ipc:///" + "ä" * 50, "101 bytes, at most 99"),
        ("x" * 100_000, "is no address"),
    ],
)
def test_bad_addresses_say_what_is_wrong_in_one_short_line(address, says):
    with pytest.raises(NetError, match=says) as caught:
        check(address)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_a_live_owner_is_not_robbed(run_folder):
    address = ipc(run_folder, "inbox")
    with hubs(2) as (first, second):
        first.bind_inbox(address, InboxMessage)
        with pytest.raises(NetError, match="inbox: address in use by another process"):
            second.bind_inbox(address, InboxMessage)
        with pytest.raises(NetError, match="address in use"):
            second.bind_clients(address, ClientMessage)
        assert os.path.exists(f"{run_folder}/inbox")
        second.bind_clients(ipc(run_folder, "other"), ClientMessage)  # a failed bind leaves nothing behind


def test_a_dead_owners_file_is_taken_over_and_removed_on_close(run_folder):
    path = f"{run_folder}/inbox"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({path!r}); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not os.path.exists(path):
        assert child.poll() is None
    with hubs(1) as (hub,):
        child.send_signal(signal.SIGKILL)
        child.communicate()
        hub.bind_inbox(f"ipc://{path}", InboxMessage)
    assert not os.path.exists(path)


def test_a_file_that_is_no_socket_is_left_alone(run_folder):
    precious = run_folder / "inbox"
    precious.write_text("precious")
    with hubs(1) as (hub,), pytest.raises(NetError, match="no socket lies there"):
        hub.bind_inbox(f"ipc://{precious}", InboxMessage)
    assert precious.read_text() == "precious"


def test_a_missing_folder_and_a_busy_port_are_one_line(run_folder):
    with hubs(1) as (hub,), socket.socket() as taken:
        with pytest.raises(NetError, match="nowhere/inbox: cannot bind"):
            hub.bind_inbox(ipc(run_folder, "nowhere/inbox"), InboxMessage)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NetError, match=f"{address}: address in use"):
            hub.bind_inbox(address, InboxMessage)


def test_closing_does_not_remove_a_successors_file(run_folder):
    address, path = ipc(run_folder, "inbox"), run_folder / "inbox"
    with hubs(2) as (old, new):
        old.bind_inbox(address, InboxMessage)
        (bound,) = old._bounds
        path.unlink()  # as an operator might
        new.bind_inbox(address, InboxMessage)
        bound.remove_file()
        assert path.exists()
