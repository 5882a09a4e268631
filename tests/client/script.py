"""What the tests of the clients let a broker say."""

import msgpack
from fake_broker import done, pack

FAST = {"timeout": 2.0, "silence_s": 0.1, "resend_s": 0.05}


def refused(key, reason="no such request", retry_after_s=None):
    return {"type": "refused", "key": key, "reason": reason, "retry_after_s": retry_after_s}


GARBAGE = [
    b"",
    b"\x01" + msgpack.packb(done()),
    b"\x04",
    b"\x04\xc1",
    pack(type="hello"),
    pack(type=3),
    pack(type="delta", rid="r1", start="0", ids=[], text=""),
    pack(type="delta", rid="r1", start=0, ids=["x"], text="no"),
    pack(type="delta", rid="other", start=0, ids=[1], text="no"),
    pack(**{**done(), "usage": {}}),
    pack(**{**done(), "usage": {"prompt_tokens": 1, "completion_tokens": "x"}}),
    pack(**{**done(), "receipt": {"prompt_tokens": 1, "magic": 2}}),
    b"\x04" + msgpack.packb([1, 2]),
    b"\x04" + b"\x81" * 100_000,
]
