"""The commands against a fake broker: what goes to stdout, what to stderr, and the exit status."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from fake_broker import STATUS, FakeBroker, accepted, answer, delta, done, endless

from tetri import cli, models
from tetri.proc import launch

FAKE_DIR = "tetri"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty run directory, which the environment names."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    (tmp_path / FAKE_DIR).mkdir()
    return tmp_path / FAKE_DIR


@pytest.fixture
def broker(place):
    """Start a fake broker with a script, as what is up in the run directory."""
    started = []

    def start(reply=answer):
        fake = FakeBroker(reply).__enter__()
        started.append(fake)
        (place / "cluster.json").write_text(json.dumps({"clients": fake.address}))
        return fake

    yield start
    for fake in started:
        fake.__exit__()


@pytest.fixture
def run(capfd, monkeypatch):
    """Run tetri-cli in this process: (exit status, stdout, stderr)."""

    def run_cli(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return run_cli


def test_the_answer_alone_goes_to_stdout(run, broker):
    fake = broker()
    assert run("submit", "hi") == (0, "one two three\n", "")
    assert run("submit", "hi", "--no-stream") == (0, "one two three\n", "")
    assert fake.seen[0]["sampling"] == {"max_tokens": 128} and fake.seen[0]["prompt"] == "hi"


def test_options_reach_the_broker(run, broker):
    fake = broker()
    options = "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 7 --stop a --stop b"
    run("submit", "hi", "--chat", "--deadline", "5", *options.split())
    assert fake.seen[0]["messages"] == [{"role": "user", "content": "hi"}] and fake.seen[0]["deadline_s"] == 5.0
    assert fake.seen[0]["sampling"] == {
        **{"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": 7},
        "stop": ["a", "b"],
    }


def test_json_is_one_object(run, broker):
    broker()
    status, out, err = run("submit", "hi", "--json")
    found = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    wanted = ["rid", "text", "token_ids", "finish_reason", "usage", "timeline", "ttft_s", "jct_s", "receipt"]
    assert list(found) == wanted
    assert found["text"] == "one two three" and found["receipt"]["prefill_instance"] is None


def test_a_dash_reads_standard_input(run, broker):
    fake = broker()
    run("submit", "-", stdin="two\nlines é\n".encode())
    assert fake.seen[0]["prompt"] == "two\nlines é"
    status, _, err = run("submit", "-", stdin=b"ab\xff")
    assert status == 2 and "standard input is not UTF-8 (byte 2)" in err


def refuse(message):
    key = message.get("key") or message.get("rid")
    return [{"type": "refused", "key": key, "reason": "the prompt is empty", "retry_after_s": None}]


def fail(message):
    return [accepted(message), done(reason="error", tokens=0, error="d0 was lost")]


def late(message):
    return [accepted(message), delta(0), done(reason="deadline", tokens=1)]


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [(refuse, 1, "the prompt is empty"), (fail, 1, "d0 was lost"), (late, 1, "the deadline passed")],
)
def test_a_request_that_fails(run, broker, reply, status, says):
    broker(reply)
    found, _, err = run("submit", "hi")
    assert (found, err) == (status, f"tetri-cli: {says}\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["submit"], "Missing argument"),
        (["flip", "d0"], "Missing argument 'ROLE'. Choose from: prefill, decode, mixed"),
        (["submit", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["submit", "x", "--max-tokens", "many"], "not a valid integer"),
        (["submit", "x", "--json", "--stream"], "exclude each other"),
        (["submit", "x", "--conf", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["submit", "x", "--max-tokens", "9" * 400], "max_tokens must be from 1"),
        (["nonsense"], "No such command"),
        (["up", "--conf", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["up", "--set", "engine.kin=3"], "engine.kin: unknown key"),
        (["up", "--set", "model.name=/nowhere"], "unknown model '/nowhere'"),
        (["model", "fetch", "nothing"], "unknown model 'nothing'"),
    ],
)
def test_wrong_arguments_are_one_line(run, broker, arguments, says):
    broker()
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1 and err.startswith("tetri-cli: ")


def test_nothing_up(run, place):
    for command in (["submit", "x"], ["status"], ["chat"]):
        status, out, err = run(*command)
        assert (status, out) == (3, "") and "run tetri-cli up" in err and err.count("\n") == 1
    assert run("down") == (0, "", f"nothing is up in {place}\n")


def test_a_run_directory_can_be_named_as_for_up(run, broker, place, monkeypatch):
    broker()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    assert run("submit", "hi", "--set", f"cluster.run_dir={place}") == (0, "one two three\n", "")
    assert run("chat", "--set", f"cluster.run_dir={place}", stdin=b"hi") == (0, "one two three\n", "")
    (place / "cluster.json").unlink()
    assert run("down", "--set", f"cluster.run_dir={place}")[2] == f"nothing is up in {place}\n"
    assert f"nothing is up in {place}" in run("status", "--set", f"cluster.run_dir={place}")[2]


def test_a_broker_that_does_not_answer(run, broker):
    broker(lambda message: [])
    status, _, err = run("submit", "x", "--timeout", "0.2")
    assert status == 3 and "no answer from the broker for 0.2 s" in err
    assert run("status", "--timeout", "0.2")[0] == 3


INSTANCE = {"iid": "p0", "role": "prefill", "state": "ready", "incarnation": 1, "blocks": 9, "free_blocks": 8}
INSTANCE |= {"queued": 1, "running": 2, "held": 3, "note": ""}


def test_status(run, broker):
    broker(lambda message: [{**STATUS, "instances": [INSTANCE]}])
    status, out, _ = run("status", "--json")
    assert status == 0 and json.loads(out)["instances"] == [INSTANCE]
    _, out, _ = run("status")
    assert "requests  decode 1" in out and "counted   none" in out
    header, row = out.splitlines()[-2:]
    assert re.split(r"\s{2,}", header.strip())[:5] == ["iid", "role", "state", "blocks", "free blocks"]
    assert row.split() == ["p0", "prefill", "ready", "9", "8", "1", "2", "3"]


def test_status_shows_kv_paths_and_what_happened_to_kv_where_anything_did(run, broker):
    quiet = {**INSTANCE, "paths": {"shm": 2, "stream": 1}, "counters": {"late": 0, "flipped": 0}}
    noted = {**quiet, "iid": "d0", "counters": {"late": 3, "flipped": 0, "healed": 12}}
    broker(lambda message: [{**STATUS, "instances": [quiet, noted]}])
    out = run("status")[1].splitlines()
    assert out[-4].endswith("  shm 2, stream 1")
    assert [re.split(r"\s{2,}", line) for line in out[-2:]] == [
        ["KV received by", "counted"],
        ["d0", "late 3, healed 12"],
    ]
    assert json.loads(run("status", "--json")[1])["instances"] == [quiet, noted]
    broker(lambda message: [{**STATUS, "instances": [quiet]}])
    assert "KV received by" not in run("status")[1]


def test_status_says_how_well_lengths_are_predicted(run, broker):
    none = {"kind": "prior", "on": False, "note": "no predictor: tetri brings none", "predicted": 0, "late": 0}
    none |= {"scored": 0, "right": 0, "prior_right": 0, "inside": 0, "cut": 0, "unread": 0}
    works = {**none, "kind": "hidden", "on": True, "note": "", "predicted": 120, "late": 3}
    works |= {"scored": 50, "right": 23, "prior_right": 20, "inside": 40}
    worse = {**works, "on": False, "note": "off: worse than the prior", "cut": 7, "unread": 2}
    found = {"p0": none, "p1": works, "m0": worse, "d0": works, "d1": none, "d2": None}
    roles = {"p": "prefill", "m": "mixed", "d": "decode"}
    shown = [{**INSTANCE, "iid": iid, "role": roles[iid[0]], "predictor": each} for iid, each in found.items()]
    broker(lambda message: [{**STATUS, "instances": shown}])
    rows = [re.split(r"\s{2,}", line) for line in run("status")[1].splitlines()[-5:]]
    shares = ["50", "46%", "40%", "80%"]
    assert rows == [
        ["lengths by", "kind", "state", "predicted", "late", "ended", "right", "of the prior", "below end", "note"],
        ["p0", "prior", "-", "0", "0", "0", "-", "-", "-", none["note"]],
        ["p1", "hidden", "on", "120", "3", *shares],
        ["m0", "hidden", "off", "120", "3", *shares, "off: worse than the prior; 7 prompts cut; 2 prompts unread"],
        ["d0", "hidden", "on", "120", "3", *shares],
    ]
    assert json.loads(run("status", "--json")[1])["instances"] == shown


@pytest.mark.parametrize(
    ("monitor", "line"),
    [
        ({"number": 1234, "age_s": 0.07, "flip": "balance"}, "view 1234, 0.1 s old, flip policy balance"),
        ({"number": 7, "age_s": 9.0, "flip": "none"}, "silent for 9.0 s: requests are placed without load reports"),
        (None, "silent since the broker's start: requests are placed without load reports"),
    ],
)
def test_status_says_whether_the_monitor_is_heard(run, broker, monitor, line):
    broker(lambda message: [{**STATUS, "monitor": monitor}])
    assert f"monitor   {line}" in run("status")[1]
    assert json.loads(run("status", "--json")[1])["monitor"] == monitor


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (["prefill", "decode", "decode"], "on 1 prefill and 2 decode workers"),
        (["mixed"], "on 1 mixed workers"),
        (["prefill", "decode", "mixed"], "on 1 prefill, 1 decode and 1 mixed workers"),
    ],
)
def test_up_counts_the_workers_by_role(run, monkeypatch, roles, says):
    monkeypatch.setattr(launch, "up", lambda config, say, wait_s: config.run_dir)
    workers = ",".join(f'{{iid="w{i}",role="{role}"}}' for i, role in enumerate(roles))
    assert says in run("up", "--set", f"worker=[{workers}]")[1]


def test_chat_keeps_the_history(run, broker):
    fake = broker()
    lines = b"first\n\nsecond\n/exit\nnever\n"
    assert run("chat", "--system", "be brief", stdin=lines) == (0, "one two three\n" * 2, "")
    roles = [(turn["role"], turn["content"]) for turn in fake.seen[-1]["messages"]]
    assert roles == [
        ("system", "be brief"),
        ("user", "first"),
        ("assistant", "one two three"),
        ("user", "second"),
    ]


def test_a_refused_turn_does_not_end_the_chat(run, broker):
    def reply(message):
        return refuse(message) if message["messages"][-1]["content"] == "bad" else answer(message)

    fake = broker(reply)
    status, out, err = run("chat", stdin=b"bad\ngood\n")
    assert (status, out, err) == (0, "one two three\n", "tetri-cli: the prompt is empty\n")
    assert [turn["content"] for turn in fake.seen[-1]["messages"]] == ["good"]
    assert run("chat", stdin=b"bad")[0] == 1


@pytest.mark.parametrize("system", [[], ["--system", "be brief"]])
def test_the_oldest_turns_leave_a_chat_that_outgrows_the_context(run, broker, system):
    def reply(message):
        text = "".join(turn["content"] for turn in message["messages"] if turn["role"] == "user")
        return answer(message) if len(text) <= 4 else full(message)

    def full(message):
        reason = "the prompt has 9 tokens, the model's context holds 4: shorten the prompt"
        return [{"type": "refused", "key": message["key"], "reason": reason, "retry_after_s": None}]

    fake = broker(reply)
    status, out, err = run("chat", *system, stdin=b"aa\nbb\ncccc\ntoo long\ndd\n")
    assert status == 0 and out == "one two three\n" * 4
    assert "the oldest 2 turns left out" in err and "the oldest turn left out" in err
    assert "context holds 4" in err  # of the line that is too long alone
    kept = [turn["content"] for turn in fake.seen[-1]["messages"] if turn["role"] != "assistant"]
    assert kept == [*system[1:], "dd"]


def start(*arguments):
    code = "from tetri.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ctrl_c_cancels_the_request(broker):
    fake = broker(endless)
    process = start("submit", "hi")
    assert process.stdout.read(4) == b"one "
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == b"two \n" and b"the request was cancelled" in err
    assert b"Traceback" not in err and "cancel" in fake.types()


def test_a_reader_that_has_seen_enough(broker):
    fake = broker(lambda message: [*endless(message)[:1], *[delta(i, word="x" * 9000) for i in range(3)]])
    process = start("submit", "hi")
    process.stdout.read(4)
    process.stdout.close()
    fake.reply = lambda message: [done(reason="cancelled", tokens=0)]
    process.wait(20)
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_model_fetch(run, monkeypatch):
    monkeypatch.setattr(models, "fetch", lambda name: f"/cache/{name}")
    assert run("model", "fetch") == (0, "/cache/smollm2-135m\n", "preparing smollm2-135m\n")
    assert run("model", "fetch", "x")[1] == "/cache/x\n"


def test_up_tells_where_things_listen(run, place, monkeypatch):
    def fake_up(config, say, wait_s):
        say("p0 (prefill) is ready")
        return config.run_dir

    monkeypatch.setattr(launch, "up", fake_up)
    conf = os.path.join(os.path.dirname(__file__), "..", "..", "conf", "emulated.toml")
    status, out, err = run("up", "--conf", conf, "--set", "broker.clients=tcp://127.0.0.1:7777")
    assert status == 0 and "tcp://127.0.0.1:7777" in out and f"{place}/log" in out
    assert err == "p0 (prefill) is ready\n"


def test_a_disk_that_is_full_is_one_line(run, monkeypatch):
    def fake_up(config, say, wait_s):
        raise OSError(28, "No space left on device", "/run/cluster.toml")

    monkeypatch.setattr(launch, "up", fake_up)
    assert run("up") == (1, "", "tetri-cli: /run/cluster.toml: No space left on device\n")


def test_help_lists_every_command_and_imports_nothing_slow():
    heavy = [
        "zmq",
        "msgpack",
        "rich",
        "tetri.client",
        "tetri.config",
        "tetri.models",
        "jinja2",
        "tokenizers",
        "torch",
    ]
    code = "import sys, tetri.cli as c; [c.group.get_command(None, n) for n in c.COMMANDS]; "
    code += f"print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_arguments_and_help(run):
    status, out, _ = run()
    assert status == 2 and all(name in out for name in cli.COMMANDS)
    assert run("--help")[0] == 0
    assert run("--version")[1].startswith("tetri-cli")


def test_the_command_line_starts_quickly(broker):
    broker()
    began = time.monotonic()
    process = start("submit", "hi", "--no-stream")
    assert process.communicate(timeout=30)[0] == b"one two three\n"
    assert time.monotonic() - began < 5  # 0.2 s on a quiet machine
