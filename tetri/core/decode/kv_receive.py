"""KV on its way into a decode instance: chunks are announced, taken, again when they come out wrong, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from tetri.core.actions import Adopt, Adopted, Broken
from tetri.core.decode.request import DecodeRequest
from tetri.policy.pairing import FAR
from tetri.wire.handover import Chunk

FETCH_TRIES = 3  # a chunk that comes out wrong is taken so often, then its offer is refused
LOST_PAUSE_S = 0.2  # before a chunk is taken again that was lost over a path which may come back; then twice as long

# What is counted, in the order in which it is shown; docs/protocol.md (Heartbeat) says what each is.
COUNTED = (
    "late",
    "old_attempt",
    "duplicate",
    "reordered",
    "truncated",
    "misfit",
    "flipped",
    "foreign",
    "lost",
    "refetched",
    "healed",
    "given_up",
)
AGAIN = ("flipped", "truncated")  # the next copy may be right


class KVReceive:
    """`fetching`: takes under way by leg, also of legs that are no more: what they bring must never be taken for a
    chunk of another leg of the same key. `pauses`: when a chunk is to be taken again."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self.fetching: dict[str, int] = {}
        self.pauses: dict[tuple[str, int], float] = {}

    # ------------------------------------------------------------ announced

    def stray(self, chunk: Chunk, request: DecodeRequest | None) -> None:
        """A chunk of no offer that is here; `seat` is what is here of its request."""
        self.counters["old_attempt" if request is not None and request.offer.attempt > chunk.attempt else "late"] += 1

    def again(self, chunk: Chunk, request: DecodeRequest) -> bool:
        """Whether it says nothing new."""
        known = bool(request.landed_as) or chunk.index in request.flow.ranges
        self.counters["duplicate"] += known
        return known

    def announced(self, chunk: Chunk, request: DecodeRequest) -> str | None:
        """Take a new chunk in. Why it cannot be one of its offer's, if it cannot."""
        flow = request.flow
        wrong = flow.obstacle(chunk)
        if wrong is not None:
            self.counters[wrong[0]] += 1
            return wrong[1]
        if any(index > chunk.index for index in flow.ranges):
            self.counters["reordered"] += 1
        flow.announce(chunk)
        return None

    # ------------------------------------------------------------ taken

    def fetch(self, chunk: Chunk, request: DecodeRequest) -> Adopt:
        self.fetching[request.key] = self.fetching.get(request.key, 0) + 1
        return Adopt(request.key, chunk.index, chunk.start, chunk.handle, chunk.digest, chunk.src, request.flow.path)

    def adopted(self, event: Adopted, request: DecodeRequest | None, now: float) -> list[Adopt]:
        """Enter what a take has brought: the chunk has landed, or is taken again, or its flow is broken."""
        left = self.fetching.get(event.key, 0) - 1
        if left < 0:
            raise Broken(f"nobody took chunk {event.index} of {event.key}")
        self.fetching[event.key] = left
        if not left:
            del self.fetching[event.key]
        if request is None:
            return []
        flow, problem = request.flow, event.problem
        if problem is not None:
            self.counters[problem] += 1
        if flow.broken is not None:
            return []
        if problem is None:
            self.counters["healed"] += event.index in flow.tries
            flow.land(event.index)
            return []
        return self._wrong(event.index, problem, request, now)

    def _wrong(self, index: int, problem: str, request: DecodeRequest, now: float) -> list[Adopt]:
        """A take has brought nothing: take it again, now or after a pause, or break the flow."""
        flow = request.flow
        far = problem == "lost" and flow.path in FAR
        tries = flow.tries[index] = flow.tries.get(index, 1) + 1
        if tries > FETCH_TRIES or not (far or problem in AGAIN):
            flow.tries[index] -= 1
            self.counters["given_up"] += 1
            flow.broken, flow.corrupt = f"chunk {index} is {problem}", not far
            self.forget(request)
            return []
        self.counters["refetched"] += 1
        if far:
            self.pauses[request.key, index] = now + LOST_PAUSE_S * 2 ** (tries - 2)
            return []
        return [self.fetch(flow.announced[index], request)]

    # ------------------------------------------------------------ pauses

    def due(self, now: float) -> list[tuple[str, int]]:
        """The chunks whose pause is over, by leg and index; their pauses end."""
        over = [place for place, until in self.pauses.items() if until <= now]
        for place in over:
            del self.pauses[place]
        return over

    def next(self) -> float | None:
        """When the next pause is over."""
        return min(self.pauses.values(), default=None)

    def forget(self, request: DecodeRequest) -> None:
        """Nothing more of it is taken."""
        for place in [place for place in self.pauses if place[0] == request.key]:
            del self.pauses[place]

    def check(self, moving: Collection[DecodeRequest]) -> None:
        """Count everything again."""
        for request in moving:
            paused = sum(key == request.key for key, _ in self.pauses)
            awaited = self.fetching.get(request.key, 0) + paused
            if request.allocated and request.flow.broken is None and awaited != len(request.flow.announced):
                raise Broken(f"{request.key} waits for {awaited} of {len(request.flow.announced)} chunks")
        keys = [request.key for request in moving]
        if any(key not in keys for key, _ in self.pauses):
            raise Broken(f"takes of legs that are no more: {list(self.pauses)}")
