"""bench_transfer: measure the bandwidth of each KV path against a plain copy (measure.py).

    tools/bench_transfer [--transport shm,stream] [--sizes MB,...] [--block-tokens N] [--json]

Without --transport: every path that this machine has, one after the other; why another is left out is said. Each row is
one path and KV chunk size, pipelined, with the digest. `ratio` is its GB/s divided by that of a plain copy of as
many bytes in the same rounds. For `stream` the chunks are in the slab before the clock starts; `bare_ratio` compares
with bare pyzmq PUSH and PULL sockets, encrypted as the path is (`bare_plain`: not encrypted), and `gbps_with_put`
includes the copy into the slab and its digest. The second table is for a single chunk: `ms` from the start of its put
until it has landed. All values are medians over the rounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from tetri.bench.report import Program, as_json, give, one_line, progress, records
from tetri.bench.transfer.bare_zmq import bare
from tetri.bench.transfer.measure import Case, Lane, alone, measure
from tetri.bench.transfer.receiver import end_by_signal
from tetri.kv.base import KVError
from tetri.kv.cuda import runtime as cuda
from tetri.kv.nixl import agent as nixl
from tetri.policy.pairing import TRANSPORTS

NAMES = ", ".join(TRANSPORTS)
TOKEN_BYTES = 23_040  # of SmolLM2-135M's KV in bfloat16
ALONE_MB = 12.0
ALONE_ROUNDS = 40
# transport -> other measurements in the same rounds, by name
OTHERS: dict[str, dict[str, Lane]] = {
    "stream": {"bare": partial(bare, encrypted=True), "bare_plain": partial(bare, encrypted=False)}
}


def listed(text: str, kind: type) -> list[Any]:
    """Parse a list such as "4,12". Raises UsageError."""
    try:
        found = [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise click.UsageError(f"{text!r} is not a list of numbers such as 4,12") from None
    if not found:
        raise click.UsageError("the list is empty")
    return found


@click.command(cls=Program)
@click.option("--transport", "transports", help=f"One or more of {NAMES}.  [default: all that this machine has]")
@click.option("--sizes", default="3,12,47", show_default=True, metavar="MB,...", help="Chunk sizes, 10^6 bytes.")
@click.option("--block-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens in a block.")
@click.option("--depth", type=click.IntRange(1), default=4, show_default=True, help="KV chunks in transit.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--memory-mb", type=click.IntRange(1), default=300, show_default=True, help="That copies rotate through.")
@as_json
def main(
    transports: str | None, sizes: str, block_tokens: int, depth: int, rounds: int, memory_mb: int, as_json: bool
) -> None:
    """Measure the bandwidth of KV paths between two processes on two cores, and the latency of a single chunk."""
    end_by_signal()
    absent = left_out() if transports is None else {}
    named = [name for name in TRANSPORTS if name not in absent] if transports is None else listed(transports, str)
    megabytes = listed(sizes, float)
    unknown = next((name for name in named if name not in TRANSPORTS), None)
    if unknown is not None or min(megabytes) <= 0:
        wrong = f"unknown transport {unknown!r}: {NAMES}" if unknown is not None else "sizes must be above 0"
        raise click.UsageError(wrong)
    block_bytes, memory = block_tokens * TOKEN_BYTES, memory_mb * 1_000_000

    def case(transport: str, megabytes: float) -> Case:
        return Case(transport, max(round(megabytes * 1e6 / block_bytes), 1), block_bytes, memory, depth)

    found: dict[str, Any] = {"block_bytes": block_bytes, "depth": depth, "rounds": rounds, "left_out": absent}
    found |= {"rows": [], "alone": []}
    with one_line("bench_transfer", KVError):
        for transport in named:
            for size in megabytes:
                found["rows"].append(measure(case(transport, size), rounds, memory, OTHERS.get(transport, {})))
                progress(line(found["rows"][-1]))
            found["alone"].append(alone(case(transport, ALONE_MB), ALONE_ROUNDS))
            progress(line(found["alone"][-1]))
    beside = sorted(found["rows"], key=lambda row: float(row["chunk_mb"]))
    lines = [f"left out: {name}: {why}" for name, why in absent.items()]
    give(found, "\n".join([records(beside), "", records(found["alone"]), "", *lines]).rstrip(), as_json)


def left_out() -> dict[str, str]:
    """The KV paths that cannot be measured on this machine, and why."""
    found = {"cuda_ipc": "tools/gpu_check measures it"}
    for name, load in (("cuda_ipc", cuda.load), ("nixl", nixl.library)):
        try:
            load()
        except KVError as error:
            found[name] = str(error)
    return found


def line(row: dict[str, Any]) -> str:
    """Format a row as one line."""
    return "  ".join(f"{name} {value}" for name, value in row.items())


if __name__ == "__main__":
    main(prog_name="bench_transfer")
