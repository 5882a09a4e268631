"""Which choices share a prefill, and which are given up together."""

from tests.core.broker.serving import RID, serving, submit
from tests.core.build import capacity, staged, tokens
from tetri.core.broker.groups import given_up_together, sharing_a_prefill
from tetri.request import Stage


def choices(*events):
    told = serving("p1", ("d1", {"capacity": capacity(max_batch=4)}))
    told.tell(submit(n=3), *events)
    return [told.core.table.choices[name] for name in (RID, f"{RID}.1", f"{RID}.2")]


def test_those_without_output_share_one():
    first, second, third = choices(tokens("p1", f"{RID}.1", 0, 7))
    assert sharing_a_prefill([first, second, third]) == [[first, third], [second]]


def test_those_that_wait_for_the_same_prefill_are_given_up_together():
    first, second, third = choices(tokens("p1", f"{RID}.1", 0, 7), staged("d1", f"{RID}.1", Stage.WAITING))
    assert given_up_together(first) == [first, third] and given_up_together(second) == [second]
