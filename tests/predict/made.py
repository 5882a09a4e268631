"""Predictors made by hand, for tests: a tiny head, a tiny encoder that transformers can load."""

import json
import string

import numpy as np
import pytest

from tetri.predict.card import HEAD, Card, write_card
from tetri.predict.encoder import load_encoder
from tetri.predict.heads import Head, save_head
from tetri.predict.lengths import PredictError, States, pack_states, prompt_key, states_path
from tetri.predict.model import PLACE, load

BUCKETS, WIDTH = 5, 100
COUNT = 120  # prompts of the file that most are trained on


def quiet(line):
    """Hears what is told while something is trained."""


def head(inputs, buckets=BUCKETS, seed=0):
    rng = np.random.default_rng(seed)
    first = (rng.normal(size=(4, inputs)).astype("f4"), np.zeros(4, "f4"))
    last = (rng.normal(size=(buckets - 1, 4)).astype("f4"), np.zeros(buckets - 1, "f4"))
    return Head(np.zeros(inputs, "f4"), np.ones(inputs, "f4"), ((first, last),), 1.5)


def card(kind, digest, **more):
    prior = (0.4, 0.3, 0.1, 0.1, 0.1)
    return Card(kind, "tiny", "weights-of-tiny", WIDTH, prior, (0.25, 0.5, 0.75), digest, **more)


def hidden(folder, hidden_size=6):
    """A predictor of kind hidden in `folder`."""
    place = folder / "hidden"
    place.mkdir(parents=True)
    write_card(card("hidden", save_head(head(hidden_size + PLACE), place / HEAD), layer=2, every=8), place)
    return folder


def classifier(folder):
    """A predictor of kind classifier in `folder`, with an encoder of its own."""
    place = folder / "classifier"
    encoder(place / "encoder")
    loaded = load_encoder("encoder", 8, 0, place)
    digest = save_head(head(loaded.vector), place / HEAD)
    write_card(card("classifier", digest, encoder="encoder", encoder_hash=loaded.digest, cut=8), place)
    return folder


def encoder(folder, kind="bert"):
    """An untrained encoder (bert) or decoder (llama) of two layers that reads characters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_letters, *string.digits, *"?.,:"]
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    folder.mkdir(parents=True)
    model = _untrained(kind, vocab_size=len(words), **sizes)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(words)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _untrained(kind, **sizes):
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**sizes)) if kind == "bert" else LlamaModel(LlamaConfig(**sizes))


def _tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return json.loads(made.to_str())


def lengths(path, count, layers=(), samples=1, limit=256, seed=0):
    """A file as `collect` writes it: long answers to prompts that ask for a story, short ones to the others. Of the
    state's 6 numbers the first says which, the second how much is left."""
    dice = np.random.default_rng(seed)
    plan = {"model": "tiny", "weights": "weights-of-tiny", "temperature": 0.7, "max_tokens": limit, "seed": 0}
    path.with_name(f"{path.name}.json").write_text(json.dumps(plan | {"layers": list(layers), "every": 32}))
    lines, records = [], []
    for sample in range(samples):
        for number in range(count):
            story = number % 2
            prompt = f"tell a long story about {number}" if story else f"what is {number} and {number}?"
            tokens = int(min(max(dice.normal(200 if story else 40, 25), 1), limit))
            row = {"prompt": prompt, "tokens": tokens, "sample": sample, "prompt_tokens": 9}
            row["ended"] = "length" if tokens == limit else "stop"
            lines.append(json.dumps(row | {"source": "stories" if story else "sums"}))
            known = tuple(range(0, tokens, 32))
            rows = dice.normal(size=(len(known), len(layers), 6))
            rows[:, -1:, 0], rows[:, -1:, 1] = story, (tokens - np.array(known)[:, None]) / 100
            records.append(pack_states(States((prompt_key(prompt), sample), known, rows)))
    path.write_text("\n".join(lines) + "\n")
    if layers:
        states_path(path).write_bytes(b"".join(records))
    return path


def says(folder, kind, *words, weights="weights-of-tiny"):
    """That predictor cannot be loaded, and one line with these words tells why."""
    with pytest.raises(PredictError) as caught:
        load(folder, kind, weights)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)
