"""The worker process: one engine and one core that runs both phases. Its role decides which new work it gets."""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import click

from tetri import log
from tetri.clock import Clock
from tetri.config import Config, WorkerConfig
from tetri.core.actions import BROKER, LengthKnown, Predict
from tetri.core.worker.worker import Worker
from tetri.engine.base import Engine
from tetri.executor import Copies, Network, WorkerExecutor
from tetri.faults import parse_faults
from tetri.kv.base import KVLost, KVStore
from tetri.net.loop import run
from tetri.policy.rules import LENGTHS
from tetri.predict.serve import still_reading
from tetri.proc import build, measured_cost, memory
from tetri.proc.cpus import few_threads, pin
from tetri.proc.faulty_network import FaultyNetwork, Poll, with_faults
from tetri.proc.network import HubNetwork, received
from tetri.proc.notes import of_config
from tetri.proc.recorder import WorkerStart, recorded
from tetri.proc.run_directory import kept
from tetri.request import ROLES
from tetri.strict import ConfigError
from tetri.wire.messages import ClusterView, InboxMessage

if TYPE_CHECKING:
    from tetri.proc.predictor import PredictorServing

RESERVED = (BROKER, "monitor", "supervisord")


def copies_of(engine: Engine, store: KVStore, logger: logging.Logger) -> Copies:
    """The KV copies between engine and store; failed copies are logged."""

    def note(error: Exception, key: str, chunk: int) -> None:
        level = logging.WARNING if isinstance(error, KVLost) else logging.ERROR
        logger.log(level, "%s %s", error, log.fields(key=key, chunk=chunk))

    return Copies(engine, store, note)


def executor_of(
    core: Worker, clock: Clock, engine: Engine, copies: Copies, network: Network, serving: PredictorServing | None
) -> WorkerExecutor:
    """The action executor of a worker. `serving` predicts lengths; if it is None, the length policy does."""
    rules, rng = core.own.rules, Random(core.own.incarnation)

    def by_policy(wanted: Predict) -> LengthKnown:
        named = LENGTHS[rules.length](len(wanted.prompt), wanted.sampling, rules, rng)
        return LengthKnown(wanted.key, named)

    if serving is None:
        return WorkerExecutor(core, clock.now, engine, copies, network, engine.step, by_policy)
    return WorkerExecutor(core, clock.now, engine, copies, network, serving.step, serving.predict, serving.known)


def serve(config: Config, iid: str, broker: str, logger: logging.Logger) -> None:
    """Run the process: build the parts, connect, loop until a signal, clean up. `broker`: the broker's address for
    worker events."""
    pin(config.worker(iid).cpus)
    if config.engine.kind == "vllm" and (few := few_threads()) is not None:
        logger.warning("%s", few)
    predicts = config.policy.length == "trained"
    if predicts:  # numpy comes with it
        from tetri.proc.predictor import StatusNetwork, load_predictor, serving_of
    with ExitStack() as stack:
        hub = stack.enter_context(closing(build.open_hub(config, iid, logger)))
        predictor = load_predictor(config, logger) if predicts else None
        stack.enter_context(kept(config.run_dir, logger))
        if (short := memory.shortage(config, iid)) is not None:
            logger.warning("%s", short)
        # Takes seconds to minutes; until it is done, a signal ends the process at once.
        with measured_cost.turn(config, logger) as turn:
            engine, store = build.engine_and_store(config, iid, hub.wait, hub.wake, stack)
            stopwatch = measured_cost.clock_of(config, gpu=config.worker(iid).gpu >= 0)
            table = measured_cost.of_engine(engine, config, stopwatch, turn, logger)
        serving = None if predictor is None else serving_of(predictor, engine, config, hub.wake, logger)
        stack.callback(serving.close if serving is not None else lambda: None)
        signals = build.stop_signals(hub, stack)
        expected = None if serving is None else serving.expected
        own = build.identity(config, iid, secrets.randbits(62), engine, store, table, expected)
        start = WorkerStart(own, own.incarnation, time.monotonic())
        core = recorded(start.core(), start, config, iid, own.incarnation, stack)
        network: Network = HubNetwork(hub, logger, store.counters)
        network = network if serving is None else StatusNetwork(network, serving)
        if (faults := parse_faults(config.transfer.faults)) is not None:
            store, network = with_faults(faults, f"{iid} {own.incarnation}", store, network, logger)
        copies = copies_of(engine, store, logger)
        clock = Clock.patient(own.patience_s)
        executor = executor_of(core, clock, engine, copies, network, serving)
        hub.bind_inbox(own.instance.inbox, InboxMessage)
        hub.connect(BROKER, broker)
        hub.connect_publisher(config.loads_address)
        hub.subscribe(config.views_address, ClusterView)
        of_config(config, logger)
        logger.info("ready to serve as %s %s", own.instance.role, log.fields(iid=iid, blocks=own.capacity.blocks))
        poll: Poll = partial(received, hub, copies, () if serving is None else (serving.known,))
        poll = partial(network.received, poll) if isinstance(network, FaultyNetwork) else poll
        run(core, poll, executor.carry_out, clock, signals.running)


def joined(config: Config, iid: str, role: str | None, cpus: str | None, gpu: int | None = None) -> Config:
    """Add this worker to the configuration, or override its settings. Raises ConfigError."""
    known = {worker.iid: worker for worker in config.workers}
    if role is None and iid not in known:
        raise ConfigError(f"no [[worker]] is called {iid!r} (known: {', '.join(known)}): give --role as well")
    if iid in RESERVED:
        raise ConfigError(f"no worker may be called {iid!r}: choose another --iid")
    worker = known.get(iid) or WorkerConfig(iid=iid, role=role or "")
    worker = replace(worker, role=role or worker.role, cpus=worker.cpus if cpus is None else cpus)
    worker = replace(worker, gpu=worker.gpu if gpu is None else gpu)
    return replace(config, workers=(*(w for w in config.workers if w.iid != iid), worker))


@click.command()
@click.option("--iid", required=True, help="Name of a [[worker]] in the file, or a new name.")
@click.option("--role", type=click.Choice(ROLES), help="Role; required if the file has no such worker.")
@click.option("--cpus", help='CPUs to run on, such as "0" or "0-1".')
@click.option("--gpu", type=click.IntRange(-1, 63), help="GPU of the engine or of the KV slab; -1: none.")
@click.option("--broker", help="Address of the broker for worker events (default: as in the file).")
@build.configured("tetri-worker")
def main(config: Config, iid: str, role: str | None, cpus: str | None, gpu: int | None, broker: str | None) -> None:
    """Run one worker. It registers with the broker and takes the work of its role."""
    config = joined(config, iid, role, cpus, gpu)
    serve(config, iid, broker or config.events_address, log.start(f"worker-{iid}"))
    if still_reading():
        logging.shutdown()
        os._exit(0)
