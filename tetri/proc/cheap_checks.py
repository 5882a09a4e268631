"""Checks of a Submit that cost almost nothing. They come before its text is tokenised, which may take seconds, and
before its content is hashed."""

from __future__ import annotations

from tetri.core.broker.delivery import Problem, problem_of_length, problem_without_prompt
from tetri.wire.clients import Submit

CHARS_A_TOKEN = 64  # no token of a usual vocabulary has more on average
CHAT_ROLES = ("system", "user", "assistant")
MAX_TURNS = 2048


def submit_problem(message: Submit, context: int) -> Problem | None:
    """Why this request cannot be served, in one line that states what is allowed; None when its text may be tokenised.
    `context`: of the model, in tokens."""
    turns = message.messages
    if (message.prompt is None) == (turns is None):
        return Problem("invalid", "give exactly one of prompt and messages")
    if (wrong := problem_without_prompt(message)) is not None:
        return Problem("invalid", wrong)
    if (most := message.sampling.max_tokens) is not None and most >= context:
        return Problem("too_long", f"max_tokens is {most}, the model's context holds {context} with the prompt")
    if turns is not None:
        if not 0 < len(turns) <= min(MAX_TURNS, context):
            most = min(MAX_TURNS, context)
            return Problem("invalid", f"the conversation has {len(turns)} messages, 1 to {most} are allowed")
        if any(turn.role not in CHAT_ROLES for turn in turns):
            return Problem("invalid", f"the role of a message must be one of {', '.join(CHAT_ROLES)}")
        length = sum(len(turn.content) for turn in turns)
    elif isinstance(message.prompt, str):
        length = len(message.prompt)
    else:
        return problem_of_length(len(message.prompt or ()), context)  # the core checks the ids
    if length > CHARS_A_TOKEN * context:
        why = f"the prompt has {length} characters, far more than the context holds: shorten it"
        return Problem("too_long", why)
    return None
