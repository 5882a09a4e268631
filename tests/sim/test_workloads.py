"""The paper's closed batches."""

import math
from statistics import fmean

import pytest

from tetri.sim import workloads
from tetri.sim.workloads import WorkloadError, tilted

CLASSES = {"LPLD": (False, False), "LPHD": (False, True), "HPLD": (True, False), "HPHD": (True, True)}
QUANTILES = [(0.0, 0.0), (0.5, 100.0), (1.0, 1000.0)]


@pytest.fixture(scope="module")
def evaluation():
    return workloads.load()


def test_counts_are_the_papers(evaluation):
    counts = {name: workload.requests for name, workload in evaluation.workloads.items()}
    assert counts == {"LPLD": 128, "LPHD": 128, "HPLD": 32, "HPHD": 32, "Mixed": 128}
    assert evaluation.baseline.slots == 16


@pytest.mark.parametrize("name", CLASSES)
def test_requests_lie_in_their_class(evaluation, name):
    heavy_prompt, heavy_output = CLASSES[name]
    for seed in range(20):
        for each in evaluation.workloads[name].draw(seed):
            assert each.at_s == 0.0 and each.prompt + each.output <= 2048
            assert (each.prompt > 512) == heavy_prompt and (each.output > 128) == heavy_output


def test_mixed_has_all_four_classes(evaluation):
    found = {(each.prompt > 512, each.output > 128) for each in evaluation.workloads["Mixed"].draw(0)}
    assert found == set(CLASSES.values())


def test_a_draw_depends_on_its_seed_and_name_only(evaluation):
    mixed = evaluation.workloads["Mixed"]
    assert mixed.draw(3) == workloads.load().workloads["Mixed"].draw(3) != mixed.draw(4)
    assert mixed.draw(3, 256)[:128] == mixed.draw(3)


def test_a_tilt_reaches_its_mean_and_keeps_the_rest():
    flat = tilted(QUANTILES, 1, 1000, 150)
    assert flat.mean == pytest.approx(150)
    assert [flat.mean < tilted(QUANTILES, 1, 1000, mean).mean for mean in (151, 600)] == [True, True]
    # without a tilt the quantiles are what they were
    plain = tilted(QUANTILES, 1, 1000, fmean([50.5, 550.5]))
    assert plain.below[99] / plain.below[-1] == pytest.approx(0.5, abs=0.002)
    # p(x) ~ f(x) exp(t x): the logarithm of the weights bends only where f does
    logs = [math.log(b - a) for a, b in zip(flat.below[200:], flat.below[201:210], strict=False)]
    assert max(logs[i + 1] - logs[i] for i in range(8)) == pytest.approx(min(logs[i + 1] - logs[i] for i in range(8)))


@pytest.mark.parametrize("low, high, mean", [(1, 10, 0.5), (1, 10, 10), (2000, 3000, 2500)])
def test_a_mean_out_of_reach_is_an_error(low, high, mean):
    with pytest.raises(WorkloadError, match="must be between"):
        tilted(QUANTILES, low, high, mean)


@pytest.mark.parametrize(
    "change",
    [
        ("prompt_mean = ", "prompt_mode = "),
        ("slots = 16", "slats = 16"),
        ("[figure1]", "[figure2]"),
        ("[0, 0], ", ""),
        ("context = 2048", "context ="),
        ("prompt = [1, 512]", "prompt = [1]"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, change):
    path = tmp_path / "workloads.toml"
    text = workloads.default_file().read_text(encoding="utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(WorkloadError) as caught:
        workloads.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(WorkloadError, match="cannot be read"):
        workloads.load("nowhere.toml")
