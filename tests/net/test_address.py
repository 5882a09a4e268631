import pytest

from tetri.net import NetError
from tetri.net.address import check


def test_good_addresses():
    assert check("ipc:///run/x") == "/run/x"
    assert check("ipc:///" + "x" * 98) == "/" + "x" * 98
    for address in ("tcp://127.0.0.1:5555", "tcp://127.1.2.3:*", "tcp://localhost:1"):
        assert check(address) is None


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "is no address"),
        ("/run/x", "is no address"),
        ("inproc://x", "is no address"),
        ("tcp://127.0.0.1", "is no address"),
        ("tcp://[::1]:80", "encrypted"),
        ("tcp://0.0.0.0:80", "encrypted"),
        ("tcp://example.org:80", "encrypted"),
        ("ipc://x", "absolute path"),
        ("ipc://@x", "absolute path"),
        ("ipc:///a\0b", "absolute path"),
        ("ipc:///" + "x" * 99, "100 bytes, at most 99"),
        ("ipc:///" + "ä" * 50, "101 bytes, at most 99"),
        ("x" * 100_000, "is no address"),
    ],
)
def test_bad_addresses_say_what_is_wrong_in_one_short_line(address, says):
    with pytest.raises(NetError, match=says) as caught:
        check(address)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
