"""Texts that take long to tokenise, and ones that are to be refused before."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import zmq

from tetri.bench import clients
from tetri.bench.deployment import REPOSITORY, polled
from tetri.bench.report import BenchError
from tetri.bench.torture.case import ADDED_GAP_MS, Findings
from tetri.bench.torture.deployed import deployed
from tetri.bench.torture.listener import Gaps, Listener
from tetri.client.facade import new_secret
from tetri.config import load
from tetri.proc.texts import Texts, command
from tetri.request import Sampling, Turn
from tetri.wire.clients import Refused, Submit
from tetri.wire.codec import encode

DEFAULT = REPOSITORY / "conf" / "default.toml"
COUNT, TEXT_BYTES, ROLE_BYTES, TURNS = 20, 512 << 10, 3_000_000, 100_000
SENTENCE = "The party of the first part shall indemnify the party of the second part, as amended in section 7(b). "
ALL = 3 * COUNT
WAITING_BYTES = 32 << 20  # of texts
STEP_S, BASE_S, WAIT_S = 0.02, 2.0, 60.0


def texts(folder: Path, found: Findings) -> None:
    """Twenty texts of 512 KiB at once, twenty conversations with a role of 3 MB and twenty with 100,000 turns, while
    another client reads its stream. In a deployment; then in a broker's loop with the tokenizer of a real model."""
    frames = _frames()
    with deployed(folder, found) as cluster, Listener(cluster.config, 2) as listener:
        gaps = Gaps(listener, found, lambda: time.sleep(BASE_S))
        with _flood(cluster.config.clients_address, frames) as flood:
            polled(flood.read_all, lambda count: count == ALL, WAIT_S, 0.02)
            gaps.judge()
        found.exactly("answered", flood.answered, ALL)
        found.exactly("tokenised", cluster.counter("texts_tokenized"), COUNT)
    _loop(found, frames)


def _frames() -> list[bytes]:
    """The messages, encoded: this program must not be busy while it listens."""
    text, turns = SENTENCE * (TEXT_BYTES // len(SENTENCE)), [Turn(role="user", content="")] * TURNS
    made = []
    for number in range(COUNT):
        made.append(_submit(f"text{number}", prompt=text))
        made.append(_submit(f"role{number}", messages=[Turn(role="u" * ROLE_BYTES, content="")]))
        made.append(_submit(f"turn{number}", messages=turns))
    return made


def _submit(key: str, prompt: str | None = None, messages: list[Turn] | None = None) -> bytes:
    sampling = Sampling(max_tokens=1)
    return encode(Submit(key=key, secret=new_secret(), prompt=prompt, messages=messages, sampling=sampling))


class Flood(clients.Talker):
    """A client that sends all at once. `answered`: how many were refused, which all of them are in the end."""

    answered = 0

    def read_all(self) -> int:
        """Read all that waits; how many were answered so far. Raises BenchError if one was accepted."""
        for message in self.read():
            if not isinstance(message, Refused) or message.retry_after_s is not None:
                raise BenchError(f"a text that is too long was answered with {message}")
            self.answered += 1
        return self.answered


@contextmanager
def _flood(address: str, frames: Sequence[bytes]) -> Iterator[Flood]:
    context = zmq.Context[zmq.Socket[bytes]]()
    try:
        flood = Flood(context, address)
        for frame in frames:
            flood.socket.send(frame, copy=False)
        yield flood
    finally:
        context.destroy(0)


def _loop(found: Findings, frames: Sequence[bytes]) -> None:
    """The broker's loop in this process, with the tokenising process of the default model."""
    with clients.played(1, 1 << 13) as cluster:
        waiting = Texts(command(load(DEFAULT)), cluster.hub.wake, WAITING_BYTES, logging.getLogger("torture"))
        with closing(waiting):
            waiting.start()
            waiting.ready()
            cluster.executor.texts = waiting
            base = cluster.phase(round(BASE_S / STEP_S), STEP_S)["gap_ms"]
            found.note("model_base_gap_ms", base)
            with _flood(cluster.other.socket.getsockopt_string(zmq.LAST_ENDPOINT), frames) as flood:
                worst, until = 0.0, time.monotonic() + WAIT_S
                while flood.read_all() < ALL and time.monotonic() < until:
                    worst = max(worst, cluster.phase(round(0.5 / STEP_S), STEP_S)["gap_ms"]["worst"])
            found.at_most("model_worst_gap_ms", worst, round(base["worst"] + ADDED_GAP_MS, 1))
            found.exactly("model_answered", flood.answered, ALL)
            found.exactly("model_tokenised", waiting.counters()["texts_tokenized"], COUNT)
