"""The dispatcher's own books; what it says is told in test_prefill.py."""

import pytest

from tests.core.build import assign, refuse, view
from tests.core.test_prefill import start
from tetri.core.actions import Broken
from tetri.core.prefill.decode_pool import Reservation
from tetri.policy.rules import Rules
from tetri.policy.views import Need

KEY = "p:a:1"


def offered(*decoders):
    told = start(decoders)
    told.tell(assign("a", prompt=8))
    told.step(("a", 7, None))
    told.core.dispatcher.check()
    return told


def test_an_older_view_is_no_news():
    told = offered("d1")
    told.tell(view(5, d1=3))
    version = told.core.peers.version
    told.tell(view(4, d1=9))
    assert told.core.peers.version == version
    told.tell(view(1, epoch=2, d1=9))  # of another monitor
    assert told.core.peers.version > version


def test_prompts_are_stalled_while_nobody_takes_the_first_of_them():
    told = offered("d1")
    core = told.core
    assert not core.reporter.load().stalled  # it is on offer
    told.tell(refuse("a"))
    assert core.reporter.load().stalled
    told.tell(view(9, d1=9))  # it is asked again
    assert not core.reporter.load().stalled


def test_who_waits_for_a_prediction_is_not_stalled():
    told = start(("d1",), rules=Rules(length="noisy"))
    told.tell(assign("a", prompt=8))
    told.later()
    assert KEY in told.core.prefill.started and not told.core.reporter.load().stalled


@pytest.mark.parametrize(
    "decoders, spoil, complaint",
    [
        (("d1",), lambda it: it._targets.clear(), "offers by instance are"),
        (("d1",), lambda it: it.unplaceable.update({KEY: it.requests[KEY]}), "stranded, and on offer or gone"),
        (("d1",), lambda it: it.offers.update({9: KEY}), "offer 9 is not what p:a:1 is on offer as"),
        (
            ("d1",),
            lambda it: it.pool.reservations.update({9: Reservation("d1", Need(1, 1, False))}),
            "claims of offers",
        ),
        ((), lambda it: it.unplaceable.clear(), "not all are in the line"),
    ],
)
def test_check_finds_what_is_wrong(decoders, spoil, complaint):
    told = offered(*decoders)
    spoil(told.core.dispatcher)
    with pytest.raises(Broken, match=complaint):
        told.core.dispatcher.check()
