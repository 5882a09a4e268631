"""tools/bench_transfer: how fast KV goes over each path, beside a plain copy (tetri/bench/transfer.py).

    tools/bench_transfer [--transport shm,stream] [--sizes MB,...] [--block-tokens N] [--json]

Each row is one chunk size, pipelined, with the digest; `ratio` is its GB/s over that of a plain copy of as many bytes
in the same rounds. For `stream` the chunks lie in the slab already, as the messages of the bare pyzmq PUSH and PULL lie
ready whose GB/s `bare_ratio` compares with (`bare_plain`: with malloc as it comes, see bare_zmq.py); `gbps_with_put` is
the whole way, with the copy into the slab and its digest. Under it one chunk alone: from the begin of its put until it
has landed on the other side."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))  # a clone that is not installed

from bare_zmq import bare

from tetri.bench.receiving import end_by_signal
from tetri.bench.transfer import Case, Lane, alone, measure
from tetri.kv import PATHS
from tetri.kv.base import KVError

TOKEN_BYTES = 23_040  # of SmolLM2-135M's KV in bfloat16
ALONE_MB = 12.0
ALONE_ROUNDS = 40
# transport -> what else is measured in the same rounds, by name
OTHERS: dict[str, dict[str, Lane]] = {
    "stream": {"bare": partial(bare, tuned=True), "bare_plain": partial(bare, tuned=False)}
}


def listed(text: str, kind: type) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise click.UsageError(f"{text!r} is no list of numbers, as in 4,12") from None
    if not found:
        raise click.UsageError("an empty list")
    return found


@click.command()
@click.option("--transport", "transports", default="shm", show_default=True, help="One or more of " + ", ".join(PATHS))
@click.option("--sizes", default="3,6,12,24,47", show_default=True, metavar="MB,...", help="Of a chunk, in 10^6 bytes.")
@click.option("--block-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens in a block.")
@click.option("--depth", type=click.IntRange(1), default=4, show_default=True, help="Chunks on their way at once.")
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--memory-mb", type=click.IntRange(1), default=512, show_default=True, help="That copies rotate over.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def main(
    transports: str, sizes: str, block_tokens: int, depth: int, rounds: int, memory_mb: int, as_json: bool
) -> None:
    """Bandwidth of the KV paths between two processes on two cores, and the time of one chunk alone."""
    end_by_signal()
    named, megabytes = listed(transports, str), listed(sizes, float)
    unknown = next((name for name in named if name not in PATHS), None)
    if unknown is not None or min(megabytes) <= 0:
        wrong = f"unknown transport {unknown!r}: {', '.join(PATHS)}" if unknown is not None else "sizes are above 0"
        raise click.UsageError(wrong)
    block_bytes, memory = block_tokens * TOKEN_BYTES, memory_mb * 1_000_000

    def case(transport: str, megabytes: float) -> Case:
        return Case(transport, max(round(megabytes * 1e6 / block_bytes), 1), block_bytes, memory, depth)

    said: dict[str, Any] = {"block_bytes": block_bytes, "depth": depth, "rounds": rounds, "rows": [], "alone": []}
    try:
        for transport in named:
            for size in megabytes:
                found = measure(case(transport, size), rounds, memory, OTHERS.get(transport, {}))
                said["rows"].append(found)
                tell(found, as_json)
            said["alone"].append(alone(case(transport, ALONE_MB), ALONE_ROUNDS))
            tell(said["alone"][-1], as_json)
    except KVError as error:
        print(f"bench_transfer: {error}", file=sys.stderr)
        sys.exit(1)
    if as_json:
        print(json.dumps(said))


def tell(row: dict[str, Any], as_json: bool) -> None:
    """Each row when it is there; beside JSON on stderr."""
    print("  ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr if as_json else sys.stdout)


if __name__ == "__main__":
    main(prog_name="bench_transfer")
