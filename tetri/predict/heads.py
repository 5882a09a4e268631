"""A trained head: small networks from features to the odds of each bucket, in numpy, so that a worker that only reads
hidden states needs no more.

Each network ends in one logit for every bucket but the last: the chance that the text ends in this bucket, once it has
come so far (a discrete hazard). So a text that was cut off in training teaches what it can, that it got so far, and
neighbouring buckets keep their order without a label for each. The odds are the mean over the networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from tetri.predict.lengths import PredictError

Array = npt.NDArray[np.float32]
FURTHEST = 8.0  # standard deviations; a feature that is further out than any in training says no more than that


@dataclass(frozen=True)
class Head:
    """`mean`, `scale`: of each feature in training. `networks`: of each the layers, (weight [out, in], bias [out]),
    ReLU between them. `temperature`: what the last layer's logits are divided by. `seen`: of the hash of each prompt
    that it learnt from, 32 bits. `later`: the head for the positions after the prompt's end; None: the same one."""

    mean: Array
    scale: Array
    networks: tuple[tuple[tuple[Array, Array], ...], ...]
    temperature: float = 1.0
    seen: frozenset[int] = field(default=frozenset(), repr=False)
    later: Head | None = field(default=None, repr=False)

    def has_seen(self, key: str) -> bool:
        return _short(key) in self.seen

    @property
    def inputs(self) -> int:
        return len(self.mean)

    @property
    def buckets(self) -> int:
        return len(self.networks[0][-1][1]) + 1

    def normed(self, features: Array) -> Array:
        near = np.nan_to_num((features - self.mean) / self.scale, nan=0.0, posinf=FURTHEST, neginf=-FURTHEST)
        return np.asarray(np.clip(near, -FURTHEST, FURTHEST), np.float32)

    def distribution(self, features: Array) -> npt.NDArray[np.float64]:
        """[n, inputs] -> [n, buckets], each row adding up to 1."""
        normed = self.normed(features)
        every = [shares(_logits(network, normed) / self.temperature) for network in self.networks]
        return np.asarray(np.mean(every, axis=0))


def _logits(network: tuple[tuple[Array, Array], ...], x: Array) -> Array:
    for weight, bias in network[:-1]:
        x = np.maximum(x @ weight.T + bias, 0.0)
    weight, bias = network[-1]
    return np.asarray(x @ weight.T + bias, np.float32)


def shares(logits: Array) -> npt.NDArray[np.float64]:
    """Hazards' logits [n, buckets - 1] -> odds [n, buckets]."""
    ends = 1.0 / (1.0 + np.exp(-np.clip(logits.astype(np.float64), -30.0, 30.0)))
    lives = np.cumprod(1.0 - ends, axis=1)
    before = np.concatenate([np.ones_like(lives[:, :1]), lives[:, :-1]], axis=1)
    return np.concatenate([before * ends, lives[:, -1:]], axis=1)


def save_head(head: Head, path: Path, keys: Sequence[str] = ()) -> str:
    """Weights as float16. `keys`: of the prompts that it learnt from. Returns the file's hash."""
    from safetensors.numpy import save

    tensors: dict[str, Any] = {"mean": head.mean, "scale": head.scale}
    tensors["temperature"] = np.array([head.temperature], np.float32)
    for number, network in enumerate(head.networks):
        for depth, (weight, bias) in enumerate(network):
            tensors[f"{number}.{depth}.weight"] = weight.astype(np.float16)
            tensors[f"{number}.{depth}.bias"] = bias.astype(np.float16)
    tensors["seen"] = np.array(sorted({_short(key) for key in keys}), np.uint32)
    data = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    path.write_bytes(data)
    return xxhash.xxh3_128_hexdigest(data)


def _short(key: str) -> int:
    return int(key[:8], 16)


def load_head(path: Path, digest: str) -> Head:
    """The head whose file has this hash. Raises PredictError."""
    try:
        from safetensors.numpy import load
    except ImportError:
        raise PredictError("a trained predictor needs safetensors: pip install 'tetri[predictor]'") from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PredictError(f"{path}: {error.strerror or error}") from None
    if xxhash.xxh3_128_hexdigest(data) != digest:
        raise PredictError(f"{path} is cut off or not the one its card is about: train again")
    try:
        tensors = load(data)
        seen = frozenset(map(int, tensors.pop("seen")))
        head = _head({name: np.asarray(value, np.float32) for name, value in tensors.items()}, seen)
    except (KeyError, ValueError, IndexError) as error:
        raise PredictError(f"{path} is no trained head ({error}): train again") from None
    return head


def _head(tensors: dict[str, Array], seen: frozenset[int]) -> Head:
    networks: list[tuple[tuple[Array, Array], ...]] = []
    while f"{len(networks)}.0.weight" in tensors:
        layers: list[tuple[Array, Array]] = []
        while (name := f"{len(networks)}.{len(layers)}") and f"{name}.weight" in tensors:
            layers.append((tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
        networks.append(tuple(layers))
    head = Head(tensors["mean"], tensors["scale"], tuple(networks), float(tensors["temperature"][0]), seen)
    head.distribution(head.mean[None])  # the shapes fit
    return head
