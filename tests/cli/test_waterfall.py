"""A Timeline as lines of text."""

import io

import msgspec
import pytest
from observed import event, timeline
from rich.console import Console

from tetri.cli.waterfall import drawn, heading, receipt, rows, steps
from tetri.request import Receipt
from tetri.wire.observation import Timeline


def typed(**fields):
    return msgspec.convert(timeline(**fields), Timeline)


def lines(found, width=80, plain=False):
    console = Console(file=io.StringIO(), width=width)
    console.print(drawn(found, width, plain))
    shown = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in shown)
    return [line.rstrip() for line in shown]


def test_stages_and_what_happened_in_them_are_in_the_order_of_time():
    found = rows(typed())
    assert [row.name for row in found if row.stage] == ["queued", "prefill", "decode"] * 2
    assert [row.name for row in found][:5] == ["queued", "prefill", "deferred", "refused", "offered"]
    assert [row.start_s for row in found] == sorted(row.start_s for row in found)
    early = rows(typed(events=[event("offered", -0.001, "p0", peer="d0")]))
    assert [row.name for row in early[:2]] == ["queued", "offered"]


def test_every_event_says_what_there_is_to_say():
    assert [row.detail for row in rows(typed()) if not row.stage] == [
        *("d1 has no memory now", "d1 refused: draining", "KV to d0", "d0 has reserved memory"),
        *("tokens 0 to 512", "KV chunk 0, blocks 0 to 32", "blocks 0 to 32, 2 MB, 20 MB/s, shm"),
        *("blocks 32 to 48, 0 B, shm: corrupt", "tokens 512 to 768, beside 44 others", "attempt 2: d0 was lost"),
        *("from d0 to d1", "lost its memory to others", "tokens 0 to 771"),
    ]
    stays = typed(stages=[], events=[event("granted", 0.1, "m0", peer="m0", note="its KV stays in its place")])
    assert [row.detail for row in rows(stays)] == ["its KV stays in its place"]
    unknown = typed(stages=[], events=[event("new kind", 0.1, "p0", note="x\x1b[2J")])
    assert [row.detail for row in rows(unknown)] == ["x\\x1b[2J"]


def test_the_heading_has_the_latencies_and_names_each_mishap():
    assert heading(typed()) == [
        ("request", "r1: length, arrived 12 s ago"),
        ("latency", "TTFT 500.0 ms   TPOT 250.0 ms   JCT 2.00 s"),
        ("limits", "TTFT 400.0 ms   TPOT -   missed TTFT"),
        ("tokens", "768 prompt   7 output   2 attempts"),
        ("refused", "at 110.0 ms: d1 refused: draining"),
        ("retry", "at 1.00 s: attempt 2: d0 was lost"),
        ("migrated", "at 1.50 s: from d0 to d1"),
        ("preempted", "at 1.60 s: lost its memory to others"),
    ]
    results = ("", "met", "tpot", "both", "failed")
    shown = [heading(typed(slo_result=result))[2][1].removeprefix("TTFT 400.0 ms   TPOT -") for result in results]
    assert shown == ["", "   kept", "   missed TPOT", "   missed both", "   failed"]
    late = {"jct_s": None, "ttft_s": None, "tpot_s": None}
    still = typed(**late, reason=None, stage="prefill", choice=1, choices=3, events=[], left_out=7)
    assert heading(still)[0] == ("request", "r1.1 (choice 1 of 3): prefill now, arrived 12 s ago")
    assert heading(still)[1][1] == "TTFT -   TPOT -   JCT -" and heading(still)[-1][0] == "left out"
    assert ("error", "no worker") in heading(typed(reason="error", error="no worker"))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Receipt(prompt_tokens=9), "the worker did not report one"),
        (
            Receipt(prompt_tokens=9, adopted=8, recomputed=1, kv_bytes=2000, chunks=1, transport="shm", preempted=1),
            "8 of 9 prompt tokens adopted as 2 kB of KV in 1 chunk over shm, 1 recomputed, preempted 1 time",
        ),
        (Receipt(prompt_tokens=9, local=9, adopted=0, recomputed=0), "9 of 9 prompt tokens local, 0 recomputed"),
        (
            Receipt(
                **{"prompt_tokens": 9, "adopted": 9, "recomputed": 0, "kv_bytes": 0, "chunks": 0, "transport": "none"},
                **{"refetched": 2, "continued": 3},
            ),
            "9 of 9 prompt tokens adopted, 0 recomputed, 2 KV chunks fetched again,"
            " 3 output tokens of earlier attempts continued",
        ),
    ],
)
def test_a_receipt_is_a_sentence(found, text):
    assert receipt(found) == text


def test_decode_steps_are_summed_up_by_instance_and_the_slowest_shown():
    assert [*steps(typed(), 40, False)] == [
        ("steps", "2 on d0: mean 250.0 ms, longest 250.0 ms, batch 3"),
        ("", "██"),
        ("steps", "5 on d1: mean 100.0 ms, longest 100.0 ms, batch 1, 1 with a prefill chunk"),
        ("", "██"),
        ("slowest", "250.0 ms at 500.0 ms on d0, batch 4"),
        ("slowest", "250.0 ms at 750.0 ms on d0, batch 2"),
        ("slowest", "100.0 ms at 1.50 s on d1, batch 1"),
        ("slowest", "100.0 ms at 1.90 s on d1, batch 1, beside 128 prompt tokens"),
    ]


def test_bars_share_one_axis():
    shown = lines(typed(), width=120)
    axis = next(line for line in shown if "took" in line)
    start, end = axis.index("took") + 5, len(axis)
    queued = [line for line in shown if line.startswith("queued")]
    (*_, decode) = [line for line in shown if line.startswith("decode")]
    assert axis.endswith("2.00 s") and [line.index("█") for line in queued] == [start, start + (end - start) // 2]
    assert decode.index("█") == start + (end - start) * 3 // 4 and decode.rindex("█") == end - 1


@pytest.mark.parametrize("found", [typed(), typed(stages=[], events=[], steps=[])])
def test_it_fits_into_80_columns_and_can_be_in_ascii(found):
    assert "\n".join(lines(found, plain=True)).isascii()
