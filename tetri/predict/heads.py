"""A trained head: small networks that map features to a length distribution. They run in numpy, so that a worker that
only reads hidden states needs no further library.

Each network has one output logit for every bucket but the last: the probability that the text ends in this bucket,
given that it got this far (a discrete hazard). Hazards can learn from a text that was cut off, and they keep the order
of the buckets. The distribution is the mean over the networks.
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
CLIP = 8.0  # standard deviations; features are clipped here, because larger values did not occur in training


@dataclass(frozen=True)
class Head:
    """A set of networks with their normalisation.

    mean, scale  of each feature in training, float32 [inputs]
    networks     the layers of each network, (weight [out, in], bias [out]) with ReLU between them
    temperature  divisor of the last layer's logits
    seen         32 bits of the hash of each prompt in the training data
    later        the head for positions after the prompt's end; None: this one
    """

    mean: Array
    scale: Array
    networks: tuple[tuple[tuple[Array, Array], ...], ...]
    temperature: float = 1.0
    seen: frozenset[int] = field(default=frozenset(), repr=False)
    later: Head | None = field(default=None, repr=False)

    def has_seen(self, key: str) -> bool:
        """Whether the prompt with this key was in the training data (rarely true by a hash collision)."""
        return _short(key) in self.seen

    @property
    def inputs(self) -> int:
        """Number of features."""
        return len(self.mean)

    @property
    def buckets(self) -> int:
        """Number of buckets of a distribution."""
        return len(self.networks[0][-1][1]) + 1

    def normed(self, features: Array) -> Array:
        """Normalised and clipped features, float32 [n, inputs]; NaN becomes 0."""
        near = np.nan_to_num((features - self.mean) / self.scale, nan=0.0, posinf=CLIP, neginf=-CLIP)
        return np.asarray(np.clip(near, -CLIP, CLIP), np.float32)

    def distribution(self, features: Array) -> npt.NDArray[np.float64]:
        """Features [n, inputs] -> length distributions [n, buckets]; each row adds up to 1."""
        normed = self.normed(features)
        every = [shares(_logits(network, normed) / self.temperature) for network in self.networks]
        return np.asarray(np.mean(every, axis=0))


def _logits(network: tuple[tuple[Array, Array], ...], x: Array) -> Array:
    for weight, bias in network[:-1]:
        x = np.maximum(x @ weight.T + bias, 0.0)
    weight, bias = network[-1]
    return np.asarray(x @ weight.T + bias, np.float32)


def shares(logits: Array) -> npt.NDArray[np.float64]:
    """Logits of the hazards [n, buckets - 1] -> distributions [n, buckets]."""
    ends = 1.0 / (1.0 + np.exp(-np.clip(logits.astype(np.float64), -30.0, 30.0)))
    lives = np.cumprod(1.0 - ends, axis=1)
    before = np.concatenate([np.ones_like(lives[:, :1]), lives[:, :-1]], axis=1)
    return np.concatenate([before * ends, lives[:, -1:]], axis=1)


def save_head(head: Head, path: Path, keys: Sequence[str] = ()) -> str:
    """Write the weights as float16, with the `keys` of the training prompts. Returns the file's hash."""
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
    """Load the head at `path` and check its hash. Raises PredictError."""
    try:
        from safetensors.numpy import load
    except ImportError:
        raise PredictError("a trained predictor needs safetensors: pip install 'tetri[predictor]'") from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PredictError(f"{path}: {error.strerror or error}") from None
    if xxhash.xxh3_128_hexdigest(data) != digest:
        raise PredictError(f"{path} is cut off or does not belong to its card: train again")
    try:
        tensors = load(data)
        seen = frozenset(map(int, tensors.pop("seen")))
        return _head({name: np.asarray(value, np.float32) for name, value in tensors.items()}, seen)
    except (KeyError, ValueError, IndexError) as error:
        raise PredictError(f"{path} is not a trained head ({error}): train again") from None


def _head(tensors: dict[str, Array], seen: frozenset[int]) -> Head:
    networks: list[tuple[tuple[Array, Array], ...]] = []
    while f"{len(networks)}.0.weight" in tensors:
        layers: list[tuple[Array, Array]] = []
        while (name := f"{len(networks)}.{len(layers)}") and f"{name}.weight" in tensors:
            layers.append((tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
        networks.append(tuple(layers))
    head = Head(tensors["mean"], tensors["scale"], tuple(networks), float(tensors["temperature"][0]), seen)
    head.distribution(head.mean[None])  # raises ValueError when the shapes do not fit
    return head
