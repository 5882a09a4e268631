from math import inf
from pathlib import Path

import pytest

from tetri import cost
from tetri.bench.simulated import setup_of
from tetri.config import load
from tetri.request import Slo

CONF = Path(__file__).parents[2] / "conf"
TABLE = cost.load("cpu-smollm2")


def of(name, *overrides):
    return setup_of(load(CONF / name, overrides), TABLE, 3)


@pytest.mark.parametrize(
    ("name", "roles"), [("default.toml", (0, 0, 0, 2)), ("split.toml", (1, 1, 0, 0)), ("emulated.toml", (2, 2, 0, 0))]
)
def test_the_instances_have_the_configured_roles(name, roles):
    made = of(name)
    assert (made.prefill, made.decode, made.mixed, made.auto) == roles
    assert (made.cost, made.seed, made.link_bytes_s) == (TABLE, 3, inf)
    made.check()


def test_the_memory_is_what_the_configuration_gives_an_instance():
    assert of("default.toml").kv_tokens == (1024 << 20) // TABLE.kv_token_bytes
    assert of("default.toml", "engine.kv_mib=64").kv_tokens == (64 << 20) // TABLE.kv_token_bytes
    assert of("emulated.toml", "emulated.blocks=600").kv_tokens == 600 * 16


def test_a_request_is_as_long_as_the_configuration_and_the_memory_allow():
    assert of("default.toml").context == 0  # as long as the memory allows
    assert of("default.toml", "model.context=2304").context == 2304
    assert of("emulated.toml", "emulated.blocks=64", "emulated.context=900").context == 900


def test_limits_policies_and_sizes_are_the_configured_ones():
    made = of("default.toml", "slo.ttft_s=2", "policy.order=sjf", "engine.max_batch=8", "transfer.reserve_share=0.25")
    assert (made.slo, made.rules.order, made.max_batch, made.reserve_share) == (Slo(ttft_s=2.0), "sjf", 8, 0.25)
    assert of("emulated.toml", "engine.cost=v100-opt13b.toml", "transfer.emulate_gbs=2").link_bytes_s < inf
