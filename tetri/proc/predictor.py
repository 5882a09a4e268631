"""Chooses the length predictor that the configuration asks for, and runs it in a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tetri import log
from tetri.config import Config
from tetri.core.actions import LengthKnown, Predict
from tetri.engine.base import Engine, EngineError
from tetri.engine.vllm.setup import prepare_environment
from tetri.engine_request import StepDone
from tetri.executor import Network
from tetri.models import find, weights_hash
from tetri.predict.card import KINDS, cards
from tetri.predict.inputs import reader
from tetri.predict.lengths import PredictError
from tetri.predict.model import AUTO, SHIPPED, Loaded, examine, load, load_first, shipped_for
from tetri.predict.serve import Answer, Parallel, Reading, Sequential, Steady, one_core
from tetri.proc import build
from tetri.proc.hidden import estimating
from tetri.request import Expected, LengthDistribution
from tetri.strict import ConfigError
from tetri.wire.messages import Heartbeat

KINDS_OF = {"vllm": AUTO, "emulated": ("classifier",)}  # of `auto`; an emulated engine has no hidden states
# The prior of a model without a trained predictor: every 100 tokens, a quarter of the remaining outputs ends; the mean
# is 400 tokens. A few dozen finished requests outweigh it.
NOBODY_KNOWS = LengthDistribution(100, tuple(0.25 * 0.75**bucket for bucket in range(31)) + (0.75**31,))
Part = TypeVar("Part")
ALONE_TOKENS = 512  # longer prompts get a batch of their own, if the classifier does not cut prompts


@dataclass(frozen=True, slots=True)
class LoadedPredictor:
    """The predictors of a worker; both are None if only the prior predicts. `expected`: what the core gets to know."""

    expected: Expected
    classifier: Loaded | None = None
    hidden: Loaded | None = None


def check(config: Config) -> None:
    """Check a predictor that the configuration names, without its encoder. Raises ConfigError and ModelError."""
    kind = config.predictor.kind
    if config.policy.length == "trained" and kind not in ("auto", "prior"):
        _named(config, examine)


def load_predictor(config: Config, logger: logging.Logger) -> LoadedPredictor | None:
    """Load the worker's predictor; None unless policy.length is "trained".

    A kind that the configuration names must load. `auto` falls back to the prior and logs why. Raises ConfigError and
    ModelError."""
    if config.policy.length != "trained":
        return None
    if config.engine.kind == "vllm":
        prepare_environment()  # must precede the import of torch
    kind = config.predictor.kind
    if kind == "prior":
        return LoadedPredictor(_prior(config, "as the configuration wants it"))
    if kind != "auto":
        named, parts = _named(config, load)
        return _combined(parts, named)
    folder, weights = _location(config)
    if folder is None:
        model = "an emulated engine" if config.engine.kind == "emulated" else f"model {config.model.name}"
        return LoadedPredictor(_prior(config, f"no predictor: tetri brings none for {model}"))
    try:
        found, reasons = load_first(folder, KINDS_OF[config.engine.kind], weights)
    except PredictError as error:
        return _fallen_back(config, logger, str(error))
    return _combined({found.card.kind: found}, folder, *reasons)


def _fallen_back(config: Config, logger: logging.Logger, why: str) -> LoadedPredictor:
    logger.warning("lengths are predicted by the prior alone %s", log.fields(why=why))
    return LoadedPredictor(_prior(config, f"no predictor: {why}"))


def _named(config: Config, load: Callable[[Path, str, str], Part]) -> tuple[Path, dict[str, Part]]:
    """(folder, parts by kind) of the predictor that the configuration names. Raises ConfigError and ModelError."""
    kind = config.predictor.kind
    folder, weights = _location(config)
    if folder is None:
        lacks = f"tetri brings no predictor for model {config.model.name}"
        advice = "train one with tetri-cli predictor train and set predictor.folder, or set another kind"
        raise ConfigError(f'predictor.kind = "{kind}": {lacks}: {advice}')
    try:
        return folder, {each: load(folder, each, weights) for each in (KINDS if kind == "both" else (kind,))}
    except PredictError as error:
        raise ConfigError(f'predictor.kind = "{kind}": {error}') from None


def _combined(loaded: dict[str, Loaded], folder: Path, *reasons: str) -> LoadedPredictor:
    """Combine the loaded kinds. With both, prior and calibration are those of the kind hidden, which predicts last.

    `reasons`: why other kinds were not chosen, for the status."""
    one = loaded.get("hidden") or loaded["classifier"]
    kind = "both" if len(loaded) == len(KINDS) else one.card.kind
    trained = f", trained {one.card.date}" if one.card.date else ""
    expected = one.expected("; ".join([f"from {_name(folder)}{trained}", *reasons]))
    return LoadedPredictor(msgspec.structs.replace(expected, kind=kind), loaded.get("classifier"), loaded.get("hidden"))


def _location(config: Config) -> tuple[Path | None, str]:
    """(the predictor's folder or None, hash of the weights that the predictor must be for; "": any).

    An emulated engine has no weights: it takes any predictor, and tetri's own one for the model that it emulates."""
    chosen = Path(config.predictor.folder) if config.predictor.folder else None
    if config.engine.kind == "emulated":
        own = SHIPPED / config.model.name
        named = config.predictor.kind != "auto"
        return chosen or (own if named and own.is_dir() else None), ""
    weights = weights_hash(find(config.model.name))
    return chosen or shipped_for(weights), weights


def _prior(config: Config, note: str) -> Expected:
    """The prior of this model: from the card of a trained predictor if there is one, else NOBODY_KNOWS."""
    folder, weights = _location(config)
    for card in cards(folder) if folder is not None else ():
        if card.weights == weights or not weights:
            return Expected("prior", LengthDistribution(card.width, card.prior), (), note)
    return Expected("prior", NOBODY_KNOWS, (), f"{note}; nothing is known of this model's lengths yet")


def _name(folder: Path) -> str:
    return f"{folder.name}, shipped with tetri" if folder.parent == SHIPPED else str(folder)


# ---------------------------------------------------------------- at work


RunningClassifier = Sequential | Parallel


class PredictorServing:
    """The predictor of one worker, behind the core's Predict action and in its heartbeats.

    `expected`: prior and calibration for the core. `step`: the engine's step, with hidden-state estimates if the
    predictor reads hidden states."""

    def __init__(
        self,
        expected: Expected,
        step: Callable[[int, int | None], StepDone],
        classifier: RunningClassifier | None = None,
        head: Steady | None = None,
    ) -> None:
        self.expected, self.step = expected, step
        self._classifier, self._head = classifier, head
        self.close = classifier.close if classifier is not None else lambda: None

    def predict(self, wanted: Predict) -> LengthKnown | None:
        """Execute a Predict action. Returns the prediction, or None if `known` will yield it later."""
        if self._classifier is None:
            return LengthKnown(wanted.key, None)
        answer = self._classifier.ask(wanted.key, wanted.prompt)
        return None if answer is None else _known(answer)

    def known(self) -> Iterator[LengthKnown]:
        """Yield the predictions since the last call."""
        return map(_known, self._classifier.answers()) if self._classifier is not None else iter(())

    def with_status(self, heartbeat: Heartbeat) -> Heartbeat:
        """Add what the core does not know to a heartbeat: whether the predictor works, and what it has not read."""
        status, parts = heartbeat.predictor, [part for part in (self._classifier, self._head) if part is not None]
        if status is None or not parts:
            return heartbeat
        troubles = [part.trouble for part in parts if part.trouble]
        classifier = self._classifier
        status = msgspec.structs.replace(
            status,
            on=status.on and len(troubles) < len(parts),
            note="; ".join(filter(None, [status.note, *troubles])),
            cut=0 if classifier is None else classifier.cut,
            unread=0 if classifier is None else classifier.unread,
        )
        return msgspec.structs.replace(heartbeat, predictor=status)


def serving_of(
    predictor: LoadedPredictor, engine: Engine, config: Config, wake: Callable[[], None], logger: logging.Logger
) -> PredictorServing:
    """Start the predictor of a worker. `wake` ends the worker's wait, from any thread.

    If the engine has no hidden states for a predictor that reads them, `auto` falls back to the prior; any other kind
    raises ConfigError. Also raises ModelError and TextError, of the tokeniser."""
    head: Steady | None = None
    step: Callable[[int, int | None], StepDone] = engine.step
    if predictor.hidden is not None:
        head = Steady(predictor.hidden, logger)
        try:
            step = estimating(engine, head)
        except (EngineError, PredictError) as error:
            if config.predictor.kind != "auto":
                raise ConfigError(f'predictor.kind = "{config.predictor.kind}": {error}') from None
            return PredictorServing(_fallen_back(config, logger, str(error)).expected, engine.step)
    classifier = None if predictor.classifier is None else start_classifier(predictor.classifier, config, wake, logger)
    return PredictorServing(predictor.expected, step, classifier, head)


def start_classifier(
    classifier: Loaded, config: Config, wake: Callable[[], None], logger: logging.Logger
) -> RunningClassifier:
    """Start a classifier in the configured mode. Raises ModelError and TextError."""
    cut = classifier.card.cut
    reading = Reading(classifier, reader(build.tokenizer(config)), cut, logger)
    if config.predictor.mode == "sequential":
        return Sequential(reading)
    return Parallel(reading, wake, 0 if cut else ALONE_TOKENS, begin=one_core)


def _known(answer: Answer) -> LengthKnown:
    key, distribution = answer
    return LengthKnown(key, None, distribution)


class StatusNetwork:
    """A worker's network that adds the predictor's status to heartbeats."""

    def __init__(self, network: Network, serving: PredictorServing) -> None:
        self.network, self.serving = network, serving
        self.publish, self.connect, self.disconnect = network.publish, network.connect, network.disconnect

    def send(self, peer: str, message: Any) -> None:
        """Send to one peer."""
        self.network.send(peer, self.serving.with_status(message) if isinstance(message, Heartbeat) else message)
