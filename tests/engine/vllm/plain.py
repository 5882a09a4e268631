"""What vLLM alone writes (reference.py), for all tests of a run: each text is computed once, by whoever asks first,
also where tests run in several processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_process import EngineProcess

from tetri.request import Sampling, TokenLogprob

GAP = 1e-3  # of logprobs: below it, other batches and chunks may decide otherwise
WRITTEN = 16  # tokens of a text are computed at least, for those who ask later


class Text(NamedTuple):
    """`gaps`: per output token, by how much its raw logprob beats the runner-up's; `digests`: of the prompt's KV
    blocks, all layers of a block in order, taken before the second token was computed."""

    ids: list[int]
    gaps: list[float]
    digests: list[str]

    def agrees(self, ids: list[int]) -> bool:
        """Whether these are its tokens, but for what follows one that rounding alone may have decided."""
        pairs = zip(ids, self.ids, strict=True)
        different = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        return different is None or self.gaps[different] < GAP


class Plain:
    """Its process is started when a text is asked for that nobody has computed. `folder`: where texts are kept, which
    belongs to one run of the tests, one model and one type of numbers."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.folder, self.arguments = folder, arguments
        self._engine: EngineProcess | None = None

    def text(self, tokens: Sequence[int], length: int) -> Text:
        """The greedy text of `length` tokens after these, whatever the model says of its end."""
        place = self.folder / hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()
        known = json.loads(place.read_text()) if place.exists() else None
        if known is None or len(known["ids"]) < length:
            sampling = Sampling(max_tokens=max(length, WRITTEN), ignore_eos=True)
            known = self.generate(list(tokens), sampling)._asdict()
            unfinished = place.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(known))
            unfinished.replace(place)
        return Text(known["ids"][:length], known["gaps"][:length], known["digests"])

    def generate(self, tokens: list[int], sampling: Sampling) -> Text:
        """One request, alone in the engine; nothing of it is kept."""
        return self._started().generate(tokens, sampling)

    def by_vllm(self, tokens: list[int], sampling: Sampling) -> tuple[list[TokenLogprob], str]:
        """One greedy request without tetri's sampler."""
        return self._started().by_vllm(tokens, sampling)

    def _started(self) -> EngineProcess:
        if self._engine is None:
            self._engine = EngineProcess("reference", **self.arguments)
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
