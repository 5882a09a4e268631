"""The arrangements: the ways to use the CPUs of a configuration's workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tetri.config import Config

ROUND_ROBIN, LEAST = "rr", "least"


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One arrangement.

    summary  what it is, for people
    roles    of tetri's workers, in their order; () for vLLM
    servers  of vLLM, each on an equal part of the CPUs; 0 for tetri
    chunk    tokens of a step of vLLM; 0: its default
    routing  how the client chooses among several servers: round robin, or the fewest outstanding requests
    eager    vLLM without its compiler: it starts in a third of the time, and its steps take longer
    urls     of servers that run already; nothing is started, or known about them"""

    name: str
    summary: str
    roles: tuple[str, ...] = ()
    servers: int = 0
    chunk: int = 0
    routing: str = LEAST
    eager: bool = False
    urls: tuple[str, ...] = ()

    @property
    def is_tetri(self) -> bool:
        """Whether it is a deployment of tetri that is started."""
        return bool(self.roles)

    @property
    def knows_limits(self) -> bool:
        """Whether it may serve requests differently under other limits of latency."""
        return self.is_tetri or bool(self.urls)

    @property
    def coupled(self) -> bool:
        """Whether every instance always does both phases."""
        return bool(self.servers) or {*self.roles} == {"mixed"}

    @property
    def deployment(self) -> str:
        """Arrangements with the same one are served by the same processes: only the client routes differently."""
        return " ".join(self.roles or self.urls) or f"{self.servers} vllm, chunk {self.chunk}"


def arrangements(config: Config, *, eager: bool = False) -> dict[str, Arrangement]:
    """All arrangements of this configuration's workers, by name. `eager`: vLLM's servers are."""
    made = [*_vllm(len(config.workers), config.engine.chunk_tokens)] if config.engine.kind == "vllm" else []
    made = [replace(each, eager=eager) for each in made]
    return {each.name: each for each in (*made, *_tetri(len(config.workers)))}


def _vllm(count: int, chunk: int) -> Sequence[Arrangement]:
    made = [Arrangement("vllm", "one vLLM server on all CPUs", servers=1)]
    if count == 1:
        return made
    for tokens, of_chunk in ((0, ""), (chunk, f", steps of {chunk} tokens")):
        stem = f"vllm-{count}-{tokens}" if tokens else f"vllm-{count}"
        for routing, how in ((ROUND_ROBIN, "round robin"), (LEAST, "least outstanding")):
            summary = f"{count} vLLM servers, {how}{of_chunk}"
            made.append(Arrangement(f"{stem}-{routing}", summary, servers=count, chunk=tokens, routing=routing))
    return made


def _tetri(count: int) -> Sequence[Arrangement]:
    made = [
        Arrangement(f"tetri-{first}+{count - first}", _split(first, count - first), _roles(first, count))
        for first in sorted({max(1, count * part // 4) for part in (1, 2, 3)})
        if first < count
    ]
    mixed = Arrangement("tetri-mixed", "tetri, every instance does both phases", ("mixed",) * count)
    return [*made, mixed, Arrangement("tetri-auto", "tetri, phases as far apart as needed", ("auto",) * count)]


def _split(prefill: int, decode: int) -> str:
    return f"tetri, {prefill} prefill and {decode} decode"


def _roles(prefill: int, count: int) -> tuple[str, ...]:
    return ("prefill",) * prefill + ("decode",) * (count - prefill)
