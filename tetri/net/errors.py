"""The error of this package."""


class NetError(RuntimeError):
    """An address, a socket, a key or a lock cannot be used. The message is one line: which, why and what to do."""
