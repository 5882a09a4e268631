"""KV compatibility of two instances: the best KV path that both support, or the reason why there is none."""

from __future__ import annotations

from tetri.instance import Fingerprint, Reach, difference

TRANSPORTS = ("cuda_ipc", "shm", "nixl", "stream")  # the KV paths that a configuration can name, the best first
PATHS = ("local", *TRANSPORTS)
SAME_HOST = ("cuda_ipc", "shm")
FAR = ("nixl", "stream")  # also between hosts: a failed fetch may succeed later


def path(a: Reach, b: Reach) -> str | None:
    """The best common path of two instances, None if there is none. The result is the same for (a, b) and (b, a)."""
    return next((name for name in PATHS if name in a.paths and name in b.paths and _obstacle(name, a, b) is None), None)


def apart(a: Reach, b: Reach) -> str:
    """Why there is no path between two instances, in one line that states what to do."""
    common = [name for name in PATHS if name in a.paths and name in b.paths]
    if not common:
        return f"no common KV path: {', '.join(a.paths)} and {', '.join(b.paths)}; set transfer.transport alike on both"
    reasons = (f"{name} {_obstacle(name, a, b)}" for name in common if name != "local")
    return "; ".join(reasons) or "local needs both in one process"


def compatibility_key(reach: Reach) -> tuple[object, ...]:
    """The properties that `path` depends on: instances with equal keys have the same path to every other instance."""
    process = reach.process if "local" in reach.paths else 0
    return (*reach.paths, reach.host, process, reach.device, *reach.near)


def incompatibility(mine: Fingerprint, theirs: Fingerprint, a: Reach, b: Reach) -> str | None:
    """Why KV can never move between two instances; None if it can."""
    why = difference(mine, theirs)
    if why is not None:
        return why
    return None if path(a, b) is not None else apart(a, b)


def _obstacle(name: str, a: Reach, b: Reach) -> str | None:
    """Why two instances cannot use a path that both support; None if they can."""
    if name == "local" and (a.host, a.process) != (b.host, b.process):
        return "needs both in one process"
    if name in SAME_HOST and a.host != b.host:
        return "needs both on one host, of one user and with one cluster.name"
    if name == "cuda_ipc" and a.device != b.device and not (b.device in a.near and a.device in b.near):
        return f"needs peer access between the GPUs {a.device} and {b.device}"
    return None
