"""Clients that do not read, and clients that vanish: what one of them costs the broker, and what it is sent."""

import pytest

from tests.core.broker.serving import RID, Serving, attach, cancel, replies, serving, submit
from tests.core.broker.work import opcodes
from tests.core.build import capacity, ending, staged, tokens
from tests.core.reading import only
from tetri.core.actions import Broken, Release, Reply, Undelivered
from tetri.request import Stage
from tetri.wire.clients import Accepted, Delta, Done


class Clients(Serving):
    """Many requests of one client `c`, which decode on d1, and at last one of `other`. `free` is how many messages
    still fit into the queue of `c`; `tried` are all that the broker tried to send to it. Not checked after every event,
    which would take long with a thousand requests."""

    def __init__(self, count, **limits):
        super().__init__(serving("p1", "d1", limits={"max_open": 10000, **limits}).core)
        self.free, self.full = 1 << 40, False
        self.tried, self.arrived = [], []
        self.rids = [f"of k{number}" for number in range(count + 1)]
        for number, rid in enumerate(self.rids):
            self.tell(submit(f"k{number}", client=b"c" if number < count else b"other", max_tokens=30))
            self.tell(tokens("p1", rid, 0, 7), staged("d1", rid, Stage.DECODE))
        self.tried.clear()
        self.arrived.clear()

    def tell(self, *events):
        return [action for event in events for action in self._turn(self.core.handle(event, self.now))]

    def later(self, seconds=0.0):
        self.now += seconds
        return self._turn(self.core.tick(self.now))

    def _turn(self, actions):
        self.full = False
        return self._follow(actions)

    def result(self, action):
        """As the loop: once a message does not fit, no later one of the same list is tried."""
        if not isinstance(action, Reply) or action.client != b"c":
            return super().result(action)
        self.full = self.full or self.free == 0
        self.tried.append(action.message)
        if self.full:
            return Undelivered(b"c", action.message, False)
        self.free -= 1
        self.arrived.append(action.message)
        return None

    def write(self, *indices):
        """Every request gets its tokens of these indices; what `other` is sent of the last."""
        for index in indices:
            for rid in self.rids:
                actions = self.tell(tokens("d1", rid, index, 7))
        return replies(actions, b"other")


@pytest.fixture(scope="module")
def stopped():
    """1,000 requests of a client that has stopped reading, each with three tokens more by now."""
    made = Clients(1000)
    made.free = 0
    for index in (1, 2, 3):
        assert [delta.start for delta in made.write(index)] == [index]
    made.core.check()
    return made


def test_of_a_stopped_reader_one_message_is_tried_with_longer_and_longer_pauses(stopped):
    assert len(stopped.tried) == 1  # of 3,000
    times, now = [], stopped.now
    while stopped.now < now + 20:
        before = len(stopped.tried)
        stopped.later(0.01)
        assert len(stopped.tried) - before in (0, 1)
        times += [stopped.now - now] * (len(stopped.tried) - before)
    pauses = [round(b - a, 1) for a, b in zip([0.0, *times], times, strict=False)]
    assert pauses[:7] == [0.1, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0] and set(pauses[6:]) == {2.0}
    assert not stopped.arrived and len({message.rid for message in stopped.tried}) < 20


def test_a_probe_of_1000_blocked_requests_is_as_little_work_as_of_10():
    def work(count):
        made = Clients(count)
        made.free = 0
        made.write(1, 2)
        made.now += 0.06
        connections = made.core.delivery.connections
        actions = []
        used = opcodes(lambda: actions.extend(connections.tick(made.now)))
        assert len(actions) == 1
        event = Undelivered(b"c", actions[0].message, False)
        return used + opcodes(lambda: made.core.handle(event, made.now))

    assert work(300) < work(10) + 100 < 1500


def test_when_it_reads_again_all_goes_on_in_order_and_a_bounded_number_at_a_time():
    made = Clients(300)
    made.free = 0
    made.write(*range(1, 11))
    made.free, most = 1 << 40, 0
    made.later(2.1)
    assert len(made.arrived) == 1
    while len(made.arrived) < 300 * 10:
        before = len(made.arrived)
        assert made.core.deadline() <= made.now  # the loop does not sleep
        made.later()
        most = max(most, len(made.arrived) - before)
        assert len(made.arrived) > before
    made.core.check()
    assert most == 64 and made.tried[1:] == made.arrived
    for rid in made.rids[:300]:
        assert [delta.start for delta in made.arrived if delta.rid == rid] == [*range(1, 11)]
    made.later()
    assert made.core.deadline() > made.now
    made.write(11)
    assert made.arrived[-1].start == 11  # at once


def test_a_reader_that_reads_a_little_gets_a_little():
    """Its pauses begin anew whenever something fits."""
    made = Clients(3)
    made.free = 0
    made.write(*range(1, 11))
    for _ in range(30):
        made.free = 1
        for _ in range(12):
            made.later(0.01)
    assert len(made.arrived) == 30
    for rid in made.rids[:3]:
        assert [delta.start for delta in made.arrived if delta.rid == rid] == [*range(1, 11)]


def test_an_attach_of_a_blocked_client_probes_it_at_once_with_one_message():
    made = Clients(3)
    made.free = 0
    made.write(*range(1, 4))
    made.tried.clear()
    made.tell(attach(1, made.rids[1]))
    assert [(delta.rid, delta.start) for delta in made.tried] == [(made.rids[1], 1)]
    made.free = 100
    made.tell(attach(2, made.rids[1]))
    assert [(delta.rid, delta.start) for delta in made.arrived] == [(made.rids[1], 2)]
    made.later()
    assert len(made.arrived) == 8 and {(d.rid, d.start) for d in made.arrived if d.rid != made.rids[1]} == {
        (rid, index) for rid in (made.rids[0], made.rids[2]) for index in (1, 2, 3)
    }


def test_a_long_answer_is_attached_to_a_part_at_a_time():
    large = {"capacity": capacity(blocks=200)}
    told = serving(("p1", large), ("d1", large), limits={"context": 1000})
    told.tell(submit(max_tokens=200), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    for index in range(1, 150):
        told.tell(tokens("d1", RID, index, 7))
    parts = [replies(told.tell(attach(0, client=b"new")), b"new")]
    while parts[-1]:
        parts.append(replies(told.later(), b"new"))
    assert [len(part) for part in parts] == [64, 64, 22, 0]
    assert [delta.start for part in parts for delta in part] == [*range(150)]


def test_the_end_reaches_a_slow_reader_and_it_is_forgotten_when_it_has_it():
    """Also when nothing is remembered of an ended request (`client_grace_s` is 0), and no tick lasts for ever."""
    made = Clients(1, client_grace_s=0.0)
    made.free = 0
    made.tell(*ending("d1", made.rids[0], 1, 8))
    made.later()  # as the loop does, at once
    for _ in range(7):
        made.later(1.0)
    assert not made.arrived
    made.free = 2
    made.later(2.0)
    made.later()
    assert [type(message) for message in made.arrived] == [Delta, Done]
    made.later(1.0)
    assert made.rids[0] not in made.core.table.requests


def test_the_end_is_not_kept_for_ever_for_a_reader_that_never_reads():
    made = Clients(1, client_grace_s=0.0)
    made.free = 0
    made.tell(*ending("d1", made.rids[0], 1, 8))
    for _ in range(9):
        made.later(1.0)
    assert made.rids[0] in made.core.table.requests
    made.later(2.0)
    assert made.rids[0] not in made.core.table.requests  # patience_s, 10, after its end


@pytest.mark.parametrize("limits", [{"client_grace_s": 0.0}, {"patience_s": 0.0}], ids=lambda limits: [*limits][0])
def test_an_ended_request_is_forgotten_with_any_timeout(limits):
    made = Clients(1, **limits)
    made.tell(*ending("d1", made.rids[0], 1, 8))
    made.later(2.1)
    assert made.rids[0] not in made.core.table.requests


# ---------------------------------------------------------------- signs of life


@pytest.fixture
def quiet():
    """No worker yet, so every request is queued."""
    return serving(limits={"quiet_s": 1.0, "max_open": 10000})


def test_a_client_that_dies_while_its_request_is_queued_is_noticed_after_a_second(quiet):
    quiet.tell(submit())
    assert not replies(quiet.later(0.9))
    (sign,) = replies(quiet.later(0.1))
    assert sign == Delta(rid=RID, start=0, ids=[], text="")
    quiet.tell(Undelivered(b"c", sign, True))
    assert not quiet.later(1.9)[1:] and quiet.status().requests == {"queued": 1}
    assert only(quiet.later(0.2), Release) == [Release(RID)]
    assert quiet.status().counters["ended_cancelled"] == 1 and not replies(quiet.later(5.0))


def test_whoever_is_gone_is_gone_with_all_its_requests(quiet):
    quiet.tell(submit("a"), submit("b"), submit("c", client=b"other"))
    quiet.tell(Undelivered(b"c", Accepted(key="b", rid="r2", prompt_tokens=3, max_tokens=4), True))
    quiet.tell(attach(0, "r2", client=b"again"))
    assert [release.rid for release in only(quiet.later(2.0), Release)] == [RID]
    assert quiet.status().requests == {"queued": 2}


def test_a_quiet_client_gets_one_sign_of_life_a_second_for_all_its_requests_in_turn(quiet):
    quiet.tell(*(submit(f"k{number}") for number in range(100)))
    found = [replies(quiet.later(0.25)) for _ in range(21)]
    signs = [sign for each in found for sign in each]
    assert [len(each) for each in found].count(1) == len(signs) == 5
    assert len({sign.rid for sign in signs}) == 5


def test_a_client_that_is_sent_something_gets_no_sign_of_life():
    told = serving("p1", "d1", limits={"quiet_s": 1.0})
    told.tell(submit("a", max_tokens=20), submit("b"), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.DECODE))
    for index in range(1, 10):
        assert not replies(told.later(0.6))
        told.tell(tokens("d1", RID, index, 7))
    assert not replies(told.later(0.9))
    (first,) = replies(told.later(0.2))
    (other,) = replies(told.later(1.0))
    assert [(each.rid, each.start) for each in (first, other)] == [(RID, 10), ("r2", 0)]  # all that it was sent


def test_nobody_gets_signs_of_life_without_open_requests(quiet):
    quiet.tell(submit(), cancel())
    assert not replies(quiet.later(1.5))


def test_many_quiet_clients_get_their_signs_a_bounded_number_at_a_time(quiet):
    quiet.tell(*(submit(f"k{number}", client=f"c{number}".encode()) for number in range(200)))
    parts = [only(quiet.later(1.0), Reply)]
    while quiet.core.deadline() <= quiet.now:
        parts.append(only(quiet.later(), Reply))
    assert [len(part) for part in parts] == [64, 64, 64, 8]
    assert len({reply.client for part in parts for reply in part}) == 200


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda request: setattr(request, "client", b"x"), "open choices by client"),
        (lambda request: setattr(request.choices[0].outbox, "sent", 0), "unsent choices by client"),
    ],
)
def test_check_finds_what_is_wrong(change, complaint):
    told = serving("p1", "d1")
    told.tell(submit(), tokens("p1", RID, 0, 7))
    change(told.core.table.requests[RID])
    with pytest.raises(Broken, match=complaint):
        told.core.check()
