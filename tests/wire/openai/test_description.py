import json
import re

import pytest

from tetri.wire.openai import ApiError, openapi, read_chat, read_completion
from tetri.wire.openai.bodies import NEUTRAL, ChatBody, CompletionBody

DESCRIPTION = openapi("1.2")
SCHEMAS = DESCRIPTION["components"]["schemas"]
CASES = [(CompletionBody, read_completion, {"prompt": "a"})]
CASES += [(ChatBody, read_chat, {"messages": [{"role": "user", "content": "a"}]})]


def references(value):
    """All references inside a JSON value."""
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [])
    ):
        if name == "$ref":
            yield inner
        yield from references(inner)


def test_it_is_complete():
    assert DESCRIPTION["openapi"].startswith("3.1.") and DESCRIPTION["info"]["version"] == "1.2"
    assert {f"#/components/schemas/{name}" for name in SCHEMAS} >= {*references(DESCRIPTION)}
    posts = {path for path, methods in DESCRIPTION["paths"].items() if "post" in methods}
    assert posts == {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}
    assert json.loads(json.dumps(DESCRIPTION)) == DESCRIPTION  # and nothing of it is lost in JSON


@pytest.mark.parametrize(("kind", "read", "bare"), CASES)
def test_it_has_all_fields_and_their_defaults(kind, read, bare):
    properties = SCHEMAS[kind.__name__]["properties"]
    assert {*properties} == {*kind.__struct_fields__, *NEUTRAL[kind]}
    assert SCHEMAS[kind.__name__]["required"] == [*bare]
    defaults = {name: field["default"] for name, field in properties.items() if "default" in field}
    defaults["stream_options"] = None
    assert read(json.dumps({**bare, **defaults}).encode(), ["m"]) == read(json.dumps(bare).encode(), ["m"])


@pytest.mark.parametrize(("kind", "read", "bare"), CASES)
def test_the_ranges_are_those_that_count(kind, read, bare):
    """The bounds of a range are accepted, and beyond them a value is refused."""
    seen = set()
    for name, field in SCHEMAS[kind.__name__]["properties"].items():
        schema = field.get("anyOf", [field])[0]
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound not in schema or name == "seed":
                continue
            seen.add(name)
            more = {"logprobs": True} if name == "top_logprobs" else {"max_tokens": 1 << 30}
            read(json.dumps({**bare, **more, name: schema[bound]}).encode(), ["m"])
            if (name, bound) != ("top_k", "minimum"):  # -1 is another way to send 0
                with pytest.raises(ApiError, match=rf"^{re.escape(name)}\b"):
                    read(json.dumps({**bare, **more, name: schema[bound] + beyond}).encode(), ["m"])
    assert seen >= {"n", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "min_tokens", "max_tokens"}
