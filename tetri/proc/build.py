"""From a configuration to the parts of a worker: its engine, its KV store, its identity."""

from __future__ import annotations

from pathlib import Path

from tetri import cost
from tetri.config import Config
from tetri.core.peers import Identity
from tetri.engine.base import Engine
from tetri.kv import open_store
from tetri.kv.base import KVStore
from tetri.models import find, weights_hash
from tetri.policy.rules import Rules
from tetri.request import Capacity
from tetri.text import ByteTokenizer, Tokenizer, load_tokenizer


def engine(config: Config) -> Engine:
    """The engine that [engine] names. Raises EngineError, ModelError or CostError."""
    if config.engine.kind == "emulated":
        return _emulated(config)
    from tetri.engine.vllm import VllmEngine

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
    )


def _emulated(config: Config) -> Engine:
    from tetri.engine.emulated import EmulatedEngine

    made = config.emulated
    return EmulatedEngine(
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


def store(config: Config, iid: str, block_bytes: int) -> KVStore:
    """The KV store that [transfer] names. Raises KVError."""
    made = config.transfer
    return open_store(made.transport, config.cluster.name, iid, made.slab_blocks, block_bytes, made.digest)


def identity(config: Config, iid: str, incarnation: int, made: Engine, kv: KVStore) -> Identity:
    return Identity(
        iid=iid,
        incarnation=incarnation,
        role=config.worker(iid).role,
        inbox=config.inbox_address(iid),
        fingerprint=made.fingerprint,
        capacity=made.capacity,
        transport=kv.transport,
        slots=kv.slots,
        rules=rules(config),
        sched_batch=config.policy.sched_batch,
        reserve_share=config.transfer.reserve_share,
        beat_s=config.cluster.beat_s,
        offer_s=config.transfer.offer_s,
        patience_s=config.cluster.patience_s,
    )


def rules(config: Config) -> Rules:
    policy = config.policy
    return Rules(policy.prefill_route, policy.decode_route, policy.order, policy.chunk, policy.admit)


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
