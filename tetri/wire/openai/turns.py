"""Messages of a conversation as the turns that the model's chat template renders."""

from __future__ import annotations

from collections.abc import Sequence

from tetri.request import Turn
from tetri.wire.openai.bodies import Message, Part
from tetri.wire.openai.errors import ApiError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TEXTS = ("text", "input_text", "output_text")


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """The turns of a conversation. Several system messages at its beginning become one, since many templates know
    only one. Raises ApiError."""
    if not messages:
        raise ApiError(400, "messages: a conversation needs at least one message", param="messages")
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
    leading = next((at for at, turn in enumerate(turns) if turn.role != "system"), len(turns))
    if leading > 1:
        text = "\n\n".join(turn.content for turn in turns[:leading])
        turns[:leading] = [Turn(role="system", content=text)]
    return turns


def _turn(message: Message, where: str) -> Turn:
    role = _ROLES.get(message.role)
    if role is None:
        raise _refused(f"{where}.role", f"{message.role[:40]!r} is not supported: {', '.join(_ROLES)} are")
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise _refused(f"{where}.{name}", "is not supported: leave it out")
    content = message.content
    if content is None and role != "assistant":
        raise _refused(f"{where}.content", "missing")
    if isinstance(content, list):
        content = "\n".join(_text(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    return Turn(role=role, content=content or "")


def _text(part: str | Part, where: str) -> str:
    if isinstance(part, str):
        return part
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type is not None and part.type not in _TEXTS:
        raise _refused(f"{where}.type", f"{part.type[:40]!r} is not supported: only text is")
    if part.text is None:
        raise _refused(f"{where}.text", "missing")
    return part.text


def _refused(path: str, problem: str) -> ApiError:
    return ApiError(400, f"{path}: {problem}", param=path)
