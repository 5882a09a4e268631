"""The faults of a simulated deployment and their rates, drawn from one seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf, isinf
from random import Random
from typing import Any

from tetri.core.actions import AddRequest, Publish, Send, Submitted
from tetri.faults import Cut, FaultsError, parsed_pairs
from tetri.sim.kernel import Kernel
from tetri.wire.handover import Offer
from tetri.wire.messages import Assign, Membership, Ready

#: probability from 0 to 1: name -> what it applies to, and the fault
CHANCES = {
    "drop": "of a message: it is lost",
    "duplicate": "of a message: it arrives twice",
    "delay": "of a message or a KV transfer: it takes up to `longest`",
    "replay": "of a message between workers: an older message, perhaps of an earlier incarnation, arrives again",
    "overtake": "of a message between workers: it arrives early, and again in its place",
    "mangle": "of an announced KV chunk: another slab, fewer slots, or a token too many or too few",
    "corrupt": "of a fetched KV chunk: its bytes do not match the digest",
    "lose": "of a fetched KV chunk: it is no longer in the slab",
    "truncate": "of a fetched KV chunk: its last block does not arrive",
    "mute": "of a length prediction: it never arrives",
    "cancel": "of a request: its client cancels it within `down` of its arrival",
}
#: rate per second: name -> what it applies to, and the fault
RATES = {
    "kill": "of each worker: it is killed, and restarts within `down`",
    "kill_monitor": "of the monitor: it is killed, and restarts within `down`",
    "freeze": "of each process: it stops for up to `down`, then handles what has arrived",
    "disconnect": "of each connection: it breaks, and messages in transit are lost",
    "leave": "of each client: it is disconnected for up to `down`",
    "stall": "of each client: it reads nothing for up to `longest`",
    "flip": "of the deployment: an operator changes the role of a random instance",
    "migrate": "of the deployment: a random running choice goes on at a random instance",
}
#: time in seconds: name -> what it is for
TIMES = {
    "until": "when the faults end; by default at the last arrival, but not before 60 s",
    "longest": "the longest delay of a message and the longest stall of a client",
    "down": "the longest time that a process is dead or frozen, or a client is disconnected",
}
FASTEST, LATEST_S = 1000.0, 1e6  # the highest rate per second, the longest time
LEAST_S = 60.0  # the shortest time with faults when there is no `until`
EXAMPLE = "drop=0.01,kill=0.001"


@dataclass(frozen=True, slots=True)
class Faults:
    """The rate of each fault. CHANCES, RATES and TIMES explain the fields."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    replay: float = 0.0
    overtake: float = 0.0
    mangle: float = 0.0
    corrupt: float = 0.0
    lose: float = 0.0
    truncate: float = 0.0
    mute: float = 0.0
    cancel: float = 0.0
    kill: float = 0.0
    kill_monitor: float = 0.0
    freeze: float = 0.0
    disconnect: float = 0.0
    leave: float = 0.0
    stall: float = 0.0
    flip: float = 0.0
    migrate: float = 0.0
    until: float = inf
    longest: float = 0.2
    down: float = 1.5


def parse_faults(text: str) -> Faults:
    """Parse "name=number,name=number". Raises FaultsError, one line that says what is allowed."""
    found: dict[str, float] = {}
    for name, number in parsed_pairs(text, [field.name for field in fields(Faults)], EXAMPLE):
        most = 1.0 if name in CHANCES else FASTEST if name in RATES else LATEST_S
        found[name] = float(number)
        if found[name] > most:
            unit = {1.0: "", FASTEST: " a second", LATEST_S: " seconds"}[most]
            raise FaultsError(f"{name} must be from 0 to {most:g}{unit}, got {number}")
    if not any(found.get(kind) for kind in (*CHANCES, *RATES)) or found.get("until") == 0.0:
        raise FaultsError(f"nothing would go wrong: give a fault a number above 0, as in {EXAMPLE}")
    return Faults(**found)


class Chance:
    """Draws the faults of one run. Faults happen until `until`, in seconds of virtual time. `counts` has the number of
    faults of every requested kind, and of reads that failed by one of the `cuts`, whose time is the virtual one. With
    a `log`, every event is appended to it as one line."""

    def __init__(
        self, kernel: Kernel, faults: Faults, seed: int, log: list[str] | None = None, cuts: Sequence[Cut] = ()
    ) -> None:
        self.kernel, self.faults, self.log, self.cuts = kernel, faults, log, cuts
        self.rng = Random(f"faults {seed}")
        self.until = faults.until
        kinds = [*[kind for kind in (*CHANCES, *RATES) if getattr(faults, kind)], *["cut"] * bool(cuts)]
        self.counts: Counter[str] = Counter(dict.fromkeys(kinds, 0))

    @property
    def over(self) -> bool:
        """Whether the time of the faults is over."""
        return self.kernel.now >= self.until

    def last_arrival(self) -> None:
        """Note that the last request has arrived, which ends the faults if `until` was not given."""
        if isinf(self.until):
            self.until = max(self.kernel.now, LEAST_S)

    def happens(self, kind: str) -> bool:
        """Draw whether a fault of CHANCES happens, and count it."""
        chance = getattr(self.faults, kind)
        if not chance or self.over or self.rng.random() >= chance:
            return False
        self.counts[kind] += 1
        return True

    def cut(self, reader: str, sender: str) -> Cut | None:
        """Return the cut by which `reader` cannot read KV of `sender` now, if there is one, and count the read."""
        found = next((cut for cut in self.cuts if cut.applies(reader, sender, self.kernel.now)), None)
        self.counts["cut"] += found is not None
        return found

    def often(self, kind: str, things: float, what: Callable[[], bool | None]) -> None:
        """Call `what` at the rate of a fault of RATES, times the number of `things` that it applies to. `what` returns
        whether the fault happened, which is counted, or None to end the calls."""
        rate = getattr(self.faults, kind) * things
        if not rate:
            return

        def now(_: Any) -> None:
            done = None if self.over else what()
            if done is not None:
                self.counts[kind] += done
                self.kernel.at(self.kernel.now + self.rng.expovariate(rate), now)

        self.kernel.at(self.kernel.now + self.rng.expovariate(rate), now)

    def after(self, most_s: float, what: Callable[[Any], None], argument: Any = None) -> None:
        """Call `what(argument)` after a random time of up to `most_s` seconds."""
        self.kernel.at(self.kernel.now + self.rng.uniform(0.0, most_s), what, argument)

    def recovers(self, what: Callable[[Any], None], argument: Any = None) -> None:
        """Call `what(argument)` within `down`: mostly early, before others notice the fault, and sometimes late."""
        down = self.faults.down
        self.after(self.rng.choice((down / 4, down / 4, down)), what, argument)

    def way_s(self, latency_s: float) -> float:
        """Draw the latency in seconds of a message or a KV fetch; without delay faults the mean is `latency_s`."""
        return self.rng.uniform(0.0, self.faults.longest if self.happens("delay") else 2 * latency_s)

    def note(self, who: str, what: Any, actions: Sequence[Any] = ()) -> None:
        """Append an event of the process `who` and the resulting actions to the log, if there is one."""
        if self.log is not None:
            self.log.append(f"{self.kernel.now:.4f} {who}: {brief(what)}")
            self.log.extend(f"       -> {brief(action)}" for action in actions)


def brief(thing: Any) -> str:
    """Return one line about an event or action, without long parts such as views, fingerprints and samplings."""
    match thing:
        case Send(peer, message):
            return f"to {peer}: {brief(message)}"
        case Publish(message):
            return f"publishes {type(message).__name__}"
        case Membership():
            there = ", ".join(f"{i.iid} {i.role}" for i in thing.instances)
            if thing.since is None:
                return f"membership {thing.number}: {there}"
            return f"membership {thing.number} since {thing.since}: {there}; gone: {', '.join(thing.gone)}"
        case Offer():
            return f"Offer({thing.src} {thing.rid} attempt {thing.attempt} offer {thing.offer}, {thing.blocks} blocks)"
        case Assign():
            return f"Assign({thing.rid} attempt {thing.attempt}, {len(thing.prompt)} + {thing.output})"
        case Submitted():
            return f"Submitted({thing.key}, {len(thing.prompt)} tokens, {thing.sampling.max_tokens} more)"
        case Ready():
            return f"Ready({thing.instance.iid} {thing.instance.incarnation})"
        case AddRequest(request):
            return f"AddRequest({request.key}, {len(request.tokens)} tokens)"
    return str(thing)
