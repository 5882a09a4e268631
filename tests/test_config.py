import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.config import (
    Config,
    ConfigError,
    MonitorConfig,
    PolicyConfig,
    WorkerConfig,
    cpu_numbers,
    default_path,
    dump,
    load,
)
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings

CONF = Path(__file__).parent.parent / "conf"
PAIR = '[[worker]]\niid="p0"\nrole="prefill"\n[[worker]]\niid="d0"\nrole="decode"\n'


@pytest.fixture
def write(tmp_path):
    def write_config(text: str) -> Path:
        path = tmp_path / "t.toml"
        path.write_text(text)
        return path

    return write_config


def test_the_shipped_files_load():
    default, emulated = load(CONF / "default.toml"), load(CONF / "emulated.toml")
    assert [(w.iid, w.role, w.cpus) for w in default.workers] == [
        ("p0", "prefill", "0"),
        ("d0", "decode", "1"),
    ]
    assert default.model.name == "smollm2-135m" and default.engine.kind == "vllm"
    assert [w.iid for w in emulated.workers] == ["p0", "p1", "d0", "d1"]
    assert emulated.engine.kind == "emulated" and emulated.engine.block_tokens == 16


def test_addresses_follow_the_run_directory(write, tmp_path):
    config = load(write(PAIR), [f"cluster.run_dir={tmp_path}"])
    assert config.clients_address == f"ipc://{tmp_path}/clients"
    assert config.events_address == f"ipc://{tmp_path}/events"
    assert config.loads_address == f"ipc://{tmp_path}/loads"
    assert config.views_address == f"ipc://{tmp_path}/views"
    assert config.inbox_address("p0") == f"ipc://{tmp_path}/inbox-p0"
    assert load(write(PAIR), ["broker.clients=tcp://127.0.0.1:5555"]).clients_address == "tcp://127.0.0.1:5555"


def test_the_default_run_directory(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Config().run_dir == Path("/run/user/7/tetri")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(Config().run_dir).startswith("/tmp/tetri-")


def test_the_environment_names_the_file(monkeypatch):
    monkeypatch.setenv("TETRI_CONF", "/somewhere/x.toml")
    assert default_path() == Path("/somewhere/x.toml")
    monkeypatch.delenv("TETRI_CONF")
    assert default_path() == CONF / "default.toml"


BAD = [
    ("[engin]\n", "engin: unknown section; allowed: cluster, broker"),
    ("[engine]\nchunk=1\n", "engine.chunk: unknown key; allowed: kind, chunk_tokens"),
    ("[engine]\nchunk_tokens='x'\n", "engine.chunk_tokens: must be a whole number from 1"),
    ("[engine]\nchunk_tokens=1.5\n", "engine.chunk_tokens: must be a whole number"),
    ("[engine]\nchunk_tokens=true\n", "engine.chunk_tokens: must be a whole number"),
    ("[engine]\nchunk_tokens=0\n", "got 0"),
    ("[engine]\nkind='gpu'\n", "must be one of: vllm, emulated"),
    ("[cluster]\nheartbeat_s=nan\n", "cluster.heartbeat_s: must be a number"),
    ("[cluster]\nheartbeat_s=inf\n", "cluster.heartbeat_s: must be a number"),
    ("[cluster]\nname='Too Big'\n", "1 to 20 of a-z"),
    ("[cluster]\ndead_s=0.3\n", "at least three times heartbeat_s"),
    ("[transfer]\nslab_blocks=4\n", "slab_blocks: must be at least 5"),
    ("[transfer]\ndigest=1\n", "must be true or false"),
    ("[transfer]\naddress='tcp://10.0.0.1'\n", 'transfer.address: must be "tcp://IPv4-ADDRESS:PORT"'),
    ("[transfer]\naddress='tcp://10.0.0.1:0'\n", "transfer.address: must be"),
    ("[transfer]\naddress='tcp://10.0.0.256:1'\n", "transfer.address: must be"),
    ("[transfer]\naddress='tcp://example.org:1'\n", "transfer.address: must be"),
    ("[transfer]\naddress='tcp://10.0.0.1:*'\n", "10.0.0.1 is not this machine's loopback, and"),
    (
        "[cluster]\nkey='/k'\n[transfer]\naddress='tcp://0.0.0.0:1'\n",
        "other hosts cannot connect to 0.0.0.0; set transfer.ann",
    ),
    ("[transfer]\naddress='tcp://127.0.0.1:*'\nannounce='tcp://127.0.0.1:*'\n", "transfer.announce: must be"),
    ("[transfer]\nannounce='tcp://127.0.0.1:1'\n", "transfer.address, which is not set"),
    ("[transfer]\ntransport='stream'\nslab_blocks=9000\n[engine]\nblock_tokens=1\nchunk_tokens=9000\n", "most 8192"),
    ("[cluster]\nkey='k'\n", "cluster.key: must be an absolute path"),
    ("[transfer]\nemulate='fast'\n", 'transfer.emulate: must be one of: "", roce-200g, nvlink, got'),
    ("[transfer]\nfaults='dorp=0.1'\n", "transfer.faults: 'dorp=0.1' is no fault: use drop, duplicate"),
    ("[transfer]\nfaults='drop=2'\n", "transfer.faults: drop must be from 0 to 1, got 2"),
    ("[model]\nname=3\n", "model.name: must be a text"),
    ("[model]\ndtype=1979-05-27\n", "model.dtype: must be a text"),
    ("[policy]\norder='best'\n", "policy.order: must be one of: fcfs"),
    ("[broker]\nclients='tcp://10.0.0.1:5555'\n", "CURVE"),
    ("[broker]\nclients='tcp://*:5555'\n", "CURVE"),
    ("[broker]\nclients='tcp://127.0.0.1:0'\n", "broker.clients: must be"),
    ("[broker]\nclients='udp://127.0.0.1:1'\n", "broker.clients: must be"),
    ("[broker]\ncpus='zero'\n", "CPU numbers"),
    ("[broker]\ncpus='3-1'\n", "names no CPU"),
    ("[engine]\ncost='no-such'\n", "engine.cost: there is no file"),
    ("[emulated]\ncost='x'\n", "emulated.cost: unknown key"),
    ("[engine]\nmax_batch=512\n", "engine.max_batch: must be below chunk_tokens (512)"),
    ("[engine]\nkind='emulated'\nblock_tokens=16\n[emulated]\nblocks=400\n", "emulated.blocks: must be at least 512"),
    ("[engine]\nstream_interval=0\n", "engine.stream_interval: must be a whole number from 1"),
    ("[monitor]\nflip='best'\n", "monitor.flip: must be one of: none, idle, below, balance"),
    ("[monitor]\nload_ms=0\n", "monitor.load_ms: must be a whole number from 1"),
    ("[monitor]\nload_ms=800\n", "monitor.stale_s: must be at least two times load_ms (800 ms)"),
    ("[monitor]\ngone_s=0.5\n", "monitor.gone_s: must be at least stale_s (1 s)"),
    ("[monitor]\nfloor=0\n", "monitor.floor: must be a whole number from 1"),
    ("[monitor]\ngain=0.5\n", "monitor.gain: must be a number from 1"),
    ("[monitor]\ncpus='3-1'\n", "monitor.cpus: '3-1' names no CPU"),
    ("[policy]\nlength='guess'\n", "policy.length: must be one of: none"),
    ("[policy]\nlength_accuracy=1.5\n", "policy.length_accuracy: must be a number from 0 to 1"),
    ("[policy]\nlength_cover=1\n", "policy.length_cover: must be a number from 0 to 0.999"),
    ("[predictor]\nkind='best'\n", "predictor.kind: must be one of: auto, classifier, hidden, both, prior"),
    ("[predictor]\nmode='late'\n", "predictor.mode: must be one of: parallel, sequential"),
    ('[predictor]\nfolder="a\\u0000b"\n', "predictor.folder: must be a folder"),
    ("[predictor]\nkind='prior'\nfolder='x'\n", 'predictor.folder: "prior" needs no predictor; leave the folder out'),
    ("[predictor]\nkind='both'\n[engine]\nkind='emulated'\n", '"both" reads the hidden states of a model, and an em'),
    ("[predictor]\nkind='hidden'\n[engine]\nkind='emulated'\n", '"hidden" reads the hidden states of a model'),
    ("[policy]\nadmit_end='top'\n", "policy.admit_end: must be one of: low, middle, high"),
    ("engine=3\n", "engine: must be a table"),
    ("[engine\n", "not a TOML file"),
    (f"[cluster]\nrun_dir='/tmp/{'x' * 90}'\n", "under 100 bytes"),
    ("[[worker]]\niid='p0'\nrole='prefill'\n", "is used 2 times"),
    ("[[worker]]\niid='P'\nrole='prefill'\n", "worker 1.iid: must be 1 to 16"),
    ("[[worker]]\niid='p1'\nrole='both'\n", "worker 1.role: must be one of: prefill, decode, mixed"),
    ("[[worker]]\nrole='prefill'\n", "worker 1: iid is missing"),
    ("[[worker]]\niid='broker'\nrole='prefill'\n", "not broker, monitor or supervisord"),
    ("[[worker]]\niid='monitor'\nrole='prefill'\n", "not broker, monitor or supervisord"),
    ("[[worker]]\niid='supervisord'\nrole='prefill'\n", "not broker, monitor or supervisord"),
    ("[broker]\nclients='tcp://[::1]:5555'\n", "not this machine's IPv4 loopback"),
    ('[cluster]\nrun_dir="a\\u0000b"\n', "cluster.run_dir: must be a folder"),
    (f"[cluster]\nheartbeat_s={'9' * 400}\n", "cluster.heartbeat_s: must be a number"),
    (f"[engine]\nkv_mib={'9' * 400}\n", "engine.kv_mib: must be a whole number"),
    (f"[engine]\nkv_mib={'9' * 5000}\n", "not a TOML file"),
    (f"[engine]\nkv_mib={'[' * 5000}{']' * 5000}\n", "not a TOML file"),
    (f"[engine]\nkv_mib={'[' * 300}{']' * 300}\n", "engine.kv_mib: must be a whole number"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_bad_values_are_one_line_that_says_what_is_allowed(write, text, says):
    path = write(text + PAIR)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert says in message and "\n" not in message and message.startswith(str(path))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_both_roles_are_needed(write, role):
    with pytest.raises(ConfigError, match="at least one"):
        load(write(f'[[worker]]\niid="a"\nrole="{role}"\n'))


def test_a_mixed_worker_is_enough(write):
    config = load(write('[[worker]]\niid="m0"\nrole="mixed"\n'))
    assert [worker.role for worker in config.workers] == ["mixed"]


def test_the_policies_settings_are_those_of_the_rules():
    assert dataclasses.asdict(PolicyConfig()) == dataclasses.asdict(Rules())
    shared = {f.name: getattr(MonitorConfig(), f.name) for f in dataclasses.fields(FlipSettings)}
    assert FlipSettings(**shared) == FlipSettings()


def test_the_predictors_folder_is_whole(write, monkeypatch, tmp_path):
    """The programs run elsewhere than where it was named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert load(write(PAIR)).predictor.folder == ""
    assert load(write(PAIR), ["predictor.folder=mine"]).predictor.folder == str(tmp_path / "mine")
    assert load(write(PAIR), ["predictor.folder=~/p"]).predictor.folder == "/home/me/p"
    assert load(write(PAIR), ["predictor.folder=~nosuchuser/p"]).predictor.folder == str(tmp_path / "~nosuchuser/p")


def test_a_single_worker_table_is_refused(write):
    with pytest.raises(ConfigError, match=r"\[\[worker\]\]"):
        load(write('[worker]\niid="a"\nrole="decode"\n'))


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_an_unreadable_file(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / name)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load(tmp_path / "b.toml")


def test_overrides_take_toml_or_bare_words(write):
    sets = [
        "engine.kind=emulated",
        "cluster.heartbeat_s = 1",
        'cluster.name="x"',
        "worker.p0.cpus=0",
        "transfer.digest=false",
    ]
    config = load(write(PAIR), sets)
    assert config.engine.kind == "emulated" and config.cluster.name == "x" and not config.transfer.digest
    assert config.cluster.heartbeat_s == 1.0 and isinstance(config.cluster.heartbeat_s, float)
    assert config.worker("p0") == WorkerConfig("p0", "prefill", cpus="0")


def test_an_override_can_replace_the_workers(write):
    config = load(write(PAIR), ['worker=[{iid="a",role="prefill"},{iid="b",role="decode"}]'])
    assert [w.iid for w in config.workers] == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.kind", "section.key=value"),
        ("=3", "section.key=value"),
        ("nope.kind=3", "unknown key; sections"),
        ("kind=3", "unknown key; sections"),
        ("engine.kin=3", "engine.kin: unknown key"),
        ("engine.chunk_tokens=many", "whole number"),
        ("worker.zz.cpus=0", "no \\[\\[worker\\]\\] with iid"),
        ("worker=3", "list of tables"),
        (f"engine.kv_mib={'[' * 5000}{']' * 5000}", "whole number"),
        (f"engine.kv_mib={'9' * 5000}", "whole number"),
    ],
)
def test_bad_overrides(write, override, says):
    with pytest.raises(ConfigError, match=says):
        load(write(PAIR), [override])


def test_an_unknown_worker_lists_the_known(write):
    with pytest.raises(ConfigError, match="known: p0, d0"):
        load(write(PAIR)).worker("zz")


def test_cost_files_lie_beside_the_configuration(write, tmp_path):
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost" / "h100.toml").write_text("")
    config = load(write("[engine]\ncost='h100.toml'\n" + PAIR))
    assert config.engine.cost == str(tmp_path / "cost" / "h100.toml")


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("0", {0}), ("0-2", {0, 1, 2}), ("0,2-3", {0, 2, 3})])
def test_cpu_numbers(text, cpus):
    assert cpu_numbers(text) == cpus


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
