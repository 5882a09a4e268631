"""What each fault does to live requests: workers killed, restarted, joined by hand, a flood of garbage."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator

import pytest
import zmq
from live import LiveCluster, wait_until

from tetri.client import AsyncClient, RequestFailed, RequestRefused, Result, TetriError
from tetri.client.sync import Stream
from tetri.engine.emulated import reference
from tetri.request import Sampling

LENGTH = 150


ONE_EACH = "worker=[{iid='p0', role='prefill'}, {iid='d0', role='decode'}]"


@contextlib.contextmanager
def slow_cluster(*overrides: str) -> Iterator[LiveCluster]:
    """Steps take some milliseconds, so that requests can be caught in the middle; memory is short of ample."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as table:
        table.write("prefill = [[1, 0.005], [512, 0.02]]\ndecode = [[1, 0.005], [32, 0.006]]\n")
        table.flush()
        made = [f"engine.cost={table.name}", "emulated.blocks=400", "emulated.context=6400"]
        with LiveCluster(overrides=[*made, *overrides]) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def pairs() -> Iterator[LiveCluster]:
    """Two prefill and two decode workers."""
    with slow_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pair() -> Iterator[LiveCluster]:
    """One of each."""
    with slow_cluster(ONE_EACH) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: no request open, nothing held, every ledger at its capacity."""
    yield
    for name in {"pair", "pairs"} & set(request.fixturenames):
        request.getfixturevalue(name).wait_idle()


class Traffic:
    """Requests in flight from one thread of control; every answer is checked against the reference."""

    def __init__(self, cluster: LiveCluster, count: int, timeout: float = 30.0) -> None:
        rng = random.Random(count)
        self.cluster = cluster
        self.timeout = timeout
        self.prompts = [[rng.randrange(1, 32000) for _ in range(rng.randint(1, 900))] for _ in range(count)]
        self.texts: dict[int, str] = {}
        self.ended_at: dict[int, float] = {}

    async def one(self, client: AsyncClient, index: int) -> Result | TetriError:
        try:
            stream = client.stream(self.prompts[index], max_tokens=LENGTH)
            self.texts[index] = ""
            async for piece in stream:
                self.texts[index] += piece
            assert stream.result is not None
            return stream.result
        except TetriError as error:
            return error
        finally:
            self.ended_at[index] = time.monotonic()

    async def run(self, disturb: object = None) -> list[Result | TetriError]:
        """All requests at once; `disturb()` once every one of them has text."""
        async with AsyncClient(self.cluster.config.clients_address, timeout=self.timeout) as client:
            tasks = [asyncio.create_task(self.one(client, i)) for i in range(len(self.prompts))]
            start = time.monotonic()
            while not all(self.texts.get(i) for i in range(len(tasks))) and time.monotonic() - start < 15:
                await asyncio.sleep(0.005)
            if callable(disturb):
                await asyncio.to_thread(disturb)
            return await asyncio.gather(*tasks)

    def check(self, results: list[Result | TetriError]) -> list[Result]:
        """Every request has the right tokens and its stream exactly the right text."""
        made = self.cluster.config.emulated
        for index, (prompt, result) in enumerate(zip(self.prompts, results, strict=True)):
            assert isinstance(result, Result), f"request {index}: {result!r}"
            right = reference(prompt, Sampling(max_tokens=LENGTH), made.vocabulary, made.token_bytes)
            assert result.token_ids == right
            assert self.texts[index] == result.text
        return [result for result in results if isinstance(result, Result)]


@contextlib.contextmanager
def long_decode(cluster: LiveCluster) -> Iterator[tuple[str, Stream]]:
    """A request that decodes for 15 s, alone at first, so that its decode instance has a request whenever it is killed:
    that instance, and the stream."""

    def running() -> list[str]:
        return [iid for iid, instance in cluster.instances().items() if instance["load"]["running"]]

    stream = cluster.client().stream([9] * 50, max_tokens=3000, ignore_eos=True)
    next(stream)
    wait_until(lambda: len(running()) == 1, "it does not run")
    yield running()[0], stream
    stream.cancel()


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_kill_9_with_two_per_role(pairs: LiveCluster, role: str) -> None:
    """Every request completes on the other worker, no token lost, repeated or changed."""
    with long_decode(pairs) as (decoder, stream):
        victim = decoder if role == "decode" else "p0"
        traffic = Traffic(pairs, 12)
        traffic.check(asyncio.run(traffic.run(lambda: pairs.kill(victim))))
    assert stream.result is not None and stream.result.finish_reason == "cancelled"
    assert stream.result.receipt.attempts == (2 if role == "decode" else 1)
    pairs.start(victim)
    pairs.wait_ready(victim)


@pytest.mark.parametrize("victim", ["d0", "p0"])
def test_kill_9_of_the_only_worker_then_restart(pair: LiveCluster, victim: str) -> None:
    def disturb() -> None:
        pair.kill(victim)
        pair.start(victim)

    traffic = Traffic(pair, 6)
    traffic.check(asyncio.run(traffic.run(disturb)))


def test_kill_9_of_the_only_worker_for_good() -> None:
    """A clear error within the configured patience, no hang, and the broker goes on."""
    with LiveCluster(overrides=[ONE_EACH, "cluster.patience_s=1"]) as cluster:
        cluster.kill("d0")
        with pytest.raises(RequestFailed, match="instance") as failure:
            cluster.client().generate("hello", max_tokens=LENGTH)
        assert "\n" not in str(failure.value)
        cluster.start("d0")
        cluster.wait_ready("d0")
        assert cluster.client().generate("hello", max_tokens=5).finish_reason == "length"
        cluster.wait_idle()


def test_a_worker_started_by_hand_joins_and_gets_work(pair: LiveCluster) -> None:
    pair.start("extra", "--role", "decode", "--broker", pair.config.events_address)
    pair.wait_ready("extra")
    traffic = Traffic(pair, 16)
    results = traffic.check(asyncio.run(traffic.run()))
    assert {result.receipt.decode_instance for result in results} == {"d0", "extra"}


def test_a_broker_that_was_killed_comes_back(pair: LiveCluster) -> None:
    """Its open requests are lost and their clients told; workers register again by themselves."""
    stream = pair.client().stream("gone with the broker", max_tokens=4000)
    next(stream)
    pair.kill("broker")
    pair.start("broker")
    with pytest.raises(RequestRefused, match="no request"):
        stream.wait()
    wait_until(lambda: len(pair.instances()) >= 2, "the workers do not come back")
    pair.wait_ready("p0", "d0")
    assert pair.client().generate("hello again", max_tokens=5).finish_reason == "length"


def test_a_flood_on_every_socket_holds_nobody_up(pairs: LiveCluster) -> None:
    """Huge and undecodable frames, and thousands of messages and questions, while a request is served."""
    config, context = pairs.config, zmq.Context()
    addresses = [(config.clients_address, zmq.DEALER), (config.operators_address, zmq.DEALER)]
    addresses += [(config.events_address, zmq.PUSH)]
    addresses += [(config.inbox_address(worker.iid), zmq.PUSH) for worker in config.workers]
    sockets = []
    for address, kind in addresses:
        socket = context.socket(kind)
        socket.linger, socket.sndhwm = 0, 100_000
        socket.connect(address)
        sockets.append(socket)
    stream = pairs.client().stream([5] * 900, max_tokens=LENGTH)
    for frames in ([b""], [b"\x01\x80"], [os.urandom(300)], [b"a", b"b", b"c"], [bytes(100 << 20)]):
        for socket in sockets:
            socket.send_multipart(frames)
    for _ in range(3000):
        for socket in sockets:
            with contextlib.suppress(zmq.Again):  # it does not read faster: as it should be
                socket.send(b"\x04garbage", zmq.NOBLOCK)
        with contextlib.suppress(zmq.Again):
            sockets[0].send(b"\x04\x81\xa4type\xa7inspect", zmq.NOBLOCK)
    assert stream.wait().finish_reason == "length"
    for socket in sockets:
        socket.close()
    context.term()
    pairs.assert_alive()


def test_a_pause_of_all_processes_loses_nobody() -> None:
    """As of a container that is paused. The workers go on later than the broker."""
    with slow_cluster(ONE_EACH, "cluster.dead_s=2") as cluster:
        programs = cluster.processes

        def pause() -> None:
            for name in programs:
                programs[name].send_signal(signal.SIGSTOP)
            time.sleep(4.0)
            for name in ("broker", "monitor", "p0", "d0"):
                programs[name].send_signal(signal.SIGCONT)
                time.sleep(0.5 * (name == "monitor"))

        traffic = Traffic(cluster, 4)
        results = traffic.check(asyncio.run(traffic.run(pause)))
        assert [result.receipt.attempts for result in results] == [1] * 4
        assert "workers_lost" not in cluster.client().status()["counters"]
        cluster.wait_idle()
