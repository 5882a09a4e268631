"""vLLM's scheduler, told by us who runs. vLLM loads it by the name in its configuration.

vLLM takes running requests as they come, each as many tokens as it wants, then waiting ones while tokens are left: a
long prompt under way would keep every decode that joins out of its steps. Here each step is shared out before vLLM
schedules it: one token for each decode, then what preempted ones need to come back, then the prefill legs that are not
held, in the order in which they were added. Running requests get a cap, waiting ones that have no share are taken
out of the queue meanwhile.

Blocks are shared out too. Those that a prefill leg still needs are nobody else's, so that it never stands still half
way. Decode legs get theirs here, before vLLM looks at anything: it would do so only in a step that has tokens left.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from tetri.engine_request import Phase


class VllmRequest(Request):
    """vLLM's request of one leg. `number`: in the order of addition. `cap`: how many tokens the next step may compute,
    None for as many as it likes; it matters only while the request runs."""

    def __init__(self, phase: Phase, number: int, *given: Any) -> None:
        super().__init__(*given)
        self.phase = phase
        self.number = number
        self.held = False
        self.cap: int | None = None

    @property
    def num_tokens_with_spec(self) -> int:
        """Read by vLLM in one place: to see how many tokens a running request wants."""
        known: int = self.num_tokens
        return known if self.cap is None else min(known, self.num_computed_tokens + self.cap)

    @property
    def missing(self) -> int:
        """Tokens without KV."""
        return int(self.num_tokens - self.num_computed_tokens)

    @property
    def unreserved(self) -> bool:
        """A decode leg that was never given blocks."""
        return self.phase == "decode" and self.status == RequestStatus.WAITING and not self.num_computed_tokens


class PlanScheduler(Scheduler):
    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._reserve()
        out = self._share()
        for request in out:
            self.waiting.remove_request(request)
        output = super().schedule(throttle_prefills)
        if out:
            back = sorted([*self.waiting, *out], key=_place)
            self.waiting.clear()
            self.waiting.extend(back)
        return output

    # ------------------------------------------------------------ blocks

    def _reserve(self) -> None:
        """Blocks for decode legs, oldest first, as far as they go. From then on they wait for their KV as vLLM's own
        requests do whose KV comes from elsewhere."""
        promised = self._promised()
        for request in [request for request in self.waiting if request.unreserved]:
            tokens = request.num_prompt_tokens - 1  # the last one is not computed yet
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

    def _promised(self) -> int:
        """Blocks that the prefill legs under way will still take."""
        return sum(self._request_remaining_blocks(request) for request in self._running("prefill"))

    def _running(self, phase: Phase) -> list[VllmRequest]:
        running: list[VllmRequest] = self.running
        return [request for request in running if request.phase == phase]

    # ------------------------------------------------------------ tokens

    def _share(self) -> list[VllmRequest]:
        """Cap the running requests; returns the waiting ones that must not be seen in this step."""
        prefills, decodes = sorted(self._running("prefill"), key=_place), self._running("decode")
        # vLLM takes the last one's blocks when others need them: the youngest decode, never a prefill leg.
        self.running: list[VllmRequest] = [*prefills, *decodes]
        budget = self.max_num_scheduled_tokens - len(decodes) - self._joining()
        for request in decodes:  # more than one token: it comes back after a preemption
            more = min(request.missing - 1, max(budget, 0))
            request.cap, budget = 1 + more, budget - more
        out, budget = self._admissible(budget)
        waiting = [request for request in self.waiting if request.phase == "prefill" and request not in out]
        for request in prefills:
            request.cap = 0
        for request in sorted([*prefills, *waiting], key=_place):
            if not request.held:
                request.cap = min(request.missing, max(budget, 0))
                budget -= request.cap
        return out

    def _joining(self) -> int:
        """Decode legs that were admitted and have not run yet: vLLM takes them first of all that wait."""
        ready = self.finished_recving_kv_req_ids
        return sum(
            request.status != RequestStatus.WAITING_FOR_REMOTE_KVS or request.request_id in ready
            for request in self.kv_holding_waiting
        )

    def _admissible(self, budget: int) -> tuple[list[VllmRequest], int]:
        """The waiting requests that must not be seen, and the tokens left beside preempted ones that come back. Seen
        are those who find blocks for all that they know beside what is promised: vLLM looks no further than the
        first that finds none."""
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() - self._promised()
        out: list[VllmRequest] = []
        short: list[str] = []  # phases in which somebody waits for blocks: nobody overtakes
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
    """In the queue: preempted decodes before prefill legs."""
    return request.phase == "prefill", request.number
