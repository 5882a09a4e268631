"""All clients of a simulated deployment: which requests they refuse to send, and what they note of the answers."""

import pytest
from msgspec import structs

from tetri.request import Receipt, Slo, Usage
from tetri.sim.clients import Clients
from tetri.sim.kernel import Kernel
from tetri.sim.setup import SimError
from tetri.sim.texts import RecordedText
from tetri.sim.traces import Arrival
from tetri.wire.clients import Accepted, Done, Refused


def asking(*arrivals, submit=lambda submitted: None):
    """Clients that have asked, and how many answers were told of."""
    kernel, told = Kernel(), []
    clients = Clients(kernel, iter(arrivals), submit, told.append)
    clients.start()
    kernel.run()
    return clients, told


SLO = Slo(ttft_s=1.0, tpot_s=0.25)


def done(prompt, output, reason="length", error=None):
    receipt = Receipt(prompt_tokens=prompt, prefill_instance="p0", decode_instance="d0", attempts=2)
    usage = Usage(prompt_tokens=prompt, completion_tokens=output)
    made = {"reason": reason, "error": error, "usage": usage, "receipt": receipt, "slo": SLO}
    return Done(rid="r", timeline={}, ttft_s=1.0, jct_s=3.0, **made)


@pytest.mark.parametrize(
    ("arrivals", "says"),
    [
        ([], "there are no requests"),
        ([Arrival(1.0, 5, 5), Arrival(0.5, 5, 5)], "arrives before its predecessor"),
        ([Arrival(-1.0, 5, 5)], "arrives before"),
        ([Arrival(float("nan"), 5, 5)], "arrives before"),
        ([Arrival(0.0, 0, 5)], "prompt and output must have at least 1 token"),
        ([Arrival(0.0, 5, 5, text=RecordedText(5, 5), n=2)], "a request with a recorded text has one choice"),
    ],
)
def test_wrong_requests_are_one_line(arrivals, says):
    with pytest.raises(SimError, match=says):
        asking(*arrivals)


def test_answers_are_noted_and_counted():
    clients, told = asking(*[Arrival(0.0, 3, 5)] * 3)
    clients.receive_reply(b"0", Accepted(key="0", rid="r", prompt_tokens=3, max_tokens=8))
    assert clients.open == 3 and not told
    clients.receive_reply(b"1", done(3, 5))
    clients.receive_reply(b"0", Refused(key="0", reason="too long"))
    clients.receive_reply(b"2", done(3, 2, "error", "d0 was lost"))
    assert told == [1, 2, 3] and clients.over
    ends = [("refused", "too long"), ("done", ""), ("failed", "d0 was lost")]
    assert [(each.state, each.why) for each in clients.outcomes] == ends
    found = clients.outcomes[1]
    assert (found.ttft_s, found.jct_s, found.tpot_s) == (1.0, 3.0, 0.5)
    assert (found.prefill, found.decode, found.attempts) == ("p0", "d0", 2)
    assert [each.slo_result for each in clients.outcomes] == ["failed", "tpot", "failed"] and found.slo == SLO


def test_of_a_request_with_several_choices_the_last_end_counts_and_one_failure_is_enough():
    asked = []
    clients, told = asking(*[Arrival(0.0, 3, 5, n=2)] * 2, submit=asked.append)
    assert [(each.n, each.sampling.temperature) for each in asked] == [(2, 1.0)] * 2
    first, second = done(3, 5), done(3, 5)
    clients.receive_reply(b"0", first)
    assert clients.open == 2 and not told and clients.outcomes[0].state == "open"
    clients.receive_reply(b"0", structs.replace(second, choice=1, ttft_s=0.5, jct_s=4.5))
    clients.receive_reply(b"1", done(3, 2, "error", "d0 was lost"))
    clients.receive_reply(b"1", structs.replace(second, choice=1))
    assert told == [1, 2] and clients.over
    found = clients.outcomes[0]
    assert (found.state, found.ttft_s, found.jct_s, found.tpot_s) == ("done", 0.5, 4.5, 1.0)
    assert (clients.outcomes[1].state, clients.outcomes[1].why) == ("failed", "d0 was lost")


def test_an_answer_with_other_tokens_than_asked_for_is_no_result():
    clients, _ = asking(Arrival(0.0, 3, 5))
    with pytest.raises(SimError, match=r"got 3 \+ 4 tokens"):
        clients.receive_reply(b"0", done(3, 4))
