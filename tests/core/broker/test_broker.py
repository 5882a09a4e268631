"""The broker's core as clients and workers meet it: what it accepts, where it places, and what its status tells."""

from functools import partial

import pytest

from tests.core.broker.serving import RID, assigned, attach, cancel, refusal, replies, serving, submit
from tests.core.broker.work import opcodes
from tests.core.build import FINGERPRINT, capacity, fingerprint, heartbeat, ready, tokens
from tests.core.reading import kinds, sent
from tetri.core.actions import Broken, Release
from tetri.core.broker.requests import needed_bytes
from tetri.cost import Cost
from tetri.policy.rules import PREFILL_ROUTES, Rules
from tetri.request import PredictorStatus
from tetri.wire.clients import Accepted, MonitorStatus, Refused
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign, ClusterView

SECOND, THIRD = "r2", "r3"


@pytest.fixture
def served():
    return serving("p1", "p2", "d1", "d2", limits={"max_open": 3})


def test_a_request_is_accepted_and_assigned_to_the_least_loaded(served):
    first = served.tell(submit("a"))
    assert replies(first) == [Accepted(key="a", rid=RID, prompt_tokens=3, max_tokens=4)]
    (assign,) = sent(first, "p1", Assign)
    assert (assign.rid, assign.attempt, assign.prompt, assign.output) == (RID, 1, [1, 2, 3], [])
    assert assigned(served.tell(submit("b"))) == [("p2", SECOND, 1)]


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": ()}, "the prompt is empty"),
        ({"secret": "s" * 21}, "the secret has 21 characters, at least 22 are needed: draw 128 bits"),
        ({"prompt": (1, 100)}, "vocabulary of 100"),
        ({"prompt": (-1,)}, "vocabulary of 100"),
        ({"prompt": (1,) * 40}, "the model's context holds 40"),
        ({"prompt": (1,) * 30, "max_tokens": 11}, "room for 10"),
        ({"deadline_s": 0.0}, "deadline_s must be above 0"),
        ({"deadline_s": float("nan")}, "deadline_s must be above 0"),
        ({"deadline_s": 1e7}, "deadline_s must be above 0 and at most 1e+06"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(served, wrong, reason):
    actions = served.tell(submit(**wrong))
    assert kinds(actions) == ["Reply"] and reason in refusal(actions)
    assert replies(actions)[0].retry_after_s is None and served.status().counters["refused"] == 1


def test_what_fits_into_no_instance_is_refused():
    told = serving(("p1", {"capacity": capacity(blocks=9)}), ("d1", {"capacity": capacity(blocks=2)}))
    why = refusal(told.tell(submit(prompt=(1,) * 6, max_tokens=3)))
    assert "9 tokens fit into no decode instance: the largest holds 8" in why
    why = refusal(told.tell(submit(prompt=(1,) * 37, max_tokens=3)))
    assert "37 tokens fit into no prefill instance" in why
    assert isinstance(replies(told.tell(submit(prompt=(1,) * 5, max_tokens=3)))[0], Accepted)


@pytest.mark.parametrize(
    "prompt, blocks, context, most",
    [
        (10, 99, 1000, 128),  # the default
        (950, 999, 1000, 50),  # the context
        (999, 999, 1000, 1),
        (10, 9, 1000, 26),  # the larger decode instance, of 4 tokens a block
        (35, 9, 1000, 1),
        (35, 9, 36, 1),
    ],
)
def test_without_a_limit_a_request_gets_the_default_or_what_fits(prompt, blocks, context, most):
    large = {"capacity": capacity(blocks=999, context=2000)}
    decode = [(iid, {"capacity": capacity(blocks=each)}) for iid, each in (("d1", 1), ("d2", blocks))]
    served = serving(("p1", large), *decode, limits={"context": context})
    actions = served.tell(submit(prompt=[1] * prompt, max_tokens=None))
    assert replies(actions)[0].max_tokens == most
    (assign,) = sent(actions, kind=Assign)
    assert assign.sampling.max_tokens == most
    assert served.core.table.weight == needed_bytes(prompt, most)
    one_more = served.tell(submit("other", [1] * prompt, max_tokens=1000))
    assert "room for" in refusal(one_more) or "the largest holds" in refusal(one_more)


def test_without_a_limit_and_without_workers_the_context_decides():
    assert replies(serving().tell(submit(prompt=[1] * 30, max_tokens=None)))[0].max_tokens == 10


def test_without_a_limit_a_request_is_refused_only_when_no_token_fits():
    served = serving(("p1", {"capacity": capacity(blocks=99)}), ("d1", {"capacity": capacity(blocks=2)}))
    assert "9 tokens fit into no decode instance: the largest holds 8" in refusal(
        served.tell(submit(prompt=[1] * 8, max_tokens=None))
    )
    assert "context holds 40" in refusal(served.tell(submit(prompt=[1] * 40, max_tokens=None)))
    few = served.tell(submit(prompt=[1] * 5, max_tokens=None, min_tokens=4))
    assert refusal(few) == "min_tokens is 4, after this prompt there is space for 3"


def test_a_repeated_submit_without_a_limit_is_the_same_request_whatever_fits_by_then():
    """What the client sent is compared, not what the broker made of it."""
    served = serving("p1", ("d1", {"capacity": capacity(blocks=2)}))
    first = replies(served.tell(submit(prompt=[1] * 5, max_tokens=None)))
    served.tell(ready("d2", "decode", capacity=capacity(blocks=9)), PeerUp("d2"))
    assert replies(served.tell(submit(prompt=[1] * 5, max_tokens=None)))[0] == first[0]
    assert "another request" in refusal(served.tell(submit(prompt=[1] * 5, max_tokens=first[0].max_tokens)))
    assert replies(served.tell(submit("new", [1] * 5, max_tokens=None)))[0].max_tokens == 31


def test_too_many_are_refused_until_later(served):
    served.tell(submit("a"), submit("b"), submit("c"))
    (refused,) = replies(served.tell(submit("d")))
    assert refused == Refused(key="d", reason="3 choices are open, try later", retry_after_s=1.0)


def test_drawn_tokens_get_a_seed_and_a_given_one_stays(served):
    asked = [submit("a", temperature=1.0), submit("b", temperature=1.0, seed=5), submit("c")]
    seeds = [assign.sampling.seed for assign in sent(served.tell(*asked), kind=Assign)]
    assert seeds[0] is not None and seeds[1:] == [5, None]


def test_unknown_requests_can_be_neither_cancelled_nor_attached_to(served):
    for question in (cancel("x"), attach(0, "x")):
        assert replies(served.tell(question)) == [Refused(key="x", reason="no request x is known here")]


@pytest.fixture
def priced():
    """A chunk of four tokens takes a second, and as long again for every four before it."""
    cost = Cost(prefill=((1.0, 1.0), (4.0, 1.0)), prefill_start_s=1 / 16)
    return serving("p1", "p2", "d1", cost=cost, chunk_tokens=4)


def place(told, key, size):
    """Where a prompt of so many tokens goes."""
    ((iid, _, _),) = assigned(told.tell(submit(key, [1] * size)))
    return iid


def test_one_long_prompt_weighs_more_than_as_many_tokens_in_short_ones(priced):
    assert place(priced, "a", 8) == "p1"  # 1 + 2 s
    assert [place(priced, key, 4) for key in "bcd"] == ["p2"] * 3  # 1 s each


@pytest.mark.parametrize(
    "events, go",
    [
        ([], ["p2", "p1"]),
        ([tokens("p1", RID, 0, 7)], ["p1", "p2"]),
        ([cancel(THIRD)], ["p1", "p2"]),
        ([cancel(SECOND)], ["p2", "p2"]),
        ([PeerDown("p2"), PeerUp("p2"), heartbeat("p2")], ["p2", "p2"]),
    ],
    ids=["nothing", "computed", "over", "the other's", "lost"],
)
def test_what_is_computed_lost_or_over_is_no_work(priced, events, go):
    """`p1` has two seconds of it, `p2` has one: where the next two requests go."""
    assert [place(priced, key, 4) for key in "abc"] == ["p1", "p2", "p1"]
    priced.tell(*events)
    assert [place(priced, key, 4) for key in "de"] == go


def test_a_request_is_assigned_with_what_is_left_until_its_deadline(served):
    first = served.tell(submit(deadline_s=3.0))
    served.now = 1.0
    again = served.tell(PeerDown("p1"))
    assert [assign.deadline_s for assign in sent(first + again, kind=Assign)] == [3.0, 2.0]


@pytest.mark.parametrize("seconds", [1e-300, 1e-12, 1e300, 1.7e308])
def test_times_too_short_or_too_long_to_count_are_counted_all_the_same(seconds):
    told = serving("p1", "p2", "d1", cost=Cost(prefill=((1.0, seconds),)), chunk_tokens=8)
    assert [place(told, key, 20) for key in "abc"] == ["p1", "p2", "p1"]
    told.tell(tokens("p1", RID, 0, 7, reason="length"), tokens("p1", THIRD, 0, 7, reason="length"))
    assert [place(told, key, 20) for key in "def"] == ["p1", "p1", "p2"]


def test_round_robin_takes_turns():
    told = serving("p1", "p2", "p3", rules=Rules(prefill_route="round_robin"))
    assert [place(told, key, 3) for key in "abcde"] == ["p1", "p2", "p3", "p1", "p2"]


def test_what_waits_is_placed_when_the_loss_of_another_makes_room_for_it():
    """A prompt that must fit twice into the only decode instance, as long as another one can prefill it: nobody takes
    it while that other is there and too small."""
    told = serving("m1", ("p1", {"capacity": capacity(blocks=4)}))
    assert not assigned(told.tell(submit("a", (1,) * 30)))
    assert assigned(told.tell(PeerDown("p1"))) == [("m1", RID, 1)]


def waiting(count):
    """So many wait when the first worker comes."""
    told = serving("d1", limits={"max_open": 5000})
    for number in range(count):
        told.core.handle(submit(f"k{number}"), 0.0)
    told.core.handle(ready("p1", "prefill"), 1.0)
    return opcodes(partial(told.core.handle, PeerUp("p1"), 1.0))


def test_thousands_that_wait_are_placed_at_once_when_a_worker_comes():
    """Each by as much work as one of a few: it took minutes when every row summed all others."""
    assert waiting(400) < 5 * waiting(100)


def placing(route, count):
    """The next one, where so many are open."""
    cost = Cost(prefill=((1.0, 0.01), (512.0, 0.1)), prefill_start_s=1e-8)
    workers = [(f"p{number}", {"capacity": capacity(blocks=900, context=4096)}) for number in range(8)]
    limits = {"context": 4096, "max_open": 10**6}
    told = serving(*workers, rules=Rules(prefill_route=route), limits=limits, cost=cost)
    for number in range(count):
        told.core.handle(submit(f"k{number}", [1] * (1 + number % 1000), max_tokens=1), 0.0)
    return opcodes(partial(told.core.handle, submit("last", [1] * 500, max_tokens=1), 1.0))


@pytest.mark.parametrize("route", PREFILL_ROUTES)
def test_a_place_among_many_is_found_as_fast_as_among_few(route):
    """By no scan of the requests, nor of anything else but the pool's columns."""
    assert placing(route, 800) < 1.2 * placing(route, 100)


def test_status_tells_what_a_beat_says(served):
    predictor = PredictorStatus(kind="hidden", on=True, predicted=5, late=1)
    served.tell(heartbeat("d1", counters={"duplicate": 2}, slots_used=5, predictor=predictor))
    found = {each.iid: (each.counters, each.slots_used, each.predictor) for each in served.status().instances}
    assert found["d1"] == ({"duplicate": 2}, 5, predictor) and found["d2"] == ({}, 0, None)


def test_status_tells_who_is_there_and_who_can_never_be_paired(served):
    served.tell(submit(), ready("d2", "decode", fingerprint=fingerprint(dtype="f32")), PeerDown("p2"))
    status = served.status()
    notes = {each.iid: (each.state, each.note) for each in status.instances}
    assert notes["p2"] == ("lost", "connection lost") and notes["d1"] == ("ready", "")
    assert {each.iid: each.paths for each in status.instances}["p1"] == {"shm": 1}
    assert notes["d2"] == ("ready", f"never paired with p1: dtype differs: f32 and {FINGERPRINT.dtype}")
    assert (status.requests, status.model, status.counters["accepted"]) == ({"queued": 1}, "m", 1)


@pytest.mark.parametrize("role", ["mixed", "auto"])
def test_who_does_both_exchanges_kv_with_all_others(role):
    told = serving("p1", "d1")
    told.tell(ready("x1", role), PeerUp("x1"))
    paths = {each.iid: each.paths for each in told.status().instances}
    assert paths == {"p1": {"shm": 2}, "d1": {"shm": 2}, "x1": {"shm": 2}}


def test_status_tells_what_the_monitor_said_last_and_when(served):
    assert served.status().monitor is None
    served.tell(ClusterView(epoch=1, number=7, loads=[], flip="idle"))
    served.now = 0.5
    assert served.status().monitor == MonitorStatus(number=7, age_s=0.5, flip="idle")


@pytest.mark.parametrize("wrong", [object(), Release("x")])
def test_nonsense_is_refused(served, wrong):
    with pytest.raises(Broken):
        served.tell(wrong)


def test_no_worker_takes_the_brokers_name(served):
    assert served.tell(ready("broker", "decode")) == [] and "broker" not in served.roles()
