"""Bodies of completions and chat completions into what they ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tetri.request import AskedSampling, TokenId, choices_problem, sampling_problem
from tetri.wire.openai.asked import Asked, Prompt
from tetri.wire.openai.bodies import ChatBody, Common, CompletionBody, converted, model_named, read, renamed
from tetri.wire.openai.errors import ApiError
from tetri.wire.openai.turns import turns_of

COMPLETION_TOKENS = 16  # output tokens of a completion that names no limit
CHAT_TOKENS = 1 << 30  # of an answer in a conversation that names none: as many as fit
MAX_CHOICES = 1024  # of all prompts of a request
_GREEDY = 1e-5  # a temperature below counts as 0

# The fields that mean the same here and to the broker.
_SAME = (
    *("top_p", "min_p", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "stop_token_ids", "ignore_eos"),
)


def read_completion(body: bytes, models: Sequence[str], context: int | None = None) -> Asked:
    """The body of `/v1/completions`. `models`: all names of the model, the first one for requests that name none;
    `context`: most tokens of prompt and output, if known. Raises ApiError."""
    fields, ignored = read(body, CompletionBody)
    limit = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    sampling = _sampling(fields, fields.logprobs)
    _check(fields.n, sampling, limit, context, {})
    return _asked(fields, models, ignored, sampling, limit, prompts=_prompts(fields.prompt, fields.n))


def read_chat(body: bytes, models: Sequence[str], context: int | None = None) -> Asked:
    """The body of `/v1/chat/completions`; see `read_completion`."""
    fields, ignored = read(body, ChatBody)
    names = {"logprobs": "top_logprobs"}
    limit = CHAT_TOKENS if fields.max_tokens is None else fields.max_tokens
    if fields.max_completion_tokens is not None:
        limit, names["max_tokens"] = fields.max_completion_tokens, "max_completion_tokens"
    if fields.top_logprobs and not fields.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: send logprobs true too", param="top_logprobs")
    sampling = _sampling(fields, fields.top_logprobs if fields.logprobs else None)
    _check(fields.n, sampling, limit, context, names)
    return _asked(fields, models, ignored, sampling, limit, turns=turns_of(fields.messages))


def _sampling(fields: Common, logprobs: int | None) -> AskedSampling:
    seed = fields.seed
    return AskedSampling(
        temperature=0.0 if 0 <= fields.temperature < _GREEDY else fields.temperature,
        top_k=0 if fields.top_k == -1 else fields.top_k,
        seed=None if seed is None or seed == -1 else seed % (1 << 63),
        stop=[fields.stop] if isinstance(fields.stop, str) else fields.stop,
        logprobs=logprobs,
        **{name: getattr(fields, name) for name in _SAME},
    )


def _check(n: int, sampling: AskedSampling, limit: int, context: int | None, names: Mapping[str, str]) -> None:
    """Raise ApiError for values that cannot be served. As in vLLM, a limit may exceed what fits after the prompt, but
    not the context. `names`: of fields that have another name in the body."""
    problem = sampling_problem(sampling.limited(limit)) or choices_problem(n, sampling)
    if context is not None and context < limit < CHAT_TOKENS:
        problem = problem or f"max_tokens must be at most {context}, the context of the model"
    if problem is None:
        return
    line = renamed(problem, names)
    known = {*(names.get(name, name) for name in AskedSampling.__struct_fields__), "n"}
    param = next((found for found in re.findall(r"\w+", line) if found in known), None)
    raise ApiError(400, line, param=param)


def _asked(
    fields: Common,
    models: Sequence[str],
    ignored: tuple[str, ...],
    sampling: AskedSampling,
    limit: int,
    **what: Any,
) -> Asked:
    options = fields.stream_options
    if not fields.stream and (options.include_usage or options.continuous_usage_stats):
        raise ApiError(400, "stream_options needs stream: send stream true too", param="stream_options")
    usage = bool(options.include_usage)
    return Asked(
        model=model_named(fields.model, models),
        sampling=sampling,
        n=fields.n,
        default_tokens=limit,
        stream=fields.stream,
        usage=usage,
        running_usage=usage and bool(options.continuous_usage_stats),
        ids=fields.return_token_ids,
        ids_as_tokens=fields.return_tokens_as_token_ids,
        ignored=ignored,
        **what,
    )


def _prompts(prompt: str | list[Any], n: int) -> list[Prompt]:
    """A text, token ids, or a list of either, as a list. `n`: choices of each."""
    prompts: list[Prompt]
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    if several and len(prompt) * n > MAX_CHOICES:  # checked first, for converting many takes long
        raise ApiError(400, f"prompt: at most {MAX_CHOICES} prompts x n, got {len(prompt)} x {n}", param="prompt")
    if isinstance(prompt, str):
        prompts = [prompt]
    elif several:
        kind = list[str] if isinstance(prompt[0], str) else list[list[TokenId]]
        prompts = converted(prompt, kind, "prompt")
    else:
        prompts = [converted(prompt, list[TokenId], "prompt")]
    if not all(prompts):
        raise ApiError(400, "prompt: a prompt needs at least one token", param="prompt")
    return prompts
