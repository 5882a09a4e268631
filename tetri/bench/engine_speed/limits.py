"""The least time of a step on a core: by the bytes that it reads, and by its arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelSize:
    """What a model reads and computes. `layers_weights`, `head_weights`: numbers in the layers, and in the product that
    gives the logits; `kv_numbers`: of one token's KV; `attention`: width of the queries over all layers."""

    layers_weights: int
    head_weights: int
    kv_numbers: int
    attention: int
    number_bytes: int

    def decode(self, batch: int, context: int) -> tuple[float, float]:
        """(bytes, operations) of a decode step of `batch` requests with `context` tokens each."""
        weights = self.layers_weights + self.head_weights
        read = weights + batch * context * self.kv_numbers
        return read * self.number_bytes, batch * (2 * weights + 4 * context * self.attention)

    def chunk(self, tokens: int) -> tuple[float, float]:
        """(bytes, operations) of a step that computes a prompt of so many tokens."""
        read = self.layers_weights + self.head_weights + tokens * self.kv_numbers
        products = 2 * tokens * self.layers_weights + 2 * self.head_weights
        return read * self.number_bytes, products + 2 * tokens * (tokens + 1) * self.attention


def model_size(folder: Path, dtype: str) -> ModelSize:
    """The size of the checkpoint in a folder."""
    config = json.loads((folder / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    head = config["vocab_size"] * config["hidden_size"]
    counts = {name: prod(shape) for file in sorted(folder.glob("*.safetensors")) for name, shape in _shapes(file)}
    inside = sum(count for name, count in counts.items() if "embed_tokens" not in name and "lm_head" not in name)
    return ModelSize(inside, head, 2 * layers * kv_heads * width, layers * heads * width, BYTES[dtype])


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    with file.open("rb") as opened:
        head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [(name, tensor["shape"]) for name, tensor in head.items() if name != "__metadata__"]
