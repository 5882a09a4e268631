"""Small byte-level checkpoint folders, as far as their texts go."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<e>\n{% endfor %}<s>assistant{{ '\n' }}"
CORPUS = [
    "the cat sat on the mat and then the other cat",
    "naïve café 日本語 🙂 ",
    "12 345 678",
    "def f(x):\n    return x",
]


def make_checkpoint(folder: Path, corpus=CORPUS, **settings) -> Path:
    """Trained on a few lines."""
    folder.mkdir(exist_ok=True)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "<e>"], initial_alphabet=alphabet)
    inner.train_from_iterator(corpus * 5, trainer)
    inner.add_tokens([AddedToken("a b\u2009c", special=False), AddedToken("Ġplain", special=False)])
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<e>"}, "chat_template": TEMPLATE, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    return folder
