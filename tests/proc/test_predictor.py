"""From the configuration to the predictor: which one, what it says when there is none, and how it serves."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.predict import made
from tetri.config import Config, load
from tetri.core.actions import LengthKnown, Predict
from tetri.engine.base import EngineError
from tetri.engine_request import StepDone
from tetri.predict import model, serve
from tetri.predict.lengths import PredictError
from tetri.predict.model import Loaded, examine
from tetri.proc import launch, predictor
from tetri.request import LengthDistribution, PredictorStatus, Sampling
from tetri.strict import ConfigError
from tetri.wire.load import Load
from tetri.wire.messages import Close, Heartbeat

CONF = Path(__file__).parents[2] / "conf"
LOG = logging.getLogger("tetri.test")
TINY = "weights-of-tiny"
PRIOR = (0.4, 0.3, 0.1, 0.1, 0.1)
LOAD = Load(**{name: 0 for name in Load.__struct_fields__ if name not in Load.__struct_defaults__})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Loads no encoder, and takes the model's weights for those of the tiny one. Lists what was loaded."""
    kinds: list[str] = []

    def load_tiny(folder: Path, kind: str, weights: str) -> Loaded:
        card, head = examine(folder, kind, weights)
        kinds.append(kind)
        return Loaded(card, head, None)

    monkeypatch.setattr(predictor, "load", load_tiny)
    monkeypatch.setattr(model, "load", load_tiny)
    monkeypatch.setattr(predictor, "find", lambda name: Path("/models") / name)
    monkeypatch.setattr(predictor, "weights_hash", lambda folder: TINY)
    monkeypatch.setattr(predictor, "shipped_for", lambda weights: None)
    monkeypatch.setattr(predictor, "prepare_environment", lambda: 1)
    return kinds


def configured(kind: str = "auto", folder: Path | str = "", *more: str, conf: str = "default") -> Config:
    own = ["policy.length=trained", f"predictor.kind={kind}", f"predictor.folder={folder}"]
    return load(CONF / f"{conf}.toml", [*own, *more])


def hidden(folder: Path) -> Path:
    return made.hidden(folder)


def classifier(folder: Path) -> Path:
    """Of which the encoder is never loaded."""
    place = folder / "classifier"
    place.mkdir(parents=True)
    digest = made.save_head(made.head(6), place / made.HEAD)
    made.write_card(made.card("classifier", digest, encoder="some encoder", cut=8), place)
    return folder


def test_nothing_is_loaded_unless_lengths_are_learnt(loaded: list[str]) -> None:
    config = load(CONF / "default.toml", ["predictor.kind=classifier", "predictor.folder=/nowhere"])
    predictor.check(config)
    assert predictor.load_predictor(config, LOG) is None and loaded == []


@pytest.mark.parametrize("kind", ["classifier", "hidden", "both"])
def test_what_is_asked_for_by_name_is_taken(kind: str, tmp_path: Path, loaded: list[str]) -> None:
    config = configured(kind, hidden(classifier(tmp_path)))
    predictor.check(config)
    assert loaded == []
    found = predictor.load_predictor(config, LOG)
    assert found is not None and found.expected.kind == kind
    assert found.expected.prior == LengthDistribution(100, PRIOR) and found.expected.levels == (0.25, 0.5, 0.75)
    assert found.expected.note == f"from {tmp_path}"
    assert (found.classifier is None, found.hidden is None) == (kind == "hidden", kind == "classifier")


def foreign(data: bytes) -> bytes:
    return data.replace(TINY.encode(), b"others")


def nothing(data: bytes) -> None:
    """It is not there."""


# file of a predictor (its folder: "") -> what becomes of its bytes, and what is said
BROKEN = {
    "missing": ("", nothing, "no {kind} predictor in {folder}"),
    "no head": ("head.safetensors", nothing, "No such file or directory"),
    "cut head": ("head.safetensors", lambda data: data[:100], "is cut off"),
    "cut card": ("card.json", lambda data: data[:50], "is cut off or no card"),
    "foreign": ("card.json", foreign, "is for another model"),
    "another version": ("card.json", lambda data: b'{"version": 99}', "is of version 99"),
}


def damage(folder: Path, file: str, changed: Any) -> None:
    if not file:
        return shutil.rmtree(folder)
    data = changed((folder / file).read_bytes())
    (folder / file).unlink()
    if data is not None:
        (folder / file).write_bytes(data)


@pytest.mark.parametrize("kind", ["classifier", "hidden", "both"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_bad_one_that_was_named_is_one_line(kind: str, broken: str, tmp_path: Path, loaded: list[str]) -> None:
    """`up` says so before anything is started."""
    part = "hidden" if kind == "both" else kind
    *what, says = BROKEN[broken]
    damage(hidden(classifier(tmp_path)) / part, *what)
    config = configured(kind, tmp_path, f"cluster.run_dir={tmp_path}/run")
    for refused in (
        lambda: predictor.check(config),
        lambda: predictor.load_predictor(config, LOG),
        lambda: launch.up(config, lambda text: None, 1.0),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        message = str(caught.value)
        assert message.startswith(f'predictor.kind = "{kind}": ') and "\n" not in message
        assert says.format(kind=part, folder=tmp_path) in message
    assert not (tmp_path / "run").exists()


def test_named_where_tetri_brings_none(loaded: list[str]) -> None:
    with pytest.raises(ConfigError, match="tetri brings no predictor for model smollm2-135m: train one with"):
        predictor.check(configured("hidden"))


@pytest.mark.parametrize("broken", BROKEN)
def test_auto_goes_on_with_the_prior_and_says_why(
    broken: str, tmp_path: Path, loaded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    *what, says = BROKEN[broken]
    damage(hidden(tmp_path) / "hidden", *what)
    config = configured("auto", tmp_path)
    predictor.check(config)
    found = predictor.load_predictor(config, LOG)
    assert found is not None and found.classifier is None and found.hidden is None
    assert found.expected.kind == "prior"
    said = says.format(kind="hidden", folder=tmp_path)
    assert found.expected.note.startswith("no predictor: ") and said in found.expected.note
    knows = "head" in broken  # the card is there: the lengths of training are known
    assert found.expected.prior == (LengthDistribution(100, PRIOR) if knows else predictor.NOBODY_KNOWS)
    assert said in caplog.text


def test_auto_takes_hidden_states_or_else_a_classifier(tmp_path: Path, loaded: list[str]) -> None:
    found = predictor.load_predictor(configured("auto", hidden(classifier(tmp_path))), LOG)
    assert found is not None and found.expected.kind == "hidden" and loaded == ["hidden"]
    shutil.rmtree(tmp_path / "hidden")
    found = predictor.load_predictor(configured("auto", tmp_path), LOG)
    assert found is not None and found.expected.kind == "classifier"
    assert "no hidden predictor in" in found.expected.note


def test_auto_where_there_is_nothing(loaded: list[str]) -> None:
    for conf, what in (("default", "model smollm2-135m"), ("emulated", "an emulated engine")):
        found = predictor.load_predictor(configured("auto", conf=conf), LOG)
        assert found is not None and found.expected.prior == predictor.NOBODY_KNOWS
        assert found.expected.note.startswith(f"no predictor: tetri brings none for {what}; nothing is known")
    assert sum(predictor.NOBODY_KNOWS.shares) == pytest.approx(1)


def test_the_prior_when_it_is_asked_for(tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "shipped_for", lambda weights: hidden(tmp_path))
    found = predictor.load_predictor(configured("prior"), LOG)
    assert found is not None and found.expected.kind == "prior" and loaded == []
    assert (
        found.expected.prior == LengthDistribution(100, PRIOR)
        and found.expected.note == "as the configuration wants it"
    )


def test_an_emulated_engine_takes_a_classifier_of_any_model(
    tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(classifier(tmp_path) / "classifier", "card.json", foreign)
    found = predictor.load_predictor(configured("classifier", tmp_path, conf="emulated"), LOG)
    assert found is not None and found.expected.kind == "classifier"
    monkeypatch.setattr(predictor, "SHIPPED", tmp_path.parent)
    own = configured("classifier", "", f"model.name={tmp_path.name}", conf="emulated")
    found = predictor.load_predictor(own, LOG)
    assert found is not None and found.expected.note == f"from {tmp_path.name}, shipped with tetri"


# ---------------------------------------------------------------- at work


class Engine:
    """Shows no hidden states."""

    fingerprint = dataclasses.make_dataclass("Print", [("engine", str, "emulated")])()

    def step(self, most: int = 1) -> StepDone:
        return StepDone(steps=most)


def test_without_hidden_states_auto_takes_the_prior_and_a_name_is_one_line(tmp_path: Path, loaded: list[str]) -> None:
    for kind in ("auto", "hidden"):
        config = configured(kind, hidden(tmp_path / kind))
        found = predictor.load_predictor(config, LOG)
        assert found is not None and found.hidden is not None
        if kind == "hidden":
            with pytest.raises(ConfigError, match=r'^predictor.kind = "hidden": an engine of kind emulated has no'):
                predictor.serving_of(found, Engine(), config, lambda: None, LOG)
            continue
        serving = predictor.serving_of(found, Engine(), config, lambda: None, LOG)
        assert serving.expected.kind == "prior" and "has no hidden states" in serving.expected.note
        assert serving.step(3) == StepDone(steps=3)
        serving.close()


class Texts:
    """A classifier that remembers what it read."""

    card = made.card("classifier", "", cut=4)

    def __init__(self, error: Exception | None = None) -> None:
        self.texts: list[str] = []
        self.error = error

    def read(self, texts: Sequence[str]) -> tuple[list[LengthDistribution], list[int]]:
        self.texts += texts
        if self.error is not None:
            raise self.error
        return [LengthDistribution(100, (1.0,))] * len(texts), [len(text) for text in texts]


def serving_with(texts: Texts, mode: str, wake: Any = lambda: None) -> predictor.PredictorServing:
    config = load(CONF / "emulated.toml", [f"predictor.mode={mode}"])
    found = predictor.LoadedPredictor(predictor.Expected("classifier", LengthDistribution(100, PRIOR)), texts)
    return predictor.serving_of(found, Engine(), config, wake, LOG)


ASKED = Predict("p:r:1", tuple(b"user: hello\nassistant: "), Sampling())
NAMED = LengthKnown("p:r:1", None, LengthDistribution(100, (1.0,)))


def test_in_front_of_the_model_the_answer_is_the_actions_result() -> None:
    texts = Texts()
    serving = serving_with(texts, "sequential")
    assert serving.predict(ASKED) == NAMED and [*serving.known()] == []
    assert texts.texts == ["hello"]
    serving.close()


def test_beside_the_model_the_answer_wakes_the_worker() -> None:
    woken = threading.Event()
    serving = serving_with(Texts(), "parallel", woken.set)
    try:
        assert serving.predict(ASKED) is None
        assert woken.wait(20)
        assert [*serving.known()] == [NAMED]
    finally:
        serving.close()


def test_of_nobody_who_could_be_asked_there_is_an_answer_too() -> None:
    serving = predictor.PredictorServing(predictor.Expected("prior", LengthDistribution(100, PRIOR)), Engine().step)
    assert serving.predict(ASKED) == LengthKnown("p:r:1", None) and [*serving.known()] == []


class Wire:
    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.publish = self.connect = self.disconnect = self.sent.append

    def send(self, peer: str, message: Any) -> None:
        self.sent.append(message)


def heartbeat(on: bool = True) -> Heartbeat:
    status = PredictorStatus(kind="classifier", on=on, note="from x", predicted=3)
    return Heartbeat(iid="p0", incarnation=1, role="prefill", load=LOAD, holds=[], epoch=1, read=1, predictor=status)


def test_beats_tell_what_was_read_and_why_nothing_is() -> None:
    texts = Texts()
    serving = serving_with(texts, "sequential")
    wire = Wire()
    network = predictor.StatusNetwork(wire, serving)
    serving.predict(ASKED)
    close = Close(rid="r", attempt=1)
    for message in (heartbeat(), close):
        network.send("broker", message)
    said = wire.sent[0].predictor
    assert wire.sent[1] is close and (said.on, said.note, said.predicted, said.cut) == (True, "from x", 3, 1)
    texts.error = PredictError("out of order")
    serving.predict(ASKED)
    network.send("broker", heartbeat())
    status = wire.sent[-1].predictor
    assert (status.on, status.predicted) == (False, 3)
    assert status.note == "from x; the classifier failed: out of order"


def test_of_two_kinds_the_other_one_goes_on() -> None:
    texts = Texts(EngineError("no"))
    classifier = serve.Sequential(serve.Reading(texts, lambda ids: "", 0, LOG))
    head = serve.Steady(made_head(), LOG)
    serving = predictor.PredictorServing(
        predictor.Expected("both", LengthDistribution(100, PRIOR)), Engine().step, classifier, head
    )
    assert serving.predict(ASKED) == LengthKnown("p:r:1", None)
    assert serving.with_status(heartbeat()).predictor.on
    head.trouble = "the hidden-state head failed: NaN"
    status = serving.with_status(heartbeat()).predictor
    assert not status.on and status.note.endswith("failed: no; the hidden-state head failed: NaN")


def made_head() -> Loaded:
    return Loaded(made.card("hidden", "", layer=2, every=8), made.head(9), None)
