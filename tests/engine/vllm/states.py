"""Hidden states by Hugging Face transformers, and how far two are from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

#: Of the difference of two states, relative to the state: what other kernels and other chunk boundaries leave in
#: float32 (2e-5 was seen). The state of the token before is further than FAR.
NEAR, FAR = 1e-4, 1e-2


def by_transformers(model: Path, layers: Sequence[int]) -> Callable[[Sequence[int]], np.ndarray]:
    """Tokens -> float32 [tokens, layers, hidden]."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def states(tokens: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            found = whole.model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
        return torch.stack([found[layer][0] for layer in layers], dim=1).numpy()

    return states


def distance(row: np.ndarray, other: np.ndarray) -> float:
    """The largest over the layers of |row - other| / |other|."""
    return float(np.max(np.linalg.norm(row - other, axis=-1) / np.linalg.norm(other, axis=-1)))
