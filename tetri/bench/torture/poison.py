"""A request that kills whoever computes it."""

from __future__ import annotations

import time
from pathlib import Path

from tetri.bench.torture.case import Findings
from tetri.bench.torture.deployed import Deployed, deployed, workers
from tetri.bench.torture.load import Load
from tetri.client import Client, RequestFailed
from tetri.engine.emulated import reference
from tetri.request import Sampling

MOST_DEATHS, MOST_S = 3, 60.0
WIDTH, SETTLED = 8, 16  # neighbours that are open, and that end before and after
VOCABULARY = 1 << 24  # so large that no neighbour meets the deadly token by chance
PROMPT, OUTPUTS, TOKENS = [7] * 50, 5, 40  # of the request whose own output is deadly: after so many tokens


def poison(folder: Path, found: Findings) -> None:
    """A request has a token in its prompt that kills the worker that computes it; another writes that token itself.
    Each ends with an error after three deaths at most, and all neighbours finish."""
    settings = [workers(2, 2), f"emulated.vocabulary={VOCABULARY}"]
    deadly = reference(PROMPT, Sampling(max_tokens=OUTPUTS, ignore_eos=True), VOCABULARY, 8)[-1]
    settings.append(f"emulated.deadly_token={deadly}")
    with deployed(folder, found, settings) as cluster, Load(cluster.config, WIDTH) as load:
        load.wait(SETTLED)
        _ask(cluster, [*PROMPT, deadly], found, "prompt")
        load.wait(SETTLED)
        _ask(cluster, PROMPT, found, "output")
        load.wait(SETTLED)
        load.finish()
        load.judge(found)


def _ask(cluster: Deployed, prompt: list[int], found: Findings, name: str) -> None:
    """Send a deadly request and wait for its end."""
    before, start, ended = cluster.counter("workers_lost"), time.monotonic(), ""
    with Client(cluster.config.clients_address) as client:
        try:
            ended = client.generate(prompt, max_tokens=TOKENS, ignore_eos=True, deadline_s=MOST_S).finish_reason
        except RequestFailed as error:
            found.note(f"{name}_error", str(error))
            ended = "error"
    found.exactly(f"{name}_ended", ended, "error")
    found.note(f"{name}_s", round(time.monotonic() - start, 1))
    found.at_most(f"{name}_deaths", cluster.counter("workers_lost") - before, MOST_DEATHS)
