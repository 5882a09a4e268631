"""The messages of a request for its client, and the memory that they and the request take."""

import tracemalloc
from array import array

import pytest
from msgspec.structs import replace

from tests.core.broker.serving import cancel, done, replies, serving, submit
from tests.core.build import capacity, ending, staged, tokens
from tetri.core.actions import Detokenize, Detokenized
from tetri.core.broker.outbox import Outbox
from tetri.core.broker.requests import CHOICE_BYTES, LOGPROB_BYTES, OUTPUT_BYTES, TOP_BYTES
from tetri.request import Receipt, Stage, TokenLogprob, Usage, choice_id
from tetri.wire.clients import Accepted, Delta, Done, Refused

DONE = Done(
    **{"rid": "r1", "reason": "stop", "usage": Usage(prompt_tokens=2, completion_tokens=4), "timeline": {}},
    **{"ttft_s": None, "jct_s": 1.0, "receipt": Receipt(prompt_tokens=2), "error": None},
)
# Tokens 0, 1 and 2, 3, and then text that was held back.
PARTS = [(0, [5], "a"), (1, [6, 7], "bé"), (3, [8], ""), (4, [], "tail")]
DELTAS = [Delta(rid="r1", start=start, ids=ids, text=text) for start, ids, text in PARTS]


def messages(*, ended=True):
    return [*DELTAS, DONE] if ended else DELTAS[:3]


def outbox(*, ended=True, sent=0):
    made = Outbox("r1", 0, array("I", [5, 6, 7, 8]))
    for message in messages(ended=ended):
        if isinstance(message, Done):
            made.end(message)
        else:
            made.add(message.start, message.ids, message.text)
    made.send_next(sent)
    return made


@pytest.mark.parametrize(
    ("ended", "start", "first"),
    [
        *((True, start, first) for start, first in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 3), (9, 3))),
        *((False, start, first) for start, first in ((0, 0), (3, 2), (4, 3), (9, 3))),
    ],
)
def test_what_a_client_with_some_tokens_lacks(ended, start, first):
    made = outbox(ended=ended)
    made.send_from(start)
    assert made.unsent == len(messages(ended=ended)) - first
    assert made.send_next(99) == messages(ended=ended)[first:] and made.unsent == 0


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_messages_come_in_order_a_part_at_a_time(most):
    made, parts = outbox(), []
    while made.unsent:
        parts.append(made.send_next(most))
    assert [message for part in parts for message in part] == messages() and made.send_next(most) == []
    assert all(len(part) == most for part in parts[:-1])


def test_what_did_not_arrive_is_found_and_all_after_it_is_unsent():
    made, sent = outbox(sent=5), 5
    for index in (4, 3, 1, 2, 0):
        sent = min(sent, index)
        assert made.unsend(messages()[index]) and made.unsent == 5 - sent
    made.send_next(5)
    for start, ids, text in ((2, [7], "bé"), (1, [6, 7], "c"), (4, [], ""), (5, [9], "d")):
        assert not made.unsend(Delta(rid="r1", start=start, ids=ids, text=text)) and made.unsent == 0
    empty = Outbox("r1", 0, array("I"))
    assert not empty.unsend(DONE) and not empty.unsend(DELTAS[0]) and empty.send_next(1) == []


def test_how_many_tokens_there_are_and_a_client_was_sent():
    made = outbox(ended=False)
    sent = [(made.tokens_sent, len(made.send_next(1))) for _ in range(4)]
    assert sent == [(0, 1), (1, 1), (3, 1), (4, 0)]
    assert (made.tokens, made.text_bytes, Outbox("r1", 0, array("I")).tokens) == (4, 4, 0)
    assert made.done is None and outbox().done == DONE


# ---------------------------------------------------------------- memory, through the core

COUNT = 8


def large(**limits):
    """A broker whose limits are far away, without timelines, which have an account of their own."""
    workers = [(iid, {"capacity": capacity(blocks=1 << 16, context=1 << 16, max_batch=16)}) for iid in ("p1", "d1")]
    return serving(*workers, limits={"context": 1 << 16, "vocabulary": 1 << 16, "timelines_mib": 0, **limits})


def taken(prompt, output, n=1, **asked):
    """Bytes that a request takes with so many tokens a choice, each with a Delta of its own and four bytes of text."""
    told = large()
    rids = [f"r{number}" for number in range(COUNT)]

    def tell(event):
        for action in told.core.handle(event, 0.0):
            if isinstance(action, Detokenize):
                told.core.handle(Detokenized(action.rid, action.start, action.ids, "word", None, False), 0.0)

    tracemalloc.start()
    for rid in rids:
        made = submit(rid, range(300, 300 + prompt), max_tokens=4000, n=n, **asked)
        tell(replace(made, rid=rid, content=rid.encode()))
        del made
    for index in range(output):
        for rid in [choice_id(rid, number) for rid in rids for number in range(n)]:
            token = 300 + index
            if "logprobs" in asked:
                token = TokenLogprob(token, -1.5 * index, {token + place: -0.5 * place for place in range(21)})
            tell(tokens("d1" if index else "p1", rid, index, token))
            if not index:
                tell(staged("d1", rid, Stage.DECODE))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert told.core.table.weight >= size
    return size / COUNT


def test_a_token_of_a_prompt_takes_at_most_8_bytes_and_one_of_the_output_24():
    """The differences of two lengths: what every request takes does not count. No string nor number is shared."""
    assert (taken(3000, 1) - taken(1000, 1)) / 2000 <= 8
    assert (taken(10, 1200) - taken(10, 200)) / 1000 <= 24


def test_a_further_choice_takes_at_most_2_kib_and_a_token_with_20_likely_ones_at_most_312():
    assert (taken(10, 1, n=9) - taken(10, 1)) / 8 <= CHOICE_BYTES == 2048
    most = OUTPUT_BYTES + LOGPROB_BYTES + 20 * TOP_BYTES
    assert (taken(10, 260, logprobs=20) - taken(10, 60, logprobs=20)) / 200 <= most == 312


def test_a_request_counts_with_all_that_it_may_produce_and_then_with_what_it_has():
    told = large()
    table, fixed = told.core.table, 4096
    told.tell(submit("a", range(10), max_tokens=1000), submit("b", range(20), max_tokens=500))
    assert table.weight == 2 * fixed + 8 * 30 + 24 * 1500
    told.tell(tokens("p1", "r1", 0, 7), staged("d1", "r1", Stage.DECODE), tokens("d1", "r1", 1, 8, 9))
    assert table.weight == 2 * fixed + 8 * 30 + 24 * 1500
    assert done(told.tell(*ending("d1", "r1", 3, 10))).usage.completion_tokens == 4
    assert table.weight == 2 * fixed + 8 * 30 + 24 * 504  # kept for its client
    told.later(2.1)
    assert table.weight == fixed + 8 * 20 + 24 * 500


def test_texts_that_are_longer_than_usual_count():
    told = large()
    told.edge = False
    told.tell(submit("a", [1], max_tokens=4), tokens("p1", "r1", 0, 7))
    before = told.core.table.weight
    told.tell(Detokenized("r1", 0, (7,), "x" * 40, None, False))
    assert told.core.table.weight == before
    told.tell(tokens("p1", "r1", 1, 8), Detokenized("r1", 1, (8,), "x" * 1000, None, False))
    assert told.core.table.weight == before + 1000


def test_beyond_max_mib_requests_are_refused_until_others_are_forgotten():
    told = large(max_mib=1)
    one = {"prompt": range(1000), "max_tokens": 12_000}  # 300,096 bytes
    assert all(isinstance(replies(told.tell(submit(key, **one)))[0], Accepted) for key in "abc")
    (refused,) = replies(told.tell(submit("d", **one)))
    assert refused == Refused(key="d", reason="the requests here may need 1 of 1 MiB, try later", retry_after_s=1.0)
    assert isinstance(replies(told.tell(submit("small")))[0], Accepted)
    assert isinstance(replies(told.tell(cancel("r1"), submit("d", **one)))[-1], Accepted)  # it has produced nothing
    (never,) = replies(told.tell(submit("e", [1], max_tokens=50_000)))
    assert never.reason == "the request may need 1204104 bytes, the broker has 1 MiB for all requests"
    assert never.retry_after_s is None
