"""What goes wrong in a simulated deployment, how often, and by chance from one seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf, isinf
from random import Random
from typing import Any

from tetri.core.actions import AddRequest, Publish, Send, Submitted
from tetri.faults import FaultsError, parsed_pairs
from tetri.sim.kernel import Kernel
from tetri.wire.handover import Offer
from tetri.wire.messages import Assign, Membership, Ready

#: name -> what a chance from 0 to 1 is of, and what happens then
CHANCES = {
    "drop": "of a message: it is lost",
    "duplicate": "of a message: it arrives twice",
    "delay": "of a message or a transfer of KV: it takes up to `longest`",
    "replay": "of a message between workers: an older one, perhaps of an earlier life, comes once more",
    "overtake": "of a message between workers: it comes early, and once more in its place",
    "mangle": "of a chunk that is announced: in another slab, in fewer slots, a token too many or too few",
    "corrupt": "of a chunk that is taken: its bytes are not those that were announced",
    "lose": "of a chunk that is taken: it is no longer there",
    "truncate": "of a chunk that is taken: its last block does not arrive",
    "mute": "of a prediction of a length: it never comes",
    "cancel": "of a request: its client cancels it within `down` of its arrival",
}
#: name -> what a rate, times a second, is of, and what happens then
RATES = {
    "kill": "of each worker: it is killed, and starts again within `down`",
    "kill_monitor": "of the monitor, likewise",
    "freeze": "of each process: it stands still for up to `down`, then reads what has arrived meanwhile",
    "disconnect": "of each connection: it breaks, with what is on its way",
    "leave": "of each client: it is away for up to `down`",
    "stall": "of each client: it takes nothing for up to `longest`",
    "flip": "of the deployment: somebody asks for another role of some instance",
}
#: name -> what a number of seconds is for
TIMES = {
    "until": "the faults end; without it when the last request arrives, but not before 60 s",
    "longest": "the longest delay of a message, and the longest stall of a client",
    "down": "the longest time that a process is dead or frozen, or a client away",
}
FASTEST, LATEST_S = 1000.0, 1e6  # the highest rate, the longest time
LEAST_S = 60.0  # without `until` there are faults for at least so long
EXAMPLE = "drop=0.01,kill=0.001"


@dataclass(frozen=True, slots=True)
class Faults:
    """Each kind by the name that CHANCES, RATES and TIMES explain."""

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
    until: float = inf
    longest: float = 0.2
    down: float = 1.5


def parse_faults(text: str) -> Faults:
    """From "name=number,name=number". Raises FaultsError, one line that says what is allowed."""
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
    """The dice of one run. Faults happen until `until`, in seconds of virtual time. `counts` has every kind that was
    asked for, from 0 on. With a `log` all that happens is written down, one line each."""

    def __init__(self, kernel: Kernel, faults: Faults, seed: int, log: list[str] | None = None) -> None:
        self.kernel, self.faults, self.log = kernel, faults, log
        self.rng = Random(f"faults {seed}")
        self.until = faults.until
        self.counts: Counter[str] = Counter({kind: 0 for kind in (*CHANCES, *RATES) if getattr(faults, kind)})

    @property
    def over(self) -> bool:
        """No fault happens any more."""
        return self.kernel.now >= self.until

    def last_arrival(self) -> None:
        """The last request has arrived: without a given end the faults end here."""
        if isinf(self.until):
            self.until = max(self.kernel.now, LEAST_S)

    def happens(self, kind: str) -> bool:
        """Cast the dice of one of CHANCES. What happens is counted."""
        chance = getattr(self.faults, kind)
        if not chance or self.over or self.rng.random() >= chance:
            return False
        self.counts[kind] += 1
        return True

    def often(self, kind: str, things: float, what: Callable[[], bool | None]) -> None:
        """Call `what` at the rate of one of RATES for each of so many things. It says whether that came to anything,
        which is counted, or None when there is nobody left to whom it could happen."""
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
        """Call `what(argument)` within `most_s`."""
        self.kernel.at(self.kernel.now + self.rng.uniform(0.0, most_s), what, argument)

    def recovers(self, what: Callable[[Any], None], argument: Any = None) -> None:
        """Call `what(argument)` within `down`: mostly soon, so that few find out, now and then late."""
        down = self.faults.down
        self.after(self.rng.choice((down / 4, down / 4, down)), what, argument)

    def way_s(self, latency_s: float) -> float:
        """How long a message, or a request for KV, is on its way: on average `latency_s`."""
        return self.rng.uniform(0.0, self.faults.longest if self.happens("delay") else 2 * latency_s)

    def note(self, who: str, what: Any, actions: Sequence[Any] = ()) -> None:
        if self.log is not None:
            self.log.append(f"{self.kernel.now:.4f} {who}: {brief(what)}")
            self.log.extend(f"       -> {brief(action)}" for action in actions)


def brief(thing: Any) -> str:
    """One line, without the views, the fingerprints and the samplings that hide everything else."""
    match thing:
        case Send(peer, message):
            return f"to {peer}: {brief(message)}"
        case Publish(message):
            return f"publishes {type(message).__name__}"
        case Membership():
            there = ", ".join(f"{i.iid} {i.role}" for i in thing.instances)
            return f"roster {thing.number}: {there}"
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
