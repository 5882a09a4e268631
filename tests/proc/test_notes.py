"""What the broker's process adds to a Status."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from live import EMULATED

from tetri.config import load
from tetri.net.hub import Hub
from tetri.proc.network import HubNetwork
from tetri.proc.notes import (
    NO_ACCESS_CONTROL,
    NO_COST,
    NOT_MEASURED,
    completed,
    of_config,
    of_costs,
    of_tokenizer,
    with_refused,
)
from tetri.proc.texts import Texts
from tetri.text import ByteTokenizer
from tetri.wire.clients import Status
from tetri.wire.observation import Measures

LOG = logging.getLogger("test")


def test_step_times_that_nobody_measured_are_a_note_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert of_config(load(EMULATED, ["engine.cost="]), LOG) == [NO_COST] and caplog.messages == [NO_COST]
    caplog.clear()
    assert of_config(load(EMULATED, ["engine.cost=cpu-smollm2.toml"]), LOG) == [] and caplog.messages == []
    assert of_config(load(EMULATED), LOG) == [NO_COST], "emulated steps are not measured"
    assert of_config(load(EMULATED, ["engine.kind=vllm"]), LOG) == []


def test_until_a_worker_has_told_its_step_times_there_is_a_note() -> None:
    measured = load(EMULATED, ["engine.kind=vllm"])
    assert of_costs(measured, known=False) == [NOT_MEASURED] and of_costs(measured, known=True) == []
    assert of_costs(load(EMULATED), known=False) == []


def test_a_chat_template_that_cannot_be_used_is_a_note_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ByteTokenizer()
    assert of_tokenizer(tokenizer, LOG) == [] and caplog.messages == []
    tokenizer.template_problem = "the chat template cannot be used: why"
    line = "messages are refused: the chat template cannot be used: why"
    assert of_tokenizer(tokenizer, LOG) == [line] and caplog.messages == [line]


def test_a_path_without_access_control_is_a_note() -> None:
    overrides = ["engine.cost=cpu-smollm2.toml", "transfer.transport="]
    found = {path: of_config(load(EMULATED, [*overrides[:1], overrides[1] + path]), LOG) for path in ("stream", "nixl")}
    assert found == {"stream": [], "nixl": [NO_ACCESS_CONTROL]}


def test_a_status_has_what_the_brokers_sockets_counted() -> None:
    hub: Any = SimpleNamespace(disconnect=None, unsent=Counter(full_d0=2, away_d1=1))
    hub.counters = Counter(sent=9, garbage_frames=1)
    status = Status(instances=[], requests={}, counters={"flips": 1}, model="m", notes=["d9 is lost"])
    texts = Texts([], lambda: None, 0, LOG)
    found = completed(status, ["no cost table"], HubNetwork(cast(Hub, hub), LOG), texts)
    assert found.counters == {
        "flips": 1,
        "unsent_full_d0": 2,
        "unsent_away_d1": 1,
        "garbage_frames": 1,
        "net_garbage_frames": 1,
        "net_sent": 9,
        "texts_tokenized": 0,
    }
    invalid = "the broker dropped 1 invalid messages (garbage_frames)"
    full = "the broker could not send 2 messages to d0, whose queue was full"
    assert found.notes == ["no cost table", "d9 is lost", full, invalid]


def test_what_was_refused_before_the_core_saw_it_is_added() -> None:
    counts = {"requests_refused": {"invalid": 2, "full": 0}, "retries": {"not_held": 1}}
    measures = Measures(counts=counts, histograms={})
    found = with_refused(measures, Counter(full=3))
    assert found.counts == {"requests_refused": {"invalid": 2, "full": 3}, "retries": {"not_held": 1}}
