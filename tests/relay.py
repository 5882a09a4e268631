"""A TCP relay that delays, throttles and cuts: what a bad network does, on a kernel without netem. A thread of a test's
process, or a program in a network namespace of its own:

    python tests/relay.py LISTEN_HOST:PORT TARGET_HOST:PORT [--delay S] [--rate BYTES_S] [--cut-every BYTES] [--seed N]

The program says "ready", and at SIGTERM what it counted, as one line of JSON each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field

PIECE = 64 << 10


@dataclass
class Weather:
    """May be changed while the relay runs. `delay` seconds a read, `rate` bytes/s of one direction (0: no limit). A
    connection is cut after about `cut_every` bytes (0: never). `silent`: what comes is swallowed, as by a dead host.
    `flip_at`: of the bytes to the client, that one is flipped, once (-1: none)."""

    delay: float = 0.0
    rate: float = 0.0
    cut_every: int = 0
    silent: bool = False
    flip_at: int = -1
    rng: random.Random = field(default_factory=lambda: random.Random(7))


class Relay:
    """`port` is where it listens. `connections`, `cuts`, `forwarded` (bytes to the client) count."""

    def __init__(self, target: str, listen: str = "127.0.0.1:0", weather: Weather | None = None) -> None:
        self.weather = weather or Weather()
        self.connections = self.cuts = self.forwarded = 0
        self._target, self._listen = _split(target), _split(listen)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        """All connections that stand now."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (self._cut(set(self._writers)), done.set()))
        assert done.wait(10)

    def wait_for_ever(self) -> None:
        self._thread.join()

    def _cut(self, writers: set[asyncio.StreamWriter]) -> None:
        self.cuts += bool(writers)
        for writer in writers:
            writer.transport.abort()
        self._writers -= writers

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, *self._listen))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._cut(set(self._writers))
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.run_until_complete(server.wait_closed())
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError):
            there, onward = await asyncio.open_connection(*self._target)
            self.connections += 1
            pair = {writer, onward}
            self._writers |= pair
            weather, left = self.weather, [float("inf")]
            if weather.cut_every:
                left[0] = weather.rng.randint(weather.cut_every // 2, weather.cut_every * 3 // 2)
            both = [self._forward(reader, onward, pair, left, False), self._forward(there, writer, pair, left, True)]
            await asyncio.gather(*both, return_exceptions=True)
            self._writers -= pair
            onward.transport.abort()
        writer.transport.abort()

    async def _forward(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        pair: set[asyncio.StreamWriter],
        left: list[float],
        back: bool,
    ) -> None:
        while data := await source.read(PIECE):
            weather = self.weather
            if weather.silent:
                continue
            if weather.delay:
                await asyncio.sleep(weather.delay)
            if weather.rate:
                await asyncio.sleep(len(data) / weather.rate)
            if back and 0 <= weather.flip_at - self.forwarded < len(data):
                at = weather.flip_at - self.forwarded
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            self.forwarded += len(data) if back else 0
            left[0] -= len(data)
            target.write(data)
            if left[0] <= 0:
                self._cut(pair & self._writers)
                return
            await target.drain()
        for writer in pair:
            writer.transport.abort()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("listen")
    parser.add_argument("target")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--cut-every", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    made = parser.parse_args()
    weather = Weather(made.delay, made.rate, made.cut_every, rng=random.Random(made.seed))
    relay = Relay(made.target, made.listen, weather)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(json.dumps("ready"), flush=True)
    try:
        relay.wait_for_ever()
    finally:
        said = {"connections": relay.connections, "cuts": relay.cuts, "forwarded": relay.forwarded}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
