"""The clients of a simulated deployment with faults. They check every message that they receive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tetri.core.actions import FromClient, Submitted
from tetri.core.broker.suspects import GUILTY
from tetri.engine.emulated import reference_tokens
from tetri.engine_request import INVALID
from tetri.request import Receipt, Sampling, Token, choice_id, token_ids
from tetri.sim.clients import Clients, Outcome, secret_of
from tetri.sim.faulty.chance import Chance
from tetri.sim.faulty.processes import EDGE, TOKEN_BYTES, VOCABULARY
from tetri.sim.setup import SimError
from tetri.sim.traces import Arrival
from tetri.text import Stopper
from tetri.wire.clients import (
    Accepted,
    Attach,
    Cancel,
    ChangeRole,
    ClientMessage,
    Delta,
    Done,
    OperatorMessage,
    Refused,
    RoleChanged,
)
from tetri.wire.codec import decode, encode

CLIENT_S = 0.001  # mean latency of a client's message
ADMIN = b"admin"


@dataclass
class Output:
    """One choice of a client's request, as it arrives. It asserts that tokens arrive in order, without gaps and without
    repetition."""

    name: str  # the request's key and the index of the choice
    sampling: Sampling
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    done: Done | None = None
    asked: list[int] = field(default_factory=list)  # the first tokens of the Attach messages for it
    expected: int = 0  # index of the next token that may arrive
    tail_at: int = -1  # token index at which text without tokens arrived

    @property
    def ids(self) -> list[int]:
        """The ids of its tokens."""
        return token_ids(self.tokens)

    def extend(self, delta: Delta) -> None:
        """Assert that no token arrives twice, out of order or after the end, unless the client asked for it again."""
        assert self.done is None or self.asked, f"client {self.name} gets {delta} after the end"
        if delta.start != self.expected:
            assert delta.start in self.asked, f"client {self.name} has {self.tokens} and gets {delta}"
            self.expected = delta.start
        again = self.tokens[delta.start : delta.start + len(delta.ids)]
        assert again == delta.ids[: len(again)], f"client {self.name} has {self.tokens} and gets {delta}"
        assert len(again) in (0, len(delta.ids)), f"client {self.name} has a part of {delta}"
        self.expected += len(delta.ids)
        if delta.ids and again:
            return
        if not delta.ids:
            if not delta.text or self.tail_at == delta.start:
                return
            self.tail_at = delta.start
        self.tokens += delta.ids
        self.text += delta.text

    def ends(self, done: Done, *, cancelled: bool) -> None:
        """Assert that a Done comes once, unless the client asked again. Ignore it while tokens are missing."""
        if self.expected == done.usage.completion_tokens:
            assert self.done in (None, done) and (self.done is None or self.asked or cancelled)
            self.done = done


@dataclass
class Client:
    """One client with one request, of one choice or several. `send` sends a message to the broker; `ended` is called
    once, with the last message."""

    chance: Chance
    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    n: int
    deadline_s: float | None
    ask_s: float
    send: Callable[[Any], None]
    ended: Callable[[Client], None]
    rid: str | None = None
    outputs: list[Output] = field(init=False)
    refused: Refused | None = None
    cancelled: bool = False
    away: bool = False
    stuck: bool = False
    received_at: float = 0.0
    submits: int = 0

    def __post_init__(self) -> None:
        choices = range(self.n)
        self.outputs = [Output(choice_id(self.key, index), self.sampling.for_choice(index)) for index in choices]

    @property
    def key(self) -> str:
        """The request's key."""
        return str(self.number)

    @property
    def name(self) -> bytes:
        """The client's name for the broker."""
        return self.key.encode()

    @property
    def secret(self) -> str:
        """The client's secret."""
        return secret_of(self.key)

    @property
    def over(self) -> bool:
        """Whether the request was refused or all its choices have ended."""
        return self.refused is not None or all(output.done is not None for output in self.outputs)

    @property
    def done(self) -> Done:
        """How the first choice ended."""
        done = self.outputs[0].done
        assert done is not None
        return done

    # ------------------------------------------------------------ sending

    def start(self) -> None:
        """Submit the request and schedule this client's faults."""
        chance = self.chance
        self.submit()
        self._later(self.ask_s, self.watch)
        chance.often("leave", 1, self.leave)
        chance.often("stall", 1, self.choke)
        if chance.happens("cancel"):
            chance.after(chance.faults.down, self.cancel)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        kernel = self.chance.kernel
        kernel.at(kernel.now + seconds, lambda _: what())

    def submit(self) -> None:
        """Send the Submit, and repeat it until the request is accepted or refused."""
        if self.rid is None and not self.over:
            self.submits += 1  # each has an id of its own, which counts only if it is the first that arrives
            own = (self.name, self.key, self.secret, b"", f"{self.key}-{self.submits}")
            self.send(Submitted(*own, self.prompt, self.sampling, self.deadline_s, n=self.n))
            self._later(self.ask_s, self.submit)

    def watch(self) -> None:
        """Send Attaches after each silence of `ask_s` seconds, as the client library does."""
        if self.over:
            return
        if self.rid is not None and not self.away and self.chance.kernel.now - self.received_at > self.ask_s:
            self.attach()
        self._later(self.ask_s, self.watch)

    def cancel(self, _: Any = None) -> None:
        """Cancel the request if it is accepted and open."""
        if self.rid is not None and not self.over:
            self.cancelled = True
            self.send(FromClient(self.name, Cancel(rid=self.rid, secret=self.secret)))

    def leave(self) -> bool | None:
        """Disconnect for a while. Returns None after the end of the request, else True."""
        if self.over:
            return None
        self.away = True
        self.chance.recovers(self.back)
        return True

    def back(self, _: Any) -> None:
        """Connect again and ask for the missing tokens."""
        self.away = False
        if self.rid is not None and not self.over:
            self.attach()

    def attach(self) -> None:
        """Ask for all tokens of each open choice from the first missing one on."""
        assert self.rid is not None
        for index, output in enumerate(self.outputs):
            if output.done is None:
                start = len(output.tokens)
                output.asked.append(start)
                attach = Attach(rid=self.rid, secret=self.secret, start=start, choice=index)
                self.send(FromClient(self.name, attach))

    def choke(self) -> bool | None:
        """Read nothing for a while. Returns None after the end of the request, else True."""
        if self.over:
            return None
        self.stuck = True
        self.chance.after(self.chance.faults.longest, self.breathe)
        return True

    def breathe(self, _: Any) -> None:
        """Read messages again."""
        self.stuck = False

    # ------------------------------------------------------------ receiving

    def receive(self, message: Any) -> str:
        """Check and handle a message. Returns "sent", "full" or "gone" as the result of the broker's send."""
        if self.away or self.stuck:
            return "gone" if self.away else "full"
        self.received_at = self.chance.kernel.now
        over = self.over
        match message:
            case Accepted():
                assert message.key == self.key and self.rid in (None, message.rid)
                if self.rid is not None:
                    for output in self.outputs:
                        output.asked.append(0)
                self.rid = message.rid
            case Delta() if message.rid == self.rid:
                self.outputs[message.choice].extend(message)
            case Done() if message.rid == self.rid:
                self.outputs[message.choice].ends(message, cancelled=self.cancelled)
            case Refused():
                assert self.rid is None, f"client {self.key} is refused: {message}"
                self.refused = message
        if self.over and not over:
            self.ended(self)
        return "sent"

    def right(self, output: Output) -> list[Token]:
        """The correct tokens of a choice, those after a stop text included."""
        return reference_tokens(self.prompt, output.sampling, VOCABULARY, TOKEN_BYTES)

    def verify(self) -> None:
        """Assert at the end that tokens and text are correct, and complete unless the request was cut short."""
        if self.refused is None:
            for output in self.outputs:
                self._verify(output)

    def _verify(self, output: Output) -> None:
        done, sampling = output.done, output.sampling
        assert done is not None
        right = self.right(output)
        stopper = Stopper(EDGE, sampling.stop, min_tokens=sampling.min_tokens, silent=sampling.stop_token_ids)
        released = stopper.feed(token_ids(right))
        text = released.text + stopper.finish().text
        right = right[: released.counted] if released.stopped else right
        assert done.usage.completion_tokens == len(output.tokens)
        assert abs(sum(done.timeline.values()) - done.jct_s) < 1e-6, done
        if done.reason == "cancelled":
            assert self.cancelled or self.chance.faults.leave, done
        if done.reason == "deadline":
            assert self.deadline_s is not None and done.jct_s >= self.deadline_s, done
        expected = (done.error or "").startswith((INVALID, GUILTY)) or (self.chance.cuts and done.error)
        wrong = f"client {output.name} has {output.tokens}, not {right}"
        if done.reason in ("cancelled", "deadline") or expected:
            assert output.tokens == right[: len(output.tokens)], wrong
            return
        assert (output.tokens, output.text) == (right, text), wrong
        ended = released.stopped or (token_ids(right)[-1] == 0 and not sampling.ignore_eos)
        assert done.reason == ("stop" if ended else "length"), (done, right)
        assert done.error is None and done.receipt.prompt_tokens == len(self.prompt)
        if not released.stopped:  # else the broker may have ended the choice itself
            self._verify_receipt(done.receipt)

    def _verify_receipt(self, receipt: Receipt) -> None:
        """Assert that the receipt has the KV figures of the decode worker, whatever faults happened."""
        assert receipt.local is not None and receipt.adopted is not None and receipt.recomputed is not None, receipt
        assert receipt.local + receipt.adopted + receipt.recomputed == receipt.prompt_tokens, receipt
        if receipt.transport == "none":  # it stayed, or the first token of an attempt was its last
            assert (receipt.adopted, receipt.kv_bytes, receipt.chunks) == (0, 0, 0), receipt
            assert receipt.decode_instance in (None, receipt.prefill_instance), receipt
        else:
            assert receipt.local == 0 and receipt.transport in ("local", "stream"), receipt


@dataclass(slots=True)
class CheckedClients(Clients):
    """Gives each request its own `Client`, of this `kind`, with a random prompt."""

    chance: Chance = field(kw_only=True)
    ask_s: float = field(kw_only=True)  # `Timeouts.ask_s`
    send: Callable[[Any], None] = field(kw_only=True)  # sends a client's event to the broker
    kind: type[Client] = Client
    clients: list[Client] = field(default_factory=list)

    def _draw(self) -> None:
        Clients._draw(self)  # super() does not work in a dataclass with slots
        if self._next is None:
            self.chance.last_arrival()

    def _ask(self, number: int, arrival: Arrival) -> None:
        if arrival.text is not None:
            raise SimError("recorded texts cannot be simulated with faults: the engine computes its own tokens")
        prompt = tuple(self.chance.rng.choices(range(VOCABULARY), k=arrival.prompt))
        sampling = arrival.sampling or Sampling(max_tokens=arrival.output, ignore_eos=True)
        own = (number, prompt, sampling, arrival.n, arrival.deadline_s)
        client = self.kind(self.chance, *own, self.ask_s, self.send, self._ended)
        self.clients.append(client)
        client.start()

    def deliver(self, name: bytes, message: Any) -> str:
        """Deliver a message of the broker to a client. Returns "sent", "full" (the queue) or "gone" (the client)."""
        return self.clients[int(name)].receive(message)

    def _ended(self, client: Client) -> None:
        """Record the outcome of a request."""
        outcome: Outcome = self.outcomes[client.number]
        if client.refused is not None:
            outcome.state, outcome.why = "refused", client.refused.reason
        for output in client.outputs:
            if (done := output.done) is not None:
                by_itself = done.reason in ("length", "stop")
                outcome.ended(done, *(("done", "") if by_itself else ("failed", done.error or done.reason)))
        self._answered()


@dataclass
class Admin:
    """An operator who changes roles. `send` sends an event to the broker; `verify(iid, role)` asserts that the instance
    has that role."""

    send: Callable[[Any], None]
    verify: Callable[[str, str], None]
    asked: dict[str, tuple[str, str]] = field(default_factory=dict)  # key -> instance and role
    reported: list[str] = field(default_factory=list)  # keys of the changes that the broker reported

    def flip(self, iid: str, role: str) -> None:
        """Ask the broker for a role change."""
        key = f"flip-{len(self.asked)}"
        self.asked[key] = (iid, role)
        self.send(FromClient(ADMIN, ChangeRole(key=key, iid=iid, role=role)))

    def receive(self, message: Any) -> str:
        """Check the reply to a role change. Returns "sent"."""
        assert isinstance(message, RoleChanged | Refused) and message.key in self.asked, message
        if isinstance(message, RoleChanged):
            assert (message.iid, message.role) == self.asked[message.key] and message.took_s >= 0
            if message.key not in self.reported:
                self.verify(message.iid, message.role)
            self.reported.append(message.key)
        return "sent"


def on_the_wire(event: Any) -> Any:
    """Return a message of a client or the operator after encoding and decoding."""
    if isinstance(event, Submitted):
        return event  # the broker's process builds it from a Submit
    union = OperatorMessage if event.client == ADMIN else ClientMessage
    return FromClient(event.client, decode(encode(event.message), union))  # type: ignore[arg-type]
