"""docs/api.md: every example in its tables is treated as the table says, and every field has its line."""

import json
import re
from pathlib import Path

import pytest
from msgspec.structs import asdict, replace

from tetri.wire.openai import ApiError, read_chat, read_completion
from tetri.wire.openai.bodies import NEUTRAL, ChatBody, CompletionBody
from tetri.wire.openai.errors import TYPES

PAGE = (Path(__file__).parents[3] / "docs/api.md").read_text(encoding="utf-8")
MODELS = ["tetri", "other"]
ENDPOINTS = {
    "completions": (read_completion, CompletionBody, {"prompt": "a"}),
    "chat": (read_chat, ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
}


def table(title):
    """The rows of the table under a title, as lists of cells without their backquotes."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def values(cell):
    return [json.loads(value) for value in re.findall(r"`([^`]*)`", cell)]


def fields(endpoint):
    return [*table("Fields of both"), *table(f"Fields of {endpoint}")]


CASES = [(endpoint, *row[:4]) for endpoint in ENDPOINTS for row in fields(endpoint)]


@pytest.mark.parametrize(
    ("endpoint", "field", "treatment", "example", "accepted"), CASES, ids=lambda cell: cell.strip("`")[:40]
)
def test_a_field_is_treated_as_its_line_says(endpoint, field, treatment, example, accepted):
    read, _, bare = ENDPOINTS[endpoint]
    name, (example,) = field.strip("`"), values(example)
    assert name in example

    def asked(body):
        return read(json.dumps(bare | body).encode(), MODELS)

    def without(body):
        return asked({key: value for key, value in body.items() if key != name})

    match treatment:
        case "supported":
            assert asked(example) != without(example) and asked(example).ignored == ()
        case "ignored":
            assert asked(example) == replace(without(example), ignored=(name,))
        case "refused":
            with pytest.raises(ApiError, match=rf"^{name} is not supported: leave it out") as refused:
                asked(example)
            assert (refused.value.status, refused.value.param) == (400, name)
            assert [value for value in values(accepted) if asked({name: value}) != asked({})] == []
            assert [*NEUTRAL[ENDPOINTS[endpoint][1]][name]] == values(accepted)
        case _:
            raise AssertionError(treatment)
    assert asked({name: None} if name not in bare else {}) == asked({})


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_has_a_line(endpoint):
    _, kind, _ = ENDPOINTS[endpoint]
    listed = {treatment: set() for treatment in ("supported", "refused", "ignored")}
    for name, treatment, *_ in fields(endpoint):
        listed[treatment].add(name.strip("`"))
    assert listed["supported"] == {*kind.__struct_fields__} and listed["refused"] == {*NEUTRAL[kind]}


@pytest.mark.parametrize(("key", "treatment", "example", "becomes"), table("Messages"))
def test_a_message_is_treated_as_its_line_says(key, treatment, example, becomes):
    body = json.dumps({"messages": values(example)}).encode()
    if treatment == "refused":
        path = rf"^messages\[0\]\.{key.strip('`')}\b"
        with pytest.raises(ApiError, match=path) as refused:
            read_chat(body, MODELS)
        assert refused.value.status == 400 and re.match(path, refused.value.param)
    else:
        assert treatment in ("supported", "ignored") and key.strip("`") in example
        assert [asdict(turn) for turn in read_chat(body, MODELS).turns] == values(becomes)


def test_the_types_of_errors():
    listed = {int(status): type.strip("`") for status, type, _ in table("Errors")}
    assert listed == TYPES


@pytest.mark.model
def test_every_field_of_vllm_has_a_line():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for endpoint, theirs in (("completions", CompletionRequest), ("chat", ChatCompletionRequest)):
        assert {*theirs.model_fields} - {name.strip("`") for name, *_ in fields(endpoint)} == set()
