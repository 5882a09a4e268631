"""A subclass of vLLM's scheduler that enforces the order of the engine contract. vLLM loads it by its name.

vLLM schedules running requests in order, each with as many tokens as it wants, then waiting ones while tokens are left.
So a long prompt in progress would keep new decode requests out of its steps. This class divides the token budget before
vLLM schedules a step: one token for each decode request, then the tokens of preempted requests that resume, then the
prefill requests that are not held, in the order in which they were added, together at most `chunk`. A running request
gets a cap, 0 while it is held; a waiting request without a share is removed from the queue for the step.

It also divides the blocks. Blocks that a running prefill request still needs are reserved for it, so that it never
stops half way. Decode requests get their blocks before vLLM schedules, because vLLM allocates only in a step with
tokens left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from tetri.engine_request import Phase


class VllmRequest(Request):
    """vLLM's request for one engine request. `number`: order of addition. `held`: excluded from steps. `cap`: most
    tokens of the next step, None: no cap; it applies only to a running request."""

    def __init__(self, phase: Phase, number: int, *given: Any) -> None:
        super().__init__(*given)
        self.phase = phase
        self.number = number
        self.held = False
        self.cap: int | None = None

    @property
    def num_tokens_with_spec(self) -> int:
        """vLLM reads this only to get the number of tokens that a running request wants; it applies `cap`."""
        known: int = self.num_tokens
        return known if self.cap is None else min(known, self.num_computed_tokens + self.cap)

    @property
    def missing(self) -> int:
        """Tokens without KV."""
        return int(self.num_tokens - self.num_computed_tokens)

    @property
    def unreserved(self) -> bool:
        """Whether this is a decode request that never had blocks."""
        return self.phase == "decode" and self.status == RequestStatus.WAITING and not self.num_computed_tokens


class PlanScheduler(Scheduler):
    """Divides tokens and blocks among the requests, then lets vLLM schedule. `chunk`: most prefill tokens of the next
    step; None: as many as the budget has left."""

    chunk: int | None = None

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's entry point, called once per step."""
        self._reserve()
        held = [request for request in self.kv_holding_waiting if request.held]  # admitted, but have not run yet
        self.kv_holding_waiting.remove_requests(held)
        out, unused = self._share()
        for request in out:
            self.waiting.remove_request(request)
        # A waiting request has no cap: vLLM gives it all tokens that are left.
        self.max_num_scheduled_tokens -= unused
        output = super().schedule(throttle_prefills)
        self.max_num_scheduled_tokens += unused
        self.kv_holding_waiting.prepend_requests(reversed(held))
        if out:
            back = sorted([*self.waiting, *out], key=_place)
            self.waiting.clear()
            self.waiting.extend(back)
        return output

    # ------------------------------------------------------------ blocks

    def _reserve(self) -> None:
        """Allocate blocks for waiting decode requests, oldest first, until one finds too few. They then wait for their
        KV in vLLM's state for remote KV."""
        promised = self._promised()
        for request in [request for request in self.waiting if request.unreserved]:
            tokens = request.num_prompt_tokens - 1  # the last token has no KV yet
            blocks = self.kv_cache_manager.allocate_slots(
                request,
                0,
                num_external_computed_tokens=tokens,
                delay_cache_blocks=True,
                reserved_blocks=promised,
                has_scheduled_reqs=False,
            )
            if blocks is None:
                break
            self.waiting.remove_request(request)
            request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
            request.num_computed_tokens = tokens
            self.deferred_waiting.add(request)
            self.kv_holding_waiting.add_request(request)
            self.connector.record.parked.append(request.request_id)

    def add_parked(self, request: VllmRequest, blocks: Sequence[int]) -> None:
        """Add a decode request that waits for admission, and give it these blocks with all of its KV. A request that
        has just ended had them; vLLM has freed them and not used them again."""
        manager = self.kv_cache_manager
        kept = [manager.block_pool.blocks[block] for block in blocks]
        manager.block_pool.touch(kept)
        manager.coordinator.single_type_managers[0].req_to_blocks[request.request_id] = kept
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        request.num_computed_tokens = request.num_prompt_tokens - 1  # the last token has no KV yet
        self.add_request(request)

    def _promised(self) -> int:
        """Blocks that running prefill requests still need."""
        return sum(self._request_remaining_blocks(request) for request in self._running("prefill"))

    def _running(self, phase: Phase) -> list[VllmRequest]:
        running: list[VllmRequest] = self.running
        return [request for request in running if request.phase == phase]

    # ------------------------------------------------------------ tokens

    def _share(self) -> tuple[list[VllmRequest], int]:
        """Cap the running requests. Returns the waiting ones to hide from vLLM in this step, and the tokens of the
        budget that `chunk` leaves unused."""
        prefills, all_decodes = sorted(self._running("prefill"), key=_place), self._running("decode")
        paused, decodes = [r for r in all_decodes if r.held], [r for r in all_decodes if not r.held]
        # vLLM preempts the last request of the list: that must be the youngest decode, never a prefill request.
        self.running: list[VllmRequest] = [*prefills, *paused, *decodes]
        for request in paused:
            request.cap = 0
        budget = self.max_num_scheduled_tokens - len(decodes) - self._joining()
        for request in decodes:  # more than one token missing: it resumes after a preemption
            more = min(request.missing - 1, max(budget, 0))
            request.cap, budget = 1 + more, budget - more
        out, budget = self._admissible(budget)
        waiting = [request for request in self.waiting if request.phase == "prefill" and request not in out]
        budget = max(budget, 0)
        chunk = budget if self.chunk is None else min(budget, self.chunk)
        unused = budget - chunk
        for request in prefills:
            request.cap = 0
        for request in sorted([*prefills, *waiting], key=_place):
            if not request.held:
                request.cap = min(request.missing, chunk)
                chunk -= request.cap
        return out, unused

    def _joining(self) -> int:
        """How many decode requests were admitted and have not run yet. vLLM schedules them before all others that
        wait."""
        ready = self.finished_recving_kv_req_ids
        return sum(
            request.status != RequestStatus.WAITING_FOR_REMOTE_KVS or request.request_id in ready
            for request in self.kv_holding_waiting
        )

    def _admissible(self, budget: int) -> tuple[list[VllmRequest], int]:
        """The waiting requests to hide from vLLM, and the budget left after preempted requests that resume. A request
        stays visible if there are blocks for all of its tokens beside the promised ones, because vLLM stops at the
        first request without enough blocks."""
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() - self._promised()
        out: list[VllmRequest] = []
        short: list[str] = []  # phases with a request that waits for blocks: later ones must not overtake it
        for request in self.waiting:
            need = self._request_remaining_blocks(request)
            if request.held or request.unreserved or request.phase in short or need > free:
                out.append(request)
                if not (request.held or request.unreserved):
                    short.append(request.phase)
                continue
            free -= need
            if request.phase == "decode":
                budget -= min(request.missing, max(budget, 0))
        return out, budget


def _place(request: VllmRequest) -> tuple[bool, int]:
    """Sort key of the queue: preempted decode requests before prefill requests."""
    return request.phase == "prefill", request.number
