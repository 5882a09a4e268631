"""What is served: the list of models, and the version of the server."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


def model_list(names: Iterable[str], created: int, root: str | None, max_model_len: int | None) -> bytes:
    """The body of `/v1/models`: one model under all its names. `root`: the folder of its checkpoint, from which
    clients load its tokenizer; `max_model_len`: most tokens of prompt and output."""
    common = {"object": "model", "created": created, "owned_by": "tetri", "root": root, "parent": None}
    models = [{"id": name, **common, "max_model_len": max_model_len} for name in names]
    return msgspec.json.encode({"object": "list", "data": models})


def server_version(version: str) -> bytes:
    """The body of `/version`."""
    return msgspec.json.encode({"version": version})
