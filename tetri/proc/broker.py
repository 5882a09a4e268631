"""The broker process: connects the broker's core to clients and workers, has texts tokenised and detokenises for it."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

import click

from tetri import log
from tetri.clock import Clock
from tetri.config import Config
from tetri.core.actions import (
    BROKER,
    Action,
    BrokerInput,
    Connect,
    Detokenize,
    Detokenized,
    Disconnect,
    FromClient,
    Release,
    Reply,
    Send,
    Submitted,
    Undelivered,
)
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import ANOTHERS, RETRY_AFTER_S, Limits, Problem
from tetri.core.broker.requests import needed_bytes
from tetri.cost import Cost
from tetri.net.hub import Hub
from tetri.net.loop import run
from tetri.proc import build
from tetri.proc.cheap_checks import submit_problem
from tetri.proc.cpus import pin
from tetri.proc.network import HubNetwork
from tetri.proc.notes import completed, of_config, of_costs, of_tokenizer, with_refused
from tetri.proc.recorder import BrokerStart, full_records, recorded
from tetri.proc.submission import content, submitted
from tetri.proc.texts import Texts, Tokenised, command
from tetri.request import Slo
from tetri.text import Stopper, Tokenizer
from tetri.wire.clients import Cancel, ClientMessage, Observation, OperatorMessage, Refused, Status, Submit
from tetri.wire.events import Arrived
from tetri.wire.messages import ClusterView, WorkerEvent


class ActionExecutor:
    """Executes the actions of the broker's core. Has prompts converted to token ids before the core sees them, and
    converts output tokens to text before a client does. `texts` must be ready before the first text arrives."""

    def __init__(self, core: Broker, hub: Hub, tokenizer: Tokenizer, texts: Texts, logger: logging.Logger) -> None:
        self.core, self.hub, self.tokenizer, self.texts = core, hub, tokenizer, texts
        self.network = HubNetwork(hub, logger)
        limits = core.limits
        self.clock = Clock.patient(limits.dead_s, limits.patience_s, limits.client_grace_s)
        self.notes: Callable[[], list[str]] = list  # degraded modes of which the core does not know
        self.refused: Counter[str] = Counter()  # Submits that the core does not see, by reason
        self.stoppers: dict[str, Stopper] = {}
        self.stuck: set[bytes] = set()  # clients with a full queue: later replies of the same list must not overtake

    def poll(self, timeout: float | None) -> Iterable[BrokerInput]:
        """Wait at most `timeout` seconds (None: without limit) and yield the core's next inputs."""
        for event in self.hub.poll(timeout):
            if not isinstance(event, Arrived):
                yield event
            elif event.client is None:
                yield event.message  # type: ignore[misc]
            elif isinstance(event.message, Submit):
                yield from self.submit(event.client, event.message)
            elif not self.cancels_text(asked := FromClient(event.client, event.message)):  # type: ignore[arg-type]
                yield asked
        for text in self.texts.done():
            yield from self.tokenised(text)

    def cancels_text(self, event: FromClient) -> bool:
        """Whether this cancels a Submit whose text waits: then it follows that to the core."""
        message = event.message
        if not isinstance(message, Cancel):
            return False
        waiting = self.texts.get(message.rid)
        if waiting is None or not waiting.owned_by(message.secret):
            return False
        waiting.cancel = event
        return True

    def submit(self, client: bytes, message: Submit) -> Iterator[Submitted]:
        """Yield the event of a Submit, unless it is refused or its text has to be tokenised first.

        A Submit with a known key is a retransmission: its text is not tokenised again."""
        asked = message.sampling
        least = needed_bytes(0, asked.max_tokens or 0, message.n, asked)
        if message.key in self.core.table.keys:
            yield submitted(client, message, content(message))
        elif (problem := submit_problem(message, self.core.limits.context)) is not None:
            self.refuse(client, message, problem)
        elif (waiting := self.texts.get(message.key)) is not None:
            if waiting.repeated_by(message, content(message)):
                waiting.client = client
            else:
                self.refuse(client, message, Problem("repeated_key", ANOTHERS))
        elif (full := self.core.full(least, len(self.texts))) is not None:
            self.refuse(client, message, Problem("full", full))
        elif isinstance(message.prompt, list):
            yield submitted(client, message, content(message), message.prompt)
        elif not self.texts.add(client, message, content(message), self.clock.now()):
            self.refuse(client, message, Problem("full", "too many texts wait to be tokenized, try later"))

    def tokenised(self, text: Tokenised) -> Iterator[BrokerInput]:
        """Yield the event of a Submit whose text was tokenised, and its Cancel, unless it is refused."""
        waiting = text.waiting
        if text.problem is not None:
            problem = Problem("full" if text.again else "invalid", text.problem)
            self.refuse(waiting.client, waiting.message, problem)
            return
        waited_s = self.clock.now() - waiting.since
        yield submitted(waiting.client, waiting.message, waiting.content, text.ids, waited_s)
        if waiting.cancel is not None:
            yield waiting.cancel

    def refuse(self, client: bytes, message: Submit, problem: Problem) -> None:
        """Refuse a Submit that its core does not see."""
        self.refused[problem.reason] += 1
        retry_after_s = RETRY_AFTER_S if problem.reason == "full" else None
        self.hub.reply(client, Refused(key=message.key, reason=problem.why, retry_after_s=retry_after_s))

    def act(self, actions: Sequence[Action]) -> None:
        """Execute one list of actions of the core."""
        self.stuck.clear()
        self.carry_out(actions)

    def carry_out(self, actions: Sequence[Action]) -> None:
        """Execute actions; pass what they result in to the core, and execute what the core answers."""
        for action in actions:
            result = self.do(action)
            if result is not None:
                self.carry_out(self.core.handle(result, self.clock.now()))

    def do(self, action: Action) -> BrokerInput | None:
        """Execute one action. Returns its result, if the core has to know it."""
        match action:
            case Reply():
                return self.reply(action)
            case Detokenize():
                return self.detokenize(action)
            case Release(rid):
                self.stoppers.pop(rid, None)
            case Send(peer, message):
                self.network.send(peer, message)
            case Connect(peer, address):
                self.network.connect(peer, address)
            case Disconnect(peer):
                self.network.disconnect(peer)
        return None

    def reply(self, action: Reply) -> Undelivered | None:
        """Send a reply to a client. Returns Undelivered if the client is gone or its queue is full."""
        message = action.message
        if isinstance(message, Status):
            message = self.completed(message)
        elif isinstance(message, Observation):
            status, measures = self.completed(message.status), with_refused(message.measures, self.refused)
            message = message.changed(status=status, measures=measures)
        sent = "full" if action.client in self.stuck else self.hub.reply(action.client, message)
        if sent == "sent":
            return None
        self.stuck.add(action.client)
        return Undelivered(action.client, action.message, sent == "gone")

    def completed(self, status: Status) -> Status:
        """The status with what the core cannot know."""
        return completed(status, self.notes(), self.network, self.texts)

    def detokenize(self, action: Detokenize) -> Detokenized:
        """Convert output tokens to text. The text ends before a stop text."""
        stopper = self.stoppers.get(action.rid)
        if stopper is None:
            asked, silent = action.sampling, action.sampling.stop_token_ids
            stopper = Stopper(self.tokenizer, asked.stop, min_tokens=asked.min_tokens, silent=silent)
            self.stoppers[action.rid] = stopper
        text, counted = stopper.advance(action.ids, action.final)
        return Detokenized(action.rid, action.start, action.ids, text, counted, action.final)


def serve(config: Config, logger: logging.Logger) -> None:
    """Run the process: lock the run directory, bind the sockets, loop until a signal, clean up."""
    pin(config.broker.cpus)
    with build.locked_hub(config, "broker", logger) as (hub, signals, stack):
        texts = stack.enter_context(closing(Texts(command(config), hub.wake, config.broker.text_mib << 20, logger)))
        texts.start()
        tokenizer = build.tokenizer(config)  # meanwhile the process loads its own
        epoch = secrets.randbits(62)
        model = config.model.name if config.engine.kind != "emulated" else "emulated"
        start = start_of(config, epoch, model)
        core = recorded(start.core(), start, config, BROKER, epoch, stack)
        executor = ActionExecutor(core, hub, tokenizer, texts, logger)
        lasting = [*of_config(config, logger), *of_tokenizer(tokenizer, logger)]
        executor.notes = lambda: [*lasting, *of_costs(config, core.costs.known), *full_records(config)]
        texts.ready()
        hub.bind_inbox(config.events_address, WorkerEvent)
        hub.bind_clients(config.clients_address, ClientMessage, config.broker.max_clients)
        hub.bind_clients(config.operators_address, OperatorMessage)
        os.chmod(config.operators_address.removeprefix("ipc://"), 0o600)  # even where others may enter the folder
        hub.subscribe(config.views_address, ClusterView)
        if port := config.broker.metrics_port:
            from tetri.proc.metrics_server import Source, served  # slow to import, and few want it

            source = Source(config.operators_address, config.engine.block_tokens)
            stack.enter_context(served(port, source))
        logger.info("serving %s at %s", model, config.clients_address)
        run(core, executor.poll, executor.act, executor.clock, signals.running)


def start_of(config: Config, epoch: int, model: str) -> BrokerStart:
    """What the core is built from. Raises CostError and ModelError."""
    return BrokerStart(
        limits=limits(config),
        rules=build.rules(config),
        epoch=epoch,
        seed=epoch,
        now=time.monotonic(),
        model=model,
        cost=build.table(config) or Cost(),
        chunk_tokens=config.engine.chunk_tokens,
        slo=Slo(ttft_s=config.slo.ttft_s or None, tpot_s=config.slo.tpot_s or None),
    )


def limits(config: Config) -> Limits:
    """The limits of a request and of the broker. Raises ModelError."""
    context, vocabulary = build.limits_of_model(config)
    return Limits(
        context=context,
        vocabulary=vocabulary,
        max_open=config.broker.max_open,
        max_mib=config.broker.max_mib,
        timelines_mib=config.broker.timelines_mib,
        heartbeat_s=config.cluster.heartbeat_s,
        dead_s=config.cluster.dead_s,
        patience_s=config.cluster.patience_s,
        client_grace_s=config.broker.client_grace_s,
        ready_s=config.broker.ready_s,
        max_deaths=config.broker.max_deaths,
    )


@click.command()
@build.configured("tetri-broker")
def main(config: Config) -> None:
    """Run the broker of a cluster."""
    serve(config, log.start("broker"))
