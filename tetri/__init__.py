"""tetri: a language model server whose prefill and decode phases run as far apart as the traffic asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetri.client import AsyncClient, Client
    from tetri.request import Slo

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Slo", "__version__"]


def __getattr__(name: str) -> Any:
    # The clients bring pyzmq along; cores and the simulator import this package without it.
    if name in ("AsyncClient", "Client"):
        import tetri.client

        return getattr(tetri.client, name)
    if name == "Slo":
        from tetri.request import Slo

        return Slo
    raise AttributeError(f"module 'tetri' has no attribute {name!r}")
