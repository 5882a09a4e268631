"""Where the broker of this machine's deployment listens, for a client that was given no address."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tetri.client.frames import TetriError, Unreachable


def find_address() -> str:
    """From cluster.json, which `tetri-cli up` leaves in the run directory: of $TETRI_CONF, or the default.

    Raises Unreachable when nothing is up there, TetriError when a file cannot be used.
    """
    # The only use of the configuration, and only without an address: other bindings simply take one.
    from tetri import config, strict

    try:
        named = os.environ.get("TETRI_CONF")
        run_dir = config.load(named).run_dir if named else config.default_run_dir()
    except strict.ConfigError as error:
        raise TetriError(str(error)) from None
    return address_in(run_dir)


def address_in(run_dir: Path) -> str:
    """The clients' address of the deployment whose run directory this is."""
    path = run_dir / "cluster.json"
    try:
        return str(json.loads(path.read_text())["clients"])
    except FileNotFoundError:
        raise Unreachable(f"nothing is up in {run_dir}: run tetri-cli up, or give the broker's address") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TetriError(f"{path} cannot be used ({error}): run tetri-cli down, then tetri-cli up") from None
