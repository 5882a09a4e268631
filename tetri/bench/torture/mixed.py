"""Answers that several instances might have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tetri.bench.chaos.__main__ import measured, settings
from tetri.bench.deployment import EMULATED, configured
from tetri.bench.torture import played
from tetri.bench.torture.case import Findings
from tetri.core.actions import Detokenize, Submitted
from tetri.request import Sampling, Stage
from tetri.wire.events import PeerUp
from tetri.wire.messages import Staged, TokenItem, Tokens

REQUESTS, WIDTH, SEED, BOUND_S = 1500, 24, 36, 30.0
WRITTEN = [100, 101, 102, 103]  # by the prefill instance and the decode instance that hold the request
#: Faults that leave a decode instance with a request that another one has, too: lost and repeated messages, lost reads.
FAULTS = f"drop=0.03,duplicate=0.04,delay=0.04,reorder=0.04,replay=0.04,lose=0.01,late=0.03,longest=0.5,seed={SEED}"


def mixed(folder: Path, found: Findings) -> None:
    """Every engine writes other tokens than its neighbours, and messages are lost, doubled, late and replayed. In each
    attempt the first token must be the prefill instance's, and all others one decode instance's."""
    found.exactly("written_by_one", interleaved(), WRITTEN)
    config = configured(EMULATED, folder, "torture", [*settings("shm", FAULTS, (2, 2)), "emulated.salt=true"])
    run = measured(config, REQUESTS, SEED, WIDTH, BOUND_S)
    found.note("requests", run["requests"])
    found.note("attempts", run["attempts"])
    found.note("injected", run["injected"])
    found.at_least("restarts", run["broker"].get("restarts", 0), 1)
    for name in ("wrong", "hung"):
        found.exactly(name, run[name][:3], [])
    found.exactly("errors", run["errors"], {})
    found.exactly("left_over", run["leaked"], [])
    found.exactly("crashes", run["crashes"], 0)


def interleaved() -> list[int]:
    """Play two decode instances and a prefill instance that write the tokens of one attempt in turn, d0 being the one
    that holds it. Returns the tokens that the broker accepts."""
    broker, accepted = played.broker(), list[int]()

    def handle(event: Any) -> None:
        for action in broker.handle(event, 1.0):
            if isinstance(action, Detokenize):
                accepted.extend(action.ids)

    def write(iid: str, start: int, *ids: int) -> None:
        items = [TokenItem(rid="r", attempt=1, start=start, ids=list(ids))]
        handle(Tokens(iid=iid, incarnation=1, items=items))

    for iid in ("p0", "d0", "d1"):
        handle(played.ready(iid, "prefill" if iid == "p0" else "decode"))
        handle(PeerUp(iid))
    secret, sampling = "s" * 32, Sampling(max_tokens=10, ignore_eos=True)
    handle(Submitted(b"client", "key", secret, b"content", "r", (1, 2, 3), sampling))
    write("p0", 0, WRITTEN[0])
    handle(Staged(iid="d0", incarnation=1, rid="r", attempt=1, stage=Stage.DECODE))
    write("d1", 1, 700, 701)
    write("p0", 1, 800)
    write("d0", 1, WRITTEN[1])
    handle(Staged(iid="d1", incarnation=1, rid="r", attempt=1, stage=Stage.DECODE))
    write("d1", 2, 702)
    write("d0", 2, *WRITTEN[2:])
    return accepted
