"""The description of the API that `/openapi.json` answers with."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

from tetri.request import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOPS, RANGES, TokenId
from tetri.wire.openai.bodies import NEUTRAL, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_BODIES: tuple[type[Struct], ...] = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
_TOKEN_IDS = {"type": "array", "items": msgspec.json.schema(TokenId), "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
# What the types of the bodies leave open, by field.
_NARROWED: dict[str, dict[str, Any]] = {
    "messages": {"minItems": 1},
    "n": {"maximum": MAX_CHOICES},
    "prompt": {
        "anyOf": [
            _TEXT,
            _TOKEN_IDS,
            {"type": "array", "items": _TEXT, "minItems": 1},
            {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
        ]
    },
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    **{name: {"minimum": least, "maximum": most} for name, least, most in RANGES},
}
_NARROWED["max_completion_tokens"] = _NARROWED["max_tokens"]
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string"]},
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "additionalProperties": {"type": "integer", "minimum": 0},
}
_LIST = {"type": "object", "required": ["object", "data"], "properties": {"data": {"type": "array"}}}
# path -> what it does, its body, the fields of its answer
_POSTS: dict[str, tuple[str, type[Struct], dict[str, Any]]] = {
    "/v1/completions": ("Continue prompts", CompletionBody, {"choices": {"type": "array"}, "usage": _USAGE}),
    "/v1/chat/completions": ("Answer a conversation", ChatBody, {"choices": {"type": "array"}, "usage": _USAGE}),
    "/tokenize": ("Tokenize a text or a conversation", TokenizeBody, {"tokens": {"type": "array"}, "count": {}}),
    "/detokenize": ("The text of tokens", DetokenizeBody, {"prompt": {"type": "string"}}),
}
_GETS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/models": ("The model, under each of its names", _LIST),
    "/version": ("The version of the server", {"type": "object"}),
    "/health": ("Whether the gateway is alive", {}),
    "/ping": ("Whether the gateway is alive", {}),
    "/ready": ("Whether every pair of instances in service has lately carried KV", {"type": "object"}),
    "/openapi.json": ("This description", {"type": "object"}),
    "/live/requests/{rid}": ("How a request was served, or is", {"type": "object"}),
    "/live/instances/{iid}": ("The last minutes of an instance", {"type": "object"}),
}
_STREAMS: dict[str, tuple[str, str]] = {  # path -> what it does, the type of its answer
    "/live": ("What happens in the deployment, as server-sent events of JSON", "text/event-stream"),
    "/metrics": ("What the deployment has measured, for Prometheus", "text/plain"),
    "/": ("A live page of the deployment", "text/html"),
}
_ERRORS = {
    "400": "The body is wrong, or asks for what is not supported: `param` names the field",
    "401": "The API key is missing or wrong",
    "404": "There is no such model, request or instance",
    "413": "The body is too large",
    "429": "Too many requests wait: retry after `retry-after` seconds",
    "503": "The deployment cannot be reached",
    "504": "The deadline passed before the answer",
}


def openapi(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 description. `version`: of the server."""
    _, schemas = msgspec.json.schema_components(_BODIES, ref_template="#/components/schemas/{name}")
    for body in _BODIES:
        _narrow(schemas[body.__name__], body)
    paths = {
        **{path: {"post": _post(path, *what)} for path, what in _POSTS.items()},
        **{path: {"get": _get(path, summary, _json(schema))} for path, (summary, schema) in _GETS.items()},
        **{path: {"get": _get(path, summary, {kind: {}})} for path, (summary, kind) in _STREAMS.items()},
    }
    keys = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "tetri", "version": version, "description": "OpenAI's API; docs/api.md has all fields."},
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": _ERROR}, "securitySchemes": keys},
        "security": [{"key": []}, {}],
    }


def _narrow(schema: dict[str, Any], body: type[Struct]) -> None:
    """Describe what a body's types leave open: ranges, nulls, and fields with which only some values are allowed."""
    fields = schema["properties"]
    for name, field in fields.items():
        field = {**field, **_NARROWED.get(name, {})}
        if name not in schema["required"]:  # a null counts as a field that is not there
            default = field.pop("default", None)
            field = {"anyOf": [field, {"type": "null"}], "default": default}
        fields[name] = field
    for name, values in NEUTRAL.get(body, {}).items():
        fields.setdefault(name, {"enum": [*values, None], "description": "Not supported with other values."})


def _post(path: str, summary: str, body: type[Struct], fields: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": [*fields], "properties": fields}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if "choices" in fields:
        content["text/event-stream"] = {}  # OpenAPI 3.1 cannot describe events
    reference = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": reference}},
        "responses": {"200": {"description": "The answer", "content": content}, **_errors(*_ERRORS)},
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}} if schema else {}


def _get(path: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    answer = {"description": "The answer", **({"content": content} if content else {})}
    names = re.findall(r"\{(\w+)\}", path)
    given = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    found = {"summary": summary, "responses": {"200": answer, **_errors("401", "503", *(["404"] if names else []))}}
    return {**found, "parameters": given} if given else found


def _errors(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}
