"""Each core alone under random events: dropped, repeated, out of order, late, of old attempts and incarnations. After
every one `check()` must hold; what a client is told, and who is spoken to, is checked too."""

from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.build import (
    CAPACITY,
    FINGERPRINT,
    assign,
    beat,
    chunk,
    drop,
    failed,
    finished,
    grant,
    handle,
    identity,
    instance,
    landed,
    offer,
    ready,
    refuse,
    staged,
    tokens,
    roster,
)
from tetri.core.actions import (
    BROKER,
    AddLeg,
    AdmitLeg,
    Adopt,
    Adopted,
    CancelLeg,
    Connect,
    Disconnect,
    Export,
    Exported,
    Free,
    FromClient,
    LegRejected,
    Reply,
    Send,
    Step,
    Submitted,
    Undelivered,
    Unword,
    Word,
    Worded,
)
from tetri.core.broker import Broker
from tetri.core.desk import Limits
from tetri.core.worker import Worker
from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.emulated import EmulatedEngine
from tetri.policy.rules import Rules
from tetri.request import Sampling, Stage
from tetri.wire.clients import Attach, Cancel, Delta, Done, Inspect
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Close, Hold, Resend

WORKERS = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}
iids = st.sampled_from(sorted(WORKERS))
stages = st.sampled_from([Stage.QUEUED, Stage.PREFILL, Stage.MOVING, Stage.WAITING, Stage.DECODE, Stage.DONE])
seconds = st.sampled_from([0.0, 0.01, 0.06, 0.3, 3.0])

# Few examples in the default run: the whole cluster (test_cluster.py) looks deeper, these look wider.
QUICK = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


class BrokerUnderFire(RuleBasedStateMachine):
    """Workers say anything about any request; the edge is prompt or slow; clients are there, full or gone."""

    @initialize()
    def begin(self):
        limits = Limits(
            context=40, vocabulary=99, max_open=4, max_attempts=4, beat_s=0.1, dead_s=2.0, patience_s=5.0,
            client_grace_s=1.0,
        )
        self.core = Broker(limits, Rules(), epoch=42, rng=Random(1), now=0.0)
        self.now = 0.0
        self.heard = {}  # rid -> what the present listener has heard since it attached
        self.again = {}  # rids of which the Done may come once more
        self.ended = {}
        self.slow = []  # words that the edge has not done
        self.connected = {}
        self.client = "sent"

    def act(self, actions):
        for action in actions:
            match action:
                case Connect(peer, _):
                    self.connected[peer] = None
                case Send(peer, _):
                    assert peer in self.connected, f"{peer} was never connected"
                case Word():
                    self.slow.append(action)
                case Unword(rid):
                    assert rid not in self.ended, "ended twice"
                    self.ended[rid] = None
                case Reply(client, message):
                    if self.client == "sent" or not isinstance(message, Delta | Done):
                        self.hear(message)
                    else:
                        self.act(self.core.handle(Undelivered(client, message, self.client == "gone"), self.now))

    def hear(self, message):
        if isinstance(message, Delta | Done):
            have = self.heard.setdefault(message.rid, [])
            if have and have[-1] == "done":
                assert isinstance(message, Done) and message.rid in self.again, "something after the Done"
                return
        if isinstance(message, Delta) and message.ids:
            assert message.start == len(have), "a gap, or a token twice"
            have += message.ids
        elif isinstance(message, Done):
            assert message.usage.completion_tokens == len(have)
            assert abs(sum(message.timeline.values()) - message.jct_s) < 1e-6
            have.append("done")

    def tell(self, event):
        self.act(self.core.handle(event, self.now))

    def rid(self, number):
        return f"00002a-{number}"

    # ------------------------------------------------------------ clients

    @rule(key=st.integers(1, 5), size=st.integers(0, 20), most=st.integers(0, 6), late=st.sampled_from([None, 0.5]))
    def submit(self, key, size, most, late):
        again = self.core.table.keys.get(f"k{key}")
        if again is not None:
            self.heard[again] = []  # all of it comes once more
        self.tell(Submitted(b"c", f"k{key}", (1,) * size, Sampling(max_tokens=most), late))

    @rule(number=st.integers(1, 6))
    def cancel(self, number):
        if self.rid(number) in self.ended:
            self.heard[self.rid(number)] = []
            row = self.core.table.rows.get(self.rid(number))
            if row is not None:
                self.heard[self.rid(number)] = list(row.output)  # only the Done comes again
                self.again[self.rid(number)] = None
        self.tell(FromClient(b"c", Cancel(rid=self.rid(number))))

    @rule(number=st.integers(1, 6))
    def attach(self, number):
        self.heard[self.rid(number)] = []
        self.tell(FromClient(b"c", Attach(rid=self.rid(number), start=0)))

    @rule()
    def inspect(self):
        self.tell(FromClient(b"c", Inspect()))

    @rule(client=st.sampled_from(["sent", "full", "gone"]))
    def client_is(self, client):
        self.client = client

    @rule(stop=st.sampled_from([False, False, False, True]))
    @precondition(lambda self: self.slow)
    def word(self, stop):
        """The edge does them in order."""
        word = self.slow.pop(0)
        counted = word.start + 1 if stop and word.ids else None
        self.tell(Worded(word.rid, word.start, word.ids, "x" * len(word.ids), counted, word.final))
        if counted is not None:  # from now on all words of it say so
            self.slow = [each for each in self.slow if each.rid != word.rid]
            row = self.core.table.rows.get(word.rid)
            if row is not None and not row.stage.ended:
                self.tell(Worded(word.rid, row.asked, (), "", counted, True))

    # ------------------------------------------------------------ workers

    @rule(iid=iids, incarnation=st.integers(1, 2))
    def ready(self, iid, incarnation):
        self.tell(ready(iid, WORKERS[iid], incarnation))

    @rule(iid=iids)
    def peer_up(self, iid):
        if iid in self.connected:
            self.tell(PeerUp(iid))

    @rule(iid=iids)
    def peer_down(self, iid):
        self.tell(PeerDown(iid))

    @rule(iid=iids, number=st.integers(1, 6), attempt=st.integers(1, 3), stage=stages)
    def staged(self, iid, number, attempt, stage):
        if stage is not Stage.DONE:
            self.tell(staged(iid, self.rid(number), stage, attempt))

    @rule(
        iid=iids, number=st.integers(1, 6), attempt=st.integers(1, 3), start=st.integers(0, 4), size=st.integers(0, 4),
        reason=st.sampled_from([None, None, "stop", "length"]),
    )
    def tokens(self, iid, number, attempt, start, size, reason):
        ids = range(start, start + size)  # every attempt yields the same ones
        self.tell(tokens(iid, self.rid(number), start, *ids, attempt=attempt, reason=reason))

    @rule(iid=iids, number=st.integers(1, 6), attempt=st.integers(1, 3), outputs=st.integers(0, 6))
    def finished(self, iid, number, attempt, outputs):
        row = self.core.table.rows.get(self.rid(number))
        if row is not None and outputs >= len(row.output):
            self.tell(finished(iid, self.rid(number), outputs, attempt=attempt))

    @rule(iid=iids, number=st.integers(1, 6), attempt=st.integers(1, 3), retry=st.booleans())
    def failed(self, iid, number, attempt, retry):
        self.tell(failed(iid, self.rid(number), retry=retry, attempt=attempt))

    @rule(
        iid=iids, incarnation=st.integers(1, 2),
        holds=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3), stages, st.integers(0, 5)), max_size=3),
    )
    def beat(self, iid, incarnation, holds):
        held = [Hold(self.rid(number), attempt, stage, outputs) for number, attempt, stage, outputs in holds]
        self.tell(beat(iid, *held, incarnation=incarnation))

    @rule(wait=seconds)
    def tick(self, wait):
        self.now += wait
        self.act(self.core.tick(self.now))

    # ------------------------------------------------------------ what must hold

    @invariant()
    def sound(self):
        if hasattr(self, "core"):
            self.core.check()
            for rid, row in self.core.table.rows.items():
                assert row.stage.ended == (rid in self.ended)
            assert (deadline := self.core.deadline()) is not None and deadline < self.now + 10

    def teardown(self):
        """Everyone is silent from now on: whatever is open ends, and is forgotten."""
        if not hasattr(self, "core"):
            return
        for _ in range(200):
            self.client = "sent"
            while self.slow:
                self._word()
            self.now += 0.7
            self.act(self.core.tick(self.now))
            self.core.check()
        held = [row for row in self.core.table.rows.values() if row.holder is None]
        assert not held, "nobody has it, and nobody gave it up"

    def _word(self):
        word = self.slow.pop(0)
        self.tell(Worded(word.rid, word.start, word.ids, "x" * len(word.ids), None, word.final))


class WorkerUnderFire(RuleBasedStateMachine):
    """Peers and the broker say anything; the engine is the emulated one, the store counts its slots."""

    role = "prefill"

    @initialize(slots=st.sampled_from([3, 5, 30]))
    def begin(self, slots):
        self.engine = EmulatedEngine(capacity=CAPACITY, token_bytes=8, vocabulary=64, cost=Cost())
        own = identity("me", self.role, slots=slots, fingerprint=self.engine.fingerprint)
        self.core, self.now = Worker(own, Random(1), now=0.0), 0.0
        self.slots, self.free, self.number = slots, list(range(slots)), 0
        self.legs, self.connected, self.done = {}, {BROKER: None}, None
        self.offers, self.jobs = [], []

    def act(self, actions):
        for action in actions:
            result = self.do(action)
            if result is not None:
                self.act(self.core.handle(result, self.now))

    def do(self, action):
        match action:
            case Connect(peer, _):
                self.connected[peer] = None
            case Disconnect(peer):
                del self.connected[peer]
            case AddLeg(leg):
                assert leg.key not in self.legs
                try:
                    self.engine.add(leg)
                except EngineError as error:
                    return LegRejected(leg.key, str(error))
                self.legs[leg.key] = None
            case CancelLeg(key):
                self.engine.cancel(key)
                self.legs.pop(key, None)
            case AdmitLeg(key, token):
                self.engine.admit(key, token)
            case Step():
                assert self.done is None
                self.done = self.engine.step()
            case Export(key, index, start, stop):
                slots = [self.free.pop() for _ in range(stop - start)]
                blocks = [memoryview(bytearray(self.engine.fingerprint.block_bytes)) for _ in slots]
                self.engine.export(key, start, stop, blocks)
                return Exported(key, index, start, stop, handle(*slots, segment="me"), 9)
            case Adopt(key, index, start, taken, _):
                problem = {7: "corrupt", 8: "lost"}.get(taken.slots[0])
                if problem is None:
                    block = memoryview(bytearray(self.engine.fingerprint.block_bytes))
                    self.engine.adopt(key, start, [block] * len(taken.slots))
                return Adopted(key, index, problem)
            case Free(freed):
                assert not set(freed.slots) & set(self.free), "freed twice"
                self.free += freed.slots
            case Send(peer, message):
                name = type(message).__name__
                assert (peer == BROKER) == (name in ("Ready", "Beat", "Staged", "Tokens", "Finished", "Failed"))
                if name == "Offer":
                    self.offers.append(message)
        return None

    def tell(self, event):
        """Messages are read between steps only."""
        if self.done is not None:
            done, self.done = self.done, None
            for sampled in done.tokens:
                if sampled.reason or sampled.key.startswith("p:"):
                    self.legs.pop(sampled.key)
            self.act(self.core.handle(done, self.now))
        if event is not None:
            self.act(self.core.handle(event, self.now))

    # ------------------------------------------------------------ the broker and the views

    @rule(
        rid=st.sampled_from("abcd"), prompt=st.integers(0, 41), old=st.integers(0, 3), attempt=st.integers(1, 3),
        most=st.integers(1, 9),
    )
    def assign(self, rid, prompt, old, attempt, most):
        if self.slots < 30:  # what a rejected leg leaves to others may be more than a small store holds
            old = min(old, most - 1)
        self.tell(assign(rid, prompt, [2] * old, attempt, most))

    @rule(rid=st.sampled_from("abcd"), attempt=st.integers(1, 3))
    def close(self, rid, attempt):
        self.tell(Close(rid=rid, attempt=attempt))

    @rule(rid=st.sampled_from("abcd"), attempt=st.integers(1, 3), start=st.integers(0, 5))
    def resend(self, rid, attempt, start):
        self.tell(Resend(rid=rid, attempt=attempt, start=start))

    @rule(there=st.lists(iids, unique=True), incarnation=st.integers(1, 2), free=st.sampled_from([3, 10]))
    def roster(self, there, incarnation, free):
        self.number += 1
        same = {"fingerprint": self.engine.fingerprint}
        others = [instance(iid, WORKERS[iid], incarnation, free, **same) for iid in there]
        self.tell(roster(self.number, instance("me", self.role, **same), *others))

    @rule(iid=iids)
    def peer_up(self, iid):
        if iid in self.connected:
            self.tell(PeerUp(iid))

    @rule(iid=st.sampled_from([*sorted(WORKERS), BROKER]))
    def peer_down(self, iid):
        self.tell(PeerDown(iid))

    # ------------------------------------------------------------ decode instances answer, rightly or not

    @rule(back=st.integers(0, 3), index=st.integers(0, 4), kind=st.sampled_from(["grant", "refuse", "landed"]))
    @precondition(lambda self: self.offers)
    def answer(self, back, index, kind):
        asked = self.offers[-1 - min(back, len(self.offers) - 1)]
        src = self.core.dispatcher.jobs.get(f"p:{asked.rid}:{asked.attempt}")
        who = (asked.rid, asked.offer, src.flow.target if src is not None and src.flow.target else "d1", asked.attempt)
        if kind == "landed":
            self.tell(landed(who[0], index, *who[1:]))
        else:
            self.tell({"grant": grant, "refuse": refuse}[kind](*who))

    @rule(rid=st.sampled_from("abcd"), number=st.integers(1, 4), src=st.sampled_from(["d1", "d2"]))
    def odd_answer(self, rid, number, src):
        for message in (grant(rid, number, src), landed(rid, 0, number, src), refuse(rid, number, src)):
            self.tell(message)

    # ------------------------------------------------------------ prefill instances ask

    @rule(
        rid=st.sampled_from("wxyz"), prompt=st.integers(0, 41), attempt=st.integers(1, 2), number=st.integers(1, 3),
        src=st.sampled_from(["p1", "p2"]), fit=st.sampled_from([True, True, True, False]),
    )
    def offer(self, rid, prompt, attempt, number, src, fit):
        if self.slots < 30:  # a prefill leg that waits for slots cannot be kept from stepping beside decodes
            return
        changes = {"fingerprint": self.engine.fingerprint if fit else FINGERPRINT}
        self.tell(offer(rid, prompt, attempt=attempt, offer=number, src=src, **changes))

    @rule(place=st.integers(0, 5), index=st.integers(0, 3), slot=st.sampled_from([1, 1, 1, 7, 8]))
    @precondition(lambda self: self.core.decode.seats)
    def chunk(self, place, index, slot):
        """One of the chunks of a seat: two blocks each, the last has the token."""
        seats = list(self.core.decode.seats.values())
        seat = seats[place % len(seats)]
        start = min(2 * index, max(seat.flow.blocks - 1, 0) // 2 * 2)
        stop = min(start + 2, seat.flow.blocks)
        made = handle(*range(slot, slot + stop - start), segment=seat.offer.src)
        token = 5 if stop == seat.flow.blocks else None
        who = {name: getattr(seat.offer, name) for name in ("src", "incarnation", "attempt", "offer")}
        self.tell(chunk(seat.offer.rid, start // 2, start, stop, token, handle=made, **who))

    @rule(rid=st.sampled_from("wxyz"), attempt=st.integers(1, 2), number=st.integers(1, 3), start=st.integers(-1, 4))
    def odd_chunk(self, rid, attempt, number, start):
        self.tell(chunk(rid, 0, start, start + 2, attempt=attempt, offer=number, handle=handle(1, 2)))

    @rule(rid=st.sampled_from("wxyz"), attempt=st.integers(1, 2), number=st.integers(1, 3))
    def drop(self, rid, attempt, number):
        self.tell(drop(rid, attempt=attempt, offer=number))

    # ------------------------------------------------------------ time

    @rule(wait=seconds)
    def tick(self, wait):
        self.tell(None)
        self.now += wait
        self.act(self.core.tick(self.now))

    @rule()
    def work(self):
        """Some turns of the loop without news."""
        for _ in range(6):
            self.tick(0.0)

    @invariant()
    def sound(self):
        if not hasattr(self, "core"):
            return
        assert len(self.free) == self.slots - self.core.prefill.slots_taken
        if self.done is None:
            self.core.check()
            assert len(self.legs) == len(self.core.ledger), "the engine and the ledger know the same legs"

    def teardown(self):
        """When all is closed, nothing is left."""
        if not hasattr(self, "core"):
            return
        self.work()
        for rid in "abcdwxyz":
            self.tell(Close(rid=rid, attempt=9))
        self.tell(None)
        self.sound()
        assert not self.legs and sorted(self.free) == list(range(self.slots))
        assert len(self.core.ledger) == 0 and self.core.ledger.free == CAPACITY.blocks
        assert not self.engine.contents and not self.core.dispatcher.offers and not self.core.prefill.raw


TestBrokerUnderFire = BrokerUnderFire.TestCase
TestBrokerUnderFire.settings = QUICK
TestWorkerUnderFire = WorkerUnderFire.TestCase
TestWorkerUnderFire.settings = QUICK
