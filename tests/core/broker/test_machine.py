"""The broker's core alone under random events: dropped, repeated, out of order, late, of old attempts and incarnations.
After every one `check()` must hold; what a client is told, and who is spoken to, is checked too."""

from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.build import failed, heartbeat, ready, staged, tokens
from tetri.core.actions import (
    Connect,
    Detokenize,
    Detokenized,
    FromClient,
    Release,
    Reply,
    Send,
    Submitted,
    Undelivered,
)
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.policy.rules import Rules
from tetri.request import Sampling, Stage, choice_id
from tetri.wire.clients import (
    Attach,
    Cancel,
    CheckReadiness,
    Delta,
    Done,
    EndRequest,
    Explain,
    Inspect,
    Observation,
    Observe,
    Refused,
)
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Hold
from tetri.wire.observation import Timeline, TraceEvent

WORKERS = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}
iids = st.sampled_from(sorted(WORKERS))
stages = st.sampled_from([Stage.QUEUED, Stage.PREFILL, Stage.MOVING, Stage.WAITING, Stage.DECODE, Stage.DONE])
seconds = st.sampled_from([0.0, 0.01, 0.06, 0.3, 3.0])
rids = st.integers(1, 6).map("r{}".format)
choices = st.builds(choice_id, rids, st.sampled_from([0, 0, 1, 2]))
SECRET, WRONG = "s" * 22, "w" * 22

# Few examples in the default run: the whole deployment (tests/sim/test_faulty.py) looks deeper, these look wider.
QUICK = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


class BrokerUnderFire(RuleBasedStateMachine):
    """Workers say anything about any request; the edge is prompt or slow; clients are there, full or gone."""

    @initialize(grace=st.sampled_from([1.0, 1.0, 0.0]), patience=st.sampled_from([5.0, 5.0, 0.0]))
    def begin(self, grace, patience):
        limits = Limits(
            context=40,
            vocabulary=99,
            max_open=4,
            max_attempts=4,
            heartbeat_s=0.1,
            dead_s=2.0,
            patience_s=patience,
            client_grace_s=grace,
        )
        self.core = Broker(limits, Rules(), epoch=42, rng=Random(1), now=0.0)
        self.now = 0.0
        self.heard = {}  # choice -> what the present listener has heard since it attached
        self.again = {}  # choices of which the Done may come once more
        self.ended = {}
        self.slow = []  # words that the edge has not done
        self.connected = {}
        self.contents = {}  # key -> what its request asks for
        self.client = "sent"
        self.attempts = {}  # choice -> its attempts so far
        self.dones = {}  # choice -> its Done
        self.told = None  # the last answer to an onlooker

    def act(self, actions):
        for action in actions:
            match action:
                case Connect(peer, _):
                    self.connected[peer] = None
                case Send(peer, _):
                    assert peer in self.connected, f"{peer} was never connected"
                case Detokenize():
                    self.slow.append(action)
                case Release(rid):
                    assert rid not in self.ended, "ended twice"
                    self.ended[rid] = None
                case Reply(client, message):
                    if self.client == "sent" or not isinstance(message, Delta | Done):
                        self.hear(message, client)
                    else:
                        self.act(self.core.handle(Undelivered(client, message, self.client == "gone"), self.now))

    def hear(self, message, client=b"c"):
        assert client != b"thief" or isinstance(message, Refused), f"a thief is told {message}"
        if client == b"onlooker":
            self.told = message
            return
        if isinstance(message, Delta | Done):
            name = choice_id(message.rid, message.choice)
            have = self.heard.setdefault(name, [])
            if have and have[-1] == "done":
                assert isinstance(message, Done) and name in self.again, "something after the Done"
                return
        if isinstance(message, Delta) and message.ids:
            assert message.start == len(have), "a gap, or a token twice"
            have += message.ids
        elif isinstance(message, Done):
            assert message.usage.completion_tokens == len(have)
            assert abs(sum(message.timeline.values()) - message.jct_s) < 1e-6
            self.dones[name] = message
            have.append("done")

    def tell(self, event):
        self.act(self.core.handle(event, self.now))

    def of(self, rid):
        """The choices of a request, if it is known."""
        request = self.core.table.requests.get(rid)
        return [] if request is None else request.choices

    @rule(
        key=st.integers(1, 5),
        size=st.integers(0, 20),
        most=st.integers(0, 6),
        late=st.sampled_from([None, 0.5]),
        n=st.sampled_from([1, 1, 2, 3]),
    )
    def submit(self, key, size, most, late, n):
        again = self.core.table.keys.get(f"k{key}")
        for choice in self.of(again):
            self.heard[choice.id] = []  # all of it comes once more
        content, rid = self.contents.get(f"k{key}"), f"r{self.core.counters['accepted'] + 1}"
        if again is None:
            content = self.contents[f"k{key}"] = f"{size} {most} {late} {n}".encode()
        asked = (SECRET, content, rid, (1,) * size, Sampling(max_tokens=most, temperature=float(n > 1)), late)
        self.tell(Submitted(b"c", f"k{key}", *asked, n=n))

    @rule(key=st.integers(1, 5), secret=st.sampled_from([SECRET, WRONG]))
    def submit_with_anothers_key(self, key, secret):
        """Of what is known. Neither its client nor a worker notices."""
        if f"k{key}" in self.core.table.keys:
            asked = (secret, b"" if secret == SECRET else self.contents[f"k{key}"], "new", (7,), Sampling(), None)
            self.tell(Submitted(b"thief", f"k{key}", *asked))

    @rule(rid=rids, kind=st.sampled_from([Cancel, Attach]))
    def ask_with_a_wrong_secret(self, rid, kind):
        self.tell(FromClient(b"thief", kind(rid=rid, secret=WRONG)))

    @rule(rid=rids, message=st.sampled_from(["cancel", "end"]))
    def cancel(self, rid, message):
        for choice in self.of(rid):
            if choice.id in self.ended:
                self.heard[choice.id] = list(choice.output)  # only the Done comes again
                self.again[choice.id] = None
        self.tell(FromClient(b"c", Cancel(rid=rid, secret=SECRET) if message == "cancel" else EndRequest(rid=rid)))

    @rule(rid=rids, index=st.sampled_from([0, 0, 1, 2]))
    def attach(self, rid, index):
        self.heard[choice_id(rid, index)] = []
        self.tell(FromClient(b"c", Attach(rid=rid, secret=SECRET, start=0, choice=index)))

    @rule(message=st.sampled_from([Inspect(), CheckReadiness()]))
    def inspect(self, message):
        self.tell(FromClient(b"c", message))

    def ask(self, message):
        """What an onlooker is told."""
        self.told = None
        self.tell(FromClient(b"onlooker", message))
        return self.told

    @rule(iid=iids, choice=choices, attempt=st.integers(1, 3), kind=st.sampled_from(["chunk", "preempted"]))
    def trace(self, iid, choice, attempt, kind):
        """A worker tells what has happened, whatever its clock says."""
        self.tell(heartbeat(iid, at=9.0, traced=[TraceEvent(kind, choice, attempt, 8.0, seconds=0.5)]))

    @rule(rid=rids, index=st.sampled_from([0, 0, 1, 2]))
    def explain(self, rid, index):
        """The stages follow each other, from the arrival to the end."""
        found = self.ask(Explain(rid=rid, choice=index))
        if not isinstance(found, Timeline):
            assert choice_id(rid, index) not in self.core.table.choices
            return
        end = 0.0
        for span in found.stages:
            assert abs(span.start_s - end) < 1e-6 and span.seconds >= 0
            end = span.start_s + span.seconds
        assert abs(end - (found.age_s if found.jct_s is None else found.jct_s)) < 1e-6
        assert [event.attempt for event in found.events if event.kind == "retry"] == [*range(2, found.attempts + 1)]
        done = self.dones.get(choice_id(rid, index))
        if done is not None:
            assert (found.reason, found.jct_s, found.receipt) == (done.reason, done.jct_s, done.receipt)

    @rule(since=st.integers(0, 20))
    def observe(self, since):
        """What is measured agrees with the Dones, and the retries with the attempts."""
        found = self.ask(Observe(epoch=42, since=since))
        assert isinstance(found, Observation)
        counts, histograms = found.measures.counts, found.measures.histograms
        assert sum(counts["requests_ended"].values()) == sum(histograms["jct"].counts) == len(self.ended)
        assert sum(counts["retries"].values()) == sum(attempt - 1 for attempt in self.attempts.values())
        told = len(found.moves) + len(found.ended) + len(found.events) + found.missed
        assert told == max(0, found.serial - since)

    @rule(iid=iids, number=st.integers(1, 4), stage=stages, what=st.integers(0, 3))
    def canary(self, iid, number, stage, what):
        """A worker reports one, that may be on its way."""
        rid = f"canary-{self.core.members.epoch:x}-{number}"
        events = [
            staged(iid, rid, stage),
            tokens(iid, rid, 1, 1, reason="length"),
            failed(iid, rid, retry=True, avoid=[iid]),
            heartbeat(iid, Hold(rid, 1, stage, 1), unread_by={"d1": "lost"}),
        ]
        self.tell(events[what])

    @rule(client=st.sampled_from(["sent", "full", "gone"]))
    def client_is(self, client):
        self.client = client

    @rule(stop=st.sampled_from([False, False, False, True]))
    @precondition(lambda self: self.slow)
    def word(self, stop):
        """The edge does them in order."""
        word = self.slow.pop(0)
        counted = word.start + 1 if stop and word.ids else None
        self.tell(Detokenized(word.rid, word.start, word.ids, "x" * len(word.ids), counted, word.final))
        if counted is not None:  # from now on all words of it say so
            self.slow = [each for each in self.slow if each.rid != word.rid]
            choice = self.core.table.choices.get(word.rid)
            if choice is not None and not choice.stage.ended:
                self.tell(Detokenized(word.rid, choice.asked, (), "", counted, True))

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

    @rule(iid=iids, choice=choices, attempt=st.integers(1, 3), stage=stages)
    def staged(self, iid, choice, attempt, stage):
        if stage is not Stage.DONE:
            self.tell(staged(iid, choice, stage, attempt))

    @rule(
        iid=iids,
        choice=choices,
        attempt=st.integers(1, 3),
        start=st.integers(0, 4),
        size=st.integers(0, 4),
        reason=st.sampled_from([None, None, "stop", "length"]),
    )
    def tokens(self, iid, choice, attempt, start, size, reason):
        ids = range(start, start + size)  # every attempt yields the same ones
        self.tell(tokens(iid, choice, start, *ids, attempt=attempt, reason=reason))

    @rule(iid=iids, choice=choices, attempt=st.integers(1, 3), retry=st.booleans())
    def failed(self, iid, choice, attempt, retry):
        self.tell(failed(iid, choice, retry=retry, attempt=attempt))

    @rule(
        iid=iids,
        incarnation=st.integers(1, 2),
        holds=st.lists(st.tuples(choices, st.integers(1, 3), stages, st.integers(0, 5)), max_size=3),
        read=st.sampled_from([0, 1, 2, 3, 9, 999]),
    )
    def heartbeat(self, iid, incarnation, holds, read):
        self.tell(heartbeat(iid, *(Hold(*hold) for hold in holds), incarnation=incarnation, read=read))

    @rule(wait=seconds)
    def tick(self, wait):
        self.now += wait
        self.act(self.core.tick(self.now))

    @invariant()
    def sound(self):
        if hasattr(self, "core"):
            self.core.check()
            for name, choice in self.core.table.choices.items():
                assert choice.stage.ended == (name in self.ended)
                self.attempts[name] = choice.attempt
            assert (deadline := self.core.deadline()) is not None and deadline < self.now + 10

    def teardown(self):
        """Everyone is silent from now on: whatever is open ends, and is forgotten."""
        if not hasattr(self, "core"):
            return
        for _ in range(200):
            self.client = "sent"
            while self.slow:
                self.word(False)
            self.now += 0.7
            self.act(self.core.tick(self.now))
            self.core.check()
        held = [choice for choice in self.core.table.choices.values() if choice.holder is None]
        assert not held, "nobody has it, and nobody gave it up"
        self.observe(0)
        assert self.core.observer.timelines.open_bytes == 0 or self.core.table.choices


TestBrokerUnderFire = BrokerUnderFire.TestCase
TestBrokerUnderFire.settings = QUICK
