"""The worker's core alone under random events: dropped, repeated, out of order, late, of old attempts and incarnations,
in every role and between roles, under every policy. After every one `check()` must hold."""

from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.core.broker.test_machine import QUICK, WORKERS, iids, seconds
from tests.core.build import (
    CAPACITY,
    FINGERPRINT,
    assign,
    chunk,
    defer,
    drop,
    grant,
    handle,
    identity,
    instance,
    landed,
    membership,
    offer,
    reach,
    refuse,
)
from tetri.core import actions as say
from tetri.core.actions import BROKER
from tetri.core.worker.worker import Worker
from tetri.cost import Cost
from tetri.engine.base import EngineError
from tetri.engine.emulated import EmulatedEngine
from tetri.engine_request import HiddenStateEstimate
from tetri.policy.rules import ADMISSIONS, ORDERS, Rules
from tetri.request import ROLES, Expected, LengthDistribution, LengthRange
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import LengthUpdate, Sibling
from tetri.wire.load import Load
from tetri.wire.messages import Close, ClusterView, Flip, InstanceLoad, Resend

COST = Cost(prefill=((0.0, 0.0), (8.0, 0.1)), decode=((1.0, 0.01), (2.0, 0.02)))
PREDICTORS = ("classifier", "hidden", "both", "prior")
some_odds = st.sampled_from([None, *(LengthDistribution(4, (rest, 0.5, 0.5 - rest)) for rest in (0.0, 0.2, 0.5))])
ranges = st.one_of(st.none(), st.tuples(st.integers(0, 9), st.integers(1, 4)))


def length(made):
    return None if made is None else LengthRange(low=made[0], high=made[0] + made[1])


class WorkerUnderFire(RuleBasedStateMachine):
    """Peers and the broker say anything; the engine is the emulated one, the store counts its slots."""

    @initialize(
        slots=st.sampled_from([3, 5, 30]),
        role=st.sampled_from(ROLES),
        order=st.sampled_from(sorted(ORDERS)),
        admit=st.sampled_from(sorted(ADMISSIONS)),
        interval=st.sampled_from([1, 1, 3, 50]),
        length=st.sampled_from(["none", "noisy", *PREDICTORS]),
        cost=st.sampled_from([Cost(), COST]),
        path=st.sampled_from(["shm", "stream"]),
    )
    def begin(self, slots, role, order, admit, length, interval, cost, path):
        self.engine = EmulatedEngine(capacity=CAPACITY, token_bytes=8, vocabulary=64, cost=Cost())
        learns = length in PREDICTORS
        rules = Rules(
            order=order, admit=admit, length="trained" if learns else length, sched_batch=3, length_granularity=4
        )
        own = identity(
            "me",
            role,
            slots=slots,
            fingerprint=self.engine.fingerprint,
            rules=rules,
            cost=cost,
            load_s=0.05,
            stream_interval=interval,
            reach=reach("me", paths=[path]),
            expected=Expected(length, LengthDistribution(2, (0.25,) * 4)) if learns else None,
        )
        self.path, self.under_way = path, []  # what a path that takes time has not brought yet
        self.core, self.now = Worker(own, Random(1), now=0.0), 0.0
        self.slots, self.free, self.number = slots, list(range(slots)), 0
        self.requests, self.connected, self.done = {}, {BROKER: None}, None
        self.stays = {}  # prefill leg -> the decode leg that it turns into
        self.offers, self.asked, self.told, self.assigned = [], [], {}, {}
        self.role, self.heartbeat = role, None  # as it said last
        self.offered, self.granted = {}, {}  # by others, and which of it was granted: by rid
        self.deferred = {}  # which of it was deferred last, by rid
        self.written = {}  # decode leg -> output tokens
        self.estimates_lengths, self.estimates = length in ("hidden", "both"), {}  # by phase: odds of what follows

    def act(self, actions):
        rejected = []
        for action in actions:
            if isinstance(action, say.Step):
                self.hear(rejected)
            result = self.do(action)
            if isinstance(result, say.RequestRejected):
                rejected.append(result)
            elif result is not None:
                self.act(self.core.handle(result, self.now))
        self.hear(rejected)

    def hear(self, rejected):
        while rejected:
            self.act(self.core.handle(rejected.pop(0), self.now))

    def do(self, action):
        match action:
            case say.Connect(peer):
                self.connected[peer] = None
            case say.Disconnect(peer):
                del self.connected[peer]
            case say.AddRequest(engine_request):
                assert engine_request.key not in self.requests
                try:
                    self.engine.add(engine_request)
                except EngineError as error:
                    return say.RequestRejected(engine_request.key, str(error))
                self.requests[engine_request.key] = engine_request
                if engine_request.phase == "decode":  # what an offer of other tokens was told of does not count
                    _, rid, attempt, *_ = engine_request.key.split(":")
                    self.told.pop((rid, int(attempt)), None)
            case say.CancelRequest(key):
                self.engine.cancel(key)
                self.requests.pop(key, None)
                self.stays = {prefill: decode for prefill, decode in self.stays.items() if key not in (prefill, decode)}
                here = self.requests
                self.granted = {rid: made for rid, made in self.granted.items() if any(k in here for k in _keys(made))}
            case say.AdmitRequest(key, token, further):
                self.engine.admit(key, token, further)
                self.written[key] = len(self.requests[key].tokens) - self.requests[key].output_from + 1
            case say.StayRequest(key, decode_key):
                assert key in self.requests and decode_key not in self.requests
                self.engine.stay(key, decode_key)
                self.stays[key] = decode_key
            case say.HoldRequest(key, held):
                assert key in self.requests
                self.engine.hold(key, held)
            case say.Step(most):
                assert self.done is None and 1 <= most <= self.core.own.stream_interval
                self.done = self.read(self.engine.step(most))
            case say.Predict(key):
                assert key in [f"p:{rid}:{attempt}" for rid, attempt in self.assigned]
                self.asked.append(key)
            case say.Publish(report):
                load = report.load
                assert report.role in ROLES and min(load.growth_blocks, load.heavy, load.queued) >= 0
                assert load.heavy <= load.waiting + load.running and 0 <= load.busy <= 1 and load.decode_s >= 0
                assert (load.queued_s > 0) == (load.queued_tokens > 0 and self.core.own.cost is COST)
            case say.Export(key, index, start, stop):
                slots = [self.free.pop() for _ in range(stop - start)]
                blocks = [memoryview(bytearray(self.engine.fingerprint.block_bytes)) for _ in slots]
                self.engine.export(key, start, stop, blocks)
                return say.Exported(key, index, start, stop, handle(*slots, segment="s-me"), 9)
            case say.Adopt(path=path):
                assert path == ("local" if action.peer == "me" else self.path)
                if path == "stream":
                    assert all((other.key, other.index) != (action.key, action.index) for other in self.under_way)
                    self.under_way.append(action)
                    return None
                return self.adopt(action, {7: "flipped", 8: "lost"}.get(action.handle.slots[0]))
            case say.Free(freed):
                assert not set(freed.slots) & set(self.free), "freed twice"
                self.free += freed.slots
                return say.Freed(len(freed.slots))
            case say.Send(peer, message):
                self.send(peer, message)
        return None

    def read(self, done):
        """What hidden states say of those that have a new token: the same of all prompts, and of all decodes."""
        told = []
        for sampled in done.tokens if self.estimates_lengths else ():
            if sampled.key not in self.requests:
                continue  # a sibling
            engine_request, key = self.requests[sampled.key], sampled.key
            outputs = self.written.get(key, len(engine_request.tokens) - engine_request.output_from)
            self.written[key] = outputs + len(sampled.ids)
            if (distribution := self.estimates.get(key[0])) is not None:
                told.append(HiddenStateEstimate(key, outputs, distribution))
        return done.changed(estimates=tuple(told))

    def adopt(self, action, problem):
        missed = tuple(key for key in action.keys if key not in self.requests)  # ended meanwhile: it is nobody's KV
        for key in () if problem is not None else [key for key in action.keys if key not in missed]:
            block = memoryview(bytearray(self.engine.fingerprint.block_bytes))
            self.engine.adopt(key, action.start, [block] * len(action.handle.slots))
        return say.Adopted(action.key, action.index, problem, missed)

    def send(self, peer, message):
        name = type(message).__name__
        assert (peer == BROKER) == (name in ("Ready", "Heartbeat", "Staged", "Tokens", "Failed"))
        assert peer != "me"
        match name:
            case "Offer":
                self.offers.append((peer, message))
            case "Grant":
                self.granted[message.rid] = self.offered[peer, message.rid, message.attempt, message.offer]
            case "Defer":
                self.deferred[message.rid] = self.offered[peer, message.rid, message.attempt, message.offer]
            case "Tokens":
                for item in message.items:
                    told = self.told.get((item.rid, item.attempt), 0)
                    assert item.ids or item.end
                    assert item.end is None or item.start + len(item.ids) >= told, "it ended before its last tokens"
                    self.told[item.rid, item.attempt] = max(told, item.start + len(item.ids))
            case "Heartbeat":
                self.role, self.heartbeat = message.role, message
                for hold in message.holds:
                    _, old, *_ = self.assigned.get((hold.rid, hold.attempt), (0, 0))
                    told = self.told.get((hold.rid, hold.attempt), 0)
                    assert hold.outputs <= max(told, old + 1), "more than the broker was told"

    def tell(self, event):
        """Messages are read between steps only."""
        if self.done is not None:
            done, self.done = self.done, None
            for sampled in done.tokens:
                if sampled.reason or sampled.key.startswith("p:"):
                    ended, stays = self.requests.pop(sampled.key, None), self.stays.pop(sampled.key, None)
                    if stays is not None and not sampled.reason:  # a sibling is not there
                        self.requests[stays] = ended
            self.act(self.core.handle(done, self.now))
        if event is not None:
            self.act(self.core.handle(event, self.now))

    # ------------------------------------------------------------ the broker, the views, the predictor

    @rule(
        rid=st.sampled_from("abcd"),
        prompt=st.integers(0, 41),
        old=st.integers(0, 3),
        attempt=st.integers(1, 3),
        most=st.integers(1, 9),
        others=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3)), max_size=3, unique_by=lambda it: it[0]),
        pinned=st.sampled_from(["", "", *sorted(WORKERS), "me"]),
    )
    def assign(self, rid, prompt, old, attempt, most, others, pinned):
        """An attempt again in the same words, perhaps with other choices of them."""
        words = self.assigned.setdefault((rid, attempt), (prompt, old, most, pinned))
        alike = [it for it in others if it[0] != rid and self.assigned.setdefault(it, words) == words]
        prompt, old, most, pinned = words
        made = assign(rid, prompt, [2] * old, attempt, most, temperature=1.0, seed=0, pinned=pinned)
        self.tell(made.changed(siblings=_siblings(alike)))

    @rule(made=ranges, said=some_odds, meanwhile=st.booleans())
    @precondition(lambda self: self.asked)
    def predicted(self, made, said, meanwhile):
        """`meanwhile`: the engine computes, as of the step that is not told of yet."""
        known = say.LengthKnown(self.asked.pop(0), length(made), said)
        if meanwhile:
            self.act(self.core.handle(known, self.now))
        else:
            self.tell(known)

    @rule(phase=st.sampled_from("pd"), said=some_odds)
    def estimate(self, phase, said):
        """From now on."""
        self.estimates[phase] = said

    @rule(role=st.sampled_from(ROLES))
    def flip(self, role):
        self.tell(Flip(role=role, number=1))
        assert self.role == role

    @rule(
        rid=st.sampled_from("abcdwxyz"),
        attempt=st.integers(1, 3),
        end=st.sampled_from([("", 0), ("stop", 3), ("length", 9), ("length", 0), ("cancelled", 0)]),
    )
    def close(self, rid, attempt, end):
        self.tell(Close(rid=rid, attempt=attempt, reason=end[0], outputs=end[1]))

    @rule(rid=st.sampled_from("abcdwxyz"), attempt=st.integers(1, 3), start=st.integers(0, 5))
    def resend(self, rid, attempt, start):
        self.tell(Resend(rid=rid, attempt=attempt, start=start))

    @rule(there=st.lists(iids, unique=True), incarnation=st.integers(1, 2))
    def membership(self, there, incarnation):
        self.number += 1
        same = {"fingerprint": self.engine.fingerprint}
        others = [
            instance(iid, WORKERS[iid], incarnation, reach=reach(iid, paths=[self.path]), **same) for iid in there
        ]
        self.tell(membership(self.number, instance("me", self.role, **same), *others))

    @rule(
        there=st.lists(iids, unique=True),
        free=st.sampled_from([0, 3, 10]),
        deferred=st.sampled_from([0, 5, 20]),
        age=st.sampled_from([0.0, 0.1, 5.0]),
    )
    def view(self, there, free, deferred, age):
        self.number += 1
        load = Load(free_blocks=free, growth_blocks=2, deferred_blocks=deferred)
        loads = [InstanceLoad(iid, 1, WORKERS[iid], age, load) for iid in there]
        self.tell(ClusterView(epoch=1, number=self.number, loads=loads))

    @rule(iid=iids)
    def peer_up(self, iid):
        if iid in self.connected:
            self.tell(PeerUp(iid))

    @rule(iid=st.sampled_from([*sorted(WORKERS), BROKER]))
    def peer_down(self, iid):
        self.tell(PeerDown(iid))

    # ------------------------------------------------------------ decode instances answer, rightly or not

    @rule(back=st.integers(0, 3), index=st.integers(0, 4), kind=st.sampled_from(["grant", "refuse", "defer", "landed"]))
    @precondition(lambda self: self.offers)
    def answer(self, back, index, kind):
        target, asked = self.offers[-1 - min(back, len(self.offers) - 1)]
        who = (asked.rid, asked.offer, target, asked.attempt)
        if kind == "landed":
            self.tell(landed(who[0], index, *who[1:]))
        else:
            self.tell({"grant": grant, "refuse": refuse, "defer": defer}[kind](*who))

    @rule(rid=st.sampled_from("abcd"), number=st.integers(1, 4), src=st.sampled_from(["d1", "d2"]))
    def odd_answer(self, rid, number, src):
        who = (number, src)
        for message in (defer(rid, *who), grant(rid, *who), landed(rid, 0, *who), refuse(rid, *who)):
            self.tell(message)

    # ------------------------------------------------------------ prefill instances ask

    @rule(
        rid=st.sampled_from("wxyz"),
        prompt=st.integers(0, 41),
        attempt=st.integers(1, 2),
        number=st.integers(1, 3),
        src=st.sampled_from(["p1", "p2"]),
        fit=st.sampled_from([True, True, True, False]),
        made=ranges,
        waited=st.sampled_from([0.0, 0.0, 3.0, 9.0]),
        others=st.lists(st.tuples(st.sampled_from("wxyz"), st.integers(1, 2)), max_size=3, unique_by=lambda it: it[0]),
        canary=st.sampled_from([False, False, True]),
    )
    def offer(self, rid, prompt, attempt, number, src, fit, made, waited, others, canary):
        changes = {"fingerprint": self.engine.fingerprint if fit else FINGERPRINT, "length": length(made)}
        changes |= {"waited_s": waited, "canary": canary}
        changes["siblings"] = _siblings(it for it in others if it[0] != rid)
        self.hear_offer(offer(rid, prompt, attempt=attempt, offer=number, src=src, **changes))

    def hear_offer(self, made):
        self.offered[made.src, made.rid, made.attempt, made.offer] = made
        self.tell(made)

    @rule(
        place=st.integers(0, 5),
        index=st.integers(0, 3),
        slot=st.sampled_from([1, 1, 1, 7, 8]),
        ended=st.sampled_from([(), (), (0,), (1,), (0, 2)]),
    )
    @precondition(lambda self: self.granted or self.deferred)
    def chunk(self, place, index, slot, ended):
        """One of the chunks of a request that was granted or deferred: two blocks each, the last has the tokens."""
        open_offers = [*self.granted.values(), *self.deferred.values()]
        made = open_offers[place % len(open_offers)]
        start = min(2 * index, max(made.blocks - 1, 0) // 2 * 2)
        stop = min(start + 2, made.blocks)
        where = handle(*range(slot, slot + stop - start), segment=f"s-{made.src}")
        tokens = [None if at in ended else 5 for at in range(1 + len(made.siblings))] if stop == made.blocks else []
        who = {name: getattr(made, name) for name in ("src", "incarnation", "attempt", "offer")}
        self.tell(chunk(made.rid, start // 2, start, stop, tokens=tokens, handle=where, **who))

    @rule(rid=st.sampled_from("wxyz"), prompt=st.integers(1, 12), made=ranges)
    def whole(self, rid, prompt, made):
        """An offer and all of its KV."""
        changes = {"fingerprint": self.engine.fingerprint, "length": length(made), "attempt": 2, "offer": 4}
        self.hear_offer(offer(rid, prompt, **changes))
        blocks = -(-prompt // CAPACITY.block_tokens)
        self.tell(chunk(rid, 0, 0, blocks, 5, handle=handle(*range(10, 10 + blocks)), attempt=2, offer=4))

    @rule(rid=st.sampled_from("wxyz"), attempt=st.integers(1, 2), number=st.integers(1, 3), start=st.integers(-1, 4))
    def odd_chunk(self, rid, attempt, number, start):
        self.tell(chunk(rid, 0, start, start + 2, attempt=attempt, offer=number, handle=handle(1, 2)))

    @rule(
        rid=st.sampled_from("wxyz"),
        attempt=st.integers(1, 2),
        number=st.integers(1, 4),
        low=st.integers(0, 12),
        more=st.integers(1, 9),
    )
    def update_length(self, rid, attempt, number, low, more):
        length = LengthRange(low=low, high=low + more)
        self.tell(LengthUpdate(src="p1", incarnation=1, rid=rid, attempt=attempt, offer=number, length=length))

    @rule(rid=st.sampled_from("wxyz"), attempt=st.integers(1, 2), number=st.integers(1, 3))
    def drop(self, rid, attempt, number):
        self.tell(drop(rid, attempt=attempt, offer=number))

    @rule(place=st.integers(0, 9), problem=st.sampled_from([None, None, "flipped", "truncated", "foreign", "lost"]))
    @precondition(lambda self: self.under_way)
    def come(self, place, problem):
        """Out of order, rightly or not, perhaps for a leg that is no more."""
        self.tell(None)
        self.tell(self.adopt(self.under_way.pop(place % len(self.under_way)), problem))

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
        assert len(self.free) == self.slots - self.core.prefill.slots_used
        if self.done is None:
            self.core.check()
            assert sum(map(len, self.core.decode.hand_overs.kv_receive.fetching.values())) == len(self.under_way)
            assert len(self.requests) == len(self.core.ledger), "the engine and the ledger know the same legs"

    def teardown(self):
        """When all is closed, nothing is left."""
        if not hasattr(self, "core"):
            return
        self.work()
        for rid in "abcdwxyz":
            self.tell(Close(rid=rid, attempt=9))
        self.tell(None)
        self.sound()
        while self.under_way:
            self.tell(self.adopt(self.under_way.pop(), None))
        self.sound()
        assert not self.requests and sorted(self.free) == list(range(self.slots)) and not self.engine.contents
        self.tick(0.1)
        load = self.heartbeat.load
        assert (load.free_blocks, load.queued, load.queued_tokens) == (CAPACITY.blocks, 0, 0)
        assert (load.kept_blocks, load.deferred_blocks) == (0, 0)
        assert (load.waiting, load.running, load.heavy, load.growth_blocks, load.decode_s) == (0, 0, 0, 0, 0.0)
        assert not self.heartbeat.holds and not self.heartbeat.slots_used and not load.stalled


def _keys(made):
    return [f"d:{each.rid}:{each.attempt}:{made.src}:{made.offer}" for each in (made, *made.siblings)]


def _siblings(others):
    return [Sibling(rid, attempt, seed) for seed, (rid, attempt) in enumerate(others, 1)]


TestWorkerUnderFire = WorkerUnderFire.TestCase
TestWorkerUnderFire.settings = QUICK
