"""What the broker's process adds to a Status and an Observation: what its core cannot know."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from msgspec.structs import replace

from tetri.config import Config
from tetri.core.broker.notes import of_counters
from tetri.proc.network import HubNetwork
from tetri.proc.texts import Texts
from tetri.text import Tokenizer
from tetri.wire.clients import Status
from tetri.wire.observation import Measures

NO_COST = (
    "no cost table (engine.cost): routing, roles and predicted times follow assumed step times. "
    "engine.cost = auto measures them"
)
NOT_MEASURED = (
    "no worker has a cost table yet (engine.cost = auto): prompts are routed by their tokens, and without [slo] no "
    "request has limits of latency"
)
NO_ACCESS_CONTROL = (
    "KV moves over nixl, which has no access control: whoever can connect to a worker, also another user of this host, "
    "can read its memory. transfer.transport = stream is encrypted"
)


def of_config(config: Config, logger: logging.Logger) -> list[str]:
    """The degraded modes that the configuration causes; each is logged as well."""
    found = [] if config.engine.table or config.engine.measures else [NO_COST]
    found += [NO_ACCESS_CONTROL] if config.transfer.transport == "nixl" else []
    return _logged(found, logger)


def of_costs(config: Config, known: bool) -> list[str]:
    """That no worker has told yet how long its steps take. `known`: whether the broker has a cost table."""
    return [NOT_MEASURED] if config.engine.measures and not known else []


def of_tokenizer(tokenizer: Tokenizer, logger: logging.Logger) -> list[str]:
    """The degraded modes that the model's files cause; each is logged as well."""
    problem = tokenizer.template_problem
    return _logged([] if problem is None else [f"messages are refused: {problem}"], logger)


def _logged(notes: list[str], logger: logging.Logger) -> list[str]:
    for line in notes:
        logger.warning("%s", line)
    return notes


def completed(status: Status, configured: list[str], network: HubNetwork, texts: Texts) -> Status:
    """The Status with the notes on the configuration, and with the counters of the broker's sockets and texts."""
    counters = {**network.counters(), **texts.counters()}
    died = [f"the tokenising process died {texts.deaths} times"] if texts.deaths else []
    notes = [*configured, *status.notes, *of_counters("the broker", counters), *died]
    traffic = {f"net_{name}": count for name, count in sorted(network.hub.counters.items())}
    return replace(status, notes=notes, counters={**status.counters, **counters, **traffic})


def with_refused(measures: Measures, refused: Mapping[str, int]) -> Measures:
    """The measures with the Submits, by reason, that were refused before the core saw them."""
    counts = measures.counts["requests_refused"]
    counted = {reason: count + refused.get(reason, 0) for reason, count in counts.items()}
    return measures.changed(counts={**measures.counts, "requests_refused": counted})
