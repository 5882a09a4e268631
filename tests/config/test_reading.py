import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.pair import PAIR, bad
from tetri.config import ConfigError, WorkerConfig, default_path, dump, load

CONF = Path(__file__).parent.parent.parent / "conf"


def test_the_shipped_files_load_and_the_environment_may_name_another(monkeypatch):
    default, split, emulated = (load(CONF / f"{name}.toml") for name in ("default", "split", "emulated"))
    assert [(w.iid, w.role, w.cpus) for w in default.workers] == [("w0", "auto", "+0"), ("w1", "auto", "+1")]
    assert [(w.iid, w.role, w.cpus) for w in split.workers] == [("p0", "prefill", "+0"), ("d0", "decode", "+1")]
    assert default.model.name == "smollm2-135m" and default.engine.kind == "vllm"
    assert (split.model, split.engine, split.policy) == (default.model, default.engine, default.policy)
    assert [w.iid for w in emulated.workers] == ["p0", "p1", "d0", "d1"]
    assert emulated.engine.kind == "emulated" and emulated.engine.block_tokens == 16
    monkeypatch.setenv("TETRI_CONF", "/somewhere/x.toml")
    assert default_path() == Path("/somewhere/x.toml")
    monkeypatch.delenv("TETRI_CONF")
    assert default_path() == CONF / "default.toml"


BAD = [
    ("[engin]\n", "engin: unknown section; allowed: cluster, broker"),
    ("[engine]\nchunk=1\n", "engine.chunk: unknown key; allowed: kind, chunk_tokens"),
    *((f"[engine]\nchunk_tokens={x}\n", "tokens: must be a whole number from 1") for x in ("'x'", "1.5", "true", "0")),
    ("[engine]\nkind='gpu'\n", "must be one of: vllm, emulated"),
    ("[cluster]\nbeat_s=0.2\n", "cluster.beat_s: is called heartbeat_s now: rename it"),
    ("[transfer]\nroom_mib=64\n", "transfer.room_mib: is called buffer_mib now: rename it"),
    *((f"[cluster]\nheartbeat_s={x}\n", "heartbeat_s: must be a number") for x in ("nan", "inf", "9" * 400)),
    ("[cluster]\nname='Too Big'\n", "1 to 20 of a-z"),
    ("[transfer]\ndigest=1\n", "must be true or false"),
    ("[cluster]\nkey='k'\n", "cluster.key: must be an absolute path"),
    ("[transfer]\nemulate='fast'\n", 'transfer.emulate: must be one of: "", roce-200g, nvlink, got'),
    ("[transfer]\nfaults='dorp=0.1'\n", "transfer.faults: 'dorp=0.1' is no fault: use drop, duplicate"),
    ("[transfer]\nfaults='drop=2'\n", "transfer.faults: drop must be from 0 to 1, got 2"),
    ("[model]\nname=3\n", "model.name: must be a text"),
    ("[model]\ndtype=1979-05-27\n", "model.dtype: must be a text"),
    ("[policy]\norder='best'\n", "policy.order: must be one of: adaptive, fcfs"),
    ("[broker]\nclients='tcp://127.0.0.1:0'\n", "broker.clients: must be"),
    ("[broker]\nclients='udp://127.0.0.1:1'\n", "broker.clients: must be"),
    ("[broker]\ncpus='zero'\n", "CPU numbers"),
    ("[broker]\ncpus='3-1'\n", "names no CPU"),
    ("[engine]\ncost='no-such'\n", "engine.cost: there is no file"),
    ("[emulated]\ncost='x'\n", "emulated.cost: unknown key"),
    ("[engine]\nstream_interval=0\n", "engine.stream_interval: must be a whole number from 1"),
    ("[monitor]\nflip='best'\n", "monitor.flip: must be one of: none, idle, below, balance"),
    ("[monitor]\nload_ms=0\n", "monitor.load_ms: must be a whole number from 1"),
    ("[monitor]\nfloor=0\n", "monitor.floor: must be a whole number from 1"),
    ("[monitor]\ngain=0.5\n", "monitor.gain: must be a number from 1"),
    ("[monitor]\ncpus='3-1'\n", "monitor.cpus: '3-1' names no CPU"),
    ("[policy]\nlength='guess'\n", "policy.length: must be one of: none"),
    ("[policy]\nlength_accuracy=1.5\n", "policy.length_accuracy: must be a number from 0 to 1"),
    ("[policy]\nlength_cover=1\n", "policy.length_cover: must be a number from 0 to 0.999"),
    ("[predictor]\nkind='best'\n", "predictor.kind: must be one of: auto, classifier, hidden, both, prior"),
    ("[predictor]\nmode='late'\n", "predictor.mode: must be one of: parallel, sequential"),
    ('[predictor]\nfolder="a\\u0000b"\n', "predictor.folder: must be a folder"),
    ("[policy]\nadmit_end='top'\n", "policy.admit_end: must be one of: low, middle, high"),
    ("engine=3\n", "engine: must be a table"),
    ("[[worker]]\niid='P'\nrole='prefill'\n", "worker 1.iid: must be 1 to 16"),
    ("[[worker]]\niid='p1'\nrole='both'\n", "worker 1.role: must be one of: prefill, decode, mixed"),
    ("[[worker]]\nrole='prefill'\n", "worker 1: iid is missing"),
    ('[cluster]\nrun_dir="a\\u0000b"\n', "cluster.run_dir: must be a folder"),
    *((f"[engine]\nkv_mib={x}\n", "kv_mib: must be a whole number") for x in ("9" * 400, "[" * 300 + "]" * 300)),
    *((text, "not a TOML file") for text in ("[engine\n", f"x={'9' * 5000}\n", f"x={'[' * 5000}{']' * 5000}\n")),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_bad_values_are_one_line_that_says_what_is_allowed(tmp_path, text, says):
    assert says in bad(tmp_path / "t.toml", text + PAIR)


def test_the_predictors_folder_is_whole_and_cost_files_lie_beside_the_configuration(write, monkeypatch, tmp_path):
    """The programs run elsewhere than where it was named."""
    monkeypatch.chdir(tmp_path)
    assert load(write(PAIR)).predictor.folder == ""
    assert load(write(PAIR), ["predictor.folder=mine"]).predictor.folder == str(tmp_path / "mine")
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost" / "h100.toml").write_text("")
    config = load(write("[engine]\ncost='h100.toml'\n" + PAIR))
    assert config.engine.cost == str(tmp_path / "cost" / "h100.toml")


def test_an_unreadable_file(tmp_path, write):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for name, says in (("missing.toml", "cannot be read"), (".", "cannot be read"), ("b.toml", "not a TOML file")):
        with pytest.raises(ConfigError, match=says):
            load(tmp_path / name)
    with pytest.raises(ConfigError, match=r"\[\[worker\]\]"):
        load(write('[worker]\niid="a"\nrole="decode"\n'))


def test_overrides_take_toml_or_bare_words_and_can_replace_the_workers(write):
    sets = ["engine.kind=emulated", "cluster.heartbeat_s = 1", 'cluster.name="x"', "transfer.digest=false"]
    config = load(write(PAIR), [*sets, "worker.p0.cpus=0", "broker.cpus=+1"])
    assert config.engine.kind == "emulated" and config.cluster.name == "x" and not config.transfer.digest
    assert config.cluster.heartbeat_s == 1.0 and isinstance(config.cluster.heartbeat_s, float)
    assert config.worker("p0") == WorkerConfig("p0", "prefill", cpus="0") and config.broker.cpus == "+1"

    config = load(write(PAIR), ['worker=[{iid="a",role="prefill"},{iid="b",role="decode"}]'])
    assert [w.iid for w in config.workers] == ["a", "b"]


BAD_OVERRIDES = {
    "section.key=value": ["engine.kind", "=3"],
    "unknown key; sections": ["nope.kind=3", "kind=3"],
    "engine.kin: unknown key": ["engine.kin=3"],
    "whole number": [
        "engine.chunk_tokens=many",
        *(f"engine.kv_mib={x}" for x in ("[" * 5000 + "]" * 5000, "9" * 5000)),
    ],
    "no \\[\\[worker\\]\\] with iid": ["worker.zz.cpus=0"],
    "list of tables": ["worker=3"],
}


def test_bad_overrides(write):
    for says, overrides in BAD_OVERRIDES.items():
        for override in overrides:
            with pytest.raises(ConfigError, match=says):
                load(write(PAIR), [override])


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)


@settings(deadline=None)
@given(model=texts, heartbeat=st.floats(0.01, 6), digest=st.booleans())
def test_what_dump_writes_load_reads(tmp_path_factory, model, heartbeat, digest):
    tmp = tmp_path_factory.mktemp("c")
    (tmp / "a.toml").write_text(PAIR)
    config = load(tmp / "a.toml", ["cluster.run_dir=/tmp/r"])
    model_section = dataclasses.replace(config.model, name=model)
    cluster = dataclasses.replace(config.cluster, heartbeat_s=heartbeat)
    transfer = dataclasses.replace(config.transfer, digest=digest)
    config = dataclasses.replace(config, model=model_section, cluster=cluster, transfer=transfer)
    (tmp / "b.toml").write_text(dump(config), encoding="utf-8")
    assert load(tmp / "b.toml") == config


def test_a_tilde_is_the_home_folder_in_every_path(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(PAIR).rename(tmp_path / "of mine.toml")
    (tmp_path / "cost.toml").write_text("")
    paths = {"cluster.run_dir": "run", "cluster.key": "key", "predictor.folder": "p", "engine.cost": "cost.toml"}
    settings = [f"{key}=~/{name}" for key, name in paths.items()]
    config = load("~/of mine.toml", [*settings, "broker.clients=ipc://~/clients"])
    cluster = config.cluster
    found = [str(config.run_dir), cluster.key, config.predictor.folder, config.engine.cost]
    assert found == [f"{tmp_path}/{name}" for name in paths.values()]
    assert config.clients_address == f"ipc://{tmp_path}/clients"
    with pytest.raises(ConfigError, match="cluster.run_dir: the home folder of ~no-such-user is not known"):
        load("~/of mine.toml", ["cluster.run_dir=~no-such-user/run"])
