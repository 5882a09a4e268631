import json

import pytest
from wire.openai.outputs import USAGE, reply

from tetri.wire.openai import Answer, ApiError, Stream
from tetri.wire.openai.reply import counted


@pytest.mark.parametrize("kind", [Answer, Stream])
def test_how_choices_were_served_stands_at_the_end(kind):
    answer = reply(kind, stream=kind is Stream, n=2)
    for choice in (1, 0):
        answer.end(0, choice, "stop", USAGE, (1,), "a", record={"receipt": {"chunks": choice}, "jct_s": 0.5})
    last = answer.finish().removesuffix(b"\n\ndata: [DONE]\n\n").split(b"data: ")[-1]
    assert json.loads(last)["tetri"] == {
        "choices": [
            {"index": 0, "receipt": {"chunks": 0}, "jct_s": 0.5},
            {"index": 1, "receipt": {"chunks": 1}, "jct_s": 0.5},
        ]
    }


@pytest.mark.parametrize("kind", [Answer, Stream])
@pytest.mark.parametrize(("reason", "status"), [("cancelled", 499), ("deadline", 504), ("error", 500)])
def test_an_end_that_leaves_the_answer_incomplete_is_raised(kind, reason, status):
    with pytest.raises(ApiError) as failed:
        reply(kind, stream=kind is Stream).end(0, 0, reason, USAGE)
    assert failed.value.status == status


def test_tokens_are_counted_as_the_api_does():
    assert counted(5, 3) == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
