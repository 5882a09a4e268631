"""In the place of tetri.engine.vllm.writer.Writer: the length of a text is known beforehand, and each step adds a token
to all of them."""

from types import SimpleNamespace

import numpy as np

LAYERS, HIDDEN = 3, 4


class PlayedWriter:
    """`lengths`: of the text of each job, by its key, PROMPT_KEY-SAMPLE; else from its seed. `at_step`: called with
    the number of each step."""

    def __init__(self, max_tokens=40, every=8, context=200, lengths=(), at_step=lambda number: None):
        self.context, self.max_tokens, self.every = context, max_tokens, every
        self.lengths, self.at_step = dict(lengths), at_step
        self.most, self.steps = 0, 0
        self.added = {}
        self._texts = {}

    def __len__(self):
        return len(self._texts)

    def add(self, key, prompt, sampling):
        assert key not in self._texts and len(prompt) + sampling.max_tokens <= self.context
        self.added[key] = list(prompt), sampling
        self._texts[key] = SimpleNamespace(key=key, ids=[], reason="", states={})
        self.most = max(self.most, len(self))

    def step(self):
        self.steps += 1
        self.at_step(self.steps)
        ended = []
        for key, text in list(self._texts.items()):
            if len(text.ids) % self.every == 0:
                text.states[len(text.ids)] = np.full((LAYERS, HIDDEN), len(text.ids) + self.length(key) / 100, "f4")
            text.ids.append(1)
            if len(text.ids) == self.length(key):
                text.reason = "length" if len(text.ids) == self.max_tokens else "stop"
                ended.append(self._texts.pop(key))
        return ended

    def length(self, key):
        return self.lengths.get(key) or 1 + self.added[key][1].seed % self.max_tokens

    def close(self):
        self._texts.clear()
