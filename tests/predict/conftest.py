import pytest

from tests.predict import made
from tetri.predict import fit
from tetri.predict.examples import read_texts
from tetri.predict.train import TrainSettings, train


@pytest.fixture(scope="module")
def little_to_learn():
    """A third of the steps is enough for what these examples hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "STEPS", 200)
        patch.setattr(fit, "RATE", 3e-3)
        yield


@pytest.fixture(scope="module")
def lengths_file(tmp_path_factory):
    return made.lengths(tmp_path_factory.mktemp("lengths") / "a.jsonl", made.COUNT, layers=(1, 2), samples=2)


@pytest.fixture(scope="module")
def hidden(lengths_file, little_to_learn, tmp_path_factory):
    """(folder, scores, texts) of a trained predictor of kind hidden."""
    out = tmp_path_factory.mktemp("hidden")
    texts = read_texts([lengths_file], states=True)
    return out, train(texts, TrainSettings("hidden", out, "tiny", "weights-of-tiny"), made.quiet), texts
