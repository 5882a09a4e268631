"""The file of a deployment's key. tests/net/test_bulk.py has who gets in with it."""

import os
import stat

import pytest
import zmq

from tetri.net import NetError, keys


def test_a_key_file_is_for_its_owner_alone_and_never_overwritten(tmp_path):
    path = tmp_path / "key"
    keys.generate(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    made = keys.load(str(path))
    assert made.public == zmq.curve_public(made.secret) and made.secret.decode() not in repr(made)
    with pytest.raises(NetError, match="exists already"):
        keys.generate(str(path))
    assert keys.load(str(path)) == made
    path.chmod(0o640)
    with pytest.raises(NetError, match="chmod 600"):
        keys.load(str(path))


def test_what_is_no_key_is_one_line(tmp_path):
    path = tmp_path / "key"
    path.touch(mode=0o600)
    for content in (b"", b"x" * 40 + b"y", b"\x00" * 40, b"~" * 40, b"x" * 100_000):
        path.write_bytes(content)
        with pytest.raises(NetError, match=r"is no key; make one with tetri-cli keygen$"):
            keys.load(str(path))
    with pytest.raises(NetError, match="cannot be read"):
        keys.load(str(tmp_path / "missing"))
    with pytest.raises(NetError, match="is no key"):
        keys.load("/dev/null")


def test_another_users_key_is_refused(tmp_path, monkeypatch):
    path = str(tmp_path / "key")
    keys.generate(path)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(NetError, match=rf"belongs to another user \(uid {owner}\)"):
        keys.load(path)


def test_without_a_name_it_says_how_to_make_a_key():
    with pytest.raises(NetError, match="needs a key: make one with tetri-cli keygen, and set cluster.key"):
        keys.load("")
