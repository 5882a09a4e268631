"""Where sockets listen: whose address it is, and what is left of it."""

import os
import socket
from functools import partial

import pytest

from tests.net.hubs import hubs, ipc
from tetri.net import NetError, sockets
from tetri.wire.clients import ClientMessage
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport


def binds(hub):
    return {
        "bind_inbox": lambda address: hub.bind_inbox(address, InboxMessage),
        "bind_clients": lambda address: hub.bind_clients(address, ClientMessage),
        "bind_subscriber": lambda address: hub.bind_subscriber(address, LoadReport),
        "bind_publisher": lambda address: hub.bind_publisher(address),
    }


@pytest.mark.parametrize("bind", binds(None))
def test_a_live_owner_is_not_robbed_and_close_removes_the_file(run_folder, bind):
    address = ipc(run_folder, "s")
    with hubs(2) as (first, second):
        binds(first)[bind](address)
        for other in binds(second).values():
            with pytest.raises(NetError, match="s: address in use by another process"):
                other(address)
        assert (run_folder / "s").exists()
        first.close()
        first.close()
        assert list(run_folder.iterdir()) == []
        binds(second)[bind](address)  # a failed bind leaves nothing behind


def test_the_longest_path_can_be_bound(run_folder):
    address = ipc(run_folder, "x" * (102 - len(f"{run_folder}/")))
    with hubs(2) as (bound, refused):
        bound.bind_publisher(address)
        with pytest.raises(NetError, match="has 103 bytes, at most 102 fit"):
            refused.bind_publisher(f"{address}x")


def test_one_outlet_and_nothing_without_binding(run_folder):
    with hubs(1) as (hub,):
        for use, says in ((partial(hub.reply, b"\0x"), "bind_clients"), (hub.publish, "bind_publisher")):
            with pytest.raises(NetError, match=f"without {says}"):
                use(None)
        for wrong in (hub.connect_publisher, lambda address: hub.subscribe(address, ClusterView)):
            with pytest.raises(NetError, match="is no address"):
                wrong("nowhere")
        hub.bind_publisher(ipc(run_folder, "views"))
        for again in (hub.bind_publisher, hub.connect_publisher):
            with pytest.raises(NetError, match="already publishes"):
                again(ipc(run_folder, "other"))


def test_a_dead_owners_file_is_taken_over_and_removed_on_close(run_folder):
    path = f"{run_folder}/inbox"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert os.path.exists(path)
    with hubs(1) as (hub,):
        hub.bind_inbox(f"ipc://{path}", InboxMessage)
    assert not os.path.exists(path)


def test_a_file_that_is_no_socket_is_left_alone_and_a_missing_folder_and_a_busy_port_are_one_line(run_folder):
    precious = run_folder / "inbox"
    precious.write_text("precious")
    with hubs(1) as (hub,), socket.socket() as taken:
        with pytest.raises(NetError, match="no socket lies there"):
            hub.bind_inbox(f"ipc://{precious}", InboxMessage)
        assert precious.read_text() == "precious"
        with pytest.raises(NetError, match="nowhere/inbox: cannot bind"):
            hub.bind_inbox(ipc(run_folder, "nowhere/inbox"), InboxMessage)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NetError, match=f"{address}: address in use"):
            hub.bind_inbox(address, InboxMessage)


def test_closing_does_not_remove_a_successors_file(run_folder, context):
    address, path = ipc(run_folder, "inbox"), run_folder / "inbox"
    old = sockets.Bound(sockets.inbox(context, InboxMessage), address)
    for file in run_folder.iterdir():  # as an operator might
        file.unlink()
    new = sockets.Bound(sockets.inbox(context, InboxMessage), address)
    theirs = sorted(run_folder.iterdir())
    assert path in theirs
    old.close()
    assert sorted(run_folder.iterdir()) == theirs
    new.close()
    assert list(run_folder.iterdir()) == []
