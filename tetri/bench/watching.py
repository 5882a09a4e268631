"""bench_watching: what it costs the broker and the gateway that somebody looks: at the live page, and at /metrics.

Played workers send tokens to a broker, and clients read them over ZeroMQ, as in bench_relay. The gateway has no
streams, so all that it does is to ask the broker and to tell. While the streams run, these situations take turns:

alone      the gateway is stopped
idle       it asks the broker once a second, and nobody looks
page       one page is open
scrape     /metrics is read once a second
both       both

broker_tok_cpu_s   tokens that the broker relays per second of its processor time, medians
gateway_percent    processor time of the gateway, of one core, medians
observation_ms     the broker's processor time for one answer to the gateway, which asks five times a second for a page
ratio              broker_tok_cpu_s of `both` over that of `alone`: of the medians, and lowest and highest of a round
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from math import ceil
from statistics import median
from threading import Event
from typing import Any
from urllib.request import urlopen

import click

from tetri.bench.deployment import EXPECTED, own_folder
from tetri.bench.relay.__main__ import Relay, cpu_s, running
from tetri.bench.report import BenchError, Program, as_json, give, one_line, progress, table
from tetri.client import Client

RATIO, MOST_PERCENT, MOST_MS = 0.97, 3.0, 1.0  # at least; at most
ASKS = 200
SETTLE_S = 0.5  # of each situation, before it is measured
SPARE = 1.5  # streams last so much longer than all situations should take
Round = dict[str, dict[str, float]]  # situation -> process -> processor time over the time that passed
WAIT_S = 10.0  # for an answer


def page(url: str, stop: Event) -> int:
    """Read the live stream as the page does, until `stop`. Returns the number of messages."""
    messages = 0
    with urlopen(f"{url}/live", timeout=WAIT_S) as answer:
        for line in answer:
            messages += line.startswith(b"data:")
            if stop.is_set():
                break
    return messages


def scrape(url: str, stop: Event) -> int:
    """Read /metrics once a second, as Prometheus does, until `stop`. Returns how often."""
    scrapes = 0
    while not stop.is_set():
        begun = time.monotonic()
        with urlopen(f"{url}/metrics", timeout=WAIT_S) as answer:
            answer.read()
        scrapes += 1
        stop.wait(begun + 1 - time.monotonic())
    return scrapes


LOOKS: dict[str, tuple[Callable[[str, Event], int], ...]] = {
    "alone": (), "idle": (), "page": (page,), "scrape": (scrape,), "both": (page, scrape),
}  # fmt: skip


@contextmanager
def looking(relay: Relay, situation: str) -> Iterator[None]:
    """Have the gateway in a situation. Raises BenchError if those who look get far less than one answer a second."""
    gateway, looks, stop = relay.pids["gateway"], LOOKS[situation], Event()
    if situation == "alone":
        os.kill(gateway, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        with ThreadPoolExecutor(max(1, len(looks))) as pool:
            counts = {look.__name__: pool.submit(look, relay.url, stop) for look in looks}
            try:
                yield
            finally:
                stop.set()
            seconds = time.monotonic() - begun
            for name, each in counts.items():
                if (count := each.result()) < seconds / 2 - 1:
                    raise BenchError(f"{name}: {count} answers in {seconds:.1f} s")
    finally:
        os.kill(gateway, signal.SIGCONT)


def measured(relay: Relay, streams: int, rate: float, seconds: float, rounds: int) -> list[Round]:
    """Measure all situations in each round, each round from another one on, while streams run. Raises BenchError and
    OSError."""
    names, step_s, begun = [*LOOKS], streams / rate, Event()
    steps = ceil(SPARE * rounds * len(names) * (SETTLE_S + seconds) / step_s)
    found = list[Round]()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(relay.phase, False, streams, steps, step_s, begun.set)
        while not (begun.wait(0.1) or reading.done()):
            pass
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            first = number % len(names)
            found.append({name: _shares(relay, name, seconds) for name in names[first:] + names[:first]})
        ended = reading.done()
        reading.result()
    if ended:
        raise BenchError("the streams ended before all was measured: the machine is too slow")
    return found


def _shares(relay: Relay, situation: str, seconds: float) -> dict[str, float]:
    with looking(relay, situation):
        time.sleep(SETTLE_S)  # the first message of the page is larger than the others
        return relay.shares(seconds)


def observation_s(relay: Relay) -> float:
    """Processor time that the broker needs for one Observation, with that for its workers' heartbeats meanwhile."""
    with Client(relay.config.clients_address) as client:
        found = client.observe()
        begun = cpu_s(relay.pids["broker"])
        for _ in range(ASKS):
            found = client.observe(found["epoch"], found["serial"])  # as the gateway asks: what is new
        return (cpu_s(relay.pids["broker"]) - begun) / ASKS


def figures(found: list[Round], rate: float, observation_s: float) -> dict[str, Any]:
    """The medians of all rounds, and whether they are within the limits."""
    tokens = {name: round(rate / median(each[name]["broker"] for each in found)) for name in LOOKS}
    percent = {name: round(100 * median(each[name]["gateway"] for each in found), 2) for name in LOOKS}
    ratios = [each["alone"]["broker"] / each["both"]["broker"] for each in found]
    ratio = {
        "medians": round(tokens["both"] / tokens["alone"], 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
    }
    few = percent["page"] < MOST_PERCENT and percent["scrape"] < MOST_PERCENT and 1000 * observation_s < MOST_MS
    return {
        "rounds": len(found), "broker_tok_cpu_s": tokens, "gateway_percent": percent,
        "observation_ms": round(1000 * observation_s, 2), "ratio": ratio, "ok": few and ratio["medians"] >= RATIO,
    }  # fmt: skip


def shown(found: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [[name, str(found["broker_tok_cpu_s"][name]), str(found["gateway_percent"][name])] for name in LOOKS]
    ratio = found["ratio"]
    return "\n".join([
        table(["", "broker: tokens per CPU-second", "gateway: % of a core"], rows),
        f"both / alone: {ratio['medians']} (rounds: {ratio['low']} to {ratio['high']}), limit {RATIO}",
        f"page and scrape: limit {MOST_PERCENT:g} % each",
        f"one observation: {found['observation_ms']} ms of the broker, limit {MOST_MS:g} ms",
        f"within the limits: {'yes' if found['ok'] else 'no'}",
    ])  # fmt: skip


@click.command(cls=Program)
@click.option("--instances", type=click.IntRange(1, 256), default=64, show_default=True, help="Registered.")
@click.option("--streams", type=click.IntRange(1, 1000), default=256, show_default=True, help="Open at once.")
@click.option("--rate", type=click.FloatRange(1), default=5000, show_default=True, help="Tokens/s of all streams.")
@click.option("--seconds", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Of each situation.")
@click.option("--rounds", type=click.IntRange(1, 30), default=10, show_default=True, help="Of all five situations.")
@as_json
def main(instances: int, streams: int, rate: float, seconds: float, rounds: int, as_json: bool) -> None:
    """Measure what it costs that somebody looks at the live page and at /metrics."""
    with (
        one_line("bench_watching", OSError, HTTPException, *EXPECTED),
        own_folder("watching") as folder,
        running(folder, True, instances) as relay,
    ):
        found = {"instances": instances, "streams": streams, "rate": rate}
        found |= figures(measured(relay, streams, rate, seconds, rounds), rate, observation_s(relay))
    give(found, shown(found), as_json)


if __name__ == "__main__":
    main(prog_name="bench_watching")
