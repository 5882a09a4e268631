"""Options that several commands share: which deployment they lead to, and for how long it may be silent."""


def test_a_dash_reads_standard_input(run, broker):
    fake = broker()
    run("submit", "-", stdin="two\nlines é\n".encode())
    assert fake.seen[0]["prompt"] == "two\nlines é"
    status, _, err = run("submit", "-", stdin=b"ab\xff")
    assert status == 2 and "standard input is not UTF-8 (byte 2)" in err


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
