"""The client of operators, who change roles and end requests of others."""

from __future__ import annotations

import secrets
from typing import Any

from tetri.client.place import find_address
from tetri.client.questions import Cancellation, Inspection, RoleQuestion
from tetri.client.sync import Client


class Operator:
    """A connection to the broker's socket for operators. It is in the run directory, which only the deployment's user
    may enter.

    `address`: the socket's address; by default that of this machine's deployment. `timeout`: seconds without an answer
    after which every method raises Unreachable. Not thread-safe.
    """

    def __init__(
        self, address: str | None = None, timeout: float = 30.0, *, silence_s: float = 2.0, resend_s: float = 1.0
    ) -> None:
        where = address or find_address("operators")
        self._client = Client(where, timeout, silence_s=silence_s, resend_s=resend_s)

    def flip(self, iid: str, role: str) -> dict[str, Any]:
        """Change the role of an instance to prefill, decode, mixed or auto and wait until the change is done. Returns
        `iid`, `role`, `was` (the old role) and `took_s` (seconds). Raises RequestRefused with the reason, BadRequest
        for an unknown role."""
        return self._client._finish(self._client._ask(RoleQuestion, secrets.token_hex(8), iid, role))

    def end(self, rid: str) -> None:
        """End a request of any client, as if that client had cancelled it, and wait for the broker's confirmation.
        Raises TetriError."""
        self._client._finish(self._client._ask(Cancellation, rid, None))

    def status(self) -> dict[str, Any]:
        """Return the cluster's status, as `Client.status` does."""
        return self._client._finish(self._client._ask(Inspection))

    def observe(self, epoch: int = 0, since: int = 0) -> dict[str, Any]:
        """Return what has happened since an Observation, as `Client.observe` does."""
        return self._client.observe(epoch, since)

    def explain(self, rid: str, choice: int = 0) -> dict[str, Any]:
        """Return how a choice of any client's request was served, as `Client.explain` does."""
        return self._client.explain(rid, choice)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
