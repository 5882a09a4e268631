"""The vLLM engine, on the CPU or a GPU, in this process. It drives vLLM's EngineCore step by step.

A process can have only one, because vLLM keeps global state. KV bytes are copied directly from and to the KV tensors,
in whole blocks, between steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tetri.engine.base import EngineError, EngineRequest, HiddenStateHook, Sampled, Span, StepDone
from tetri.engine.vllm.sampler import GREEDY_BELOW, vllm_params
from tetri.engine.vllm.setup import (
    VllmSettings,
    block_bytes_of,
    check_layout,
    engine_config,
    make_fingerprint,
    memory_of,
    prepare_environment,
    start_core,
    stop_ids,
)
from tetri.engine_request import INVALID
from tetri.instance import Capacity
from tetri.kv.cuda.runtime import Device
from tetri.request import Token, blocks_for, sampling_problem, token_ids


@dataclass(slots=True)
class _LiveRequest:
    """An engine request, and vLLM's `request` for it. `missing`: blocks of a decode request without KV so far.
    `preempted`: it lost its blocks and has written no token since. `stays`: of a prefill request, its key as a decode
    request here, when its prefill has ended."""

    engine_request: EngineRequest
    request: Any
    outputs_left: int  # output tokens left for the whole request, this engine request's first one included
    parked: bool = False  # a decode request that has its blocks and waits for `admit`
    missing: set[int] = field(default_factory=set)
    preempted: bool = False
    stays: str = ""

    @property
    def keys(self) -> list[str]:
        """Its key and those of its siblings."""
        return [self.engine_request.key, *(key for key, _ in self.engine_request.siblings)]


class VllmEngine:
    """Implements Engine and SupportsHiddenStates of tetri.engine.base.

    `dtype`: bfloat16 or float32, for weights and KV.
    `kv_bytes`: size of the KV space.
    `context`: most tokens of a request, prompt and output together; None: the model's own limit.
    `weights`: a hash of the checkpoint.
    `gpu`: the GPU to run on, None: the CPU.
    `reserve`: called with the bytes of a KV block before vLLM allocates memory.

    Raises EngineError when the checkpoint is unknown, its KV layout is unsupported or the KV space is too small for one
    context.
    """

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        chunk_tokens: int,
        max_batch: int,
        kv_bytes: int,
        context: int | None,
        weights: str,
        block_tokens: int = 128,
        gpu: Device | None = None,
        reserve: Callable[[int], object] = lambda block_bytes: None,
    ) -> None:
        settings = VllmSettings(
            Path(model), dtype, chunk_tokens, max_batch, kv_bytes, context, weights, block_tokens, gpu is not None
        )
        settings.check()
        self._start(settings, gpu, reserve)
        self._requests: dict[str, _LiveRequest] = {}
        self._stays: dict[str, _LiveRequest] = {}  # prefill requests that go on here, by their key as decode requests
        self._ended: dict[str, list[int]] = {}  # by key: block ids of requests that ended in the last step
        self._reported: dict[str, int] = {}  # by key: block counts as of the last StepDone
        self._drawn: dict[str, tuple[Token, ...]] = {}  # by key: what this step's sampler reports
        self._parked = 0
        self._added = 0
        # Loading creates a million permanent objects: exclude them from garbage collection, which would delay a step.
        gc.collect()
        gc.freeze()

    def _start(self, settings: VllmSettings, gpu: Device | None, reserve: Callable[[int], object]) -> None:
        threads = prepare_environment()
        import torch
        from vllm.distributed.kv_transfer import has_kv_transfer_group

        if has_kv_transfer_group():
            raise EngineError("this process already runs a vLLM engine: start another process")
        torch.set_num_threads(threads)
        config = engine_config(settings)
        reserve(expected := block_bytes_of(settings, config))
        self._core = start_core(settings, config)
        self._scheduler = self._core.scheduler
        self._connector = self._scheduler.connector
        spec = check_layout(self._scheduler.kv_cache_config)
        self._memory = memory_of(gpu, self._scheduler.kv_cache_config, expected)
        self.block_bytes = self._memory.block_bytes
        self.fingerprint = make_fingerprint(settings, config, spec, self._memory.layers, self.block_bytes)
        self._stop_ids = stop_ids(config)
        self._vocab = config.model_config.get_vocab_size()
        manager = self._scheduler.kv_cache_manager
        self._req_to_blocks = manager.coordinator.single_type_managers[0].req_to_blocks
        self.capacity = Capacity(
            blocks=manager.block_pool.get_num_free_blocks(),  # without the null block
            block_tokens=spec.block_size,
            chunk_tokens=self._scheduler.max_num_scheduled_tokens,
            max_batch=settings.max_batch,
            context=config.model_config.max_model_len,
        )

    # ------------------------------------------------------------ engine requests

    def add(self, engine_request: EngineRequest) -> None:
        """As in `Engine`."""
        self._check_new(engine_request.key)
        live = self._live_request(engine_request, self._outputs_left(engine_request))
        self._ended.pop(engine_request.key, None)
        self._requests[engine_request.key] = live
        self._scheduler.add_request(live.request)

    def _check_new(self, key: str) -> None:
        if key in self._requests or key in self._stays:
            raise EngineError(f"engine request {key!r} is already there")

    def _live_request(self, engine_request: EngineRequest, left: int) -> _LiveRequest:
        """An engine request that vLLM does not know yet, with `left` output tokens left."""
        from tetri.engine.vllm.scheduler import VllmRequest

        decode = engine_request.phase == "decode"
        # The tokens after those of a decode request come with `admit`; until then any valid id is a placeholder.
        unknown = 1 + engine_request.ahead if decode else 0
        prompt = [*engine_request.tokens, *[engine_request.tokens[-1]] * unknown]
        key, drawn = engine_request.key, self._drawn
        params = vllm_params(
            engine_request.sampling,
            engine_request.output_from,
            left - 1 if decode else 1,
            self._stop_ids,
            self._vocab,
            partial(drawn.__setitem__, key),
            [seed for _, seed in engine_request.siblings],
        )
        self._added += 1
        request = VllmRequest(engine_request.phase, self._added, key, prompt, params, None)
        return _LiveRequest(engine_request, request, left)

    def _outputs_left(self, engine_request: EngineRequest) -> int:
        """Output tokens left for the request. Raises EngineError for an engine request that cannot run."""
        count, sampling = len(engine_request.tokens), engine_request.sampling
        if not engine_request.tokens:
            raise EngineError("an engine request needs at least one token")
        for ids, where in (
            (engine_request.tokens, ""),
            (sampling.stop_token_ids, " in stop_token_ids"),
            (sampling.logit_bias, " in logit_bias"),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < self._vocab:
                raise EngineError(f"token ids{where} must be from 0 to {self._vocab - 1}")
        if engine_request.siblings and engine_request.phase == "decode":
            raise EngineError("only a prefill request can have siblings")
        if not 0 <= engine_request.output_from <= count:
            raise EngineError(f"output_from must be from 0 to {count}, got {engine_request.output_from}")
        if problem := sampling_problem(sampling):
            raise EngineError(problem)
        if sampling.temperature >= GREEDY_BELOW and sampling.seed is None:
            raise EngineError("a temperature above 0 needs a seed")
        left = sampling.max_tokens - (count - engine_request.output_from)
        needed = 2 if engine_request.phase == "decode" else 1  # a decode request gets its first token with `admit`
        if left < needed:
            raise EngineError(
                f"max_tokens ({sampling.max_tokens}) leaves nothing to compute in this {engine_request.phase} request"
            )
        if count + left > self.capacity.context:
            raise EngineError(
                f"{count} tokens and up to {left} of output exceed the context of {self.capacity.context} tokens"
            )
        if engine_request.ahead > left - needed:
            raise EngineError(f"room for {engine_request.ahead} tokens is too much: it ends before")
        return left

    def cancel(self, key: str) -> None:
        """As in `Engine`. Frees the blocks at once."""
        from vllm.v1.request import RequestStatus

        self._ended.pop(key, None)
        self._reported.pop(key, None)
        if key in self._stays:
            self._stays.pop(key).stays = ""
        live = self._requests.pop(key, None)
        if live is None:
            return
        self._stays.pop(live.stays, None)
        if live.parked:
            # vLLM keeps the blocks of a parked request until its KV is received; report that, as none is in flight.
            self._scheduler.finished_recving_kv_req_ids.add(key)
            self._parked -= 1
        self._scheduler.finish_requests(key, RequestStatus.FINISHED_ABORTED)
        self._connector.record.freed.pop(key, None)

    def admit(self, key: str, token: int, further: Sequence[int] = ()) -> None:
        """As in `Engine`. Raises EngineError unless all of its blocks were adopted."""
        live = self._requests.get(key)
        if live is None or not live.parked:
            raise EngineError(f"engine request {key!r} does not wait for admission")
        engine_request, fresh = live.engine_request, [token, *further]
        if len(further) > engine_request.ahead:
            raise EngineError(f"engine request {key!r} has room for {engine_request.ahead} tokens, not {len(further)}")
        filled = len(engine_request.tokens) + len(further)
        if missing := live.missing & {*range(blocks_for(filled, self.capacity.block_tokens))}:
            raise EngineError(
                f"engine request {key!r} cannot be admitted: {len(missing)} of its blocks were not adopted"
            )
        if not 0 <= min(fresh) <= max(fresh) < self._vocab:
            raise EngineError(f"token ids must be from 0 to {self._vocab - 1}, got {fresh}")
        self._know(live, fresh)
        # As if a connector had reported the KV as received, but without the delay of one more step.
        self._scheduler.finished_recving_kv_req_ids.add(key)
        live.parked = False
        self._parked -= 1

    @staticmethod
    def _know(live: _LiveRequest, fresh: list[int]) -> None:
        """Tell vLLM the tokens of a decode request that were unknown until now. It has KV for all but the last."""
        request, count = live.request, len(live.engine_request.tokens)
        request.prompt_token_ids[count:] = request._all_token_ids[count:] = fresh
        request.num_prompt_tokens = count + len(fresh)
        request.num_computed_tokens = request.num_prompt_tokens - 1
        request.max_tokens = live.outputs_left - len(fresh)

    def hold(self, key: str, held: bool) -> None:
        """As in `Engine`."""
        live = self._requests.get(key)
        if live is None:
            return
        if live.engine_request.phase == "decode" and (live.parked or live.request.unreserved):
            raise EngineError(f"engine request {key!r} is not admitted: such a decode request cannot be held")
        live.request.held = held

    def stay(self, key: str, decode_key: str) -> None:
        """As in `Engine`."""
        live = self._requests.get(key)
        if live is None or len(live.keys) > 1 or live.engine_request.phase == "decode" or live.stays:
            raise EngineError(f"engine request {key!r} cannot go on here: only a prefill without siblings can, once")
        self._check_new(decode_key)
        live.stays = decode_key
        self._stays[decode_key] = live

    # ------------------------------------------------------------ steps

    def step(self, most: int = 1, chunk: int | None = None) -> StepDone:
        """As in `Engine`, but never more than one pass; none when all requests are parked."""
        self._ended.clear()
        self._drawn.clear()
        if len(self._requests) == self._parked:
            return StepDone(held=self._held())
        self._scheduler.chunk = chunk
        record = self._connector.begin_step()
        outputs, _ = self._core.step()
        for key in record.parked:
            self._park(key)
        for key in record.preempted:
            self._requests[key].preempted = True
        spans = tuple(Span(key, *span) for key, span in record.computed.items() if self._has_span(key))
        tokens = tuple(chain.from_iterable(map(self._sampled, outputs[0].outputs))) if outputs else ()
        self._ended.update(record.freed)
        return StepDone(spans, tokens, tuple(record.parked), tuple(record.preempted), self._held())

    def _has_span(self, key: str) -> bool:
        """Whether a StepDone lists what was computed of a request: a chunk of a prompt, or a decode request again."""
        live = self._requests[key]
        return live.engine_request.phase == "prefill" or live.preempted

    def _park(self, key: str) -> None:
        live = self._requests[key]
        tokens = len(live.engine_request.tokens) + live.engine_request.ahead
        live.parked = True
        live.missing = set(range(blocks_for(tokens, self.capacity.block_tokens)))
        self._parked += 1

    def _sampled(self, output: Any) -> Sequence[Sampled]:
        key, reason = output.request_id, output.finish_reason
        (token,) = output.new_token_ids
        tokens, live = self._drawn.get(key, (token,)), self._requests[key]
        live.preempted = False
        if not tokens:
            return self._failed(live)
        if reason is None:
            return (Sampled(key, tokens, None),)
        del self._requests[key]
        self._reported.pop(key, None)
        if (ended := str(reason)) not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended engine request {key!r} with {ended!r}")
        if live.engine_request.phase == "decode":
            return (Sampled(key, tokens, ended),)
        firsts = self._first_tokens(live, tokens)
        if self._stays.pop(live.stays, None) and firsts[0].reason is None:
            self._go_on(live)
        return firsts

    def _first_tokens(self, live: _LiveRequest, tokens: Sequence[Token]) -> Sequence[Sampled]:
        """The results of a prefill request and its siblings. vLLM does not know these, and ends every prefill request
        after its one token, also when the whole request continues."""
        stops, last = live.request.sampling_params.stop_token_ids, "length" if live.outputs_left == 1 else None
        ends = ["stop" if token in stops else last for token in token_ids(tokens)]
        return [Sampled(*result) for result in zip(live.keys, zip(tokens), ends, strict=True)]

    def _go_on(self, live: _LiveRequest) -> None:
        """Make a decode request that waits for `admit` of a prefill request that stays and has just ended. To vLLM it
        is a new request, as one whose KV has arrived: so it gets the tokens that it would get elsewhere, and while it
        waits it takes none of vLLM's places for running requests."""
        key, freed = live.stays, self._connector.record.freed.pop(live.engine_request.key)
        made = self._live_request(live.engine_request.as_decode(key), live.outputs_left)
        self._scheduler.add_parked(made.request, freed)
        made.parked = True
        self._parked += 1
        self._requests[key], self._reported[key] = made, len(freed)

    def _failed(self, live: _LiveRequest) -> Sequence[Sampled]:
        """End a request, with its siblings, for which the model computed no valid number. Its KV may have such numbers
        too. They must not stay behind: attention multiplies what lies in the unused part of a block by 0, and 0 times
        NaN is NaN."""
        key = live.engine_request.key
        freed = self._connector.record.freed.get(key)
        ids = freed or [block.block_id for block in self._req_to_blocks.get(key, ())]
        self._memory.write(ids, [memoryview(bytes(self.block_bytes))] * len(ids))
        self.cancel(key)
        return [Sampled(each, (), "error", INVALID) for each in live.keys]

    def _held(self) -> tuple[tuple[str, int], ...]:
        """(key, blocks) of the requests whose block count changed since the last call."""
        blocks, reported = self._req_to_blocks, self._reported
        self._reported = {key: len(blocks.get(key, ())) for key in self._requests}
        return tuple((key, count) for key, count in self._reported.items() if count != reported.get(key, 0))

    # ------------------------------------------------------------ hidden states

    def hook_hidden_states(self, layers: Sequence[int], every: int) -> HiddenStateHook:
        """As in `SupportsHiddenStates`."""
        from tetri.engine.vllm.hidden_states import LayerHook

        if every < 1:
            raise EngineError(f"hidden states need an interval of at least 1 token, got {every}")
        return LayerHook(self._core, layers, partial(self._hooked, every))

    def _hooked(self, every: int) -> dict[str, int]:
        """Called inside a step: the keys whose states to keep, with the output tokens of their requests."""
        found: dict[str, int] = {}
        for key, (_, stop) in self._connector.record.computed.items():
            live = self._requests[key]
            if stop == live.request.num_tokens:  # else the step has only a chunk of its tokens
                outputs = stop - live.engine_request.output_from
                if live.engine_request.phase == "prefill" or outputs % every == 0:
                    found[key] = outputs
        return found

    # ------------------------------------------------------------ KV blocks

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None:
        """As in `Engine`."""
        self._memory.read(self._blocks(key, start, stop), into)

    def adopt(self, key: str, start: int, blocks: Sequence[memoryview]) -> None:
        """As in `Engine`."""
        live = self._requests.get(key)
        if live is None or not live.parked:
            raise EngineError(f"engine request {key!r} has no blocks that wait for KV")
        stop = start + len(blocks)
        self._memory.write(self._blocks(key, start, stop), blocks)
        live.missing.difference_update(range(start, stop))

    def _blocks(self, key: str, start: int, stop: int) -> list[int]:
        """vLLM's ids of blocks [start, stop) of a running engine request, or of one that ended in the last step."""
        if key in self._requests:
            ids = [block.block_id for block in self._req_to_blocks.get(key, ())]
        else:
            ids = self._ended.get(key, [])
        if not 0 <= start <= stop <= len(ids):
            raise EngineError(f"engine request {key!r} has {len(ids)} blocks; [{start}, {stop}) was asked")
        return ids[start:stop]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._memory.close()
        self._core.shutdown()
        cleanup_dist_env_and_memory()
