"""The bodies of requests: their fields and defaults, and what is refused because it would change the output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from tetri.request import Positive, TokenId
from tetri.wire.openai.errors import ApiError

S = TypeVar("S", bound=Struct)


class StreamOptions(Struct, frozen=True):
    """What a stream tells besides output."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(Struct, kw_only=True):
    """The fields of both endpoints. A null counts as a field that is not there."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Positive = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[TokenId, float] = {}
    stop: str | list[str] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class CompletionBody(Common, kw_only=True):
    """The body of a completion."""

    prompt: str | list[Any]
    logprobs: int | None = None


class Part(Struct):
    """A part of a message's content."""

    type: str | None = None  # None: text
    text: str | None = None
    refusal: str | None = None


class Message(Struct):
    """One message of a conversation."""

    role: str
    content: str | list[str | Part] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None


class ChatBody(Common, kw_only=True):
    """The body of a chat completion."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


class TokenizeBody(Struct, kw_only=True):
    """The body of `/tokenize`: either a prompt or messages."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(Struct, kw_only=True):
    """The body of `/detokenize`."""

    model: str = ""
    tokens: list[TokenId]


# Fields that would change the output and are not supported -> the values with which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}
NEUTRAL: dict[type[Struct], dict[str, tuple[Any, ...]]] = {
    CompletionBody: {**_NEUTRAL, "add_special_tokens": (True,), "prompt_embeds": ([],), "suffix": ("",)},
    ChatBody: {
        **_NEUTRAL,
        **_CHAT_NEUTRAL,
        "add_special_tokens": (False,),
        "audio": (),
        "documents": ([],),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "return_prompt_text": (False,),
        "tool_choice": ("none", "auto"),
        "web_search_options": (),
    },
    TokenizeBody: _CHAT_NEUTRAL,
}


def read(body: bytes, kind: type[S]) -> tuple[S, tuple[str, ...]]:
    """A body and the names of its fields that have no effect. Raises ApiError."""
    fields = _object(body)
    neutral = NEUTRAL.get(kind, {})
    if fields.get("tool_choice") == "none":  # the model does not see the tools
        neutral = {name: values for name, values in neutral.items() if name != "tools"}
    for name, value in fields.items():
        if name in neutral and value not in neutral[name]:
            raise ApiError(400, f"{name} is not supported: {_advice(name, neutral[name])}", param=name)
    ignored = fields.keys() - neutral.keys() - set(kind.__struct_fields__)
    return converted(fields, kind), tuple(sorted(ignored))


def _advice(name: str, neutral: Sequence[Any]) -> str:
    if name == "tools":
        return 'leave it out, or send "none" as tool_choice'
    values = " or ".join(msgspec.json.encode(value).decode() for value in neutral)
    return f"leave it out, or send {values}" if values else "leave it out"


def _object(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object that are not null."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {_sentence(str(error))}") from None
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: too deeply nested") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    # Some clients write whole numbers with a fraction.
    return {name: _whole(field) for name, field in value.items() if field is not None}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def converted(value: Any, kind: Any, where: str = "") -> Any:
    """A decoded JSON value as `kind`. `where`: its path in the body. Raises ApiError that names the field."""
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), where) from None


_PLACE = re.compile(r" - at `(key` in `)?\$([^`]*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")


def _refusal(text: str, where: str) -> ApiError:
    """An error of msgspec as a line that begins with the field's path."""
    key, path = found.groups("") if (found := _PLACE.search(text)) else ("", "")
    path = where + path.replace("[...]", "")
    if missing := _MISSING.search(text):
        path, what = f"{path}.{missing[1]}", "missing"
    else:
        what = ("in a key, " if key else "") + _sentence(_PLACE.sub("", text))
    path = path.lstrip(".")
    return ApiError(400, f"{path}: {what}" if path else what, param=path or None)


def _sentence(text: str) -> str:
    for noise in ("`", " - at $[...]", " | null", "JSON is malformed: "):
        text = text.replace(noise, "")
    return text[:1].lower() + text[1:]


def model_named(name: str, models: Sequence[str]) -> str:
    """The model's name as the client spelled it; the first one if it named none. Raises ApiError."""
    if name and name not in models:
        known = ", ".join(models)
        raise ApiError(404, f"the model {name[:100]!r} does not exist: {known} does", param="model")
    return name or models[0]


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A line about fields with other names for some of them."""
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), text)
