import pytest

from tetri.net import NetError
from tetri.net.address import check


def test_good_addresses():
    assert check("ipc:///run/x") == "/run/x"
    assert check("ipc:///" + "x" * 101) == "/" + "x" * 101
    for address in ("tcp://127.0.0.1:5555", "tcp://127.1.2.3:*", "tcp://localhost:1"):
        assert check(address) is None


BAD = {
    "is no address": ["", "/run/x", "inproc://x", "tcp://127.0.0.1", "x" * 100_000],
    "encrypted": ["tcp://[::1]:80", "tcp://0.0.0.0:80", "tcp://example.org:80"],
    "absolute path": ["ipc://x", "ipc://@x", "ipc:///a\0b"],
    "103 bytes, at most 102": ["ipc:///" + "x" * 102],
    "105 bytes, at most 102": ["ipc:///" + "ä" * 52],
}


@pytest.mark.parametrize("says", BAD)
def test_bad_addresses_say_what_is_wrong_in_one_short_line(says):
    for address in BAD[says]:
        with pytest.raises(NetError, match=says) as caught:
            check(address)
        assert len(str(caught.value)) < 300 and str(caught.value).isprintable()
