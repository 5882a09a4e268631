"""What is sent, and what a reply looks like."""

import msgspec
import pytest
from fake_broker import STATUS, pack

import tetri
from tests.client.script import GARBAGE
from tetri.client import BadRequest
from tetri.client.frames import parse
from tetri.request import Slo

BAD_S = (0, -1, float("nan"), 1e6)
BAD_SLOS = ((Slo(ttft_s="5"), "ttft_s: expected float"), ({"itl_s": 1}, "unknown field"), (5, "slo: expected object"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *((both, "exactly one of prompt and messages") for both in ({}, {"prompt": "x", "messages": []})),
        *(({"prompt": prompt}, "string or a list of token ids") for prompt in (3, ["a"])),
        *(({"prompt": prompt}, "cannot be encoded") for prompt in ("\ud800", [1 << 70])),
        ({"prompt": "x" * (5 << 20)}, "at most"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        *(({"prompt": "x", "max_tokens": most}, "max_tokens: expected int") for most in ("9", True)),
        ({"prompt": "x", "temperature": "hot"}, "temperature: expected float, got str"),
        ({"prompt": "x", "stop": [3]}, r"stop\[0\]: expected str, got int"),
        ({"prompt": "x", "stop": [""]}, "stop takes at most"),
        ({"prompt": "x", "heat": 3}, "'heat' is not a sampling parameter; known: max_tokens"),
        *(({"prompt": "x", "deadline_s": most}, "deadline_s must be above 0") for most in (0, float("nan"))),
        ({"prompt": "x", "deadline_s": "5"}, "deadline_s: expected float, got str"),
        *(({"prompt": "x", "slo": Slo(tpot_s=most)}, "tpot_s must be above 0 and at most 86400 s") for most in BAD_S),
        *(({"prompt": "x", "slo": slo}, says) for slo, says in BAD_SLOS),
        *(({"prompt": "x", name: 10**400}, f"{name}: number out of range") for name in ("deadline_s", "temperature")),
        ({"prompt": "x", "max_tokens": 10**400}, "max_tokens must be from 1 .* many digits"),
        ({"prompt": "x", "seed": 10**5000}, "seed must be from 0 .* many digits"),
        *(({"prompt": "x", "n": n}, "n: expected int") for n in (0, "2", 1.5)),
        ({"prompt": "x", "n": 17, "temperature": 1}, "n must be at most 16, got 17"),
        ({"prompt": "x", "n": 2}, "n must be 1 when temperature is 0, got 2"),
        ({"prompt": "x", "default_tokens": 0}, "default_tokens: expected int >= 1"),
        ({"prompt": "x", "min_tokens": 9, "default_tokens": 8}, r"min_tokens \(9\) must not exceed .* \(8, the"),
        ({"prompt": "x", "logprobs": 21}, "logprobs must be from 0 to 20, got 21"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias: expected int, got str"),
        ({"prompt": "x", "logit_bias": {5: 101}}, "logit_bias must be from -100 to 100"),
        ({"prompt": "x", "stop_token_ids": [-1]}, r"stop_token_ids\[0\]: expected int >= 0"),
        ({"messages": [5]}, "a Turn or a mapping"),
        ({"messages": 5}, "messages must be a list"),
    ],
)
def test_requests_that_make_no_sense_are_not_sent(tmp_path, arguments, says):
    with tetri.Client(f"ipc://{tmp_path}/none") as client, pytest.raises(BadRequest, match=says) as caught:
        client.events(**arguments)
    assert "\n" not in str(caught.value)


def test_what_a_reply_looks_like():
    assert msgspec.to_builtins(parse(pack(**STATUS))) == STATUS
    assert all(parse(frame) is None for frame in GARBAGE if b"other" not in frame)
