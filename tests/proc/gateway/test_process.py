"""A gateway as a process of a live cluster: what its clients see, and what they cannot do to each other."""

import asyncio
import http.client
import json
import signal
import socket
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from live import LiveCluster, wait_until
from prometheus_client.parser import text_string_to_metric_families as parse

from tetri.net import descriptors
from tetri.net.errors import NetError
from tetri.proc import gateways
from tetri.proc.gateway import process
from tetri.proc.gateway.counts import Counts
from tetri.request import Slo

SLOW = ["engine.cost=cpu-smollm2.toml", "emulated.time_scale=0.1"]  # steps that take time, so that answers last
LONG = {"prompt": "Hello", "max_tokens": 8000, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster():
    with LiveCluster(overrides=SLOW) as cluster:
        cluster.url = cluster.start_gateway()
        yield cluster


def connect(cluster):
    return http.client.HTTPConnection(cluster.url.removeprefix("http://"), timeout=20)


def ask(cluster, path, body=None, **headers):
    """(status, headers, body) of an answer."""
    with closing(connect(cluster)) as connection:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def opened(cluster):
    return gateways.read(cluster.folder)["gateway"]["open"]


def test_what_is_served(cluster):
    status, headers, body = ask(cluster, "/v1/models", **{"X-Request-Id": "me"})
    model = json.loads(body)["data"][0]
    assert (status, headers["x-request-id"], model["id"]) == (200, "me", "emulated")
    assert model["max_model_len"] == cluster.config.emulated.context and model["root"] == "emulated"
    status, _, body = ask(cluster, "/v1/completions", {"prompt": "Hello", "max_tokens": 3}, **{"X-Tetri-Receipt": "1"})
    answer = json.loads(body)
    assert status == 200 and answer["usage"]["completion_tokens"] == 3
    assert answer["tetri"]["choices"][0]["receipt"]["adopted"] == 5
    assert json.loads(ask(cluster, "/tokenize", {"prompt": "Hi"})[2])["tokens"] == [72, 105]
    assert json.loads(ask(cluster, "/detokenize", {"tokens": [72, 105]})[2]) == {"prompt": "Hi"}
    wait_until(lambda: ask(cluster, "/ready")[0] == 200, "the cluster is not ready")


def counted(cluster, name):
    """What the gateway's metric `name` has counted, by its label, once the broker has told it of all ends."""
    with cluster.client() as client:
        wait_until(lambda: not client.status()["requests"], "requests are open")
        ends = sum(client.observe()["measures"]["counts"]["requests_ended"].values())

    def read(name):
        text = ask(cluster, "/metrics")[2].decode()
        return {s.labels[key]: s.value for f in parse(text) for s in f.samples if s.name == name for key in s.labels}

    wait_until(lambda: sum(read("tetri_requests_ended_total").values()) == ends, "the gateway has not asked since then")
    return read(name)


def test_limits_of_latency_are_named_in_headers_and_metrics_equal_the_receipts(cluster):
    names = ("tetri_slo_requests_total", "tetri_tokens_total")
    before = [counted(cluster, name) for name in names]
    limits = [("1e3", "1"), ("0.001", "3600000"), ("3600000", "0.001"), ("0.001", "0.001"), ("3600000", "3600000")]
    body, told = {"prompt": "Hello", "max_tokens": 3, "ignore_eos": True}, []
    for ttft, tpot in limits:
        headers = {"X-SLO-TTFT-Ms": ttft, "X-SLO-TPOT-Ms": tpot, "X-Tetri-Receipt": "1"}
        status, _, answer = ask(cluster, "/v1/completions", body, **headers)
        if ttft == "1e3":
            says = "x-slo-ttft-ms must be a number of milliseconds above 0 and at most 86400000, got '1e3'"
            assert (status, json.loads(answer)["error"]["message"]) == (400, says)
            continue
        told += json.loads(answer)["tetri"]["choices"]
    assert [each["slo_result"] for each in told] == ["ttft", "tpot", "both", "met"]
    assert told[0]["slo"] == {"ttft_s": 1e-6, "tpot_s": 3600.0}
    results, tokens = (
        {label: now - was[label] for label, now in counted(cluster, name).items()}
        for name, was in zip(names, before, strict=True)
    )
    assert results == {"met": 1, "ttft": 1, "tpot": 1, "both": 1, "failed": 0}
    kinds = ("local", "adopted", "recomputed", "continued")
    assert {kind: tokens[kind] for kind in kinds} == {
        kind: sum(each["receipt"][kind] or 0 for each in told) for kind in kinds
    }
    assert tokens["local"] + tokens["adopted"] + tokens["recomputed"] == tokens["prompt"] == 20
    with cluster.client() as client:
        made = client.generate("Hello", max_tokens=3, slo=Slo(ttft_s=1e-6))
        found = client.explain(made.rid)
    assert (made.slo_result, made.slo.ttft_s, found["slo_result"]) == ("ttft", 1e-6, "ttft")
    assert made.slo.tpot_s is not None and found["slo"]["tpot_s"] == made.slo.tpot_s  # from the cost table


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_cancels_its_request(cluster, stream):
    with closing(connect(cluster)) as connection:
        connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": stream}))
        if stream:
            assert connection.getresponse().read(6) == b"data: "
        else:
            with cluster.client() as client:
                wait_until(lambda: client.status()["requests"], "no request is open")
    cluster.wait_idle()


def test_a_second_gateway_serves_the_same_cluster(cluster):
    other = cluster.start_gateway("gateway1")
    assert other != cluster.url and {*gateways.urls(cluster.folder)} == {"gateway", "gateway1"}


def test_a_gateway_that_ends_ends_its_answers():
    with LiveCluster(overrides=SLOW) as cluster:
        cluster.url = cluster.start_gateway()
        with closing(connect(cluster)) as connection, closing(connect(cluster)) as idle:
            connection.request("POST", "/v1/completions", json.dumps(LONG))
            idle.connect()
            answer = connection.getresponse()
            answer.read(1)
            cluster.processes["gateway"].send_signal(signal.SIGTERM)
            *_, error, last, _ = answer.read().split(b"\n\n")
        assert b"the gateway ends" in error and last == b"data: [DONE]"
        assert cluster.processes.pop("gateway").wait(10) == 0
        assert not [*gateways.reports(cluster.folder)]
        cluster.wait_idle()


def test_what_a_gateway_counts_is_in_the_run_directory_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "REPORT_S", 0.01)
    path, counts = tmp_path / "gateway.json", Counts()

    async def run():
        with process.reported(path, "http://x", counts):
            assert json.loads(path.read_text()) == {"url": "http://x", "open": 0, "answered": {}, "ignored": {}}
            path.unlink()
            while not path.exists():
                await asyncio.sleep(0.005)
            counts.answered(200)
            while json.loads(path.read_text())["answered"] != {"200": 1}:
                await asyncio.sleep(0.005)

    asyncio.run(run())
    assert not path.exists()
    with (
        pytest.raises(NetError, match="cannot be written"),
        process.reported(tmp_path / "no" / "x", "http://x", counts),
    ):
        pass


# ---------------------------------------------------------------- hostile clients

CONNECTIONS = 2000
LONGEST_S = 0.2


class Stream:
    """One stream that goes on. `longest_s`: between two parts of it; `late_s`: most that a timer here was late, when
    the machine stood still."""

    def __init__(self, url):
        self.host, self.port = url.removeprefix("http://").split(":")
        self.longest_s, self.parts, self.late_s = 0.0, 0, 0.0

    async def run(self, until):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
        )
        last = None
        while not until.is_set():
            data = await asyncio.wait_for(reader.read(1 << 16), 10)
            assert data, "the stream has ended"
            now = time.monotonic()
            if last is not None:
                self.longest_s, self.parts = max(self.longest_s, now - last), self.parts + 1
            last = now
        writer.close()

    async def tick(self, until):
        while not until.is_set():
            began = time.monotonic()
            await asyncio.sleep(0.005)
            self.late_s = max(self.late_s, time.monotonic() - began - 0.005)


BODY = json.dumps(LONG).encode()
BAD = [
    b'{"prompt": ',
    b'{"prompt": "\xff\xfe"}',
    b"\xff" * 100,
    b'{"prompt": 7}',
    b"[" * 100000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "max_tokens": 1e400}',
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"prompt": "x", "n": 0}',
    b'{"prompt": []}',
    b"null",
    b"",
]


@pytest.mark.alone
def test_others_go_on_whatever_hostile_clients_do():
    descriptors.raise_limit()
    with LiveCluster(overrides=[*SLOW, "gateway.request_s=3"]) as cluster:
        cluster.url = cluster.start_gateway()
        files = Path(f"/proc/{cluster.processes['gateway'].pid}/fd")
        before = len([*files.iterdir()])
        stream = Stream(cluster.url)
        statuses = asyncio.run(attacked(cluster, stream))
        assert stream.parts > 50 and stream.longest_s < LONGEST_S + 2 * stream.late_s
        assert set(statuses) <= {400, 413, 200} and {400, 413} <= set(statuses)
        # All are closed, but for that of the tokenising process and what libraries open once.
        wait_until(lambda: len([*files.iterdir()]) < before + 10, "descriptors are left")
        cluster.wait_idle()
        wait_until(lambda: opened(cluster) == 0, "an answer is still given")
        assert "ERROR" not in cluster.log("gateway")


async def attacked(cluster, stream):
    """The statuses that hostile clients get while a stream goes on."""
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    going = asyncio.gather(stream.run(over), stream.tick(over))
    statuses = await loop.run_in_executor(None, attack, cluster, stream)
    over.set()
    await going
    return statuses


def attack(cluster, stream):
    with ExitStack() as stack:
        address = stream.host, int(stream.port)
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(CONNECTIONS)]
        for number, each in enumerate(idle):  # some of them with a part of a request
            each.sendall(b"POST /v1/completions HTTP/1.1\r\n"[: number % 32])
        large = json.dumps({"prompt": "word " * 600000}).encode()
        texts = [*(("/v1/completions", body) for body in BAD), ("/tokenize", large)]
        statuses = [ask(cluster, *each)[0] for each in texts]
        statuses += [flooded(address) for _ in range(3)]
        for each in idle:  # until they are cut off
            with suppress(ConnectionError):
                assert each.recv(12) in (b"", b"HTTP/1.1 408")
    return statuses


def flooded(address):
    """The status of 50 MB."""
    with socket.create_connection(address) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n\r\n")
        part = bytes(1 << 20)
        for _ in range(47):
            connection.sendall(part)
        return int(connection.recv(12)[9:])
