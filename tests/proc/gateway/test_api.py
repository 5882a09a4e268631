"""The endpoints besides completions, and how all of them refuse."""

import asyncio

import pytest
from asgi import Asking, ask
from scripted import Client

from tetri import __version__
from tetri.client import RequestRefused, Unreachable
from tetri.config import GatewayConfig
from tetri.proc.gateway.answers import Model
from tetri.proc.gateway.api import application, listed
from tetri.proc.gateway.counts import Counts
from tetri.proc.gateway.keys import Keys, hashed
from tetri.proc.gateway.live import Live
from tetri.proc.gateway.observatory import Observatory

MODEL = Model(["m", "gpt"], "/models/m", 100, lambda token: bytes((token,)))
READY = {"ready": True, "why": "", "pairs": []}


class Tokens:
    """A byte a token, between a 1 and a 2."""

    async def ids(self, prompt, turns):
        return [1, *(str(len(turns)) if prompt is None else prompt).encode(), 2]


class Broker(Client):
    def __init__(self, ready=READY, script=()):
        super().__init__(*script)
        self.ready = ready

    async def readiness(self):
        if isinstance(self.ready, Exception):
            raise self.ready
        return self.ready


def app(client=None, keys=(), counts=None, **settings):
    client, counts = client or Broker(), counts or Counts()
    live = Live(Observatory(client), counts, 16)
    return application(GatewayConfig(**settings), Keys(keys), client, MODEL, Tokens(), counts, live)


def test_the_model_has_all_its_names_and_the_folder_of_its_checkpoint():
    models = ask(app(), "/v1/models", method="GET").json()["data"]
    assert [each["id"] for each in models] == ["m", "gpt"]
    assert all(each["root"] == "/models/m" and each["max_model_len"] == 100 for each in models)


def test_the_process_tells_that_it_runs_and_what_it_is():
    for path in ("/health", "/ping"):
        assert [ask(app(Broker(Unreachable("x"))), path, method=way).status for way in ("GET", "POST")] == [200, 200]
    assert ask(app(), "/version", method="GET").json() == {"version": __version__}
    assert "/v1/completions" in ask(app(), "/openapi.json", method="GET").json()["paths"]


@pytest.mark.parametrize(("ready", "status"), [(READY, 200), ({**READY, "ready": False, "why": "p0 to d0"}, 503)])
def test_whether_all_pairs_are_ready(ready, status):
    got = ask(app(Broker(ready)), "/ready", method="GET")
    assert (got.status, got.json()) == (status, ready)


def test_without_a_broker_nothing_is_ready():
    got = ask(app(Broker(Unreachable("no answer"))), "/ready", method="GET")
    assert got.status == 503 and got.json()["error"]["message"] == "no answer"


@pytest.mark.parametrize(
    ("body", "ids", "texts"),
    [
        (b'{"prompt": "Hi"}', [1, 72, 105, 2], None),
        (b'{"prompt": "Hi", "add_special_tokens": false}', [72, 105], None),
        (b'{"prompt": "Hi", "return_token_strs": true}', [1, 72, 105, 2], ["\x01", "H", "i", "\x02"]),
        (b'{"messages": [{"role": "user", "content": "x"}]}', [1, 49, 2], None),
    ],
)
def test_tokenize(body, ids, texts):
    assert ask(app(), "/tokenize", body).json() == {
        **{"count": len(ids), "max_model_len": 100},
        **{"tokens": ids, "token_strs": texts},
    }


def test_detokenize():
    assert ask(app(), "/detokenize", b'{"tokens": [72, 195, 188]}').json() == {"prompt": "H\u00fc"}


def test_a_key_guards_all_but_the_page_itself():
    locked = app(keys=[hashed(b"k")])
    data = ("/live", "/live/requests/x", "/live/instances/p0", "/metrics", "/openapi.json")
    assert [ask(locked, path, method="GET").status for path in data] == [401] * len(data)
    assert [ask(locked, path, method="GET").status for path in ("/", "/page.js", "/page.css")] == [200] * 3
    assert ask(locked, "/metrics", method="GET", headers={"authorization": "Bearer k"}).status == 200


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "says"),
    [
        ("/nowhere", "GET", b"", 404, "GET /nowhere: not found"),
        ("/v1/completions", "GET", b"", 405, "GET /v1/completions: method not allowed"),
        ("/v1/completions", "POST", b"{", 400, "not valid JSON"),
        ("/v1/completions", "POST", b'{"prompt": "x", "model": "other"}', 404, "'other' does not exist"),
        ("/v1/completions", "POST", b'{"prompt": "x"}', 429, "full"),
        ("/tokenize", "POST", b"[]", 400, "JSON object"),
        ("/v1/completions", "POST", b" " * 1025, 413, "1 KiB"),
    ],
)
def test_every_refusal_is_an_error_object(path, method, body, status, says):
    client = Broker(script=[[RequestRefused("full", 2.5)]])
    got = ask(app(client, body_kib=1), path, body, method)
    error = got.json()["error"]
    assert got.status == error["code"] == status and says in error["message"]
    assert got.headers.get("retry-after-ms") == ("2500" if status == 429 else None)
    assert got.headers["x-request-id"] and ("allow" in got.headers) == (status == 405)


def test_a_fault_of_the_gateway_tells_nobody_what_it_is():
    class Faulty(Exception):
        pass

    counts = Counts()

    async def asked():
        asking = Asking("/ready", method="GET", headers={"x-request-id": "me"})
        with pytest.raises(Faulty):  # for the log
            await asking.of(app(Broker(Faulty("secret")), counts=counts))
        return asking.got()

    got = asyncio.run(asked())
    assert got.status == 500 and b"secret" not in got.body and got.json()["error"]["type"] == "InternalServerError"
    assert got.headers["x-request-id"] == "me" and counts.plain()["answered"] == {"500": 1}


def test_a_client_that_goes_while_it_sends_gets_nothing():
    async def asked():
        asking = Asking("/tokenize")
        asking.feed.get_nowait()
        asking.disconnect()
        return await asking.of(app())

    assert asyncio.run(asked()).body == b""


def test_web_pages_may_ask_only_from_configured_origins():
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert ask(app(), "/v1/completions", method="OPTIONS", headers=asks).status == 405
    settings = {"origins": "https://a.example, https://b.example", "keys": [hashed(b"k")]}
    allowed = ask(app(**settings), "/v1/completions", method="OPTIONS", headers=asks)
    assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
    answered = ask(app(**settings), "/v1/models", method="GET", headers=asks)
    assert answered.headers["access-control-expose-headers"] == "x-request-id, x-tetri-rid"
    other = ask(app(**settings), "/v1/models", method="GET", headers={**asks, "origin": "https://evil.example"})
    assert other.status == 401 and "access-control-allow-origin" not in other.headers


def test_several_values_of_a_setting():
    assert listed("") == [] and listed(" a, b ,,c") == ["a", "b", "c"]
