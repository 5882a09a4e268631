"""Find the broker of this machine's deployment for a client without an address."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tetri import private
from tetri.client.frames import TetriError, Unreachable


def find_address(socket: str = "clients") -> str:
    """Return the address of the broker's socket for clients or for operators, from cluster.json in the run directory.
    The run directory is that of the configuration $TETRI_CONF if it is set, else the default one. `tetri-cli up` writes
    the file.

    Raises Unreachable if no deployment runs, TetriError if a file cannot be used or the run directory is not this
    user's own: whoever writes the address gets the prompts.
    """
    # Imported here: clients with an address do not need the configuration.
    from tetri import config, strict

    try:
        named = os.environ.get("TETRI_CONF")
        run_dir = config.load(named).run_dir if named else config.default_run_dir()
    except strict.ConfigError as error:
        raise TetriError(str(error)) from None
    return address_in(run_dir, socket)


def address_in(run_dir: Path, socket: str = "clients") -> str:
    """Return the address of this socket in the deployment with this run directory. Raises as `find_address`."""
    path = run_dir / "cluster.json"
    try:
        return str(json.loads(private.read_text(path))[socket])
    except private.PrivateError as error:
        raise TetriError(str(error)) from None
    except FileNotFoundError:
        raise Unreachable(f"nothing is up in {run_dir}: run tetri-cli up, or give the broker's address") from None
    except OSError as error:  # such as too many open files: another launch would not help
        raise TetriError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise TetriError(f"{path} cannot be used ({error}): run tetri-cli down, then tetri-cli up") from None
