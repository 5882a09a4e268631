"""compare_api: whether two servers of OpenAI's API give the same answers: tetri and vLLM, on the same model in float32.

Asks both servers the same: 50 prompts as completions and in conversations, greedy, with log probabilities, and the
edges of limits, stop texts, tokenizing and errors. The reference is a server, or what a server has answered earlier:

    tools/compare_api --url http://127.0.0.1:8000 --reference http://127.0.0.1:8001
    tools/compare_api --url http://127.0.0.1:8001 --record tests/openai/vllm.json
    tools/compare_api --url http://127.0.0.1:8000 --answers tests/openai/vllm.json

Log probabilities may differ by 1e-3. Where the reference's two most likely tokens are as close as that, another token
is no difference: it is printed, and what follows it is not compared. Exit status 1 for any other difference.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import click

from tetri.bench.report import BenchError, Program, as_json, give, one_line, progress
from tetri.paths import FILE, OutFile

CONTEXT = 2304  # tokens, of both servers
TOLERANCE = 1e-3  # of a log probability
TOP, TOKENS = 5, 12  # log probabilities and output tokens of the 50 prompts
AT_ONCE, PATIENCE_S = 8, 300.0
DIGITS = 5  # of a recorded log probability
Answer = dict[str, Any]
EXPECTED = (OSError, ValueError)

SENTENCES = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n    ",
    "Q: What is the boiling point of water?\nA:",
    "import numpy as np\n\n",
    "Die Hauptstadt von Deutschland ist",
    "La tour Eiffel se trouve à",
    "日本の首都は",
    "Привет, как",
    "The emoji for a smile is 🙂 and for a heart it is",
    "naïve café résumé",
    '{"name": "Ada", "born": ',
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,\n\n",
    "To be, or not to be,",
    "   leading spaces and\ttabs",
    "a",
    "<html><body>",
    "The special token <|im_end|> is",
    "Water is made of hydrogen and",
    "Roses are red,\nviolets are blue,\n",
    "x" * 40,
    "Step 1: Preheat the oven.\nStep 2:",
    "The quick brown fox jumps over the lazy dog. " * 8,
)


class Case(NamedTuple):
    """One question: a POST of `body` to `path`."""

    name: str
    path: str
    body: dict[str, Any]


# ---------------------------------------------------------------- the questions


def cases(model: str) -> list[Case]:
    """All questions, for a server that calls its model `model`."""
    made = [*_completions(), *_chats(), *_limits(), *_stops(), *_sampled(), *_tokenized(), *_wrong()]
    return [Case(name, path, {"model": model, **body}) for name, path, body in made]


def _prompts() -> list[str]:
    """50 prompts: sentences of many kinds, and pieces of growing length of a text."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    pieces = [text[97 * number :][: 20 + 3 * number**2] for number in range(50 - len(SENTENCES))]
    return [*SENTENCES, *pieces]


def _plain(text: str) -> str:
    """A text without special tokens: inside a message they are ordinary text for tetri, and special for vLLM."""
    return text.replace("<|", "< |")


def _completion(name: str, prompt: Any, **more: Any) -> Case:
    return Case(name, "/v1/completions", {"prompt": prompt, "temperature": 0, "logprobs": TOP, **more})


def _chat(name: str, content: Any, **more: Any) -> Case:
    asked = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    return Case(name, "/v1/chat/completions", {**asked, **more})


def _completions() -> Iterator[Case]:
    for number, prompt in enumerate(_prompts()):
        yield _completion(f"completion {number}", prompt, max_tokens=TOKENS)


def _chats() -> Iterator[Case]:
    for number, prompt in enumerate(_prompts()):
        yield _chat(f"chat {number}", _plain(prompt), max_tokens=TOKENS)
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "two plus two?"}]
    yield _chat("chat, parts", parts, max_tokens=TOKENS)
    system, user = {"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you?"}
    turns = [system, user, {"role": "assistant", "content": "Arr!"}, {"role": "user", "content": "And your ship?"}]
    yield _chat("chat, turns", "", messages=turns, max_completion_tokens=TOKENS)
    yield _chat("chat, no log probabilities", "Name a colour.", max_tokens=TOKENS, logprobs=False, top_logprobs=None)
    yield _chat("chat, none of the top", "Name a colour.", max_tokens=TOKENS, top_logprobs=0)


def _limits() -> Iterator[Case]:
    """max_tokens at its least, without any, and where the context ends."""
    yield _completion("limit of one token", "The sea is", max_tokens=1)
    yield _chat("limit of one token in a chat", "What is the sea?", max_tokens=1)
    yield _completion("no limit", "The sea is")
    yield _completion("log probabilities of the token alone", "The sea is", logprobs=0)
    yield _completion("the last tokens of the context", [4093] * (CONTEXT - 2), max_tokens=2, logprobs=None)
    yield _completion("fewer than the default before the end", [4093] * (CONTEXT - 3), logprobs=None)
    yield _completion("one more than the context has", [4093] * (CONTEXT - 2), max_tokens=3, logprobs=None)
    yield _completion("a prompt as long as the context", [4093] * CONTEXT, max_tokens=1, logprobs=None)
    yield _completion("more than the context", "The sea is", max_tokens=CONTEXT, stop=" of")
    yield _completion("a limit above the context", "The sea is", max_tokens=CONTEXT + 1)
    words = "sea " * (CONTEXT - 60)
    yield _chat("a chat to the context's end", words, ignore_eos=True, logprobs=False, top_logprobs=None)
    yield _chat("a chat longer than the context", words + "sea " * 60, logprobs=False, top_logprobs=None)
    yield _completion("no token", "The sea is", max_tokens=0)


def _stops() -> Iterator[Case]:
    """Stop texts: met inside a token, over several tokens, with the last token, before min_tokens, and never."""
    prompt = "The capital of France is"  # it goes on: " Paris.\n\nThe answer is ..."
    stops: dict[str, Any] = {
        "word": " answer",
        "inside": "ari",
        "several": ["zebra", "answer is", "The"],
        "never": "zebra",
    }
    stops |= {"newline": "\n", "first": " Paris", "over tokens": ".\n\nThe", "letter": ["e"], "empty list": []}
    for name, stop in stops.items():
        yield _completion(f"stop {name}", prompt, stop=stop, max_tokens=16)
    hello = "Say hello."
    for name, stop in {"word": " am", "inside": "elp", "over tokens": "to assist", "never": "zebra"}.items():
        yield _chat(f"stop {name} in a chat", hello, stop=stop, max_tokens=16)
    yield _completion("stop with the last token", prompt, stop=[" answer"], max_tokens=6)
    yield _completion("stop after min_tokens", prompt, stop=["."], min_tokens=4, max_tokens=40)
    yield _completion("stop at a token", prompt, stop_token_ids=[198], max_tokens=16)
    yield _chat("the end of a text", hello, max_tokens=40)
    yield _chat("past the end of a text", hello, max_tokens=40, ignore_eos=True, logprobs=False, top_logprobs=None)
    yield _completion("a number of prompts", ["The sea is", "The sun is"], max_tokens=8)
    yield _completion("prompts of ids", [[504, 2985, 314], [504]], max_tokens=8)


def _sampled() -> Iterator[Case]:
    """What changes greedy output, and how tokens are named."""
    prompt = "The cat and the dog and the"
    changes: dict[str, Any] = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0}
    changes |= {"logit_bias": {"2644": -100, "198": 3}, "return_token_ids": True, "return_tokens_as_token_ids": True}
    for name, value in changes.items():
        yield _completion(name, prompt, max_tokens=16, **{name: value})
        yield _chat(f"{name} in a chat", prompt, max_tokens=16, **{name: value})


def _tokenized() -> Iterator[Case]:
    for number, prompt in enumerate(SENTENCES):
        yield Case(f"tokenize {number}", "/tokenize", {"prompt": prompt})
        yield Case(f"tokenize chat {number}", "/tokenize", {"messages": [{"role": "user", "content": _plain(prompt)}]})
    yield Case("tokenize without special tokens", "/tokenize", {"prompt": "The sea", "add_special_tokens": False})
    yield Case("detokenize", "/detokenize", {"tokens": [1, 2, 3, 504, 2985, 314, 4636, 242, 221, 4636]})


def _wrong() -> Iterator[Case]:
    """What both servers refuse."""
    hi = "Hi"
    yield _completion("greedy choices", hi, n=2)
    yield _completion("unknown model", hi, model="nobody")
    yield _completion("no prompt", None)
    yield _completion("too many log probabilities", hi, logprobs=21)
    for name, value in {"temperature": -1, "top_p": 0, "max_tokens": "many", "n": 0, "top_k": -5}.items():
        yield _completion(f"wrong {name}", hi, **{name: value})
    yield _chat("top_logprobs alone", hi, logprobs=False)
    yield _chat("no messages", hi, messages=[])
    yield Case("detokenize a text", "/detokenize", {"tokens": "Hi"})


# ---------------------------------------------------------------- the answers


def asked(url: str, made: Sequence[Case]) -> dict[str, Answer]:
    """What a server answers, by the names of the questions. Raises OSError and BenchError."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(partial(_ask, url), made))
    return {case.name: answer for case, answer in zip(made, answers, strict=True)}


def model_of(url: str) -> str:
    """The name of the model that a server has. Raises OSError and BenchError."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=PATIENCE_S) as response:
        found = json.load(response)["data"][0]
    if found["max_model_len"] != CONTEXT:
        raise BenchError(f"{url} has a context of {found['max_model_len']} tokens: start it with {CONTEXT}")
    return str(found["id"])


def _ask(url: str, case: Case) -> Answer:
    body = json.dumps(case.body).encode()
    request = urllib.request.Request(f"{url}{case.path}", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return essence(json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            return {"status": error.code, "message": "message" in json.load(error)["error"]}


def essence(body: Mapping[str, Any]) -> Answer:
    """What of an answer must be equal, in a form that is short as JSON."""
    if "choices" not in body:  # of /tokenize and /detokenize
        return {name: body[name] for name in ("count", "tokens", "token_strs", "prompt") if body.get(name) is not None}
    usage = body["usage"]
    made: Answer = {"usage": [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]]}
    made["choices"] = [_choice(choice) for choice in sorted(body["choices"], key=lambda choice: choice["index"])]
    return made | _given(body, "prompt_token_ids")


def _choice(choice: Mapping[str, Any]) -> Answer:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    made: Answer = {"text": text, "end": choice["finish_reason"]}
    made |= _given(choice, "token_ids") | _given(choice, "prompt_token_ids")
    if (found := choice.get("logprobs")) is not None:
        made["tokens"] = _records(found["content"]) if "content" in found else _columns(found)
    return made


def _given(body: Mapping[str, Any], name: str) -> Answer:
    return {} if body.get(name) is None else {name: body[name]}


def _columns(found: Mapping[str, Any]) -> list[Any]:
    """Completions: of each token its text, log probability, the most likely ones, and its offset."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    rows = zip(*(found[name] for name in names), strict=True)
    return [[token, _rounded(value), _rounded_all(top or {}), offset] for token, value, top, offset in rows]


def _records(found: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Chat: likewise, without an offset. Bytes are left out: of a character in several tokens vLLM gives all bytes to
    the last one, tetri each token its own."""
    made = []
    for record in found:
        top = {each["token"]: each["logprob"] for each in record["top_logprobs"]}
        made.append([record["token"], _rounded(record["logprob"]), _rounded_all(top), None])
    return made


def _rounded(value: float) -> float:
    return round(value, DIGITS)


def _rounded_all(top: Mapping[str, float]) -> dict[str, float]:
    """Log probabilities by text, but for "": that is the text of every part of a character, so it names no token."""
    return {token: _rounded(value) for token, value in top.items() if token}


# ---------------------------------------------------------------- the comparison


class Found(NamedTuple):
    """What a comparison found: differences, and tokens that rounding alone may have decided."""

    differences: list[str]
    ties: list[str]


def compared(answers: Mapping[str, Answer], reference: Mapping[str, Answer]) -> Found:
    """Compare the answers to all questions with those of the reference."""
    found = Found([], [])
    for name in sorted(answers.keys() ^ reference.keys()):
        found.differences.append(f"{name}: only one side has an answer")
    for name, wanted in reference.items():
        if name in answers:
            _compare(name, answers[name], wanted, found)
    return found


def _compare(name: str, answer: Answer, wanted: Answer, found: Found) -> None:
    choices, others = answer.get("choices", []), wanted.get("choices", [])
    known = len(found.ties)
    if len(choices) == len(others):
        for choice, other in zip(choices, others, strict=True):
            _compare_choice(name, choice, other, found)
    rest, wanted_rest = _but(answer, "choices"), _but(wanted, "choices")
    if len(choices) != len(others) or (rest != wanted_rest and len(found.ties) == known):
        found.differences.append(f"{name}: {_short(rest)} instead of {_short(wanted_rest)}")


def _compare_choice(name: str, choice: Answer, wanted: Answer, found: Found) -> None:
    for at, (token, other) in enumerate(zip(choice.get("tokens", []), wanted.get("tokens", []), strict=False)):
        if token[0] != other[0] or token[3] != other[3]:
            gap = _gap(other[2])
            where = f"{name}: token {at} is {token[0]!r} {token[3]} instead of {other[0]!r} {other[3]} (gap {gap:.2g})"
            (found.ties if gap < TOLERANCE else found.differences).append(where)
            return
        if problem := _unlike(token, other):
            found.differences.append(f"{name}: token {at}, {other[0]!r}: {problem}")
            return
    rest, wanted_rest = _but(choice, "tokens"), _but(wanted, "tokens")
    rest["length"], wanted_rest["length"] = len(choice.get("tokens", [])), len(wanted.get("tokens", []))
    if rest != wanted_rest:
        found.differences.append(f"{name}: {_short(rest)} instead of {_short(wanted_rest)}")


def _gap(top: Mapping[str, float]) -> float:
    """By how much the most likely token beats the next one."""
    best = sorted(top.values(), reverse=True)[:2]
    return best[0] - best[1] if len(best) == 2 else 1.0


def _unlike(token: Sequence[Any], wanted: Sequence[Any]) -> str | None:
    """How the log probabilities of two equal tokens differ. Of the least likely ones, either may be among the top."""
    pairs = [(token[1], wanted[1])]
    top, other = token[2], wanted[2]
    if len(top) != len(other):
        return f"{len(top)} log probabilities instead of {len(other)}"
    pairs += [(top[name], value) for name, value in other.items() if name in top]
    if any(abs(a - b) > TOLERANCE for a, b in pairs):
        return f"log probabilities {token[1:3]} instead of {wanted[1:3]}"
    lowest = min(other.values(), default=0.0)
    strange = [*chain((top[name] for name in top.keys() - other), (other[name] for name in other.keys() - top))]
    return f"top {top} instead of {other}" if any(value - lowest > TOLERANCE for value in strange) else None


def _but(made: Answer, name: str) -> Answer:
    return {key: value for key, value in made.items() if key != name}


def _short(made: object) -> str:
    text = json.dumps(made, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]} ..."


# ---------------------------------------------------------------- the program


def recorded(answers: Mapping[str, Answer]) -> str:
    """The answers as JSON, one line each."""
    lines = (f"{json.dumps(name)}: {json.dumps(made, separators=(',', ':'))}" for name, made in answers.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


@click.command(cls=Program)
@click.option("--url", required=True, help="The server, such as http://127.0.0.1:8000.")
@click.option("--reference", help="The server to compare with.")
@click.option("--answers", type=FILE, help="Recorded answers to compare with.")
@click.option("--record", type=OutFile(), help="Write the server's answers to this file instead.")
@as_json
def main(url: str, reference: str | None, answers: Path | None, record: Path | None, as_json: bool) -> None:
    """Compare the answers of a server of OpenAI's API with those of another."""
    if sum(given is not None for given in (reference, answers, record)) != 1:
        raise click.UsageError("give one of --reference, --answers and --record")
    with one_line("compare_api", *EXPECTED):
        progress(f"asking {url}")
        own = asked(url, cases(model_of(url)))
        if record is not None:
            record.write_text(recorded(own))
            return
        known = json.loads(answers.read_text()) if answers is not None else {}
        if reference is not None:
            progress(f"asking {reference}")
            known = asked(reference, cases(model_of(reference)))
        found = compared(own, known)
    lines = [f"{len(own)} answers, {len(found.differences)} differ", *found.differences]
    lines += [f"no difference: {tie}" for tie in found.ties]
    give({"answers": len(own), "differences": found.differences, "ties": found.ties}, "\n".join(lines), as_json)
    sys.exit(1 if found.differences else 0)


if __name__ == "__main__":
    main(prog_name="compare_api")
