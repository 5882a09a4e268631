"""From a configuration to the parts of a process: its engine, its KV store, its identity, its rules."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tetri import cost
from tetri.config import Config, cpu_numbers
from tetri.core.instance.identity import Identity
from tetri.engine.base import Engine
from tetri.instance import Instance
from tetri.kv import StoreSettings, open_store
from tetri.kv.base import KVStore
from tetri.kv.cuda.runtime import Device, load, put_first
from tetri.kv.limit import LINKS, LimitedLink, LimitedStore
from tetri.models import find, weights_hash
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings
from tetri.request import Capacity, Expected
from tetri.strict import ConfigError
from tetri.text import ByteTokenizer, Tokenizer, load_tokenizer

# What is predicted with when [engine] names no cost: nobody has measured this engine, so the seconds mean nothing, but
#: those of a longer prompt or of a larger batch are more.
UNMEASURED = cost.Cost(prefill=((0.0, 0.0), (1000.0, 1.0)), decode=((1.0, 0.02), (100.0, 0.2)))


def gpu(config: Config, iid: str) -> Device | None:
    """The GPU that this worker is to use, which becomes number 0 of this process; None: it has none. Raises KVError."""
    number = config.worker(iid).gpu
    if number < 0:
        return None
    put_first(number)
    return Device(load())


def engine_and_store(
    config: Config, iid: str, wait: Callable[[float], bool], wake: Callable[[], None], stack: ExitStack
) -> tuple[Engine, KVStore]:
    """This worker's engine and its KV store, which `leaving` closes. The slab comes first, as soon as the engine knows
    how large a block is: on a GPU whatever fits beside it must not depend on who was faster, and when it does not
    fit, that is said before the weights are loaded. Raises what `engine`, `store`, `gpu` and `link` raise."""
    slower, device, opened = link(config), gpu(config, iid), list[KVStore]()

    def reserve(block_bytes: int) -> None:
        made = store(config, iid, block_bytes, wake, device)
        opened.append(made if slower is None else LimitedStore(made, slower, block_bytes))
        stack.callback(opened[0].close)

    def something_waits(seconds: float) -> bool:
        """What the store has for the worker at a certain time wakes nobody, and ends a run as a message does."""
        message, due = wait(seconds), opened[0].due()
        return message or (due is not None and due <= time.monotonic())

    made = engine(config, something_waits, device, reserve)
    stack.callback(made.close)
    return made, opened[0]


def engine(
    config: Config,
    wait: Callable[[float], bool] | None = None,
    device: Device | None = None,
    reserve: Callable[[int], None] = lambda block_bytes: None,
) -> Engine:
    """The engine that [engine] names. `wait(seconds)` is how an emulated one spends its time: True when a message
    waits, which ends a run of several passes. The real one computes on `device`, if there is one; `reserve` is called
    with the bytes of a block before the engine takes its memory. Raises EngineError, ModelError or CostError."""
    if config.engine.kind == "emulated":
        emulated = _emulated(config, wait)
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


def _emulated(config: Config, wait: Callable[[float], bool] | None) -> Engine:
    from tetri.engine.emulated import EmulatedEngine

    made = config.emulated
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
        cost=cost.load(config.engine.cost) if config.engine.cost else cost.Cost(),
        time_scale=made.time_scale,
    )
    built.wait = wait or built.wait
    return built


def store(
    config: Config, iid: str, block_bytes: int, wake: Callable[[], None], device: Device | None = None
) -> KVStore:
    """The KV store that [transfer] names; `wake` ends the worker's wait when something has come. `device` is the
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
    """The emulated link. An emulated engine's KV is small and its time may be stretched: its link is slower by as
    much, so that a chunk takes as long as the KV of the model that the cost table was measured with, at the same pace.
    Raises ConfigError or CostError."""
    made, engine = config.transfer, config.engine
    bytes_s = 1e9 * made.emulate_gbs or LINKS.get(made.emulate)
    if bytes_s is None:
        if made.emulate_latency_us or made.emulate_token_bytes:
            raise ConfigError("transfer.emulate_* say more of a link: name it by transfer.emulate or emulate_gbs")
        return None
    if engine.kind != "emulated":
        if made.emulate_token_bytes:
            raise ConfigError("transfer.emulate_token_bytes is of an emulated engine: a real one has its own KV")
        return LimitedLink(bytes_s, made.emulate_latency_us / 1e6)
    token_bytes = made.emulate_token_bytes or (cost.load(engine.cost).kv_token_bytes if engine.cost else 0)
    if not token_bytes:
        raise ConfigError(
            "transfer.emulate needs the size of the emulated model's KV: name an engine.cost table with kv_token_bytes,"
            " or set transfer.emulate_token_bytes"
        )
    scale = config.emulated.time_scale
    if not scale:
        raise ConfigError("transfer.emulate takes time, emulated.time_scale = 0 wants none: set one of them")
    slower = token_bytes / config.emulated.token_bytes * scale
    return LimitedLink(bytes_s / slower, made.emulate_latency_us / 1e6 * scale)


def identity(
    config: Config, iid: str, incarnation: int, made: Engine, kv: KVStore, expected: Expected | None = None
) -> Identity:
    """What the worker's core is; `expected`: what its predictor of output lengths knows before any traffic."""
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
        cost=predicted(config),
        load_s=config.monitor.load_ms / 1000,
        stream_interval=config.engine.stream_interval,
        reserve_share=config.transfer.reserve_share,
        heartbeat_s=config.cluster.heartbeat_s,
        offer_s=config.transfer.offer_s,
        patience_s=config.cluster.patience_s,
        expected=expected,
    )


def rules(config: Config) -> Rules:
    return Rules(**dataclasses.asdict(config.policy))


def flip_settings(config: Config) -> FlipSettings:
    made = config.monitor
    return FlipSettings(**{f.name: getattr(made, f.name) for f in dataclasses.fields(FlipSettings)})


def predicted(config: Config) -> cost.Cost:
    """What everybody predicts with. Raises CostError."""
    measured = cost.load(config.engine.cost) if config.engine.cost else UNMEASURED
    scale = config.emulated.time_scale
    if config.engine.kind != "emulated" or not scale:
        return measured
    return dataclasses.replace(
        measured,
        prefill=tuple((x, seconds * scale) for x, seconds in measured.prefill),
        decode=tuple((x, seconds * scale) for x, seconds in measured.decode),
        prefill_start_s=measured.prefill_start_s * scale,
        decode_context_s=measured.decode_context_s * scale,
    )


def tokenizer(config: Config) -> Tokenizer:
    """Raises ModelError or TextError."""
    return ByteTokenizer() if config.engine.kind == "emulated" else load_tokenizer(find(config.model.name))


def limits_of_model(config: Config) -> tuple[int, int]:
    """(context, vocabulary) in tokens."""
    if config.engine.kind == "emulated":
        return config.emulated.context, config.emulated.vocabulary
    from tetri.models import shape

    context, vocabulary = shape(Path(find(config.model.name)))
    return min(config.model.context or context, context), vocabulary


def pin(cpus: str) -> None:
    """Keep this process on its CPUs, before any library counts them. Raises ConfigError."""
    wanted = cpu_numbers(cpus)
    if not wanted:
        return
    missing = wanted - set(range(os.cpu_count() or 1))
    if missing:
        raise ConfigError(f"cpus = {cpus!r}: this machine has no CPU {min(missing)}")
    os.sched_setaffinity(0, wanted)
