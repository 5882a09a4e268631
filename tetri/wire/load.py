"""The load of an instance, as it reports it itself."""

from __future__ import annotations

from tetri.request import Count, Record


class Load(Record, frozen=True):
    """One instance's load at one moment. Blocks are KV blocks. Predictions use the configured end of the length ranges
    and the cost table.

    queued          prompts in the prefill queue
    queued_tokens   their prompt tokens that are not computed yet
    queued_s        predicted seconds to compute these
    waiting         decode requests on offer here that are not in the batch
    landed          those of `waiting` whose KV has all landed: they wait only for admission
    running         decode requests in the batch
    heavy           of waiting and running: predicted to write more than `heavy_tokens` output tokens
    growth_blocks   of waiting and running: blocks that they are predicted to need in addition until they end
    kept_blocks     free blocks that no offer gets now: kept for the growth of the batch, or past the share of waiting
                    requests
    deferred_blocks blocks that deferred offers wait for
    decode_s        of waiting and running: predicted seconds until all have ended
    busy            share of the time since the last report in which the engine computed
    stalled         whether the prompts wait for a decode instance to grant them, rather than for this engine
    unread          transfers in a row whose KV it could not read, from several instances and with none that it could;
                    else 0
    kv_tokens       tokens that its KV memory holds
    context         of waiting and running: tokens of their prompts and outputs
    step_s          predicted seconds of a decode step of waiting and running; 0 without any
    share           share of its time that prefill gets while these keep their limits of TPOT, 0 to 1
    base_s          predicted seconds of a decode step of one request without context
    chunk_s         predicted seconds of the chunk with the best prefill rate, without decodes
    arrived         requests that were ever assigned to it
    arrived_s       predicted seconds of their prefill in full chunks
    decodes         their choices that are to decode: all that may write more than one token
    ended           requests that have ever ended here with all their output
    ended_tokens    their output tokens
    ttft_s          the limit of TTFT of the last request that was assigned to it; 0: it had none
    tpot_s          of waiting and running: the median limit of TPOT; 0: none is here, or they have none
    """

    free_blocks: int
    queued: Count = 0
    queued_tokens: Count = 0
    queued_s: float = 0.0
    waiting: Count = 0
    landed: Count = 0
    running: Count = 0
    heavy: Count = 0
    growth_blocks: Count = 0
    kept_blocks: Count = 0
    deferred_blocks: Count = 0
    decode_s: float = 0.0
    busy: float = 0.0
    stalled: bool = False
    unread: Count = 0
    kv_tokens: Count = 0
    context: Count = 0
    step_s: float = 0.0
    share: float = 1.0
    base_s: float = 0.0
    chunk_s: float = 0.0
    arrived: Count = 0
    arrived_s: float = 0.0
    decodes: Count = 0
    ended: Count = 0
    ended_tokens: Count = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
