"""Where the HTTP gateways of a deployment listen, as everybody else needs it who starts or asks them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tetri import private
from tetri.config import Config
from tetri.net.errors import NetError

BACKLOG = 2048  # connections that wait to be accepted
KEEPALIVE_S = 60  # of silence, after which the kernel asks whether a client's host is still there


def listening(config: Config, number: int) -> socket.socket:
    """A socket that listens at the address of gateway `number`. Raises NetError."""
    host, port = config.gateway.host, config.gateway.port
    port = port and port + number
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # only now is it certain that nobody else does
    except OSError as error:
        listener.close()
        advice = "choose another with --set gateway.port=PORT (0: any free one), or none with --set gateway.count=0"
        raise NetError(f"http://{_shown(host)}:{port} cannot be used ({error.strerror}): {advice}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of a gateway, for a client on the same host."""
    host, port = listener.getsockname()[:2]
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{_shown(local)}:{port}"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def report_of(run_dir: Path, name: str) -> Path:
    """The file in which the gateway `name` reports where it listens and what it has counted."""
    return run_dir / f"{name}.json"


def reports(run_dir: Path) -> Iterator[Path]:
    """The reports of all gateways."""
    yield from sorted(run_dir.glob("gateway*.json"))


def read(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What the gateways report, by their names. Raises PrivateError."""
    found = {}
    for path in reports(run_dir):
        with suppress(OSError, ValueError):  # it ended meanwhile
            found[path.stem] = json.loads(private.read_text(path))
    return found


def urls(run_dir: Path) -> dict[str, str]:
    """The URLs of the gateways that listen, by their names. Raises PrivateError."""
    return {name: report["url"] for name, report in read(run_dir).items()}
