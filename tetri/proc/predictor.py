"""From a configuration to the predictor of output lengths: which one it is, and how it serves in a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from tetri import log
from tetri.config import Config
from tetri.core.actions import LengthKnown, Predict
from tetri.engine.base import Engine, EngineError
from tetri.engine.vllm.setup import prepare_environment
from tetri.engine_request import StepDone
from tetri.executor import Network
from tetri.models import find, weights_hash
from tetri.predict.card import KINDS, Card, read_card
from tetri.predict.inputs import reader
from tetri.predict.lengths import PredictError
from tetri.predict.model import SHIPPED, Loaded, examine, load, shipped_for
from tetri.predict.serve import Answer, Parallel, Reading, Sequential, Steady, one_core
from tetri.proc import build
from tetri.proc.hidden import estimating
from tetri.request import Expected, LengthDistribution
from tetri.strict import ConfigError
from tetri.wire.messages import Heartbeat

#: What `auto` takes, the first that is there; an emulated engine has no hidden states.
AUTO = {"vllm": (("hidden",), ("classifier",)), "emulated": (("classifier",),)}
#: Where no training tells how long outputs are: every 100 tokens a quarter of those that are left ends, 400 in the
#: mean. A few dozen ends of real requests outweigh it.
NOBODY_KNOWS = LengthDistribution(100, tuple(0.25 * 0.75**bucket for bucket in range(31)) + (0.75**31,))
Part = TypeVar("Part")
ALONE_TOKENS = 512  # prompts of more, for a classifier that cuts nothing, are read by themselves


@dataclass(frozen=True, slots=True)
class LoadedPredictor:
    """What there is for this worker. `expected` says it to the core."""

    expected: Expected
    classifier: Loaded | None = None
    hidden: Loaded | None = None


def check(config: Config) -> None:
    """What is wrong with a predictor that was asked for by name, as far as that can be said at once. Raises
    ConfigError and ModelError."""
    kind = config.predictor.kind
    if config.policy.length == "trained" and kind not in ("auto", "prior"):
        _named(config, examine)


def load_predictor(config: Config, logger: logging.Logger) -> LoadedPredictor | None:
    """None unless lengths are predicted by what was learnt. Asked for by its name a predictor must be there; `auto`
    goes on with the prior, and says why. Raises ConfigError and ModelError, one line."""
    if config.policy.length != "trained":
        return None
    if config.engine.kind == "vllm":
        prepare_environment()  # before anything imports torch
    kind = config.predictor.kind
    if kind == "prior":
        return LoadedPredictor(_prior(config, "as the configuration wants it"))
    if kind != "auto":
        named, parts = _named(config, load)
        return _together(parts, named)
    folder, weights = _place(config)
    if folder is None:
        model = "an emulated engine" if config.engine.kind == "emulated" else f"model {config.model.name}"
        return LoadedPredictor(_prior(config, f"no predictor: tetri brings none for {model}"))
    whys: list[str] = []
    for kinds in AUTO[config.engine.kind]:
        try:
            return _together({each: load(folder, each, weights) for each in kinds}, folder, *whys)
        except PredictError as error:
            whys.append(str(error))
    return _fallen_back(config, logger, whys[0])


def _fallen_back(config: Config, logger: logging.Logger, why: str) -> LoadedPredictor:
    logger.warning("lengths are predicted by the prior alone %s", log.fields(why=why))
    return LoadedPredictor(_prior(config, f"no predictor: {why}"))


def _named(config: Config, load: Callable[[Path, str, str], Part]) -> tuple[Path, dict[str, Part]]:
    """The parts of the predictor that was asked for. Raises ConfigError."""
    kind = config.predictor.kind
    folder, weights = _place(config)
    if folder is None:
        raise ConfigError(
            f'predictor.kind = "{kind}": tetri brings no predictor for model {config.model.name}: train one with'
            " tetri-cli predictor train and set predictor.folder, or set another kind"
        )
    try:
        return folder, {each: load(folder, each, weights) for each in (KINDS if kind == "both" else (kind,))}
    except PredictError as error:
        raise ConfigError(f'predictor.kind = "{kind}": {error}') from None


def _together(loaded: dict[str, Loaded], folder: Path, *whys: str) -> LoadedPredictor:
    """Of both the hidden states' prior and calibration are used: theirs is the last word. `whys`: why not another."""
    one = loaded.get("hidden") or loaded["classifier"]
    kind = "both" if len(loaded) == len(KINDS) else one.card.kind
    trained = f", trained {one.card.date}" if one.card.date else ""
    expected = one.expected("; ".join([f"from {_name(folder)}{trained}", *whys]))
    return LoadedPredictor(msgspec.structs.replace(expected, kind=kind), loaded.get("classifier"), loaded.get("hidden"))


def _place(config: Config) -> tuple[Path | None, str]:
    """The predictor's folder, None where there is no place to look in, and the hash of the weights that it must be for.
    An emulated engine has none: any may be, and tetri's own is the one of the model that it stands for."""
    chosen = Path(config.predictor.folder) if config.predictor.folder else None
    if config.engine.kind == "emulated":
        own = SHIPPED / config.model.name
        named = config.predictor.kind != "auto"
        return chosen or (own if named and own.is_dir() else None), ""
    weights = weights_hash(find(config.model.name))
    return chosen or shipped_for(weights), weights


def _prior(config: Config, note: str) -> Expected:
    """The lengths that this model wrote in training, if anybody has trained a predictor for it."""
    card = _any_card(config)
    if card is None:
        return Expected("prior", NOBODY_KNOWS, (), f"{note}; nothing is known of this model's lengths yet")
    return Expected("prior", LengthDistribution(card.width, card.prior), (), note)


def _any_card(config: Config) -> Card | None:
    folder, weights = _place(config)
    if folder is None:
        return None
    for kind in KINDS:
        try:
            card = read_card(folder, kind)
        except PredictError:
            continue
        if card.weights == weights or not weights:
            return card
    return None


def _name(folder: Path) -> str:
    return f"{folder.name}, shipped with tetri" if folder.parent == SHIPPED else str(folder)


# ---------------------------------------------------------------- at work


class AskedPrompts(Protocol):
    """A classifier that serves: tetri.predict.serve.Parallel or Sequential."""

    @property
    def trouble(self) -> str: ...

    @property
    def cut(self) -> int: ...

    @property
    def unread(self) -> int: ...

    def ask(self, key: str, prompt: tuple[int, ...]) -> Answer | None: ...

    def answers(self) -> Iterator[Answer]: ...

    def close(self) -> None: ...


class PredictorServing:
    """The predictor of one worker, as its core's actions and its beats know it. `expected` says to the core what to
    expect of it; `step` is the engine's, with what its hidden states foretell if they are read."""

    def __init__(
        self,
        expected: Expected,
        step: Callable[[int], StepDone],
        classifier: AskedPrompts | None = None,
        head: Steady | None = None,
    ) -> None:
        self.expected, self.step = expected, step
        self._classifier, self._head = classifier, head
        self.close = classifier.close if classifier is not None else lambda: None

    def predict(self, wanted: Predict) -> LengthKnown | None:
        if self._classifier is None:
            return LengthKnown(wanted.key, None)
        answer = self._classifier.ask(wanted.key, wanted.prompt)
        return None if answer is None else _known(answer)

    def known(self) -> Iterator[LengthKnown]:
        """What was named since it was asked last."""
        return map(_known, self._classifier.answers()) if self._classifier is not None else iter(())

    def with_status(self, heartbeat: Heartbeat) -> Heartbeat:
        """The beat, with what the core cannot know: whether the predictor works at all, and what it has read."""
        status, parts = heartbeat.predictor, [part for part in (self._classifier, self._head) if part is not None]
        if status is None or not parts:
            return heartbeat
        troubles = [part.trouble for part in parts if part.trouble]
        asked = self._classifier
        status = msgspec.structs.replace(
            status,
            on=status.on and len(troubles) < len(parts),
            note="; ".join(filter(None, [status.note, *troubles])),
            cut=0 if asked is None else asked.cut,
            unread=0 if asked is None else asked.unread,
        )
        return msgspec.structs.replace(heartbeat, predictor=status)


def serving_of(
    predictor: LoadedPredictor, engine: Engine, config: Config, wake: Callable[[], None], logger: logging.Logger
) -> PredictorServing:
    """`wake` ends the worker's wait, from any thread. Raises EngineError and ConfigError when the engine shows no
    hidden states to one that reads them, unless `auto` has chosen it: then it is the prior's turn. Also ModelError and
    TextError, of the tokeniser."""
    head: Steady | None = None
    step: Callable[[int], StepDone] = engine.step
    if predictor.hidden is not None:
        head = Steady(predictor.hidden, logger)
        try:
            step = estimating(engine, head)
        except (EngineError, PredictError) as error:
            if config.predictor.kind != "auto":
                raise ConfigError(f'predictor.kind = "{config.predictor.kind}": {error}') from None
            return PredictorServing(_fallen_back(config, logger, str(error)).expected, engine.step)
    classifier = None if predictor.classifier is None else asked(predictor.classifier, config, wake, logger)
    return PredictorServing(predictor.expected, step, classifier, head)


def asked(classifier: Loaded, config: Config, wake: Callable[[], None], logger: logging.Logger) -> AskedPrompts:
    """Ready to be asked. Raises ModelError and TextError."""
    cut = classifier.card.cut
    reading = Reading(classifier, reader(build.tokenizer(config)), cut, logger)
    if config.predictor.mode == "sequential":
        return Sequential(reading)
    return Parallel(reading, wake, 0 if cut else ALONE_TOKENS, begin=one_core)


def _known(answer: Answer) -> LengthKnown:
    key, distribution = answer
    return LengthKnown(key, None, distribution)


class StatusNetwork:
    """A worker's network, over which beats go with the predictor's own part."""

    def __init__(self, network: Network, serving: PredictorServing) -> None:
        self.network, self.serving = network, serving
        self.publish, self.connect, self.disconnect = network.publish, network.connect, network.disconnect

    def send(self, peer: str, message: Any) -> None:
        self.network.send(peer, self.serving.with_status(message) if isinstance(message, Heartbeat) else message)
