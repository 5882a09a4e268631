"""One attempt of one request on the prefill side."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetri.core.kvflow import Outflow
from tetri.request import Capacity, Sampling, Stage, blocks_for
from tetri.wire.messages import Finished


@dataclass(slots=True)
class Job:
    """One attempt of one request on the prefill side. `tokens` is prompt + output of earlier attempts."""

    key: str
    rid: str
    attempt: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    sampling: Sampling
    arrival: int
    flow: Outflow
    done: int = 0  # tokens computed
    turn: int = 0  # its place in the order in which jobs were started; 0: not yet
    running: bool = False  # the engine has its leg
    token: int | None = None  # the one that prefill yields
    end: Finished | None = None  # when that token ended the request
    refused: dict[str, str] = field(default_factory=dict)  # decode instance -> why, since the last view
    stranded_at: float | None = None  # since when no decode instance exists for it

    @property
    def goal(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def decodes(self) -> bool:
        """Whether anything may follow the first token."""
        return self.end is None and len(self.output) + 1 < self.sampling.max_tokens

    @property
    def unplaced(self) -> bool:
        """Started, to be decoded, and on offer nowhere."""
        return bool(self.turn) and self.flow.offer is None and self.decodes and not self.flow.complete

    def fits(self, capacity: Capacity) -> bool:
        """Whether an engine can hold the whole request, its longest output included."""
        tokens = len(self.prompt) + self.sampling.max_tokens
        return self.goal < capacity.context and blocks_for(tokens, capacity.block_tokens) <= capacity.blocks

    @property
    def stage(self) -> Stage:
        if self.token is not None:
            return Stage.DONE if self.end else Stage.MOVING
        return Stage.PREFILL if self.running else Stage.QUEUED

    def outputs(self) -> list[int]:
        return [*self.output, *([] if self.token is None else [self.token])]
