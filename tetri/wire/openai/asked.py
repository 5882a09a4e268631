"""What a body asks for."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from tetri.request import AskedSampling, Turn

Prompt = str | list[int]


class Asked(Struct, frozen=True, kw_only=True):
    """A request for completions (`prompts`) or for the answer to a conversation (`turns`).

    model           as the client spelled it
    default_tokens  the limit of each choice; fewer if fewer fit
    ignored         names of fields in the body that have no effect
    usage           the stream ends with a chunk that counts tokens; `running_usage`: every chunk does
    ids             the answer has the ids of its tokens (`return_token_ids`)
    ids_as_tokens   log probabilities name tokens as `token_id:5` (`return_tokens_as_token_ids`)
    """

    model: str
    prompts: list[Prompt] = []
    turns: list[Turn] | None = None
    sampling: AskedSampling
    n: int = 1
    default_tokens: int
    stream: bool = False
    usage: bool = False
    running_usage: bool = False
    ids: bool = False
    ids_as_tokens: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return self.turns is not None

    def submits(self) -> list[dict[str, Any]]:
        """The keyword arguments of a client's request, one for each prompt; their place is the `prompt_index`."""
        common = {**asdict(self.sampling), "n": self.n, "default_tokens": self.default_tokens}
        if self.turns is not None:
            return [{"messages": [asdict(turn) for turn in self.turns], **common}]
        return [{"prompt": prompt, **common} for prompt in self.prompts]
