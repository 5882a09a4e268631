"""One side of the comparison, a process that has one engine loaded: `python FILE SIDE SETTINGS`.

It reads a JSON object from each line of stdin and answers with one on stdout:

{"do": "begin", "batch": B, "context": C}   start B requests of C tokens and go on until all of them decode
{"do": "steps", "count": N}                 the seconds of N more of their steps
{"do": "end"}                               end them
{"do": "chunks", "tokens": T, "count": N}   the seconds of N steps, each with one whole prompt of T tokens
{"do": "profile", "count": N}               where the time of N more steps goes: milliseconds of a step by kind
{"do": "machine"}                           instead of all these, of the side "machine": see `Machine`

The file runs with the `tetri` that PYTHONPATH names, also an older one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

TOKEN = 11  # valid in every vocabulary; which tokens a prompt has does not influence times
ENDLESS = 1 << 20


class Plain:
    """vLLM's own engine core called in a loop, with vLLM's own scheduler and sampler, and no connector."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from tetri.bench.overhead.direct import load

        self.core = load(settings)
        self.context: int = self.core.vllm_config.model_config.max_model_len
        self.count = 0
        self.open: list[str] = []

    def add(self, tokens: int, most: int) -> None:
        """Add a prompt of so many tokens with `most` greedy tokens of output."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.count += 1
        params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False)
        self.open.append(f"r{self.count}")
        self.core.scheduler.add_request(Request(self.open[-1], [TOKEN] * tokens, params, None))

    def step(self) -> int:
        """Run a step; returns how many requests got a token."""
        outputs, _ = self.core.step()
        return len(outputs[0].outputs) if outputs else 0

    def begin(self, batch: int, context: int) -> None:
        """As at the head of this file."""
        for _ in range(batch):
            self.add(context, min(self.context - context, ENDLESS))
        while self.step() < batch:
            pass

    def steps(self, count: int) -> list[float]:
        """As at the head of this file."""
        return [_timed(self.step) for _ in range(count)]

    def end(self) -> None:
        """As at the head of this file."""
        from vllm.v1.request import RequestStatus

        self.core.scheduler.finish_requests(self.open, RequestStatus.FINISHED_ABORTED)
        self.open.clear()
        self.step()

    def chunks(self, tokens: int, count: int) -> list[float]:
        """As at the head of this file."""
        for _ in range(count):
            self.add(tokens, 1)
        self.open.clear()
        return self.steps(count)


class Engine:
    """tetri's engine, called in a loop through its contract."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from tetri.config import load
        from tetri.proc import build

        self.engine = build.engine(load(Path(settings["conf"]), settings["overrides"]))
        self.count = 0
        self.open: list[str] = []

    def add(self, phase: Any, tokens: int, most: int) -> str:
        """Add an engine request; returns its key."""
        from tetri.engine_request import EngineRequest
        from tetri.request import Sampling

        self.count += 1
        key = f"{phase}-{self.count}"
        sampling = Sampling(max_tokens=most, ignore_eos=True)
        self.engine.add(EngineRequest(key, phase, (TOKEN,) * tokens, tokens, sampling))
        self.open.append(key)
        return key

    def begin(self, batch: int, context: int) -> None:
        """As at the head of this file."""
        from tetri.request import blocks_for

        capacity, zeros = self.engine.capacity, memoryview(bytes(self.engine.fingerprint.block_bytes))
        keys = [self.add("decode", context, min(capacity.context - context, ENDLESS)) for _ in range(batch)]
        waiting = {*keys}
        while waiting:
            waiting -= {*self.engine.step().allocated}
        for key in keys:
            self.engine.adopt(key, 0, [zeros] * blocks_for(context, capacity.block_tokens))
            self.engine.admit(key, TOKEN)
        while len(self.engine.step().tokens) < batch:
            pass

    def steps(self, count: int) -> list[float]:
        """As at the head of this file."""
        return [_timed(self.engine.step) for _ in range(count)]

    def end(self) -> None:
        """As at the head of this file."""
        while self.open:
            self.engine.cancel(self.open.pop())
        self.engine.step()

    def chunks(self, tokens: int, count: int) -> list[float]:
        """As at the head of this file."""
        for _ in range(count):
            self.add("prefill", tokens, 1)
        self.open.clear()
        return self.steps(count)


class Begun:
    """An engine that notes when each of its steps begins, and how many tokens it gave."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.times: list[float] = []
        self.tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, *given: Any) -> Any:
        """As in `Engine`."""
        self.times.append(time.perf_counter())
        done = self._engine.step(*given)
        self.tokens = len(done.tokens)
        return done


class WholeWorker:
    """A worker without the other processes: its core, executor, loop, KV store and sockets. The time of a step is that
    from its begin to the begin of the next one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import logging

        from tetri.clock import Clock
        from tetri.config import load
        from tetri.core.actions import BROKER
        from tetri.core.worker.worker import Worker
        from tetri.proc import build
        from tetri.proc.network import HubNetwork, received
        from tetri.proc.worker import copies_of, executor_of
        from tetri.wire.messages import ClusterView, InboxMessage, Membership

        config, logger, stack = load(Path(settings["conf"]), settings["overrides"]), logging.getLogger(), ExitStack()
        iid = config.workers[0].iid
        hub = build.open_hub(config, iid, logger)
        made, store = build.engine_and_store(config, iid, hub.wait, hub.wake, stack)
        self.engine = Begun(made)
        own = build.identity(config, iid, 1, self.engine, store)
        self.clock = Clock.patient(own.patience_s)
        self.core = Worker(own, Random(1), self.clock.now())
        copies = copies_of(self.engine, store, logger)
        network = HubNetwork(hub, logger, store.counters)
        self.act = executor_of(self.core, self.clock, self.engine, copies, network, None).carry_out
        hub.bind_inbox(own.instance.inbox, InboxMessage)
        hub.connect(BROKER, config.events_address)
        hub.connect_publisher(config.loads_address)
        hub.subscribe(config.views_address, ClusterView)
        self.poll = partial(received, hub, copies, ())
        self.listed = Membership(epoch=1, number=1, serial=1, instances=[own.instance])
        self.count = 0
        self.open: list[str] = []

    def tell(self, message: Any) -> None:
        """Handle a message as if it had come over a socket."""
        self.act(self.core.handle(message, self.clock.now()))

    def run(self, running: Callable[[], bool]) -> None:
        """Run the worker's loop while `running()`."""
        from tetri.net.loop import run

        run(self.core, self.poll, self.act, self.clock, running)

    def add(self, tokens: int, most: int) -> None:
        """Assign a request with so many tokens of prompt and output."""
        from tetri.request import Sampling
        from tetri.wire.messages import Assign

        self.count += 1
        self.open.append(f"r{self.count}")
        self.tell(Assign(self.open[-1], 1, [TOKEN] * tokens, [], Sampling(max_tokens=most, ignore_eos=True)))

    def begin(self, batch: int, context: int) -> None:
        """As at the head of this file."""
        self.tell(self.listed)
        for _ in range(batch):
            self.add(context, min(self.engine.capacity.context - context, ENDLESS))
        self.engine.tokens = 0
        self.run(lambda: self.engine.tokens < batch)

    def steps(self, count: int) -> list[float]:
        """As at the head of this file."""
        times = self.engine.times
        times.clear()
        self.run(lambda: len(times) <= count)
        return [after - before for before, after in pairwise(times)]

    def end(self) -> None:
        """As at the head of this file."""
        from tetri.wire.messages import Close

        while self.open:
            self.tell(Close(self.open.pop(), 1, reason="abort"))

    def chunks(self, tokens: int, count: int) -> list[float]:
        """As at the head of this file."""
        self.tell(self.listed)
        for _ in range(count + 1):
            self.add(tokens, 1)
        found = self.steps(count)
        self.end()
        return found


class Machine:
    """What the core can do at most."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.numbers = torch.ones(1 << 27)  # 512 MiB: larger than the caches
        self.factors = [torch.randn(2048, 2048).to(getattr(torch, settings["dtype"])) for _ in range(2)]

    def machine(self) -> dict[str, float]:
        """Bytes a second that one pass over memory reads, and operations a second of a large matrix product."""
        read = min(_timed(self.numbers.sum) for _ in range(5))
        multiply = min(_timed(lambda: self.factors[0] @ self.factors[1]) for _ in range(5))
        return {"bytes_s": self.numbers.nbytes / read, "operations_s": 2 * 2048**3 / multiply}


SIDES: dict[str, type[Any]] = {"plain": Plain, "engine": Engine, "worker": WholeWorker, "machine": Machine}
#: Parts of a step, by the names of torch's operations; the first that matches counts.
KINDS = {
    "linear layers": ("onednn_mm", "mkldnn_linear", "addmm", "aten::mm", "aten::linear", "weight_packed_linear"),
    "attention": ("cpu_attention_with_kv_cache", "cpu_attn_reshape_and_cache"),
    "reading KV ahead": ("aten::index_select",),
    "other operations": ("",),
}


def profiled(steps: Callable[[int], list[float]], count: int) -> dict[str, float]:
    """Milliseconds of a step in each of KINDS, the rest, which is Python, and the longest operations."""
    from torch.profiler import ProfilerActivity, profile

    whole = sorted(steps(count))[count // 2] * 1000
    with profile(activities=[ProfilerActivity.CPU]) as made:
        steps(count)
    parts, single = dict.fromkeys(KINDS, 0.0), dict[str, float]()
    for row in made.key_averages():
        name = next(kind for kind, names in KINDS.items() if any(each in row.key for each in names))
        single[row.key] = row.self_cpu_time_total / 1000 / count
        parts[name] += single[row.key]
    longest = sorted(single, key=single.__getitem__, reverse=True)[:12]
    rest = {"Python and the rest": whole - sum(parts.values())}
    return {"step": whole, **parts, **rest, **{f"  {name}": single[name] for name in longest}}


def _timed(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    """Serve the lines of stdin."""
    from tetri.bench.report import own_stdout

    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    os.sched_setaffinity(0, {settings["cpu"]})  # before any library counts the CPUs
    answers = own_stdout()
    side = SIDES[kind](settings["engine"])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        do = asked.pop("do")
        found = profiled(side.steps, **asked) if do == "profile" else getattr(side, do)(**asked)
        print(json.dumps({"found": found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
