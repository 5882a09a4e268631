"""tetri-cli chat against a fake broker: the history, and what leaves it."""

import pytest
from fake_broker import answer

from tests.cli.fakes import refuse


def test_chat_keeps_the_history(run, broker):
    fake = broker()
    lines = b"first\n\nsecond\n/exit\nnever\n"
    assert run("chat", "--system", "be brief", stdin=lines) == (0, "one two three\n" * 2, "")
    roles = [(turn["role"], turn["content"]) for turn in fake.seen[-1]["messages"]]
    assert roles == [
        ("system", "be brief"),
        ("user", "first"),
        ("assistant", "one two three"),
        ("user", "second"),
    ]


def test_a_refused_turn_does_not_end_the_chat(run, broker):
    def reply(message):
        return refuse(message) if message["messages"][-1]["content"] == "bad" else answer(message)

    fake = broker(reply)
    status, out, err = run("chat", stdin=b"bad\ngood\n")
    assert (status, out, err) == (0, "one two three\n", "tetri-cli: the prompt is empty\n")
    assert [turn["content"] for turn in fake.seen[-1]["messages"]] == ["good"]
    assert run("chat", stdin=b"bad")[0] == 1


@pytest.mark.parametrize("system", [[], ["--system", "be brief"]])
def test_the_oldest_turns_leave_a_chat_that_outgrows_the_context(run, broker, system):
    def reply(message):
        text = "".join(turn["content"] for turn in message["messages"] if turn["role"] == "user")
        return answer(message) if len(text) <= 4 else full(message)

    def full(message):
        reason = "the prompt has 9 tokens, the model's context holds 4: shorten the prompt"
        return [{"type": "refused", "key": message["key"], "reason": reason, "retry_after_s": None}]

    fake = broker(reply)
    status, out, err = run("chat", *system, stdin=b"aa\nbb\ncccc\ntoo long\ndd\n")
    assert status == 0 and out == "one two three\n" * 4
    assert "the oldest 2 turns left out" in err and "the oldest turn left out" in err
    assert "context holds 4" in err  # of the line that is too long alone
    kept = [turn["content"] for turn in fake.seen[-1]["messages"] if turn["role"] != "assistant"]
    assert kept == [*system[1:], "dd"]


def test_a_chat_without_a_limit_makes_space_for_an_answer_and_at_last_takes_what_there_is(run, broker):
    def reply(message):
        turns, most = len(message["messages"]), message["sampling"].get("max_tokens", 1)
        return answer(message) if turns == 1 and most < 256 else full(message)

    def full(message):
        reason = "300 tokens fit into no decode instance: the largest holds 299"
        return [{"type": "refused", "key": message["key"], "reason": reason, "retry_after_s": None}]

    fake = broker(reply)
    assert run("chat", stdin=b"one\ntwo\n")[:2] == (0, "one two three\n" * 2)
    asked = [(len(each["messages"]), each["sampling"].get("max_tokens")) for each in fake.seen]
    assert asked == [(1, 256), (1, None), (3, 256), (1, 256), (1, None)]
    assert run("chat", "--max-tokens", "256", stdin=b"one\n")[0] == 1
