"""A worker's core as tests drive it: with an engine and a KV store that are played."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any

from tests.core.build import PHASES, chunk, handle, identity, instance, landed, membership, offer, view
from tests.core.reading import Told, kinds, sent
from tetri.core import actions as say
from tetri.core.actions import BROKER, Action
from tetri.core.instance.identity import Identity
from tetri.core.worker.worker import Worker
from tetri.engine_request import EngineRequest, HiddenStateEstimate, Sampled, Span, StepDone
from tetri.instance import Instance
from tetri.request import LengthDistribution, blocks_for
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Chunk, Offer
from tetri.wire.load import Load
from tetri.wire.messages import Heartbeat, Ready

PROMPT_TOKEN, TOKEN = 7, 6  # what every prompt ends with here, and what follows; from elsewhere requests bring a 5


class Working(Told):
    """The engine runs what it was handed, as its contract says: a token for each that decodes, then the prompts in the
    order in which they came, up to the budget of a step. Requests are named by their ids. KV comes and goes at once;
    while `far`, what is taken comes when the test says so (`come`); `exports` and `frees` say whether the store does
    its part at once."""

    def __init__(self, own: Identity, core: Any = None) -> None:
        super().__init__(Worker(own, Random(1), now=0.0) if core is None else core)
        self.own, self.iid = own, own.iid
        self.requests: dict[str, EngineRequest] = {}
        self.computed: dict[str, int] = {}  # prefill leg -> tokens
        self.waiting: dict[str, None] = {}  # decode legs without blocks
        self.sizes: dict[str, int] = {}  # running decode leg -> tokens, prompt and output
        self.preempted: dict[str, int] = {}  # of these, the preempted ones, and how many tokens are computed again
        self.held: dict[str, None] = {}
        self.stays: dict[str, str] = {}  # prefill leg -> the decode leg that it turns into
        self.most: int | None = None  # passes that the step under way may take, None while there is none
        self.limit: int | None = None  # most prompt tokens of that step; None: as many as its budget has left
        self.far, self.exports, self.frees = False, True, True
        self.trouble: dict[int, list[str]] = {}  # index of a chunk -> what is wrong with it, one try after the other
        self.asked: dict[str, tuple[str, Offer]] = {}  # rid -> its newest offer, and to whom
        self.announced: dict[str, dict[int, Chunk]] = {}  # rid -> chunks of that offer
        self.up: dict[str, None] = {}
        self.memberships = self.viewed = 0

    def tell(self, *events: Any) -> list[Action]:
        for event in events:
            if isinstance(event, say.RequestRejected):
                self._forget(event.key)
            elif isinstance(event, PeerDown):
                self.up.pop(event.peer, None)
        return super().tell(*events)

    def result(self, action: Action) -> Any:
        match action:
            case say.AddRequest(engine_request):
                self.requests[engine_request.key] = engine_request
                (self.waiting if engine_request.phase == "decode" else self.computed)[engine_request.key] = 0
            case say.CancelRequest(key):
                self._forget(key)
            case say.AdmitRequest(key, _, further):
                self.sizes[key] = len(self.requests[key].tokens) + 1 + len(further)
            case say.StayRequest(key, decode_key):
                assert key in self.computed and key not in self.stays, f"{key} cannot stay"
                self.stays[key] = decode_key
            case say.HoldRequest(key, held):
                assert (key in self.held) != held, f"{key} was told so before"
                self.held.update({key: None}) if held else self.held.pop(key)
            case say.Step(most, chunk_tokens):
                assert self.most is None, "a step is under way"
                self.most, self.limit = most, chunk_tokens
            case say.Export(key, index, start, stop) if self.exports:
                return say.Exported(key, index, start, stop, handle(*range(start, stop), segment=f"s-{self.iid}"), 9)
            case say.Adopt(key, index) if not self.far:
                problems = self.trouble.get(index)
                return say.Adopted(key, index, problems.pop(0) if problems else None)
            case say.Send(peer, Offer() as made):
                self.asked[made.rid], self.announced[made.rid] = (peer, made), {}
            case say.Send(_, Chunk() as made):
                self.announced[made.rid][made.index] = made
        return super().result(action) if self.frees else None

    def _forget(self, key: str) -> None:
        for place in (self.requests, self.computed, self.waiting, self.sizes, self.preempted, self.held, self.stays):
            place.pop(key, None)
        self.stays = {prefill: decode for prefill, decode in self.stays.items() if decode != key}

    def key(self, rid: str) -> str:
        """Of the newest leg of a request."""
        return [key for key in self.requests if key.split(":")[1] == rid][-1]

    def chunk(self) -> list[tuple[str, int, int]]:
        """Which tokens of which prompts the step under way computes."""
        return [(span.key.split(":")[1], span.start, span.stop) for span in self._chunk(())]

    def _chunk(self, out: Iterable[str]) -> list[Span]:
        found, room = list[Span](), 0 if self.most is None else self.own.capacity.chunk_tokens
        for key, size in self.sizes.items():
            room -= 0 if key in out or key in self.held else size if key in self.preempted else 1
        room = room if self.limit is None else min(room, self.limit)
        for key, start in self.computed.items():
            stop = min(len(self.requests[key].tokens), start + room)
            if key not in self.held and stop > start:
                found.append(Span(key, start, stop))
                room -= stop - start
        return found

    def step(
        self,
        *,
        passes: int = 1,
        preempted: Iterable[str] = (),
        out: Iterable[str] = (),
        spans: list[tuple[str, int, int]] | None = None,
        estimates: Mapping[str, LengthDistribution] | None = None,
        part: Mapping[str, int] | None = None,
        **ends: str,
    ) -> list[Action]:
        """Plan a step, unless one is under way, and run it; `ends` says why a request ends in it. In it some are
        `preempted`, still `out`, or computed again in `part`, up to so many tokens; `spans` of prompts are others than
        planned; hidden states say what follows."""
        planned = self.later() if self.most is None else []
        assert self.most is not None and passes <= self.most, kinds(planned)
        lost = [key for key in self.requests if key.split(":")[1] in preempted]
        away = [*lost, *self.held, *(key for key in self.sizes if key.split(":")[1] in out)]
        ran = self._chunk(away) if spans is None else [Span(f"p:{rid}:1", *span) for rid, *span in spans]
        tokens, held = list[Sampled](), [(key, 0) for key in lost]
        says = [
            HiddenStateEstimate(self.key(rid), self._outputs(self.key(rid)), distribution)
            for rid, distribution in (estimates or {}).items()
        ]
        for span in [span for span in ran if span.key in self.computed]:
            held.append((span.key, blocks_for(span.stop, self.own.capacity.block_tokens)))
            self.computed[span.key] = span.stop
            if span.stop == len(self.requests[span.key].tokens):
                siblings = self.requests[span.key].siblings
                tokens.append(self._sampled(span.key, (PROMPT_TOKEN,), ends))
                tokens += [self._sibling(key, seed, tokens[-1], ends) for key, seed in siblings]
        for key in [key for key in self.sizes if key not in away]:
            size, again, stop = self.sizes[key], self.preempted.pop(key, None), (part or {}).get(key.split(":")[1])
            if again is not None:
                ran.append(Span(key, again, size - 1 + passes if stop is None else stop))
            if stop is not None:
                self.preempted[key] = stop
                continue
            tokens.append(self._sampled(key, (TOKEN,) * passes, ends))
            if key in self.requests:
                held.append((key, blocks_for(size - 1 + passes, self.own.capacity.block_tokens)))
        for key in lost:
            (self.computed if key in self.computed else self.preempted)[key] = 0
        allocated, self.waiting, self.most = tuple(self.waiting), {}, None
        done = StepDone(tuple(ran), tuple(tokens), allocated, tuple(lost), tuple(held), passes, tuple(says))
        return planned + self.tell(done)

    def _outputs(self, key: str) -> int:
        engine_request = self.requests[key]
        return self.sizes.get(key, len(engine_request.tokens)) - engine_request.output_from

    def _sampled(self, key: str, ids: tuple[int, ...], ends: Mapping[str, str]) -> Sampled:
        full = self._outputs(key) + len(ids) >= self.requests[key].sampling.max_tokens
        reason = ends.get(key.split(":")[1], "length" if full else None)
        if key in self.sizes:
            self.sizes[key] += len(ids)
        if reason is None and key in self.stays:
            self.requests[self.stays[key]] = self.requests[key]
        if reason is not None or key in self.computed:
            self._forget(key)
        return Sampled(key, ids, reason)

    @staticmethod
    def _sibling(key: str, seed: int, first: Sampled, ends: Mapping[str, str]) -> Sampled:
        """The token of a sibling is told by its seed."""
        full = "length" if first.reason == "length" else None
        return Sampled(key, (PROMPT_TOKEN + seed,), ends.get(key.split(":")[1], full))

    def run(self) -> list[tuple[str, int, int]]:
        """Run the next step if there is one; which tokens of which prompts it has computed."""
        if self.most is None:
            self.later()
        spans = self.chunk()
        if self.most is not None:
            self.step()
        return spans

    def meet(self, *others: str | Instance, apart: Iterable[str] = ("d9",)) -> list[Action]:
        """These are there, and connected; `apart` are there and are not. Roles are told by first letters."""
        self.memberships += 1
        entries = [each if isinstance(each, Instance) else _entry(each) for each in (self.iid, *others, *apart)]
        actions = self.tell(membership(self.memberships, *entries))
        new = [each.iid for each in entries[1 : len(others) + 1] if each.iid not in self.up]
        self.up.update(dict.fromkeys(new))
        return actions + self.tell(*map(PeerUp, new))

    def view(self, **loads: int | Load) -> list[Action]:
        """The monitor tells of their memory, or load."""
        self.viewed += 1
        return self.tell(view(self.viewed, **loads))

    def answer(self, rid: str, make: Callable[..., Any]) -> list[Action]:
        """Whoever was asked last to decode it grants or refuses that."""
        peer, made = self.asked[rid]
        return self.tell(make(rid, made.offer, peer, made.attempt))

    def take(self, rid: str) -> list[Action]:
        """And has taken all that was announced."""
        peer, made = self.asked[rid]
        return self.tell(*(landed(rid, index, made.offer, peer, made.attempt) for index in self.announced[rid]))

    def land(self, *rids: str, prompt: int = 8, number: int = 1, **changes: Any) -> list[Action]:
        """Requests ("r") come from elsewhere, the KV of each in one chunk. They wait to be admitted."""
        src = changes.pop("src", "p1" if self.iid[0] == "d" else "d9")
        offers = [offer(rid, prompt, offer=number + n, src=src, **changes) for n, rid in enumerate(rids or ["r"])]
        self.tell(*offers)
        while self.waiting:
            self.step()
        return self.tell(*(chunk(o.rid, 0, 0, o.blocks, token=5, offer=o.offer, src=src) for o in offers))

    def running(self, *rids: str, **changes: Any) -> Working:
        """They run: one step is done."""
        self.land(*rids, **changes)
        self.step()
        return self

    def come(self, index: int, problem: str | None = None, key: str = "d:r:1:p1:1") -> list[Action]:
        """A chunk that was far is here."""
        return self.tell(say.Adopted(key, index, problem))

    def heartbeat(self) -> Heartbeat:
        (found,) = sent(self.later(self.own.heartbeat_s), BROKER, Heartbeat)
        return found

    def load(self) -> Load:
        """As it registers."""
        (found,) = sent(self.tell(PeerUp(BROKER)), BROKER, Ready)
        return found.load

    def holds(self) -> list[tuple[str, str, int]]:
        return [(hold.rid, hold.stage.value, hold.outputs) for hold in self.heartbeat().holds]


def _entry(iid: str) -> Instance:
    return instance(iid, PHASES[iid[0]])


def working(iid: str, *others: str | Instance, **changes: Any) -> Working:
    """A worker that knows these others, all of them connected. Its role is told by its first letter."""
    told = Working(identity(iid, changes.pop("role", PHASES[iid[0]]), **changes))
    told.later()
    told.meet(*others)
    return told
