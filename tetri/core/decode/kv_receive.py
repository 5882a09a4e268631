"""KV receive: fetches the announced KV chunks of hand-overs, retries failed fetches and counts failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from tetri.core.actions import Adopt, Adopted, Broken
from tetri.core.decode.request import DecodeRequest, HandOver
from tetri.core.instance.activity import ActivityLog
from tetri.policy.pairing import FAR
from tetri.wire.handover import Chunk

FETCH_TRIES = 3  # fetches of one chunk; when the last one fails, its offer is refused
LOST_PAUSE_S = 0.2  # before the first retry over a path that may come back; doubles with each retry

# Names of the counters, in the order of the status output; docs/protocol.md (Heartbeat) explains each.
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
RETRYABLE = ("flipped", "truncated")  # problems that another fetch may solve


class KVReceive:
    """Fetches KV chunks.

    fetching   key of the hand-over -> chunk index -> when the pending fetch began; also of hand-overs that have ended:
               the results must never count for another one with the same key
    pauses     (key of the hand-over, chunk index) -> when to fetch the chunk again
    unread     transfers that failed since the last one that succeeded, by instance whose KV could not be read
    """

    def __init__(self, activity: ActivityLog) -> None:
        self.activity = activity
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self.fetching: dict[str, dict[int, float]] = {}
        self.pauses: dict[tuple[str, int], float] = {}
        self.unread: Counter[str] = Counter()

    @property
    def failing(self) -> int:
        """The number of failed transfers in a row if they came from several instances, so that the fault is probably
        here; else 0: it may be on the other side, or on the way."""
        return self.unread.total() if len(self.unread) > 1 else 0

    # ------------------------------------------------------------ announced

    def stray(self, chunk: Chunk, request: DecodeRequest | None) -> None:
        """Count a chunk whose offer is not open here. `request`: the open attempt of the same request, if any."""
        self.counters["old_attempt" if request is not None and request.offer.attempt > chunk.attempt else "late"] += 1

    def is_duplicate(self, chunk: Chunk, hand_over: HandOver) -> bool:
        """Return whether the chunk was announced before, and count it if so."""
        duplicate = hand_over.landed or chunk.index in hand_over.flow.ranges
        self.counters["duplicate"] += duplicate
        return duplicate

    def announced(self, chunk: Chunk, hand_over: HandOver) -> str | None:
        """Add a new chunk to its hand-over. Return why it cannot belong to the offer, or None."""
        flow = hand_over.flow
        if chunk.written and not flow.ends(hand_over.offer, chunk):
            self.counters["misfit"] += 1
            return "the chunk does not fit its offer: it has too few tokens, or too many"
        wrong = flow.obstacle(chunk, 0 if hand_over.offer.receipt is not None else 1 + len(hand_over.offer.siblings))
        if wrong is not None:
            self.counters[wrong[0]] += 1
            return wrong[1]
        if any(index > chunk.index for index in flow.ranges):
            self.counters["reordered"] += 1
        flow.announce(chunk)
        hand_over.tokens = chunk.tokens or hand_over.tokens
        hand_over.written = chunk.written or hand_over.written
        return None

    # ------------------------------------------------------------ fetches

    def fetch(self, chunk: Chunk, hand_over: HandOver) -> Adopt:
        """Start to copy a chunk into the blocks of all choices."""
        key, path = hand_over.key, hand_over.flow.path
        self.fetching.setdefault(key, {})[chunk.index] = self.activity.now
        return Adopt(
            *(key, chunk.index, chunk.start, chunk.handle, chunk.digest, chunk.src, path), keys=hand_over.engine_keys()
        )

    def adopted(self, event: Adopted, hand_over: HandOver | None, now: float) -> list[Adopt]:
        """Handle the result of a fetch: the chunk has landed, or is fetched again (the returned actions), or the whole
        KV receive has failed (`flow.broken`). Raise Broken when no such fetch is pending, and when the engine did not
        take the blocks of a choice that is here."""
        pending = self.fetching.get(event.key, {})
        since = pending.pop(event.index, None)
        if since is None:
            raise Broken(f"nobody took chunk {event.index} of {event.key}")
        if not pending:
            del self.fetching[event.key]
        if hand_over is None:
            return []
        flow, problem, chunk = hand_over.flow, event.problem, hand_over.flow.announced[event.index]
        size = len(chunk.handle.slots) * chunk.handle.block_bytes
        place = chunk.src, chunk.start, chunk.stop
        self.activity.fetched(hand_over.lead, since, *place, size, flow.path, problem)
        if problem is not None:
            self.counters[problem] += 1
        if flow.broken is not None:
            return []
        if problem is None:
            if event.missed and any(key in event.missed for key in hand_over.engine_keys()):
                raise Broken(f"the engine has not taken chunk {event.index} for one of {event.missed}")
            self.counters["healed"] += event.index in flow.tries
            flow.land(event.index)
            if flow.complete:
                self.unread.clear()
            return []
        return self._retry(event.index, problem, hand_over, now)

    def _retry(self, index: int, problem: str, hand_over: HandOver, now: float) -> list[Adopt]:
        """Retry a failed fetch, now or after a pause, or give the KV receive up."""
        flow = hand_over.flow
        far = problem == "lost" and flow.path in FAR
        tries = flow.tries[index] = flow.tries.get(index, 1) + 1
        if tries > FETCH_TRIES or not (far or problem in RETRYABLE):
            flow.tries[index] -= 1
            self.counters["given_up"] += 1
            self.unread[hand_over.offer.src] += 1
            flow.broken, flow.corrupt = f"chunk {index} is {problem}", problem in RETRYABLE
            self.forget(hand_over)
            return []
        self.counters["refetched"] += 1
        if far:
            self.pauses[hand_over.key, index] = now + LOST_PAUSE_S * 2 ** (tries - 2)
            return []
        return [self.fetch(flow.announced[index], hand_over)]

    # ------------------------------------------------------------ pauses

    def due(self, now: float) -> list[tuple[str, int]]:
        """Return hand-over key and index of the chunks to fetch again now, and end their pauses."""
        due = [place for place, until in self.pauses.items() if until <= now]
        for place in due:
            del self.pauses[place]
        return due

    def next(self) -> float | None:
        """Return when the next pause ends, or None."""
        return min(self.pauses.values(), default=None)

    def forget(self, hand_over: HandOver) -> None:
        """Cancel the retries of a hand-over."""
        for place in [place for place in self.pauses if place[0] == hand_over.key]:
            del self.pauses[place]

    def check(self, moving: Collection[HandOver]) -> None:
        """Raise Broken when the pending fetches disagree with the hand-overs in `moving`."""
        for hand_over in moving:
            paused = sum(key == hand_over.key for key, _ in self.pauses)
            awaited = len(self.fetching.get(hand_over.key, ())) + paused
            if hand_over.ready and hand_over.flow.broken is None and awaited != len(hand_over.flow.announced):
                raise Broken(f"{hand_over.key} waits for {awaited} of {len(hand_over.flow.announced)} chunks")
        keys = [hand_over.key for hand_over in moving]
        if any(key not in keys for key, _ in self.pauses):
            raise Broken(f"fetches of hand-overs that are gone: {list(self.pauses)}")
