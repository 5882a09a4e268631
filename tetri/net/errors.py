"""The one error of this room."""


class NetError(RuntimeError):
    """An address, a socket or a lock cannot be had; one line that says which, why and what to do."""
