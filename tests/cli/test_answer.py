"""An answer while it appears: interrupted, and read no further."""

import signal

from fake_broker import delta, done, endless

from tests.cli.fakes import start


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
