"""API keys: who may ask a gateway.

Only hashes of keys are kept. A key is long and random, so a plain SHA-256 of it tells nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from hmac import compare_digest

from tetri.strict import ConfigError

VARIABLE = "TETRI_API_KEY"
_LINE = re.compile(r"([0-9a-fA-F]{64})(\s.*)?")


class Keys:
    """The keys that may ask. Without any, everybody may."""

    def __init__(self, hashes: Iterable[bytes]) -> None:
        self._hashes = tuple(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allow(self, authorization: bytes) -> bool:
        """Whether the value of an Authorization header has one of the keys. Takes as long for each wrong one."""
        if not self._hashes:
            return True
        scheme, _, key = authorization.partition(b" ")
        digest = hashed(key.strip())
        found = [compare_digest(digest, known) for known in self._hashes]
        return any(found) and scheme.lower() == b"bearer"


def hashed(key: bytes) -> bytes:
    """The SHA-256 of a key."""
    return hashlib.sha256(key).digest()


def load(path: str) -> Keys:
    """The keys of a key file and of $TETRI_API_KEY. A line of the file has the SHA-256 of a key in hexadecimal, as
    sha256sum writes it, then perhaps a name; empty lines and those with # are comments. Raises ConfigError."""
    own = os.environ.get(VARIABLE, "")
    hashes = [hashed(os.fsencode(own))] if own else []
    if not path:
        return Keys(hashes)
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(f"gateway.key_file: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"gateway.key_file: {path}: is no text") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            advice = "printf %s KEY | sha256sum makes one"
            raise ConfigError(f"gateway.key_file: {path}: line {number} is no SHA-256 of a key: {advice}")
        hashes.append(bytes.fromhex(found[1]))
    if not hashes:
        raise ConfigError(f"gateway.key_file: {path}: has no key, so nobody could ask")
    return Keys(hashes)
