"""The broker process: clients on one side, workers' events on the other, the core in between."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import click

from tetri import log
from tetri.config import Config, default_path, load
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
from tetri.core.broker.delivery import Limits
from tetri.cost import CostError
from tetri.models import ModelError
from tetri.net.errors import NetError
from tetri.net.hub import Hub
from tetri.net.lock import hold
from tetri.net.loop import run
from tetri.net.signals import StopSignals
from tetri.proc import build
from tetri.proc.recorder import BrokerStart, recorded
from tetri.strict import ConfigError
from tetri.text import Stopper, TextError, Tokenizer
from tetri.wire.clients import ClientMessage, Refused, Submit
from tetri.wire.codec import WireError
from tetri.wire.events import Arrived
from tetri.wire.messages import ClusterView, WorkerEvent

CHARS_A_TOKEN = 64  # a longer text is not worth the time, all others' time, that it takes to tokenise

EXPECTED = (ConfigError, CostError, ModelError, NetError, TextError, log.LogError)


class ActionExecutor:
    """Carries out what the broker's core says, and is its edge to text: prompts become token ids before the
    core sees them, output becomes text before a client does."""

    def __init__(self, core: Broker, hub: Hub, tokenizer: Tokenizer, logger: logging.Logger) -> None:
        self.core, self.hub, self.tokenizer, self.log = core, hub, tokenizer, logger
        self.stoppers: dict[str, Stopper] = {}
        self.stuck: set[bytes] = set()  # clients that refused a reply of the present list: order is kept

    def poll(self, timeout: float | None) -> Iterable[BrokerInput]:
        for event in self.hub.poll(timeout):
            if not isinstance(event, Arrived):
                yield event
            elif event.client is None:
                yield event.message  # type: ignore[misc]
            elif not isinstance(event.message, Submit):
                yield FromClient(event.client, event.message)  # type: ignore[arg-type]
            else:
                submitted = self.tokenise(event.client, event.message)
                if submitted is not None:
                    yield submitted

    def tokenise(self, client: bytes, message: Submit) -> Submitted | None:
        """None when there is nothing to tokenise: the client is told. A Submit that was sent again is not tokenised
        again: the core knows its key."""
        if message.key in self.core.table.keys:
            return Submitted(client, message.key, (), message.sampling)
        try:
            prompt = self.prompt(message)
        except TextError as error:
            self.hub.reply(client, Refused(key=message.key, reason=str(error)))
            return None
        return Submitted(client, message.key, tuple(prompt), message.sampling, message.deadline_s)

    def prompt(self, message: Submit) -> Sequence[int]:
        if (message.prompt is None) == (message.messages is None):
            raise TextError("give exactly one of prompt and messages")
        texts = [turn.content for turn in message.messages or ()] + [message.prompt or ""]
        length, most = sum(map(len, texts)), CHARS_A_TOKEN * self.core.limits.context
        if not isinstance(message.prompt, list) and length > most:
            raise TextError(f"the prompt has {length} characters, far more than the context holds: shorten it")
        if message.messages is not None:
            return self.tokenizer.chat(message.messages)
        assert message.prompt is not None
        return self.tokenizer.encode(message.prompt) if isinstance(message.prompt, str) else message.prompt

    def act(self, actions: Sequence[Action]) -> None:
        self.stuck.clear()
        self.carry_out(actions)

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            result = self.do(action)
            if result is not None:
                self.carry_out(self.core.handle(result, time.monotonic()))

    def do(self, action: Action) -> BrokerInput | None:
        match action:
            case Reply():
                return self.reply(action)
            case Detokenize():
                return self.detokenize(action)
            case Release(rid):
                self.stoppers.pop(rid, None)
            case Send(peer, message):
                try:
                    self.hub.send(peer, message)  # when it is lost, beats and timers make up for it
                except WireError as error:
                    self.log.error("%s %s", error, log.fields(iid=peer))
            case Connect(peer, address):
                self.connect(peer, address)
            case Disconnect(peer):
                self.hub.disconnect(peer)
        return None

    def reply(self, action: Reply) -> Undelivered | None:
        sent = "full" if action.client in self.stuck else self.hub.reply(action.client, action.message)
        if sent == "sent":
            return None
        self.stuck.add(action.client)
        return Undelivered(action.client, action.message, sent == "gone")

    def detokenize(self, action: Detokenize) -> Detokenized:
        stopper = self.stoppers.get(action.rid)
        if stopper is None:
            stopper = self.stoppers[action.rid] = Stopper(self.tokenizer, action.stop)
        released = stopper.feed(action.ids)
        text = released.text
        if action.final and not released.stopped:
            released = stopper.finish()
            text += released.text
        counted = released.counted if released.stopped else None
        return Detokenized(action.rid, action.start, action.ids, text, counted, action.final)

    def connect(self, peer: str, address: str) -> None:
        try:
            self.hub.connect(peer, address)
        except NetError as error:  # the worker told a wrong address: it stays unreachable, and says so in status
            self.log.error("%s %s", error, log.fields(iid=peer))


def serve(config: Config, logger: logging.Logger) -> None:
    """The whole process: lock the run directory, bind, loop until a signal, leave nothing behind."""
    build.pin(config.broker.cpus)
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    tokenizer = build.tokenizer(config)
    with hold(config.run_dir / "broker.lock"), ExitStack() as stack:
        hub = Hub(logger)
        stack.callback(hub.close)
        signals = StopSignals(hub.wake_fd)
        stack.callback(signals.restore)
        epoch = secrets.randbits(62)
        model = config.model.name if config.engine.kind != "emulated" else "emulated"
        start = start_of(config, epoch, model)
        core = recorded(start.core(), start, config, BROKER, epoch, stack)
        executor = ActionExecutor(core, hub, tokenizer, logger)
        hub.bind_inbox(config.events_address, WorkerEvent)
        hub.bind_clients(config.clients_address, ClientMessage)
        hub.subscribe(config.views_address, ClusterView)
        logger.info("serving %s at %s", model, config.clients_address)
        run(core, executor.poll, executor.act, time.monotonic, signals.running)


def start_of(config: Config, epoch: int, model: str) -> BrokerStart:
    return BrokerStart(
        limits=limits(config),
        rules=build.rules(config),
        epoch=epoch,
        seed=epoch,
        now=time.monotonic(),
        model=model,
        cost=build.predicted(config),
        chunk_tokens=config.engine.chunk_tokens,
    )


def limits(config: Config) -> Limits:
    context, vocabulary = build.limits_of_model(config)
    return Limits(
        context=context,
        vocabulary=vocabulary,
        max_open=config.broker.max_open,
        heartbeat_s=config.cluster.heartbeat_s,
        dead_s=config.cluster.dead_s,
        patience_s=config.cluster.patience_s,
        client_grace_s=config.broker.client_grace_s,
    )


@click.command()
@click.option("--conf", type=click.Path(exists=True, dir_okay=False), help="TOML file of the cluster.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
def main(conf: str | None, overrides: tuple[str, ...]) -> None:
    """Run the broker of a cluster."""
    try:
        serve(load(conf or default_path(), overrides), log.start("broker"))
    except EXPECTED as error:
        click.echo(f"tetri-broker: {error}", err=True)
        sys.exit(2)
