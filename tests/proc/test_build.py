"""From the configuration to what cores are made of."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from tetri.config import load
from tetri.cost import Cost
from tetri.engine.base import EngineRequest
from tetri.engine.salted import salt_of, writers
from tetri.instance import Reach
from tetri.kv.base import Wanted
from tetri.proc import build
from tetri.proc.monitor import start_of
from tetri.request import Sampling
from tetri.strict import ConfigError

EMULATED = Path(__file__).parents[2] / "conf" / "emulated.toml"
DEFAULT, SPLIT = EMULATED.with_name("default.toml"), EMULATED.with_name("split.toml")


def test_rules_and_flip_settings_are_those_of_the_configuration():
    config = load(EMULATED, ["policy.order=sjf", "policy.stretch=2", "monitor.hold_s=3", "monitor.floor=2"])
    assert dataclasses.asdict(build.rules(config)) == dataclasses.asdict(config.policy)
    settings = build.flip_settings(config)
    assert (settings.hold_s, settings.floor, settings.gain) == (3.0, 2, config.monitor.gain)


def test_the_engines_cost_is_its_timing_and_everybodys_prediction(tmp_path):
    table = tmp_path / "some.toml"
    table.write_text("prefill = [[1, 0.01], [512, 0.2]]\ndecode = [[1, 0.01], [32, 0.03]]\n")
    config = load(EMULATED, [f"engine.cost={table}"])
    assert build.table(config).prompt_s(512, 0, 512) == pytest.approx(0.2)
    slow = load(EMULATED, [f"engine.cost={table}", "emulated.time_scale=3"])
    assert build.table(slow).prompt_s(512, 0, 512) == pytest.approx(0.6)
    waited = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return False

    engine = build.engine(config, wait)
    engine.add(EngineRequest("a", "prefill", tuple(range(100)), 100, Sampling()))
    engine.step()
    assert 0.01 < sum(waited) < 0.2


@pytest.mark.parametrize(
    ("settings", "compares"),
    [
        (["engine.cost=v100-opt13b.toml"], True),
        (["engine.cost=v100-opt13b.toml", "emulated.time_scale=0.5"], True),
        (["engine.cost=v100-opt13b.toml", "emulated.time_scale=0"], False),  # steps take no time
        ([], False),
        (["engine.cost="], False),
    ],
)
def test_steps_are_compared_with_a_table_if_they_take_its_time(settings, compares):
    assert identity_of(load(EMULATED, settings)).compares_steps is compares


def identity_of(config, measured=None):
    engine: Any = build.engine(load(EMULATED))
    kv: Any = SimpleNamespace(reach=Reach(paths=["shm"], host="h", process=0, segment="s"), slots=9)
    return build.identity(config, "d0", 1, engine, kv, measured)


def test_a_worker_predicts_with_the_table_that_is_named_else_with_the_measured_one():
    measured = Cost(((1.0, 7.0),), ((1.0, 7.0),))
    assert identity_of(load(EMULATED, ["engine.cost=v100-opt13b.toml"]), measured).cost.source != measured.source
    found = identity_of(load(SPLIT), measured)
    assert found.cost == measured and found.compares_steps


def test_without_a_table_longer_prompts_and_larger_batches_still_count_as_more():
    predicted = identity_of(load(EMULATED)).cost
    assert predicted != Cost()
    assert predicted.prompt_s(100, 0, 512) < predicted.prompt_s(600, 0, 512) < predicted.prompt_s(2000, 0, 512)
    assert predicted.decode_s(1, 0) < predicted.decode_s(9, 0)


def test_a_monitor_is_made_from_the_configuration():
    start = start_of(load(EMULATED, ["monitor.flip=idle", "monitor.load_ms=250", "monitor.stale_s=2"]))
    assert (start.flip, start.load_s, start.stale_s, start.gone_s) == ("idle", 0.25, 2.0, 20.0)
    assert start.core().load_s == 0.25


OPT13B = ["engine.cost=v100-opt13b.toml", "emulated.token_bytes=64"]  # 819,200 bytes of KV a token


@pytest.mark.parametrize(
    ("overrides", "gbs", "latency_s"),
    [
        (["transfer.emulate=roce-200g", *OPT13B], 25 * 64 / 819200, 0),
        (["transfer.emulate=nvlink", *OPT13B], 300 * 64 / 819200, 0),
        (["transfer.emulate=nvlink", *OPT13B, "emulated.token_bytes=128"], 300 * 128 / 819200, 0),
        (["transfer.emulate=nvlink", *OPT13B, "emulated.time_scale=3"], 100 * 64 / 819200, 0),
        (["transfer.emulate=nvlink", "transfer.emulate_gbs=2", *OPT13B], 2 * 64 / 819200, 0),
        (["transfer.emulate_gbs=2", "transfer.emulate_token_bytes=6400"], 2 * 64 / 6400, 0),
        (["transfer.emulate_gbs=2", "transfer.emulate_token_bytes=6400", *OPT13B], 2 * 64 / 6400, 0),
        (["transfer.emulate=nvlink", "transfer.emulate_latency_us=50", *OPT13B], 300 * 64 / 819200, 5e-5),
        (["transfer.emulate=roce-200g", "engine.kind=vllm"], 25, 0),
    ],
)
def test_an_emulated_link_takes_as_long_as_the_real_models_kv_would(overrides, gbs, latency_s):
    link = build.link(load(EMULATED, overrides))
    assert link.bytes_s == pytest.approx(gbs * 1e9) and link.latency_s == pytest.approx(latency_s)


def test_no_link_is_emulated_unless_one_is_named():
    assert build.link(load(EMULATED)) is None and build.link(load(EMULATED, OPT13B)) is None


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["transfer.emulate=nvlink"], "cost table with kv_token_bytes"),
        (["transfer.emulate=nvlink", *OPT13B, "emulated.time_scale=0"], "time_scale = 0"),
        (["transfer.emulate_latency_us=5"], "name it by transfer.emulate or emulate_gbs"),
        (["transfer.emulate_gbs=5", "transfer.emulate_token_bytes=5", "engine.kind=vllm"], "has its own KV"),
    ],
)
def test_a_link_that_cannot_be_emulated_is_one_line(overrides, why):
    with pytest.raises(ConfigError, match=why) as caught:
        build.link(load(EMULATED, overrides))
    assert "\n" not in str(caught.value)


def test_a_run_of_several_passes_ends_when_something_is_due_in_the_store():
    """Nobody wakes a worker for KV that has come over an emulated link."""
    config = load(EMULATED, [*OPT13B, "transfer.emulate_gbs=1", "cluster.name=t-due"])
    waited = []

    def wait(seconds):
        waited.append(seconds)
        return False

    with ExitStack() as leaving:
        engine, store = build.engine_and_store(config, "d0", wait, lambda: None, leaving)
        other = build.store(config, "p0", store.block_bytes, lambda: None)
        leaving.callback(other.close)
        store.meet("p0", other.reach)
        engine.add(EngineRequest("a", "decode", (5, 6, 7), 3, Sampling(max_tokens=200, ignore_eos=True)))
        assert engine.step().allocated == ("a",)
        engine.adopt("a", 0, [bytes(store.block_bytes)])
        engine.admit("a", 1)
        assert engine.step(8).steps == 8, "with nothing on its way a run is as long as it is asked to be"
        handle, digest = other.put(1, lambda blocks: None)
        assert store.fetch(Wanted(("a", 0), "p0", "shm", handle, digest)) is None
        while time.monotonic() < store.due():
            time.sleep(0.001)
        assert engine.step(8).steps == 1
        assert [taken.problem for taken in store.fetched()] == [None]
        assert engine.step(8).steps == 8
        other.free(handle)


def test_an_emulated_engine_computes_no_valid_number_after_the_token_that_says_so():
    engine = build.engine(load(EMULATED, ["emulated.nan_token=7"]))
    for key, prompt in {"a": (5, 6, 7), "b": (5, 6, 8)}.items():
        engine.add(EngineRequest(key, "prefill", prompt, 3, Sampling()))
    assert [(sampled.key, sampled.reason) for sampled in engine.step().tokens] == [("a", "error"), ("b", None)]


@pytest.mark.parametrize(("value", "count"), [("true", 2), ("false", 1)])
def test_the_tokens_of_a_salted_engine_depend_on_its_instance(value, count):
    tokens = {}
    for iid in ("d0", "d1"):
        engine = build.engine(load(EMULATED, [f"emulated.salt={value}"]), iid=iid)
        engine.add(EngineRequest("a", "prefill", (5, 6, 7), 3, Sampling()))
        (sampled,) = engine.step().tokens
        tokens[iid] = sampled.token
        found = writers((5, 6, 7), [sampled.token], Sampling(), 32000, 64, {iid: salt_of(iid)})
        assert found == [{iid} if value == "true" else set()]
    assert len({*tokens.values()}) == count


def test_an_emulated_engine_ends_its_process_when_it_computes_the_token_that_says_so():
    program = (
        "from tetri.config import load; from tetri.proc import build\n"
        "from tetri.engine.base import EngineRequest; from tetri.request import Sampling\n"
        f"engine = build.engine(load({str(EMULATED)!r}, ['emulated.deadly_token=7']))\n"
        "for key, prompt in {'a': (5, 6, 8), 'b': (5, 7, 8)}.items():\n"
        "    engine.add(EngineRequest(key, 'prefill', prompt, 3, Sampling()))\n"
        "    engine.step()\n"
        "    print('lives', flush=True)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("lives\n", -signal.SIGKILL), ended.stderr


@pytest.mark.parametrize(("value", "count"), [("true", 1), ("false", 7)])
def test_special_tokens_in_prompts_are_a_setting(value, count):
    config = load(DEFAULT, [f"model.special_tokens_in_prompt={value}"])
    assert len(build.tokenizer(config).encode("<|im_end|>")) == count


def test_a_process_without_standard_streams_opens_no_socket_in_their_place(monkeypatch):
    seen = []

    @click.command()
    @build.configured("program")
    def command(config):
        seen.append(sys.stdin.read())

    monkeypatch.setattr(sys, "stdin", None)
    command.main(["--conf", str(EMULATED)], standalone_mode=False)
    sys.stdin.close()
    assert seen == [""]
