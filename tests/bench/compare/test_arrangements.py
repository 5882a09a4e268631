from pathlib import Path

import pytest

from tetri.bench.compare.arrangements import Arrangement, arrangements
from tetri.config import load

CONF = Path(__file__).parents[3] / "conf"
DEFAULT = load(CONF / "default.toml")
EMULATED = load(CONF / "emulated.toml")


def test_two_workers_of_the_real_engine():
    assert [*arrangements(DEFAULT)] == [
        *("vllm", "vllm-2-rr", "vllm-2-least", "vllm-2-512-rr", "vllm-2-512-least"),
        *("tetri-1+1", "tetri-mixed", "tetri-auto"),
    ]


def test_vllm_has_no_emulated_engine():
    assert [*arrangements(EMULATED)] == ["tetri-1+3", "tetri-2+2", "tetri-3+1", "tetri-mixed", "tetri-auto"]


def test_one_worker_has_no_split_and_no_second_server():
    alone = load(CONF / "default.toml")
    alone = type(alone)(**{name: getattr(alone, name) for name in alone.__slots__} | {"workers": alone.workers[:1]})
    assert [*arrangements(alone)] == ["vllm", "tetri-mixed", "tetri-auto"]


@pytest.mark.parametrize(
    ("name", "roles", "servers", "chunk", "routing"),
    [
        ("vllm", (), 1, 0, "least"),
        ("vllm-2-rr", (), 2, 0, "rr"),
        ("vllm-2-512-least", (), 2, 512, "least"),
        ("tetri-1+1", ("prefill", "decode"), 0, 0, "least"),
        ("tetri-auto", ("auto", "auto"), 0, 0, "least"),
    ],
)
def test_what_a_name_means(name, roles, servers, chunk, routing):
    made = arrangements(DEFAULT)[name]
    assert (made.roles, made.servers, made.chunk, made.routing) == (roles, servers, chunk, routing)


def test_only_vllm_is_eager():
    made = arrangements(DEFAULT, eager=True)
    assert {name for name, each in made.items() if each.eager} == {name for name in made if name.startswith("vllm")}
    assert not any(each.eager for each in arrangements(DEFAULT).values())


def test_what_it_takes_part_in():
    made = arrangements(DEFAULT)
    assert [name for name, each in made.items() if each.is_tetri] == ["tetri-1+1", "tetri-mixed", "tetri-auto"]
    assert [name for name, each in made.items() if not each.coupled] == ["tetri-1+1", "tetri-auto"]
    running = Arrangement("url", "", urls=("http://127.0.0.1:1",))
    assert [each.knows_limits for each in (*made.values(), running)] == [False] * 5 + [True] * 4
    assert not running.is_tetri and not running.coupled


def test_only_the_routing_of_the_same_servers_differs():
    made = arrangements(DEFAULT)
    groups = {each.deployment for each in made.values()}
    assert len(groups) == len(made) - 2
    assert made["vllm-2-rr"].deployment == made["vllm-2-least"].deployment != made["vllm-2-512-rr"].deployment
