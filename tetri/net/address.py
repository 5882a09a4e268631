"""Checks addresses: their syntax, whether they may be used, and whether another process already listens there."""

from __future__ import annotations

import os
import re
import socket
import stat

from tetri.net.errors import NetError

MAX_PATH_BYTES = 107  # of a Unix socket
NEXT = ".next"  # suffix of the socket that will take the place of one (net/turnstile.py)
MAX_IPC_BYTES = MAX_PATH_BYTES - len(NEXT)
_TCP = re.compile(r"tcp://(localhost|127(?:\.\d{1,3}){3}):(\d{1,5}|\*)")
_TCP_NUMERIC = re.compile(r"tcp://\d{1,3}(?:\.\d{1,3}){3}:(\d{1,5}|\*)")
_TCP_ELSEWHERE = re.compile(r"tcp://.*:(\d{1,5}|\*)")


def check(address: str, encrypted: bool = False) -> str | None:
    """Raise NetError unless `address` may be bound or connected to. Returns the path of an `ipc://` address, else None.
    Only encrypted sockets may use addresses of other hosts."""
    if address.startswith("ipc://"):
        return _ipc_path(address)
    if _TCP.fullmatch(address) or (encrypted and _TCP_NUMERIC.fullmatch(address)):
        return None
    if encrypted and _TCP_ELSEWHERE.fullmatch(address):
        raise NetError(f"{_quoted(address)}: write the host as an IPv4 address, as in tcp://10.0.0.1:7000")
    if _TCP_ELSEWHERE.fullmatch(address):
        raise NetError(
            f"{_quoted(address)}: traffic between hosts must be encrypted: use 127.0.0.1 here"
            " (only KV can use other hosts, with cluster.key)"
        )
    raise NetError(f"{_quoted(address)} is no address: write ipc:///path or tcp://127.0.0.1:port")


def _ipc_path(address: str) -> str:
    path = address.removeprefix("ipc://")
    size = len(os.fsencode(path))
    if not path.startswith("/") or "\0" in path:
        raise NetError(f"{_quoted(address)}: an ipc address needs an absolute path, as in ipc:///run/name")
    if size > MAX_IPC_BYTES:
        raise NetError(f"{_quoted(address)}: the path has {size} bytes, at most {MAX_IPC_BYTES} fit: shorten it")
    return path


def _quoted(address: str) -> str:
    """The address, short and printable: it may come from a message."""
    return repr(address if len(address) <= 160 else address[:157] + "...")


def refuse_live_owner(path: str) -> None:
    """Raise NetError when a process listens on the Unix socket `path`, or when the file is something else.

    ZeroMQ unlinks any file at the path before it binds, so a second process would silently take over the clients of
    the first. The file of a dead owner is no error.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise NetError(f"ipc://{path}: a file that is no socket lies there; remove it or choose another address")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError as error:  # full backlog or no permission: a process listens
            raise NetError(f"ipc://{path}: address in use ({error.strerror or error})") from None
    raise NetError(f"ipc://{path}: address in use by another process")
