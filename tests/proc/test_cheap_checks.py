"""What is refused before anything is tokenised."""

import pytest

from tetri.proc.cheap_checks import CHARS_A_TOKEN, MAX_TURNS, submit_problem
from tetri.request import AskedSampling, Turn
from tetri.wire.clients import Submit

HELLO = Turn(role="user", content="Hello")
CONTEXT = 4096


def problem(**fields):
    found = submit_problem(Submit(**{"key": "k", "secret": "s" * 22, **fields}), CONTEXT)
    return None if found is None else found.why


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "exactly one of prompt and messages"),
        ({"prompt": "a", "messages": [HELLO]}, "exactly one of prompt and messages"),
        ({"prompt": "a", "sampling": AskedSampling(top_p=0.0)}, "top_p must be above 0"),
        ({"prompt": "a", "secret": "s" * 21}, "the secret has 21 characters"),
        ({"prompt": "a", "deadline_s": 0.0}, "deadline_s must be above 0"),
        ({"prompt": "a", "sampling": AskedSampling(max_tokens=CONTEXT)}, "max_tokens is 4096"),
        ({"prompt": [1] * CONTEXT}, "the prompt has 4096 tokens, the model's context holds 4096: shorten the prompt"),
        ({"messages": []}, "0 messages, 1 to 2048"),
        ({"messages": [Turn(role="user", content="")] * 100_000}, "100000 messages, 1 to 2048"),
        ({"messages": [HELLO, Turn(role="x" * 3_000_000, content="")]}, "must be one of system, user, assistant"),
        ({"messages": [Turn(role="user", content="a" * 10_000)] * 27}, "270000 characters"),
        ({"prompt": "a" * (CHARS_A_TOKEN * CONTEXT + 1)}, "262145 characters"),
    ],
)
def test_it_is_refused_by_what_can_be_seen_at_once(fields, says):
    refused = problem(**fields)
    assert says in refused
    assert len(refused) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a" * (CHARS_A_TOKEN * CONTEXT)},
        {"prompt": [1] * (CONTEXT - 1)},
        {"messages": [HELLO] * MAX_TURNS},
    ],
)
def test_what_may_fit_is_tokenised(fields):
    assert problem(**fields) is None
