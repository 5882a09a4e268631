"""KV on its way into a decode instance: chunks are announced, taken, again when they come out wrong, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from tetri.core.actions import Adopt, Adopted, Broken
from tetri.core.seat import Seat
from tetri.policy.pairing import FAR
from tetri.wire.handover import Chunk

TAKE_TRIES = 3  # a chunk that comes out wrong is taken so often, then its offer is refused
LOST_PAUSE_S = 0.2  # before a chunk is taken again that was lost over a path which may come back; then twice as long

# What is counted, in the order in which it is shown; docs/protocol.md (Beat) says what each is.
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


class Landing:
    """`taking`: takes under way by leg, also of legs that are no more: what they bring must never be taken for a
    chunk of another leg of the same key. `pauses`: when a chunk is to be taken again."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self.taking: dict[str, int] = {}
        self.pauses: dict[tuple[str, int], float] = {}

    # ------------------------------------------------------------ announced

    def stray(self, chunk: Chunk, seat: Seat | None) -> None:
        """A chunk of no offer that is here; `seat` is what is here of its request."""
        self.counters["old_attempt" if seat is not None and seat.offer.attempt > chunk.attempt else "late"] += 1

    def again(self, chunk: Chunk, seat: Seat) -> bool:
        """Whether it says nothing new."""
        known = bool(seat.landed_as) or chunk.index in seat.flow.ranges
        self.counters["duplicate"] += known
        return known

    def announced(self, chunk: Chunk, seat: Seat) -> str | None:
        """Take a new chunk in. Why it cannot be one of its offer's, if it cannot."""
        flow = seat.flow
        wrong = flow.obstacle(chunk)
        if wrong is not None:
            self.counters[wrong[0]] += 1
            return wrong[1]
        if any(index > chunk.index for index in flow.ranges):
            self.counters["reordered"] += 1
        flow.announce(chunk)
        return None

    # ------------------------------------------------------------ taken

    def take(self, chunk: Chunk, seat: Seat) -> Adopt:
        self.taking[seat.key] = self.taking.get(seat.key, 0) + 1
        return Adopt(seat.key, chunk.index, chunk.start, chunk.handle, chunk.digest, chunk.src, seat.flow.path)

    def adopted(self, event: Adopted, seat: Seat | None, now: float) -> list[Adopt]:
        """Enter what a take has brought: the chunk has landed, or is taken again, or its flow is broken."""
        left = self.taking.get(event.key, 0) - 1
        if left < 0:
            raise Broken(f"nobody took chunk {event.index} of {event.key}")
        self.taking[event.key] = left
        if not left:
            del self.taking[event.key]
        if seat is None:
            return []
        flow, problem = seat.flow, event.problem
        if problem is not None:
            self.counters[problem] += 1
        if flow.broken is not None:
            return []
        if problem is None:
            self.counters["healed"] += event.index in flow.tries
            flow.land(event.index)
            return []
        return self._wrong(event.index, problem, seat, now)

    def _wrong(self, index: int, problem: str, seat: Seat, now: float) -> list[Adopt]:
        """A take has brought nothing: take it again, now or after a pause, or break the flow."""
        flow = seat.flow
        far = problem == "lost" and flow.path in FAR
        tries = flow.tries[index] = flow.tries.get(index, 1) + 1
        if tries > TAKE_TRIES or not (far or problem in AGAIN):
            flow.tries[index] -= 1
            self.counters["given_up"] += 1
            flow.broken, flow.spoilt = f"chunk {index} is {problem}", not far
            self.forget(seat)
            return []
        self.counters["refetched"] += 1
        if far:
            self.pauses[seat.key, index] = now + LOST_PAUSE_S * 2 ** (tries - 2)
            return []
        return [self.take(flow.announced[index], seat)]

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

    def forget(self, seat: Seat) -> None:
        """Nothing more of it is taken."""
        for place in [place for place in self.pauses if place[0] == seat.key]:
            del self.pauses[place]

    def check(self, moving: Collection[Seat]) -> None:
        """Count everything again."""
        for seat in moving:
            paused = sum(key == seat.key for key, _ in self.pauses)
            awaited = self.taking.get(seat.key, 0) + paused
            if seat.allocated and seat.flow.broken is None and awaited != len(seat.flow.announced):
                raise Broken(f"{seat.key} waits for {awaited} of {len(seat.flow.announced)} chunks")
        keys = [seat.key for seat in moving]
        if any(key not in keys for key, _ in self.pauses):
            raise Broken(f"takes of legs that are no more: {list(self.pauses)}")
