"""Builds the parts of a process from the configuration: hub, engine, KV store, identity, rules."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import wraps
from logging import Logger
from pathlib import Path
from typing import Any

import click

from tetri import cost, private, terminal
from tetri.config import Config, default_path
from tetri.config import load as load_config
from tetri.core.instance.identity import Identity
from tetri.cost import Cost, CostError
from tetri.engine.base import Engine, EngineError
from tetri.faults import parse_cuts
from tetri.instance import Capacity, Instance
from tetri.kv import StoreSettings, open_store
from tetri.kv.base import KVError, KVStore
from tetri.kv.cuda.runtime import Device, load, put_first
from tetri.kv.cut_store import CutStore
from tetri.kv.limit import LINKS, LimitedLink, LimitedStore
from tetri.log import LogError
from tetri.models import ModelError, find, weights_hash
from tetri.net import descriptors
from tetri.net.errors import NetError
from tetri.net.hub import Hub
from tetri.net.lock import hold
from tetri.net.signals import StopSignals
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings
from tetri.proc import open_files
from tetri.proc.run_directory import kept
from tetri.request import Expected
from tetri.strict import ConfigError
from tetri.text import ByteTokenizer, TextError, Tokenizer, load_tokenizer

# A worker's cost table when it has none. The seconds are not measured, but they grow with the prompt and the batch.
UNMEASURED = Cost(prefill=((0.0, 0.0), (1000.0, 1.0)), decode=((1.0, 0.02), (100.0, 0.2)))

EXPECTED = (
    *(ConfigError, CostError, EngineError, KVError, LogError, ModelError, NetError, TextError),
    private.PrivateError,
)


def configured(program: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options --conf and --set to a command, which gets the configuration that they select. An expected error
    ends the program with one line on stderr and status 2."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @click.option("--conf", type=click.Path(exists=True, dir_okay=False), help="TOML file of the cluster.")
        @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
        @wraps(function)
        def command(conf: str | None, overrides: tuple[str, ...], **given: Any) -> None:
            try:
                terminal.prepare()
                function(load_config(conf or default_path(), overrides), **given)
            except EXPECTED as error:
                terminal.tell(f"{program}: {error}")
                sys.exit(2)

        return command

    return decorate


@contextmanager
def locked_hub(config: Config, name: str, logger: Logger) -> Iterator[tuple[Hub, StopSignals, ExitStack]]:
    """Lock the run directory for the process `name` and open a hub. Yields (hub, signals that end the loop, a stack
    that is closed before the hub). Raises NetError."""
    with (
        kept(config.run_dir, logger),
        hold(config.run_dir / f"{name}.lock"),
        closing(open_hub(config, name, logger)) as hub,
        ExitStack() as stack,
    ):
        yield hub, stop_signals(hub, stack), stack


def open_hub(config: Config, name: str, logger: Logger) -> Hub:
    """The hub of the process `name`, which may open as many files as the machine allows; the log says when these are
    too few for the configuration."""
    short = open_files.shortage(config, name, descriptors.raise_limit())
    if short is not None:
        logger.warning("%s", short)
    return Hub(logger)


def stop_signals(hub: Hub, stack: ExitStack) -> StopSignals:
    """Make signals end the loop of this process; `stack` restores their earlier handlers."""
    signals = StopSignals(hub.wake_fd)
    stack.callback(signals.restore)
    return signals


def gpu(config: Config, iid: str) -> Device | None:
    """The worker's GPU, which becomes device 0 of this process; None if it has none. Raises KVError."""
    number = config.worker(iid).gpu
    if number < 0:
        return None
    put_first(number)
    return Device(load())


def engine_and_store(
    config: Config, iid: str, wait: Callable[[float], bool], wake: Callable[[], None], stack: ExitStack
) -> tuple[Engine, KVStore]:
    """Build the worker's engine and KV store; `stack` closes them.

    The slab is allocated as soon as the engine knows the size of a block, before it takes its own memory: on a GPU the
    memory left for the engine is then the same at each start, and a slab that does not fit fails before the weights are
    loaded. Raises what `engine`, `store`, `gpu` and `link` raise."""
    slower, device, opened = link(config), gpu(config, iid), list[KVStore]()

    def reserve(block_bytes: int) -> None:
        made = store(config, iid, block_bytes, wake, device)
        made = made if slower is None else LimitedStore(made, slower, block_bytes)
        cuts = parse_cuts(config.transfer.cuts)
        opened.append(CutStore(made, cuts, iid, str(config.run_dir / "cut")) if cuts else made)
        stack.callback(opened[0].close)

    def something_waits(seconds: float) -> bool:
        """Whether a message waits or the store is due: the store does not wake the worker for what is due by time."""
        message, due = wait(seconds), opened[0].due()
        return message or (due is not None and due <= time.monotonic())

    made = engine(config, something_waits, device, reserve, iid)
    stack.callback(made.close)
    return made, opened[0]


def engine(
    config: Config,
    wait: Callable[[float], bool] | None = None,
    device: Device | None = None,
    reserve: Callable[[int], None] = lambda block_bytes: None,
    iid: str = "",
) -> Engine:
    """Build the engine that [engine] names. Raises EngineError, ModelError or CostError.

    wait     spends the time of an emulated step, in seconds; True, when a message waits, ends a run of several steps
    device   the GPU of a real engine; None: the CPU
    reserve  called with the bytes of a KV block before the engine takes its memory
    iid      the instance that it is for, which emulated.salt mixes into its tokens
    """
    if config.engine.kind == "emulated":
        emulated = _emulated(config, wait, iid)
        reserve(emulated.fingerprint.block_bytes)
        return emulated
    from tetri.engine.vllm.engine import VllmEngine

    folder = find(config.model.name)
    return VllmEngine(
        folder,
        dtype=config.model.dtype,
        chunk_tokens=config.engine.chunk_tokens,
        max_batch=config.engine.max_batch,
        kv_bytes=config.engine.kv_mib << 20,
        context=config.model.context or None,
        weights=weights_hash(folder),
        block_tokens=config.engine.block_tokens,
        gpu=device,
        reserve=reserve,
    )


def _emulated(config: Config, wait: Callable[[float], bool] | None, iid: str) -> Engine:
    from tetri.engine.emulated import EmulatedEngine
    from tetri.engine.salted import salt_of

    made = config.emulated
    salt = salt_of(iid) if made.salt else 0
    built = EmulatedEngine(
        capacity=Capacity(
            blocks=made.blocks,
            block_tokens=config.engine.block_tokens,
            chunk_tokens=config.engine.chunk_tokens,
            max_batch=config.engine.max_batch,
            context=made.context,
        ),
        token_bytes=made.token_bytes,
        vocabulary=made.vocabulary,
        cost=cost.load(config.engine.table) if config.engine.table else Cost(),
        time_scale=made.time_scale,
        nan_token=None if made.nan_token < 0 else made.nan_token,
        salt=lambda key: salt,
        deadly_token=None if made.deadly_token < 0 else made.deadly_token,
    )
    built.wait = wait or built.wait
    return built


def store(
    config: Config, iid: str, block_bytes: int, wake: Callable[[], None], device: Device | None = None
) -> KVStore:
    """Build the KV store that [transfer] names. `wake` ends the worker's wait when KV has arrived. `device` is the
    worker's GPU, if it has one. Raises KVError."""
    made = config.transfer
    settings = StoreSettings(
        deployment=config.cluster.name,
        iid=iid,
        slots=made.slab_blocks,
        block_bytes=block_bytes,
        transport=made.transport,
        address=made.address,
        digest=made.digest,
        device=device,
        on_host=device is None or config.engine.kind == "emulated",
        announce=made.announce,
        key=config.cluster.key,
        buffer=made.buffer_mib << 20,
    )
    return open_store(settings, wake)


def link(config: Config) -> LimitedLink | None:
    """The emulated link; None if none is configured. Raises ConfigError or CostError.

    An emulated engine has smaller KV blocks than the model of its cost table, and its time may be scaled. Its link is
    slowed down by both factors, so that the transfer of a chunk takes the right share of the time of a step."""
    made, engine = config.transfer, config.engine
    bytes_s = 1e9 * made.emulate_gbs or LINKS.get(made.emulate)
    if bytes_s is None:
        if made.emulate_latency_us or made.emulate_token_bytes:
            raise ConfigError("transfer.emulate_* describe a link: name it by transfer.emulate or emulate_gbs")
        return None
    if engine.kind != "emulated":
        if made.emulate_token_bytes:
            raise ConfigError("transfer.emulate_token_bytes is for an emulated engine: a real one has its own KV")
        return LimitedLink(bytes_s, made.emulate_latency_us / 1e6)
    token_bytes = made.emulate_token_bytes or (cost.load(engine.table).kv_token_bytes if engine.table else 0)
    if not token_bytes:
        advice = "name an engine.cost table with kv_token_bytes, or set transfer.emulate_token_bytes"
        raise ConfigError(f"transfer.emulate needs the size of the emulated model's KV: {advice}")
    scale = config.emulated.time_scale
    if not scale:
        raise ConfigError("transfer.emulate needs time, but emulated.time_scale = 0 takes none: change one of them")
    slower = token_bytes / config.emulated.token_bytes * scale
    return LimitedLink(bytes_s / slower, made.emulate_latency_us / 1e6 * scale)


def identity(
    config: Config,
    iid: str,
    incarnation: int,
    made: Engine,
    kv: KVStore,
    measured: Cost | None = None,
    expected: Expected | None = None,
) -> Identity:
    """What the worker's core is built from. `measured`: the cost table that was measured, if the configuration names
    none; `expected`: the prior and calibration of its length predictor."""
    found = table(config) or measured
    instance = Instance(
        iid=iid,
        incarnation=incarnation,
        role=config.worker(iid).role,
        inbox=config.inbox_address(iid),
        fingerprint=made.fingerprint,
        capacity=made.capacity,
        reach=kv.reach,
    )
    return Identity(
        instance,
        slots=kv.slots,
        rules=rules(config),
        cost=found or UNMEASURED,
        compares_steps=found is not None and (config.engine.kind != "emulated" or config.emulated.time_scale > 0),
        load_s=config.monitor.load_ms / 1000,
        stream_interval=config.engine.stream_interval,
        reserve_share=config.transfer.reserve_share,
        heartbeat_s=config.cluster.heartbeat_s,
        offer_s=config.transfer.offer_s,
        patience_s=config.cluster.patience_s,
        expected=expected,
    )


def rules(config: Config) -> Rules:
    """The policies that [policy] names."""
    return Rules(**dataclasses.asdict(config.policy))


def flip_settings(config: Config) -> FlipSettings:
    """The settings of the flip policy, from [monitor]."""
    made = config.monitor
    return FlipSettings(**{f.name: getattr(made, f.name) for f in dataclasses.fields(FlipSettings)})


def table(config: Config) -> Cost | None:
    """The cost table that the configuration names, in seconds of the clock; None if it names none. Raises CostError."""
    if not config.engine.table:
        return None
    named, scale = cost.load(config.engine.table), config.emulated.time_scale
    if config.engine.kind != "emulated" or not scale:
        return named
    return dataclasses.replace(
        named,
        prefill=tuple((x, seconds * scale) for x, seconds in named.prefill),
        decode=tuple((x, seconds * scale) for x, seconds in named.decode),
        prefill_start_s=named.prefill_start_s * scale,
        decode_context_s=named.decode_context_s * scale,
    )


def tokenizer(config: Config) -> Tokenizer:
    """The model's tokeniser; bytes for an emulated engine. Raises ModelError or TextError."""
    if config.engine.kind == "emulated":
        return ByteTokenizer()
    return load_tokenizer(find(config.model.name), specials_in_prompt=config.model.special_tokens_in_prompt)


def limits_of_model(config: Config) -> tuple[int, int]:
    """(context, vocabulary) of the model, in tokens. Raises ModelError."""
    if config.engine.kind == "emulated":
        return config.emulated.context, config.emulated.vocabulary
    from tetri.models import shape

    context, vocabulary = shape(Path(find(config.model.name)))
    return min(config.model.context or context, context), vocabulary
