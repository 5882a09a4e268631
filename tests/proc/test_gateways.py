"""Where gateways listen, and how others find them."""

import json
import socket
from contextlib import closing

import pytest
from live import EMULATED

from tetri.config import load
from tetri.net.errors import NetError
from tetri.proc import gateways


def config(*settings):
    return load(EMULATED, [f"gateway.{each}" for each in settings])


def test_each_gateway_has_its_own_port():
    with (
        closing(gateways.listening(config("port=0"), 0)) as first,
        closing(gateways.listening(config("port=0"), 1)) as second,
    ):
        assert gateways.url_of(first) != gateways.url_of(second)
        port = first.getsockname()[1]
        with pytest.raises(NetError) as refused:  # the next one of a deployment whose first port is one less
            gateways.listening(config(f"port={port - 1}"), 1)
    says = (
        f"http://127.0.0.1:{port} cannot be used (Address already in use): choose another with --set gateway.port=PORT"
    )
    assert str(refused.value).startswith(says)
    with closing(gateways.listening(config(f"port={port - 1}"), 1)) as again:
        assert gateways.url_of(again) == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")])
def test_a_url_is_one_that_this_host_can_use(host, shown):
    try:
        listener = gateways.listening(config(f"host={host}", "port=0"), 0)
    except NetError:
        assert host == "::1" and not socket.has_dualstack_ipv6()
        return
    with closing(listener):
        assert gateways.url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"


def test_the_reports_of_all_gateways_are_found(tmp_path):
    tmp_path.chmod(0o700)
    assert gateways.urls(tmp_path) == {} == gateways.urls(tmp_path / "none")
    for name in ("gateway1", "gateway"):
        gateways.report_of(tmp_path, name).write_text(json.dumps({"url": f"http://{name}", "open": 1}))
    gateways.report_of(tmp_path, "gateway2").write_text("")
    assert gateways.urls(tmp_path) == {"gateway": "http://gateway", "gateway1": "http://gateway1"}
    assert gateways.read(tmp_path)["gateway1"]["open"] == 1
