"""A worker that does both, and is told how long outputs will be while its engine computes."""

from tests.core.build import assign, capacity, sent
from tests.core.test_lengths import NAMED, learnt, named
from tests.core.test_mixed import decoding, start
from tetri.engine_request import Sampled, Span, StepDone
from tetri.wire.handover import Grant, Offer

ROOMY = capacity(blocks=60, context=100, max_batch=4, chunk_tokens=8)


def asking(**changes):
    """`x` is decoded here; its second attempt begins here too, and the classifier is asked about it."""
    told = start(**{"capacity": ROOMY, **learnt("classifier"), **changes})
    key = decoding(told)
    told.tell(assign("x", prompt=8, attempt=2, max_tokens=20))
    told.later()
    assert told.core.stepping and [span.key for span in told.core.prefill.expected] == ["p:x:2"]
    return told, key


def test_an_answer_during_a_step_takes_nobody_out_of_that_step():
    """The engine has computed the first attempt, which the second one replaces."""
    told, key = asking()
    assert told.tell(named(key="p:x:2")) == []
    assert key in told.core.decode.batch.running
    spans = (*told.core.prefill.expected, Span(key, 50, 51))
    told.tell(StepDone(spans, (Sampled(key, (6,), None),)))
    (request,) = told.core.decode.requests.values()
    assert (request.offer.attempt, request.length) == (2, NAMED) and told.core.prefill.requests["p:x:2"].granted
    assert told.core.estimator.status().late == 0


def test_an_answer_during_a_step_goes_to_others_at_once():
    told, key = asking(role="prefill", others=[("d1", "decode")])
    assert [offer.length for offer in sent(told.tell(named(key="p:x:2")), "d1", Offer)] == [NAMED]
    assert not sent(told.tell(StepDone((*told.core.prefill.expected, Span(key, 50, 51)))), "d1", Grant)
