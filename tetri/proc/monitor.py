"""The monitor process: receives load reports, publishes the cluster view, and asks the broker for flips."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial

import click

from tetri import log
from tetri.clock import Clock
from tetri.config import Config
from tetri.core.actions import BROKER, Action, Broken, Publish, Send
from tetri.net.loop import run
from tetri.proc import build
from tetri.proc.cpus import pin
from tetri.proc.network import HubNetwork, polled
from tetri.proc.recorder import MonitorStart, recorded
from tetri.wire.messages import FlipWanted, LoadReport

NAME = "monitor"


def carry_out(network: HubNetwork, logger: logging.Logger, actions: Sequence[Action]) -> None:
    """Execute the actions of the monitor's core. Raises Broken for an action that a monitor does not have."""
    for action in actions:
        match action:
            case Publish(message):
                network.publish(message)
            case Send(peer, message):
                if isinstance(message, FlipWanted):
                    logger.info("%s should become %s: %s", message.iid, message.role, message.why)
                network.send(peer, message)
            case _:
                raise Broken(f"a monitor cannot execute {action}")


def serve(config: Config, logger: logging.Logger) -> None:
    """Run the process: lock the run directory, bind the sockets, loop until a signal, clean up."""
    pin(config.monitor.cpus)
    with build.locked_hub(config, NAME, logger) as (hub, signals, stack):
        start = start_of(config)
        core = recorded(start.core(), start, config, NAME, start.epoch, stack)
        hub.bind_subscriber(config.loads_address, LoadReport)
        hub.bind_publisher(config.views_address)
        hub.connect(BROKER, config.events_address)
        logger.info("watching with flip policy %s", config.monitor.flip)
        act = partial(carry_out, HubNetwork(hub, logger), logger)
        run(core, partial(polled, hub), act, Clock.patient(config.monitor.gone_s), signals.running)


def start_of(config: Config) -> MonitorStart:
    """What the core is built from."""
    made = config.monitor
    return MonitorStart(
        flip=made.flip,
        settings=build.flip_settings(config),
        epoch=secrets.randbits(62),
        load_s=made.load_ms / 1000,
        stale_s=made.stale_s,
        gone_s=made.gone_s,
        now=time.monotonic(),
    )


@click.command()
@build.configured("tetri-monitor")
def main(config: Config) -> None:
    """Run the monitor of a cluster. It publishes the load of all instances and asks for changes of role."""
    serve(config, log.start(NAME))
