"""API keys: which are accepted, and which files."""

import hashlib

import pytest

from tetri.proc.gateway.keys import VARIABLE, Keys, hashed, load
from tetri.strict import ConfigError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_without_keys_everybody_may_ask():
    keys = load("")
    assert not keys and keys.allow(b"") and keys.allow(b"Bearer x")


@pytest.mark.parametrize(
    ("authorization", "allowed"),
    [
        (b"Bearer one", True),
        (b"bearer two", True),
        (b"Bearer  two ", True),
        (b"Bearer three", False),
        (b"Basic one", False),
        (b"one", False),
        (b"", False),
        (b"Bearer", False),
        (b"Bearer \xff", False),
    ],
)
def test_who_may_ask(authorization, allowed):
    assert Keys([hashed(b"one"), hashed(b"two")]).allow(authorization) is allowed


def test_a_file_has_hashes_and_the_environment_one_more_key(tmp_path, monkeypatch):
    first, second = (hashlib.sha256(key).hexdigest() for key in (b"one", b"two"))
    file = tmp_path / "keys"
    file.write_text(f"# who\n\n{first}  -\n{second.upper()} Anna's laptop\n")
    keys = load(str(file))
    assert keys.allow(b"Bearer one") and keys.allow(b"Bearer two") and not keys.allow(b"Bearer env")
    monkeypatch.setenv(VARIABLE, "env")
    assert load(str(file)).allow(b"Bearer env") and load("").allow(b"Bearer env") and not load("").allow(b"Bearer one")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"# nothing\n", "has no key, so nobody could ask"),
        (b"# a\nsecret\n", "line 2 is no SHA-256 of a key: printf %s KEY | sha256sum makes one"),
        (b"\xff\n", "is no text"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, says):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load(str(file))
    assert says in str(refused.value) and "secret" not in str(refused.value).replace(str(file), "")
