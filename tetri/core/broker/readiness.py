"""Readiness: whether each pair of a prefill and a decode instance in service has lately carried KV.

The hand-over of any request counts. A pair without traffic gets a canary: a request of the broker's own with one token
for each phase, pinned to the pair (Assign.pinned). Workers serve it after everything else. It is not in the request
table, so no counter, limit or statistic knows of it. At most one starts each second, and only while somebody asks.

A canary that only waits behind other work shows nothing: its pair stays as it was. The pair is broken if the KV cannot
be read, or if the canary is late although its instances are idle, until a hand-over lands again.

A hand-over moves its pair to the end of a dict, whatever the number of pairs; all other work is done when somebody
asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import inf

from tetri.core.actions import Action, Broken, Reply, Send
from tetri.core.broker.closes import Closes
from tetri.core.broker.membership import Members
from tetri.core.broker.requests import BEFORE_TOKENS, ON_DECODER
from tetri.request import Sampling, Stage
from tetri.wire.clients import PairReadiness, Readiness
from tetri.wire.messages import Assign, Close, Failed, Hold, Staged, TokenItem

EVERY_S = 1.0  # least seconds between two canaries
LATE_S = 10.0  # a canary that takes longer is late
PER_PAIR_S = 4.0  # a hand-over counts for so long a pair at least: canaries alone can then keep all pairs ready
ASKED = 2.0  # canaries go on for so many times `within_s` after the last question
MOST_LISTED = 64  # pairs in an answer
CANARY = Sampling(max_tokens=2, ignore_eos=True)
PROMPT = [0]  # any token will do
CARRIED, BUSY, UNKNOWN, BROKEN = "carried", "busy", "unknown", "broken"
NO_PAIR = "no prefill instance and decode instance that can exchange KV are in service"

Pair = tuple[str, str]  # ids of a prefill and a decode instance; of one that does both also with itself


@dataclass(slots=True)
class PairState:
    """`carried_at` and `tried_at`: when its last hand-over landed, and when its last canary started. `broken`: why the
    last hand-over failed, "" if it did not. `note`: why the last canary showed nothing."""

    carried_at: float = -inf
    tried_at: float = -inf
    broken: str = ""
    note: str = ""


@dataclass(slots=True)
class Canary:
    """One canary on its way. `stage`: the last that was reported; DONE: it has both tokens."""

    rid: str
    pair: Pair
    sent_at: float
    stage: Stage = Stage.QUEUED

    @property
    def landed(self) -> bool:
        """Whether its KV is at the decode instance."""
        return self.stage in ON_DECODER or self.stage is Stage.DONE


class PairChecks:
    """Knows when each pair carried KV, starts canaries, and answers. Shares the broker's members and closes.

    `_carried` has the pairs with a hand-over since their last canary started, in order of their last hand-over; `_open`
    has the others, roughly in the order in which they were tried."""

    def __init__(self, members: Members, closes: Closes, ready_s: float) -> None:
        """`ready_s`: least seconds for which a hand-over counts."""
        self.members, self.closes, self.ready_s = members, closes, ready_s
        self.canaries: dict[str, Canary] = {}  # by rid, oldest first
        self._carried: dict[Pair, PairState] = {}
        self._open: dict[Pair, PairState] = {}
        self._pairs: list[Pair] = []  # in service, when last looked at
        self._asked_at = -inf
        self._next_at: float | None = None  # of the next look at canaries; None: no canary was started for EVERY_S
        self._number = 0

    @property
    def within_s(self) -> float:
        """Seconds for which a hand-over counts."""
        return max(self.ready_s, PER_PAIR_S * len(self._pairs))

    def deadline(self) -> float | None:
        """The time of the next `tick`; None while nobody asks."""
        return self._next_at

    def ask(self, client: bytes, now: float) -> list[Action]:
        """Answer a CheckReadiness, and start a canary if one is due."""
        self._look()
        self._asked_at = now
        if self._next_at is None:
            self._next_at = now
        return [Reply(client, self._answer(now)), *self.tick(now)]

    def tick(self, now: float) -> list[Action]:
        """End late canaries and start one, if it is time."""
        if self._next_at is None or now < self._next_at:
            return []
        actions = [action for canary in list(self.canaries.values()) for action in self._end_late(canary, now)]
        asked = now - self._asked_at < ASKED * self.within_s
        if asked:
            self._look()
            actions += self._start_due(now)
        self._next_at = now + EVERY_S if asked or self.canaries else None
        return actions

    # ------------------------------------------------------------ what workers report

    def carried(self, prefill: str, decode: str, now: float) -> None:
        """All KV of a request has landed. Called for each request: it must be cheap."""
        pair = prefill, decode
        state = self._open.pop(pair, None) or self._carried.pop(pair, None) or PairState()
        state.carried_at, state.broken, state.note = now, "", ""
        self._carried[pair] = state

    def unread(self, prefill: str, unread_by: Mapping[str, str]) -> None:
        """A heartbeat names decode instances that cannot read KV of its worker: canaries find out when they can."""
        for decode in unread_by:
            state = self._carried.pop((prefill, decode), None)
            if state is not None:
                self._open[prefill, decode] = state

    def moved(self, event: Staged | Failed, now: float) -> list[Action]:
        """A worker reports the stage of a canary, or gives it up: `avoid` says that its KV could not be moved."""
        canary = self.canaries.get(event.rid)
        if canary is None:
            return []
        if isinstance(event, Failed):
            return self._end(canary, broken=event.why if event.avoid else "", note=event.why)
        self._staged(canary, event.iid, event.stage, now)
        return []

    def tokens(self, item: TokenItem, iid: str, now: float) -> list[Action]:
        """A worker reports tokens of a canary; the second one shows that the KV has landed."""
        canary = self.canaries.get(item.rid)
        if canary is None:
            return []
        if item.start + len(item.ids) > 1:
            self._staged(canary, iid, Stage.DECODE, now)
        return [] if item.end is None else self._end(canary, broken=item.end.error or "")

    def held(self, hold: Hold, iid: str, now: float) -> bool:
        """Whether a heartbeat lists a canary that is on its way. Messages about it may have been lost."""
        canary = self.canaries.get(hold.rid)
        if canary is not None:
            self._staged(canary, iid, hold.stage, now)
        return canary is not None

    def forget(self, iid: str) -> list[Action]:
        """A worker is lost or was restarted: what is known of its pairs no longer counts."""
        for states in (self._carried, self._open):
            for pair in [pair for pair in states if iid in pair]:
                del states[pair]
        ended = [canary for canary in self.canaries.values() if iid in canary.pair]
        return [action for canary in ended for action in self._end(canary)]

    def _staged(self, canary: Canary, iid: str, stage: Stage, now: float) -> None:
        landed = iid == canary.pair[1] and (stage in ON_DECODER or stage is Stage.DONE)
        if landed and not canary.landed:
            self.carried(*canary.pair, now)
        if landed or not canary.landed:
            canary.stage = stage

    # ------------------------------------------------------------ canaries

    def _look(self) -> None:
        """Update the pairs in service: after a change of members, or when KV was carried in one that is not."""
        pairs = self.members.pairs()
        if pairs is self._pairs and len(self._carried) + len(self._open) == len(pairs):
            return
        self._pairs, serving = pairs, dict.fromkeys(pairs)
        self._carried = {pair: state for pair, state in self._carried.items() if pair in serving}
        kept = {pair: state for pair, state in self._open.items() if pair in serving}
        new = {pair: PairState() for pair in pairs if pair not in self._carried and pair not in kept}
        self._open = {**new, **kept}

    def _start_due(self, now: float) -> list[Action]:
        """Start a canary for the pair that is due first: one of `_open` EVERY_S after it was tried, another one when
        half of the time for which its hand-over counts is over."""
        moving = {canary.pair for canary in self.canaries.values()}
        due: list[tuple[float, Pair]] = []
        for states in (self._open, self._carried):
            pair = next((pair for pair in states if pair not in moving), None)
            if pair is not None:
                state = states[pair]
                at = state.tried_at + EVERY_S if states is self._open else state.carried_at + self.within_s / 2
                due.append((at, pair))
        at, pair = min(due, default=(inf, None))
        return [] if pair is None or at > now else [self._start(pair, now)]

    def _start(self, pair: Pair, now: float) -> Send:
        self._number += 1
        rid = f"canary-{self.members.epoch:x}-{self._number}"
        state = self._open.pop(pair, None) or self._carried.pop(pair)
        state.tried_at = now
        self._open[pair] = state
        self.canaries[rid] = Canary(rid, pair, now)
        prefill, decode = pair
        return Send(prefill, Assign(rid=rid, attempt=1, prompt=PROMPT, output=[], sampling=CANARY, pinned=decode))

    def _end_late(self, canary: Canary, now: float) -> list[Action]:
        if now - canary.sent_at < LATE_S:
            return []
        if canary.stage is Stage.DONE:  # its last tokens were lost
            return self._end(canary)
        busy = self._busy(canary.pair, canary.stage)
        return self._end(canary, broken="" if busy else _late(canary), note=busy)

    def _end(self, canary: Canary, broken: str = "", note: str = "") -> list[Action]:
        """Close a canary on both workers. `broken`: what it shows; `note`: why it shows nothing."""
        del self.canaries[canary.rid]
        pair = canary.pair
        state = self._open.get(pair) or self._carried.get(pair)
        if state is not None and broken:
            self._carried.pop(pair, None)
            state.broken, self._open[pair] = broken, state
        elif state is not None:
            state.note = note
        close = Close(rid=canary.rid, attempt=1, reason="cancelled")
        return [self.closes.send(iid, close) for iid in dict.fromkeys(pair)]

    def _busy(self, pair: Pair, stage: Stage) -> str:
        """Why a canary of the pair in this stage only waits, in one line; "" if the instances have nothing else to do.
        An instance that does not compute is not busy: its work may be stuck."""
        prefill, decode = (self.members.by_iid[iid] for iid in pair)
        own = [canary for canary in self.canaries.values() if canary.pair[0] == prefill.iid]
        if stage in BEFORE_TOKENS and prefill.load.busy:
            queued = prefill.load.queued - sum(canary.stage in BEFORE_TOKENS for canary in own)
            if queued > 0:
                return f"{prefill.iid} has {queued} prompts to prefill first"
            if prefill.slots_used > len(own):
                return f"{prefill.iid} has other KV to send first"
        load = decode.load
        if stage not in ON_DECODER and load.busy and load.free_blocks - load.kept_blocks - load.deferred_blocks < 1:
            return f"{decode.iid} has no free KV memory"
        if stage in ON_DECODER and load.busy and load.running > 1:
            return f"{decode.iid} has {load.running} requests to decode"
        return ""

    # ------------------------------------------------------------ the answer

    def _answer(self, now: float) -> Readiness:
        listed: list[PairReadiness] = []
        wrong: list[PairReadiness] = []
        for found in self._states(now):
            if found.state in (UNKNOWN, BROKEN):
                wrong.append(found)
            listed.append(found)
            if len(listed) >= MOST_LISTED and wrong:
                break
        listed.sort(key=lambda found: found.state == CARRIED)
        why = "" if self._pairs else NO_PAIR
        if wrong:
            more = "" if len(wrong) == 1 else f" ({len(wrong) - 1} more like it)"
            why = f"{wrong[0].prefill} to {wrong[0].decode} is {wrong[0].state}: {wrong[0].why}{more}"
        return Readiness(
            ready=not why,
            why=why,
            within_s=self.within_s,
            in_service=len(self._pairs),
            pairs=listed[:MOST_LISTED],
        )

    def _states(self, now: float) -> Iterator[PairReadiness]:
        """The state of each pair; of those that have carried lately and were not tried since, only some."""
        stages = {canary.pair: canary.stage for canary in self.canaries.values()}
        for count, (pair, state) in enumerate(chain(self._open.items(), self._carried.items())):
            if count >= MOST_LISTED and pair in self._carried and now - state.carried_at <= self.within_s:
                return
            yield self._state(pair, state, stages.get(pair, Stage.QUEUED), now)

    def _state(self, pair: Pair, state: PairState, stage: Stage, now: float) -> PairReadiness:
        prefill, decode = pair
        age_s = None if state.carried_at == -inf else now - state.carried_at
        broken = self.members.by_iid[prefill].unread_by.get(decode) or state.broken
        if broken:
            name, why = BROKEN, broken
        elif age_s is not None and age_s <= self.within_s:
            name, why = CARRIED, ""
        elif busy := self._busy(pair, stage):
            name, why = BUSY, busy
        else:
            since = "yet" if age_s is None else f"for {age_s:.0f} s"
            name, why = UNKNOWN, state.note or f"no KV has moved {since}"
        return PairReadiness(prefill=prefill, decode=decode, state=name, age_s=age_s, why=why)

    def check(self) -> None:
        """Check that each pair is in one place. Raises Broken."""
        both = self._carried.keys() & self._open.keys()
        if both:
            raise Broken(f"carried, and tried since: {both}")


def _late(canary: Canary) -> str:
    """What is wrong with the pair of a late canary."""
    prefill, decode = canary.pair
    if canary.stage in BEFORE_TOKENS:
        return f"{prefill} did not prefill a canary within {LATE_S:g} s"
    if canary.landed:
        return f"{decode} did not decode a canary within {LATE_S:g} s"
    return f"KV of {prefill} did not reach {decode} within {LATE_S:g} s"
