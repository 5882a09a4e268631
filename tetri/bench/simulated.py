"""The simulator's setup for a deployment that is configured or runs."""

from __future__ import annotations

from math import inf

from tetri.config import Config
from tetri.cost import Cost
from tetri.proc import build
from tetri.request import Slo
from tetri.sim.setup import Setup


def setup_of(config: Config, cost: Cost, seed: int = 0) -> Setup:
    """Return the simulator's setup for this deployment, with the roles and limits that it starts with. `cost`: the
    step times of its instances."""
    roles = [worker.role for worker in config.workers]
    link = build.link(config)
    kv_tokens = _kv_tokens(config, cost.kv_token_bytes)
    return Setup(
        cost=cost,
        link_bytes_s=inf if link is None else link.bytes_s,
        prefill=roles.count("prefill"),
        decode=roles.count("decode"),
        mixed=roles.count("mixed"),
        auto=roles.count("auto"),
        slo=Slo(ttft_s=config.slo.ttft_s or None, tpot_s=config.slo.tpot_s or None),
        rules=build.rules(config),
        kv_tokens=kv_tokens,
        block_tokens=config.engine.block_tokens,
        chunk_tokens=config.engine.chunk_tokens,
        max_batch=config.engine.max_batch,
        context=_context(config, kv_tokens or cost.kv_tokens),
        slots=config.transfer.slab_blocks,
        reserve_share=config.transfer.reserve_share,
        seed=seed,
        flip=config.monitor.flip,
        flip_settings=build.flip_settings(config),
        load_s=config.monitor.load_ms / 1000,
        heartbeat_s=config.cluster.heartbeat_s,
        stream_interval=config.engine.stream_interval,
    )


def _kv_tokens(config: Config, token_bytes: int) -> int:
    """Tokens that the KV memory of an instance holds; 0: as in the cost table."""
    if config.engine.kind == "emulated":
        return config.emulated.blocks * config.engine.block_tokens
    return (config.engine.kv_mib << 20) // token_bytes if token_bytes else 0


def _context(config: Config, kv_tokens: int) -> int:
    """Tokens of the longest request; 0: as many as the KV memory holds."""
    asked = config.emulated.context if config.engine.kind == "emulated" else config.model.context
    held = kv_tokens // config.engine.block_tokens * config.engine.block_tokens
    return min(asked, held)
