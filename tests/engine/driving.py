"""Driving an engine by hand, as a worker would: legs, hand-overs, and what its steps say."""

from __future__ import annotations

from tetri.engine_request import EngineRequest, StepDone
from tetri.request import Sampling, blocks_for


def prompt(length, salt=0):
    return tuple((7 * position + salt) % 50 + 3 for position in range(length))


def engine_request(key, phase, tokens, output_from=None, siblings=(), ahead=0, **sampling):
    sampling = Sampling(**{"max_tokens": 8, "ignore_eos": True, **sampling})
    begin = len(tokens) if output_from is None else output_from
    return EngineRequest(key, phase, tuple(tokens), begin, sampling, tuple(siblings), ahead)


def prefill(engine, key, tokens, **sampling):
    """Run a prefill leg alone: the copies of its blocks, taken as each chunk fills them, and its token."""
    engine.add(engine_request(key, "prefill", tokens, **sampling))
    copies, done = [], 0
    while done < len(tokens):
        step = engine.step()
        ((_, _, done),) = ((span.key, span.start, span.stop) for span in step.spans if span.key == key)
        last = done == len(tokens)
        stop = blocks_for(done, engine.capacity.block_tokens) if last else done // engine.capacity.block_tokens
        copies += export(engine, key, len(copies), stop)
    return copies, step.tokens[0]


def export(engine, key, start, stop):
    blocks = [bytearray(engine.fingerprint.block_bytes) for _ in range(stop - start)]
    engine.export(key, start, stop, [memoryview(block) for block in blocks])
    return blocks


def adopt(engine, key, tokens, copies, token, output_from=None, **sampling):
    """Bring a decode leg into the running batch."""
    engine.add(engine_request(key, "decode", tokens, output_from, **sampling))
    assert key in engine.step().allocated
    blocks = [memoryview(block) for block in copies]
    engine.adopt(key, 0, [blocks[0], *((block[:99], block[99:]) for block in blocks[1:])])  # the others in parts
    engine.admit(key, token)


def adopt_all(engine, prompts, **sampling):
    """Prefill prompts one by one, then bring all of them into the batch at once: their first tokens by key."""
    ready = {key: prefill(engine, f"p{key}", tokens, **sampling) for key, tokens in prompts.items()}
    for key, tokens in prompts.items():
        engine.add(engine_request(key, "decode", tokens, **sampling))
    assert engine.step().allocated == tuple(prompts)
    for key, (copies, first) in ready.items():
        engine.adopt(key, 0, [memoryview(block) for block in copies])
        engine.admit(key, first.token)
    return {key: first.token for key, (_, first) in ready.items()}


def stay(engine, key, decode_key, tokens, **sampling):
    """Run a prefill leg that stays: its token. What waits for its admission then is `decode_key`."""
    engine.add(engine_request(key, "prefill", tokens, **sampling))
    engine.stay(key, decode_key)
    while not (sampled := engine.step().tokens):
        pass
    return sampled[0]


def held(steps, key):
    """How many blocks the leg has after each of these steps, as far as they tell."""
    counts, last = [], 0
    for step in steps:
        ended = any(sampled.key == key and sampled.reason for sampled in step.tokens)
        last = 0 if ended else dict(step.held).get(key, last)
        counts.append(last)
    return counts


def computed(step: StepDone):
    """Positions by key."""
    return {sampled.key: len(sampled.ids) for sampled in step.tokens} | {
        span.key: span.stop - span.start for span in step.spans
    }


def run(engine, *keys, most=1, chunk=None):
    """Step until these legs have ended: their tokens, the reasons of their ends, and all the steps."""
    tokens, reasons, steps = {key: [] for key in keys}, {}, []
    while len(reasons) < len(keys):
        step = engine.step(most, chunk)
        assert step.spans or step.tokens, "the engine does not go on"
        steps.append(step)
        for sampled in step.tokens:
            tokens[sampled.key] += sampled.ids
            if sampled.reason:
                reasons[sampled.key] = sampled.reason
    return tokens, reasons, steps
