"""The baseline: plain vLLM in one process, driven step by step, without connector, plug-in or tetri's engine.

`Direct` runs this module as a program. It reads a JSON object {"prompts": [ids, ...], "tokens": N} from each line of
stdin and answers with one on stdout. It stays loaded while the live cluster computes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tetri.bench.overhead.measure import Run, stopped
from tetri.bench.report import BenchError, own_stdout


class Direct:
    """Runs the vLLM process. `settings`: the parameters of `engine_arguments`. Methods raise BenchError if it ends."""

    def __init__(self, settings: dict[str, Any], cpu: int, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-P", "-m", __name__, str(cpu), json.dumps(settings)]
        with open(log, "wb") as output:
            # Its own session, like the live workers: Linux divides CPU time between sessions first.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until the engine is loaded."""
        self._answer()

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        """Run all prompts at once with `tokens` greedy tokens each; return `Run.plain`."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        return self._answer()

    def stopped(self) -> AbstractContextManager[None]:
        """Stop the process (SIGSTOP) in this context."""
        return stopped([self._process.pid])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            output = self._log.read_text(errors="replace").strip().splitlines() or ["no reason in its log"]
            raise BenchError(f"plain vLLM ended: {output[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Kill the process."""
        with self._process:  # closes its pipes, and waits
            self._process.kill()  # nothing needs a clean shutdown


def engine_arguments(
    model: str,
    dtype: str,
    context: int,
    chunk_tokens: int,
    max_batch: int,
    block_tokens: int,
    kv_bytes: int,
    compiled: bool = False,
) -> dict[str, Any]:
    """Return the engine arguments of tetri/engine/vllm/setup.py without the connector and the sampler plug-in;
    `compiled`: with vLLM's compiler, which is its default."""
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": context or None,
        "enforce_eager": not compiled,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
        "disable_hybrid_kv_cache_manager": True,
        "max_num_batched_tokens": chunk_tokens,
        "max_num_seqs": min(2 * max_batch + 16, chunk_tokens),
        "block_size": block_tokens,
        "kv_cache_memory_bytes": kv_bytes,
        "generation_config": "vllm",
        "disable_log_stats": True,
    }


def load(settings: dict[str, Any]) -> Any:
    """Load vLLM's EngineCore in this process."""
    from tetri.engine.vllm.setup import prepare_environment

    threads = prepare_environment()  # must run before torch and vLLM are imported
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    torch.set_num_threads(threads)
    config = EngineArgs(**engine_arguments(**settings)).create_engine_config()
    core = EngineCore(config, Executor.get_class(config), log_stats=False)
    gc.collect()
    gc.freeze()  # as the live engine does
    return core


def generate(core: Any, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """Run all prompts at once with `tokens` greedy tokens each."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    arrivals: list[list[float]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    run = Run(arrivals, tokens, time.process_time)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        core.scheduler.add_request(Request(str(index), list(prompt), params, None))
    while core.scheduler.has_requests():
        outputs, _ = core.step()
        now = time.monotonic()
        for output in outputs[0].outputs if outputs else ():
            ids[int(output.request_id)] += output.new_token_ids
            arrivals[int(output.request_id)].append(now)
        run.look()
    return run.plain(ids)


def main() -> None:
    """Serve the lines of stdin. Arguments: the CPU, and the settings in JSON."""
    os.sched_setaffinity(0, {int(sys.argv[1])})  # before any library counts the CPUs
    answers = own_stdout()
    core = load(json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(core, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
