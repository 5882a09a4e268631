"""Carrying requests from a prefill engine to a decode engine, chunk by chunk, as two workers would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace
from plain import Plain, Text
from vllm_process import EngineProcess

from tetri.engine.base import EngineRequest, Phase, Sampled, StepDone
from tetri.request import Sampling, Token, blocks_for, token_ids

BLOCK = 128
TOKENS = tuple(range(100, 800))  # 700 tokens: two chunks, six blocks
TEXT = Sampling(max_tokens=6, ignore_eos=True)

# (index of the chunk, its blocks) -> the blocks that arrive; None: the chunk is lost
Tamper = Callable[[int, list[bytearray]], list[bytearray] | None]


@dataclass
class Request:
    """A request on its way and what became of it. `sent` and `arrived`: digests of the prompt's KV blocks on the
    prefill and on the decode side; `recomputed`: positions of `tokens` that the decode engine computed."""

    key: str
    tokens: Sequence[int]
    sampling: Sampling
    output_from: int = -1
    output: list[Token] = field(default_factory=list)
    reason: str | None = None
    sent: list[str] = field(default_factory=list)
    arrived: list[str] = field(default_factory=list)
    chunks: int = 0
    blocks_moved: int = 0
    recomputed: int = 0
    preempted: int = 0

    @property
    def ids(self) -> list[int]:
        return token_ids(self.output)

    def engine_request(self, phase: Phase) -> EngineRequest:
        """Its legs are called by its key, with p and d before it, for one engine may have both."""
        start = len(self.tokens) if self.output_from < 0 else self.output_from
        return EngineRequest(phase[0] + self.key, phase, tuple(self.tokens), start, self.sampling)


class Engines(NamedTuple):
    reference: Plain
    prefill: EngineProcess
    decode: EngineProcess


class Pair:
    def __init__(self, prefill: EngineProcess, decode: EngineProcess, tamper: Tamper | None = None) -> None:
        self.prefill, self.decode, self.tamper = prefill, decode, tamper

    def carry(self, *requests: Request) -> None:
        """Run requests that arrive at the same moment to their ends."""
        by_key = {request.key: request for request in requests}
        moved = {request.key: request for request in requests if not self.stays(request)}
        for request in moved.values():
            self.decode.add(request.engine_request("decode"))
        self.allocate(moved)
        self.start(requests)
        while any(request.reason is None for request in requests):
            for engine in dict.fromkeys((self.prefill, self.decode)):
                done = self.step(engine)
                self.move(by_key, done)
                self.record(by_key, done)

    def start(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.prefill.add(request.engine_request("prefill"))

    def stays(self, request: Request) -> bool:
        """Whether the decode engine prefills it."""
        return False

    def source(self, request: Request) -> str:
        """The key of the leg that computes its KV."""
        return f"p{request.key}"

    def step(self, engine: EngineProcess) -> StepDone:
        return engine.step()

    def allocate(self, by_key: dict[str, Request]) -> None:
        missing = set(by_key)
        for _ in by_key:
            missing -= {key[1:] for key in self.step(self.decode).allocated}
            if not missing:
                return
        raise AssertionError(f"no blocks for {sorted(missing)}")

    def move(self, by_key: dict[str, Request], done: StepDone) -> None:
        """Everything that this step made ready."""
        for span in done.spans:
            request = by_key[span.key[1:]]
            whole = span.stop == len(request.tokens)
            stop = blocks_for(span.stop, BLOCK) if whole else span.stop // BLOCK
            if span.key[0] == "p" and stop > request.blocks_moved:
                self.send_chunk(request, stop)
        for token in done.tokens:
            if token.key[0] == "p":
                assert token.error is None
                self.first_token(by_key[token.key[1:]], token)

    def send_chunk(self, request: Request, stop: int) -> None:
        start = request.blocks_moved
        blocks: list[bytearray] | None = self.prefill.export(self.source(request), start, stop)
        if self.tamper:
            blocks = self.tamper(request.chunks, blocks or [])
        if blocks is not None:
            self.decode.adopt(f"d{request.key}", start, blocks)
        request.chunks += 1
        request.blocks_moved = stop

    def first_token(self, request: Request, first: Sampled) -> None:
        request.output, request.reason = list(first.ids), first.reason
        if first.reason:
            self.decode.cancel(f"d{request.key}")
            return
        self.arrive(request)
        self.decode.admit(f"d{request.key}", first.token)

    def arrive(self, request: Request) -> None:
        count = blocks_for(len(request.tokens), BLOCK)
        assert request.blocks_moved == count
        request.sent = self.prefill.digests(self.source(request), 0, count)
        request.arrived = self.decode.digests(f"d{request.key}", 0, count)

    def record(self, by_key: dict[str, Request], done: StepDone) -> None:
        for span in done.spans:
            request = by_key[span.key[1:]]
            request.recomputed += max(0, min(span.stop, len(request.tokens)) - span.start) if span.key[0] == "d" else 0
        for key in done.preempted:
            by_key[key[1:]].preempted += 1
        for token in done.tokens:
            if token.key[0] == "d":
                by_key[token.key[1:]].output += token.ids
                by_key[token.key[1:]].reason = token.reason


class Mixed(Pair):
    """The decode engine prefills every other request, and there it stays."""

    def stays(self, request: Request) -> bool:
        return int(request.key) % 2 == 0

    def start(self, requests: Sequence[Request]) -> None:
        super().start([request for request in requests if not self.stays(request)])
        for request in filter(self.stays, requests):
            self.decode.add(request.engine_request("prefill"))
            self.decode.stay(f"p{request.key}", f"d{request.key}")

    def send_chunk(self, request: Request, stop: int) -> None:
        if not self.stays(request):
            super().send_chunk(request, stop)

    def arrive(self, request: Request) -> None:
        if not self.stays(request):
            super().arrive(request)


class Group(Pair):
    """The requests are choices of one: the leg of the first computes the prompt for all, and its KV goes to each."""

    def start(self, requests: Sequence[Request]) -> None:
        self.choices = requests
        lead, *others = requests
        siblings = tuple((f"p{choice.key}", choice.sampling.seed) for choice in others)
        self.prefill.add(replace(lead.engine_request("prefill"), siblings=siblings))

    def source(self, request: Request) -> str:
        return super().source(self.choices[0])

    def send_chunk(self, request: Request, stop: int) -> None:
        for choice in self.choices:
            super().send_chunk(choice, stop)


def carry_alone(
    engines: Engines, key: str, tokens: Sequence[int], sampling: Sampling, tamper: Tamper | None = None
) -> Request:
    """Slots of the last block that hold no token are compared too: they are made zero on both sides (the reference does
    the same for itself), and nothing but a token's K and V can differ."""
    engines.prefill.fill_next(2 * blocks_for(len(tokens), BLOCK), 0)
    request = Request(key, tokens, sampling)
    Pair(engines.prefill, engines.decode, tamper).carry(request)
    return request


def differences(right: Text, request: Request) -> list[str]:
    """What is not as plain vLLM wrote it, in words."""
    found = []
    for name, digests in (("sent", request.sent), ("arrived", request.arrived)):
        wrong = [i for i, (a, b) in enumerate(zip(right.digests, digests, strict=True)) if a != b]
        if wrong:
            found.append(f"{request.key}: KV blocks {wrong} {name} differ")
    if request.ids != right.ids:
        found.append(f"{request.key}: tokens {request.ids}, not {right.ids}")
    return found


def engine_request(
    key: str,
    phase: Phase,
    tokens: Sequence[int] = TOKENS,
    sampling: Sampling = TEXT,
    output_from: int | None = None,
) -> EngineRequest:
    return EngineRequest(key, phase, tuple(tokens), len(tokens) if output_from is None else output_from, sampling)


def adopt_zeros(engine: EngineProcess, key: str, tokens: Sequence[int] = TOKENS) -> None:
    engine.adopt(key, 0, [bytes(engine.facts()[2])] * blocks_for(len(tokens), BLOCK))


def fill(engine: EngineProcess, leave: int) -> list[str]:
    """Reserve all blocks but `leave` with decode legs that are never admitted."""
    keys: list[str] = []
    while (free := engine.free_blocks() - leave) > 0:
        keys.append(f"ballast-{len(keys)}")
        # One token less than the blocks hold: vLLM wants room for the next token before it gives any.
        engine.add(engine_request(keys[-1], "decode", [5] * (min(free, 16) * BLOCK - 1), Sampling(max_tokens=2)))
        assert engine.step().allocated == (keys[-1],)
    return keys


def crowd(engine: EngineProcess, prompt: Sequence[int]) -> list[str]:
    """Decode legs first and x of one block each run, one block is free, and the ballast has all others: whoever wants
    another one second is preempted."""
    ballast = fill(engine, leave=3)
    for key in ("first", "x"):
        engine.add(engine_request(key, "decode", prompt, Sampling(max_tokens=10, ignore_eos=True)))
        engine.step()
        adopt_zeros(engine, key, prompt)
        engine.admit(key, 5)
    return ballast
