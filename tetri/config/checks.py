"""Checks across the tables of a configuration: values that are valid alone, but not together."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator

from tetri.config.tables import Config, cpu_numbers
from tetri.faults import FaultsError, parse_cuts, parse_faults
from tetri.request import blocks_for

STREAM_BLOCKS = 8192  # most blocks that one Fetch can ask for (wire/bulk.py)


def contradictions(config: Config) -> Iterator[str]:
    """Every contradiction in a configuration, each in one line that names the setting and what is allowed."""
    iids = [worker.iid for worker in config.workers]
    for iid in sorted({iid for iid in iids if iids.count(iid) > 1}):
        yield f"worker.iid: {iid!r} is used {iids.count(iid)} times; every worker needs its own"
    for role in ("prefill", "decode"):
        if not {role, "mixed", "auto"} & {worker.role for worker in config.workers}:
            yield f'worker: at least one [[worker]] with role = "{role}", "mixed" or "auto" is needed'
    if config.cluster.dead_s < 3 * config.cluster.heartbeat_s:
        yield f"cluster.dead_s: must be at least three times heartbeat_s ({config.cluster.heartbeat_s:g} s)"
    if config.monitor.gone_s < config.monitor.stale_s:
        yield f"monitor.gone_s: must be at least stale_s ({config.monitor.stale_s:g} s)"
    if 1000 * config.monitor.stale_s < 2 * config.monitor.load_ms:
        yield f"monitor.stale_s: must be at least two times load_ms ({config.monitor.load_ms} ms)"
    chunk, block = config.engine.chunk_tokens, config.engine.block_tokens
    if config.engine.max_batch >= chunk:
        yield (
            f"engine.max_batch: must be below chunk_tokens ({chunk}): a step computes one token of every running"
            " decode and at least one token of a prompt"
        )
    if config.transfer.slab_blocks < (least := blocks_for(chunk + block - 1, block)):
        yield f"transfer.slab_blocks: must be at least {least}, the blocks that one chunk may fill"
    for name, parse in (("faults", parse_faults), ("cuts", parse_cuts)):
        try:
            parse(getattr(config.transfer, name))
        except FaultsError as error:
            yield f"transfer.{name}: {error}"
    yield from _transfer_problems(config)
    yield from _predictor_problems(config)
    yield from _gateway_problems(config)
    pinned = [(f"{name}.cpus", getattr(config, name).cpus) for name in ("broker", "gateway", "monitor")]
    for place, cpus in [*pinned, *((f"worker {w.iid}.cpus", w.cpus) for w in config.workers)]:
        if cpus and not cpu_numbers(cpus):
            yield f"{place}: {cpus!r} names no CPU"
    if config.broker.clients:
        yield from _address_problem(config.broker.clients)
    emulated = config.emulated
    if config.engine.kind == "emulated" and emulated.blocks * block < emulated.context:
        yield f"emulated.blocks: must be at least {blocks_for(emulated.context, block)}, which hold one context"


def _transfer_problems(config: Config) -> Iterator[str]:
    transfer, key = config.transfer, config.cluster.key
    if key and not os.path.isabs(key):
        yield f"cluster.key: must be an absolute path, got {key!r}"
    addresses = (("address", transfer.address, r"\d{1,5}|\*"), ("announce", transfer.announce, r"\d{1,5}"))
    for name, address, port in addresses:
        parts = re.fullmatch(rf"tcp://(\d{{1,3}}(?:\.\d{{1,3}}){{3}}):({port})", address)
        if not address:
            continue
        if not parts or not _ip(parts[1]) or not (parts[2] == "*" or 0 < int(parts[2]) < 65536):
            yield f'transfer.{name}: must be "tcp://IPv4-ADDRESS:PORT" or "", got "{address}"'
        elif not key and not _is_loopback(parts[1]):
            yield (
                f"transfer.{name}: {parts[1]} is not this machine's loopback, and between hosts KV must be encrypted:"
                " make a key with tetri-cli keygen, copy it to every host, and set cluster.key"
            )
        elif parts[1] == "0.0.0.0" and not (name == "address" and transfer.announce):
            yield (
                f"transfer.{name}: other hosts cannot connect to 0.0.0.0; set transfer.announce to an address of this"
                " host that they can reach"
            )
    block = config.engine.block_tokens
    most = blocks_for(config.engine.chunk_tokens + block - 1, block)
    if (transfer.address or transfer.transport == "stream") and most > STREAM_BLOCKS:
        yield (
            f"engine.block_tokens: a chunk may fill {most} blocks, but `stream` moves at most {STREAM_BLOCKS}: set"
            " larger blocks or smaller chunks"
        )
    if transfer.announce and not transfer.address:
        yield "transfer.announce: needs transfer.address, which is not set"


def _gateway_problems(config: Config) -> Iterator[str]:
    host, port, count = config.gateway.host, config.gateway.port, config.gateway.count
    try:
        ipaddress.ip_address(host)
    except ValueError:
        yield f'gateway.host: must be an IP address such as "127.0.0.1" or "0.0.0.0", got "{host}"'
    if port and port + count > 65536:
        yield f"gateway.port: must be at most {65536 - count}, so that {count} processes find a port each"


def _predictor_problems(config: Config) -> Iterator[str]:
    kind, folder = config.predictor.kind, config.predictor.folder
    if kind in ("hidden", "both") and config.engine.kind == "emulated":
        yield f'predictor.kind: "{kind}" reads the hidden states of a model, and an emulated engine has none'
    if kind == "prior" and folder:
        yield 'predictor.folder: "prior" needs no predictor; leave the folder out or choose another predictor.kind'


def _ip(host: str) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a text names, since sockets use IPv4 only; None for a host name or *."""
    try:
        return ipaddress.IPv4Address(host)
    except ValueError:
        return None


def _address_problem(address: str) -> Iterator[str]:
    if re.fullmatch(r"ipc:///[^\0]+", address):
        return
    parts = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/\[\]]+):(\d{1,5})", address)
    if not parts or not 0 < int(parts[2]) < 65536:
        yield f'broker.clients: must be "ipc:///path", "tcp://127.0.0.1:PORT" or "", got "{address}"'
    elif not _is_loopback(parts[1].strip("[]")):
        yield (
            f"broker.clients: {parts[1]} is not this machine's IPv4 loopback; encryption (CURVE) between hosts is"
            " not supported here yet, so use 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    address = _ip(host)
    return host == "localhost" or (address is not None and address.is_loopback)
