"""What contradicts itself in a configuration, although each value alone is fine."""

import re

import pytest

from tests.config.pair import PAIR, bad
from tetri.config import ConfigError, load

PROGRAMS = "broker, monitor, gateway or supervisord"
NO_ADDRESS = ("10.0.0.1", "10.0.0.1:0", "10.0.0.256:1", "example.org:1")
BAD = [
    ("[cluster]\ndead_s=0.59\n", "at least three times heartbeat_s"),
    ("[transfer]\nslab_blocks=4\n", "slab_blocks: must be at least 5"),
    *((f"[transfer]\naddress='tcp://{at}'\n", 'address: must be "tcp://IPv4-ADDRESS:PORT"') for at in NO_ADDRESS),
    ("[transfer]\naddress='tcp://10.0.0.1:*'\n", "10.0.0.1 is not this machine's loopback, and"),
    (
        "[cluster]\nkey='/k'\n[transfer]\naddress='tcp://0.0.0.0:1'\n",
        "other hosts cannot connect to 0.0.0.0; set transfer.ann",
    ),
    ("[transfer]\naddress='tcp://127.0.0.1:*'\nannounce='tcp://127.0.0.1:*'\n", "transfer.announce: must be"),
    ("[transfer]\nannounce='tcp://127.0.0.1:1'\n", "transfer.address, which is not set"),
    ("[transfer]\ntransport='stream'\nslab_blocks=9000\n[engine]\nblock_tokens=1\nchunk_tokens=9000\n", "most 8192"),
    ("[broker]\nclients='tcp://10.0.0.1:5555'\n", "CURVE"),
    ("[broker]\nclients='tcp://*:5555'\n", "CURVE"),
    ("[gateway]\nhost='1.2.3'\n", 'gateway.host: must be an IP address such as "127.0.0.1" or "0.0.0.0", got "1.2.3"'),
    ("[gateway]\nport=65535\ncount=2\n", "gateway.port: must be at most 65534"),
    ("[engine]\nmax_batch=512\n", "engine.max_batch: must be below chunk_tokens (512)"),
    ("[engine]\nkind='emulated'\nblock_tokens=16\n[emulated]\nblocks=400\n", "emulated.blocks: must be at least 512"),
    ("[monitor]\nload_ms=800\n", "monitor.stale_s: must be at least two times load_ms (800 ms)"),
    ("[monitor]\ngone_s=0.5\n", "monitor.gone_s: must be at least stale_s (1 s)"),
    ("[predictor]\nkind='prior'\nfolder='x'\n", 'predictor.folder: "prior" needs no predictor; leave the folder out'),
    ("[predictor]\nkind='both'\n[engine]\nkind='emulated'\n", '"both" reads the hidden states of a model, and an em'),
    ("[predictor]\nkind='hidden'\n[engine]\nkind='emulated'\n", '"hidden" reads the hidden states of a model'),
    ("[[worker]]\niid='p0'\nrole='prefill'\n", "is used 2 times"),
    *((f"[[worker]]\niid='{taken}'\nrole='prefill'\n", f"not {PROGRAMS}") for taken in re.findall(r"\w{3,}", PROGRAMS)),
    ("[broker]\nclients='tcp://[::1]:5555'\n", "not this machine's IPv4 loopback"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_contradictions_are_one_line(tmp_path, text, says):
    assert says in bad(tmp_path / "t.toml", text + PAIR)


def test_both_roles_are_needed_and_a_mixed_worker_is_enough(write):
    for role in ("prefill", "decode"):
        with pytest.raises(ConfigError, match="at least one"):
            load(write(f'[[worker]]\niid="a"\nrole="{role}"\n'))
    config = load(write('[[worker]]\niid="m0"\nrole="mixed"\n'))
    assert [worker.role for worker in config.workers] == ["mixed"]
