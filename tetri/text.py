"""Conversion between text and token ids: tokenizers, chat templates, incremental detokenization, stop strings.

A token is a sequence of bytes; text is these bytes decoded as UTF-8, with U+FFFD for invalid ones. Text therefore
grows token by token through an incremental UTF-8 decoder and equals the text of decoding all tokens at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tetri.control_tokens import ControlTokens
from tetri.request import Turn

ROLES = ("system", "user", "assistant")
NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

_SURROGATES = 0xD800  # the first of 2048 code points that no valid text contains


class TextError(ValueError):
    """A tokenizer cannot be used, or a text cannot be tokenized; one line."""


class Tokenizer(Protocol):
    """A tokenizer. `eos_ids`: token ids that end the output. `specials`: id of each special token, by its text.
    `template_problem`: why the model's chat template cannot be used; None if it can, or if the model has none."""

    eos_ids: frozenset[int]
    specials: Mapping[str, int]
    template_problem: str | None

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, including the tokens that the model expects before it. Raises TextError."""

    def chat(self, turns: Sequence[Turn]) -> list[int]:
        """The token ids of a conversation, up to the start of the assistant's answer. Raises TextError."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, possibly part of a character; empty for a special token."""


class ByteTokenizer:
    """The tokenizer of engines without a model: ids below 256 are bytes, other ids become a hexadecimal number."""

    eos_ids: frozenset[int] = frozenset()
    specials: Mapping[str, int] = {}
    template_problem: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def chat(self, turns: Sequence[Turn]) -> list[int]:
        lines = "".join(f"{turn.role}: {turn.content}\n" for turn in turns)
        return self.encode(lines + "assistant: ")

    def token_bytes(self, token: int) -> bytes:
        return bytes((token,)) if 0 <= token < 256 else f"{token:x} ".encode()


class ChatTemplate:
    """A model's chat template. It is untrusted code that comes with the weights: it runs in a sandbox, and may raise
    anything. `named`: the text of each named special token. Raises TextError."""

    def __init__(self, source: str, named: Mapping[str, str]) -> None:
        from jinja2 import TemplateSyntaxError

        try:
            self._template = _sandbox().from_string(source)
        except TemplateSyntaxError as error:
            raise TextError(f"line {error.lineno}: {_line(error.message).rstrip('.')}") from None
        except Exception as error:
            raise TextError(_line(error)) from None
        self._named = named

    def render(self, messages: Sequence[Mapping[str, str]], *, ask: bool = True) -> str:
        """The text of a conversation. `ask`: up to the start of the assistant's answer. Raises TextError."""
        try:
            # Templates tell by None that there are none, whatever else they test.
            absent = {"tools": None, "documents": None}
            return str(self._template.render(messages=messages, add_generation_prompt=ask, **absent, **self._named))
        except TextError:
            raise
        except Exception as error:
            raise TextError(f"the chat template fails on this conversation: {_line(error)}") from None


class ModelTokenizer:
    """The tokenizer of a checkpoint. `load_tokenizer` creates it. `specials_in_prompt`: whether special tokens in the
    text of a prompt count, or are ordinary text."""

    def __init__(
        self,
        inner: Any,
        template: ChatTemplate | None,
        template_problem: str | None,
        eos_ids: frozenset[int],
        specials_in_prompt: bool,
    ) -> None:
        self.eos_ids = eos_ids
        self.template_problem = template_problem
        self._inner = inner
        self._template = template
        self._specials_in_prompt = specials_in_prompt
        self._bytes: dict[int, bytes] = {}  # cache, by token id
        added = inner.get_added_tokens_decoder()
        self.specials: Mapping[str, int] = {token.content: i for i, token in added.items() if token.special}
        self._silent = frozenset(self.specials.values())
        # Some models separate turns by added tokens that are not marked as special.
        turns = "" if template is None else _separators(template)
        others = {token.content: i for i, token in added.items() if token.content.strip() and token.content in turns}
        self._controls = ControlTokens(inner, {**others, **self.specials})

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        if self._specials_in_prompt:
            return list(self._inner.encode(text).ids)
        before, after = self._around()
        return [*before, *self._controls.encode(self._controls.hidden(text), _utf8), *after]

    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that the model expects before and after a prompt."""
        whole, bare = self._inner.encode("a").ids, self._inner.encode("a", add_special_tokens=False).ids
        at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]

    def chat(self, turns: Sequence[Turn]) -> list[int]:
        """As in `Tokenizer`. Only the template makes control tokens; in the text of a turn they are ordinary text."""
        if self._template is None:
            reason = self.template_problem or "the model has no chat template"
            raise TextError(f"{reason}: send a prompt instead of messages")
        for turn in turns:
            if turn.role not in ROLES:  # a template may make a token of it
                raise TextError(f"a role must be one of {', '.join(ROLES)}, got {turn.role[:40]!r}")
            _utf8(turn.content)
        controls = self._controls
        text = self._template.render(_messages(turns, controls.hidden))
        if any(controls.may_begin(turn.content) for turn in turns):
            # A template that changes or joins texts might complete a control token that is in none of them.
            broken = self._template.render(_messages(turns, controls.broken))
            text = text if controls.named(text) == controls.named(broken) else broken
        ids = controls.encode(text, _utf8)
        if controls.among(ids) != controls.named(text):  # an unusual tokenizer, which normalizes before it looks
            raise TextError("a text of this conversation spells a special token")
        return ids

    def token_bytes(self, token: int) -> bytes:
        if token not in self._bytes:
            self._bytes[token] = self._spell(token)
        return self._bytes[token]

    def _spell(self, token: int) -> bytes:
        piece = None if token in self._silent or not 0 <= token < 1 << 32 else self._inner.id_to_token(token)
        if piece is None:  # special tokens and padding of the vocabulary have no text
            return b""
        try:
            return bytes(_byte_of()[char] for char in piece)
        except KeyError:  # an added token is stored as plain text
            return bytes(piece.encode())


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of complete output tokens."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def load_tokenizer(folder: str | Path, *, specials_in_prompt: bool = True) -> Tokenizer:
    """Read tokenizer.json and the files that belong to it in a checkpoint's folder. `specials_in_prompt`: whether
    special tokens in the text of a prompt count. A chat template that cannot be used is only a `template_problem`.
    Raises TextError."""
    from tokenizers import Tokenizer as Inner

    folder = Path(folder)
    text = _read(folder / "tokenizer.json")
    try:
        inner = Inner.from_str(text)
    except Exception as error:  # the tokenizers package raises no narrower type
        raise TextError(f"{folder}/tokenizer.json: cannot be used: {_line(error)}") from error
    decoder = (json.loads(text).get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        raise TextError(f"{folder}/tokenizer.json: decoder {decoder} is not supported, only ByteLevel is")
    inner.no_truncation()
    inner.no_padding()
    settings = _json(folder / "tokenizer_config.json")
    named = {name: _content(settings[name]) for name in NAMED_TOKENS if settings.get(name)}
    eos_ids = _eos_ids(folder)
    if (token := inner.token_to_id(named.get("eos_token", ""))) is not None:
        eos_ids |= {token}
    if not eos_ids:
        raise TextError(f"{folder}: no file names the end-of-sequence token (generation_config.json should)")
    template = problem = None
    try:
        template = _template(folder, settings, named)
    except TextError as error:
        problem = f"the chat template cannot be used: {error}"
    return ModelTokenizer(inner, template, problem, eos_ids, specials_in_prompt)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"character {error.start} of the text is half a surrogate pair") from None


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character stands for in byte-level vocabularies (since GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: cannot be read: {_line(error)}") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise TextError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TextError(f"{path}: must hold an object")
    return found


def _eos_ids(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _template(folder: Path, settings: dict[str, Any], named: dict[str, str]) -> ChatTemplate | None:
    """The chat template, from the first place that has one. Raises TextError."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return _compiled(path, _read(path), named)
    for path, there in ((folder / "tokenizer_config.json", settings), (folder / "chat_template.json", None)):
        source = (_json(path) if there is None else there).get("chat_template")
        if source is not None:
            return _compiled(path, _default(path, source), named)
    return None


def _default(path: Path, source: Any) -> str:
    """The template called "default", if there are several, by name. Raises TextError."""
    if isinstance(source, list):
        source = {each["name"]: each.get("template") for each in source if isinstance(each, dict) and "name" in each}
    if isinstance(source, dict):
        if "default" not in source:
            raise TextError(f"{path}: none of its templates is called default: {', '.join(map(str, source))}")
        source = source["default"]
    if not isinstance(source, str):
        raise TextError(f"{path}: chat_template must be a text, not {json.dumps(source)[:40]}")
    return source


def _compiled(path: Path, source: str, named: dict[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate(source, named)
    except TextError as error:
        raise TextError(f"{path}: {error}") from None


@cache
def _sandbox() -> Any:
    """What templates are written for: the environment of transformers' apply_chat_template."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Renders what is inside {% generation %}, which marks the text of the assistant for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    sandbox.filters["tojson"] = _tojson
    return sandbox


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> None:
    raise TextError(f"the chat template refuses this conversation: {_line(reason)}")


def _messages(turns: Sequence[Turn], keep_out: Callable[[str], str]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": keep_out(turn.content)} for turn in turns]


def _separators(template: ChatTemplate) -> str:
    """The text of a conversation without contents; "" if the template refuses it."""
    try:
        return template.render([{"role": role, "content": ""} for role in ("user", "assistant", "user")], ask=False)
    except TextError:
        return ""


def _line(error: object) -> str:
    return " ".join(str(error).split())


class Released(NamedTuple):
    """Text that may be shown now. `stopped`: a stop string was found. `counted`: number of output tokens that belong
    to the answer so far, without those after the token that completed a stop string."""

    text: str
    stopped: bool
    counted: int


class Stopper:
    """Detokenizes output incrementally, up to a stop string.

    The stop string that is complete first ends the text; if several are complete at the same character, the longest
    counts. The answer is the text before it and does not depend on how the text is divided into tokens. Text that may
    be the beginning of a stop string is held back.

    A special token has no text, so a stop string that contains one also matches the token's id; the string may have
    other text around it. Spelled out by ordinary tokens, it matches as any text does.

    `output`: tokens of this answer that an earlier Stopper has processed; their text is not released again.
    `min_tokens`: only a stop string that a later token than the first `min_tokens` completes counts, as in vLLM. It may
    have begun before. `silent`: tokens that have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), output: Sequence[int] = (), min_tokens: int = 0,
        silent: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self.stopped, self.counted = False, 0
        self._min_tokens = min_tokens
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._marks = _marks(tokenizer.specials, stop)
        by_id = [_marked(text, self._marks) for text in stop]
        self._stop = tuple(dict.fromkeys([*stop, *by_id]))
        self._mark_of = dict.fromkeys(silent, "") | {tokenizer.specials[text]: m for text, m in self._marks.items()}
        self._hidden = dict.fromkeys(map(ord, self._marks.values()))
        self._first = frozenset(text[0] for text in self._stop)
        self._reach = max(map(len, self._stop), default=1) - 1  # most characters that may have to be held back
        self._held = ""
        self.feed(output)

    def feed(self, ids: Iterable[int]) -> Released:
        """Process the next output tokens; tokens after a stop string are ignored."""
        shown = []
        for token in ids:
            if self.stopped:
                break
            self.counted += 1
            shown.append(self._release(self._text_of(token)))
        return Released(self._shown("".join(shown)), self.stopped, self.counted)

    def finish(self) -> Released:
        """End the output and release the text that was held back; an incomplete character becomes U+FFFD."""
        text = "" if self.stopped else self._release(self._utf8.decode(b"", final=True))
        text += self._held
        self._held = ""
        return Released(self._shown(text), self.stopped, self.counted)

    def advance(self, ids: Iterable[int], final: bool) -> tuple[str, int | None]:
        """Process the next output tokens, the last ones if `final`. Returns the text to show, and the number of tokens
        up to a stop string; None without one."""
        released = self.feed(ids)
        text = released.text
        if final and not released.stopped:
            released = self.finish()
            text += released.text
        return text, released.counted if released.stopped else None

    def _text_of(self, token: int) -> str:
        """The characters that a token completes, or the mark of a special token in a stop string."""
        mark = self._mark_of.get(token)
        if mark is None:
            return self._utf8.decode(self._token_bytes(token))
        return self._utf8.decode(b"", final=True) + mark  # no character continues beyond a special token

    def _shown(self, text: str) -> str:
        return text.translate(self._hidden) if self._hidden else text

    def _release(self, new: str) -> str:
        if not self._stop or not new:
            return new
        # A match that ends in `new` cannot begin before the held text: only a possible beginning is held.
        text = self._held + new
        if self.counted > self._min_tokens:
            old = len(self._held) + 1
            found = [(text.find(stop, max(0, old - len(stop))), len(stop)) for stop in self._stop]
            ends = [(at + length, at) for at, length in found if at >= 0]
            if ends:
                self.stopped, self._held = True, ""
                return text[: min(ends)[1]]
        keep = self._keep(text)
        self._held = text[keep:]
        return text[:keep]

    def _keep(self, text: str) -> int:
        """The first index at which the rest of the text may be the beginning of a stop string."""
        for at in range(max(0, len(text) - self._reach), len(text)):
            if text[at] in self._first:
                rest = text[at:]
                if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stop):
                    return at
        return len(text)


def _marks(specials: Mapping[str, int], stop: Sequence[str]) -> dict[str, str]:
    """A mark for each special token that a stop string contains, longer tokens first. It is half a surrogate pair,
    which neither decoded output nor a stop string can contain."""
    named = sorted((text for text in specials if any(text in each for each in stop)), key=len, reverse=True)
    return {text: chr(_SURROGATES + number) for number, text in enumerate(named)}


def _marked(text: str, marks: Mapping[str, str]) -> str:
    for special, mark in marks.items():
        text = text.replace(special, mark)
    return text
