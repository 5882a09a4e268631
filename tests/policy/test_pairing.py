"""Over which path KV moves between two instances."""

import itertools

import pytest

from tests.core.build import FINGERPRINT, fingerprint
from tests.core.build import reach as made_by
from tetri.policy.pairing import FAR, PATHS, SAME_HOST, apart, compatibility_key, incompatibility, path

ALL = [*PATHS]
ONE_HOST = "needs both on one host, of one user and with one cluster.name"
CUDA, THREE = {"paths": ["cuda_ipc"], "device": "GPU-a"}, {"paths": ["local", "cuda_ipc", "shm"]}
GPU = {"device": "GPU-a", "paths": ["cuda_ipc", "shm", "stream"]}


def reach(**changes):
    return made_by("x", **changes)


@pytest.mark.parametrize(
    "one, other, best",
    [
        ({"paths": ALL}, {"paths": ALL}, "local"),
        ({"paths": ALL}, {"paths": ALL, "process": 1}, "cuda_ipc"),
        ({"paths": ["shm", "nixl", "stream"]}, {"paths": ALL, "process": 1}, "shm"),
        ({"paths": ["nixl", "stream"]}, {"paths": ALL}, "nixl"),
        ({"paths": ["stream"]}, {"paths": ALL}, "stream"),
        ({"paths": ALL}, {"paths": ALL, "host": "other"}, "nixl"),
        ({"paths": ["shm", "stream"]}, {"paths": ["shm", "stream"], "host": "other"}, "stream"),
        ({"paths": ["local"]}, {"paths": ["local"]}, "local"),
        ({"paths": ["local"]}, {"paths": ["local"], "host": "other"}, None),  # the same number is another process
        ({"paths": ["local"]}, {"paths": ["local"], "process": 1}, None),
        ({"paths": ["shm"]}, {"paths": ["shm"], "host": "other"}, None),
        ({"paths": ["shm"]}, {"paths": ["stream"]}, None),
        ({"paths": []}, {"paths": ALL}, None),
        (GPU, {**GPU, "process": 1}, "cuda_ipc"),  # two processes on one card
        (GPU, {**GPU, "device": "GPU-b"}, "shm"),  # cards that do not reach each other
        ({**GPU, "near": ["GPU-b"]}, {**GPU, "device": "GPU-b", "near": ["GPU-a"]}, "cuda_ipc"),
        ({**GPU, "near": ["GPU-b"]}, {**GPU, "device": "GPU-b"}, "shm"),  # one way is not enough
        ({**GPU, "near": ["GPU-b"]}, {**GPU, "device": "GPU-b", "near": ["GPU-a"], "host": "other"}, "stream"),
        (GPU, {"paths": ["shm", "stream"]}, "shm"),  # one without a GPU
    ],
)
def test_the_best_path_that_both_have(one, other, best):
    a, b = reach(**one), reach(**other)
    assert path(a, b) == path(b, a) == best
    assert (incompatibility(FINGERPRINT, FINGERPRINT, a, b) is None) == (best is not None)


@pytest.mark.parametrize(
    "one, other, says",
    [
        ({"paths": ["shm"]}, {"paths": ["stream"]}, "no common KV path: shm and stream; set transfer.transport alike"),
        ({"paths": ["shm"]}, {"paths": ["shm"], "host": "b"}, f"shm {ONE_HOST}"),
        ({"paths": ["local"]}, {"paths": ["local"], "process": 1}, "local needs both in one process"),
        (CUDA, {**CUDA, "device": "GPU-b"}, "cuda_ipc needs peer access between the GPUs GPU-a and GPU-b"),
        (THREE, {**THREE, "host": "b"}, f"cuda_ipc {ONE_HOST}; shm {ONE_HOST}"),
    ],
)
def test_why_there_is_none(one, other, says):
    a, b = reach(**one), reach(**other)
    assert apart(a, b).startswith(says) and "\n" not in apart(a, b)
    assert incompatibility(FINGERPRINT, FINGERPRINT, a, b) == apart(a, b)


def test_another_model_or_layout_is_named_first():
    a, b = reach(paths=["shm"]), reach(paths=["stream"])
    assert incompatibility(fingerprint(model="a"), fingerprint(model="b"), a, b) == "model differs: a and b"
    layout = incompatibility(FINGERPRINT, fingerprint(block_tokens=16), a, a)
    assert layout == f"block_tokens differs: {FINGERPRINT.block_tokens} and 16"


def test_instances_of_one_compatibility_key_have_the_same_paths_to_all_others():
    paths = [("shm",), ("local", "shm"), ("cuda_ipc", "stream"), ("nixl",)]
    devices = [("", ()), ("GPU-a", ("GPU-b",)), ("GPU-b", ("GPU-a",))]
    several = [
        reach(paths=list(names), host=host, process=process, device=device, near=list(near), segment=str(number))
        for number, (names, host, process, (device, near)) in enumerate(itertools.product(paths, "ab", (0, 1), devices))
    ]
    for one, other in itertools.combinations(several, 2):
        if compatibility_key(one) == compatibility_key(other):
            assert [path(one, each) for each in several] == [path(other, each) for each in several]
    assert sorted((*SAME_HOST, *FAR, "local")) == sorted(PATHS)
    assert len({compatibility_key(each) for each in several}) < len(several)  # or nothing is gained by it
