"""The monitor process: receives load reports, publishes the cluster view, and asks the broker for flips."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import click

from tetri import log
from tetri.config import Config, default_path, load
from tetri.core.actions import BROKER, Action, Broken, Publish, Send
from tetri.net.errors import NetError
from tetri.net.hub import Hub
from tetri.net.lock import hold
from tetri.net.loop import run
from tetri.net.signals import StopSignals
from tetri.proc import build
from tetri.proc.network import HubNetwork, polled
from tetri.proc.recorder import MonitorStart, recorded
from tetri.strict import ConfigError
from tetri.wire.messages import FlipWanted, LoadReport

EXPECTED = (ConfigError, NetError, log.LogError)
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
    build.pin(config.monitor.cpus)
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with hold(config.run_dir / "monitor.lock"), ExitStack() as stack:
        hub = Hub(logger)
        stack.callback(hub.close)
        signals = StopSignals(hub.wake_fd)
        stack.callback(signals.restore)
        start = start_of(config)
        core = recorded(start.core(), start, config, NAME, start.epoch, stack)
        hub.bind_subscriber(config.loads_address, LoadReport)
        hub.bind_publisher(config.views_address)
        hub.connect(BROKER, config.events_address)
        logger.info("watching with flip policy %s", config.monitor.flip)
        act = partial(carry_out, HubNetwork(hub, logger), logger)
        run(core, partial(polled, hub), act, time.monotonic, signals.running)


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
@click.option("--conf", type=click.Path(exists=True, dir_okay=False), help="TOML file of the cluster.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
def main(conf: str | None, overrides: tuple[str, ...]) -> None:
    """Run the monitor of a cluster. It publishes the load of all instances and asks for changes of role."""
    try:
        serve(load(conf or default_path(), overrides), log.start(NAME))
    except EXPECTED as error:
        click.echo(f"tetri-monitor: {error}", err=True)
        sys.exit(2)
