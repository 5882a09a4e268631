"""The screen of top."""

import io

import pytest
from observed import histogram, member, observation, typed
from rich.console import Console

from tetri.cli.screen import Screen

P0 = member("p0", "prefill", {"queued": 3, "queued_s": 0.42, "free_blocks": 50}, {"chunk_tokens": 1, "chunk_space": 4})
D0 = member("d0", "decode", {"running": 7, "heavy": 3}, {"decode_steps": 2, "decode_tokens": 13})
GONE = member("d1", "decode", state="lost")


def lines(screen, now=0.0, width=80, height=24, plain=False):
    """What a terminal of this size shows."""
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(screen.render(now, width, height, plain))
    shown = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert all(len(line) <= width for line in shown)
    return shown


def after(*observations, **options):
    screen = Screen(**options)
    for at, found in enumerate(observations):
        screen.observed(10.0 * at, typed(found))
    return screen


def row(shown, start):
    return next(line.split() for line in shown if line.startswith(start))


def test_it_shows_both_banks_the_stages_the_latencies_and_what_happened():
    status = {"requests": {"queued": 3, "decode": 7}, "model": "m", "notes": ["d1 is lost: silent"]}
    later = observation(
        *(P0, member("d0", "decode", {"running": 7, "heavy": 3}, {"decode_steps": 4, "decode_tokens": 18}), GONE),
        histograms={"ttft": histogram([0, 5, 0, 0], 0.75), "queue_predicted": histogram([1, 0, 0, 0], 0.05)},
        status={**status, "slo": {"ttft_s": 0.5, "tpot_s": None}},
        ended=20,
        kept=(15, 5),
        events=[["lost", "d1", 2.2, "silent"]],
    )
    shown = lines(after(observation(P0, D0, GONE), later), now=10.0)
    assert "requests  queued 3   prefill 0   moving 0   waiting 0   decode 7" in shown
    assert "last 10 s TTFT p50 150.0 ms p99 199.0 ms   TPOT -" in shown
    assert "limits    TTFT 500.0 ms   TPOT -   kept 75%   goodput 1.5 requests/s" in shown
    assert "queue     predicted 50.0 ms   real -   1 tokens/s   2 requests/s" in shown
    assert row(shown, "p0") == ["p0", "prefill", "3", "420.0", "ms", "-", "████", "50%", "0%", "-"]
    assert row(shown, "d0") == ["d0", "decode", "0", "7", "3", "2.5", "0%", "0%", "-"]
    assert row(shown, "d1")[1] == "lost"
    assert shown[-2:] == ["       2 s ago  lost      d1  silent", "degraded  d1 is lost: silent"]


def test_the_first_one_has_the_means_since_the_start():
    shown = lines(after(observation(P0, D0, histograms={"tpot": histogram([1, 0, 0, 0], 0.05)})))
    assert row(shown, "p0")[5] == "25%" and row(shown, "d0")[5] == "6.5"
    assert "so far    TTFT -   TPOT p50 50.0 ms p99 50.0 ms" in shown and not any(
        "requests/s" in line for line in shown
    )


def test_an_instance_is_in_the_bank_of_each_phase_that_it_has_work_of():
    mixed, turned = member("m0", "mixed"), member("d5", "prefill", {"running": 1})
    shown = lines(after(observation(mixed, turned)))
    split = shown.index("decode")
    assert [
        [line.split()[0] for line in part if line[:2] in ("m0", "d5")] for part in (shown[:split], shown[split:])
    ] == [*(["m0", "d5"], ["m0", "d5"])]
    assert lines(after(observation(member("p0", "prefill"))))[-1] == "none"


@pytest.mark.parametrize("width", [80, 200])
def test_of_more_instances_than_fit_it_shows_the_lost_and_the_busiest(width):
    idle = [member(f"{role[0]}{n}", role) for n in range(32) for role in ("prefill", "decode")]
    busy = member("p99", "prefill", {"queued": 9, "queued_s": 5.0})
    screen = after(observation(*idle, busy, member("d99", "decode", state="lost")))
    shown = lines(screen, width=width)
    assert len(shown) <= 24 and row(shown, "p99") and any(" lost " in line for line in shown)
    assert sum(line.count("they have less work") for line in shown) == 2
    assert len(lines(after(*[observation(*idle)], whole=True), width=width)) > (64 if width == 80 else 32)


def test_it_says_that_the_broker_is_away_and_goes_on_when_it_is_back():
    screen = Screen()
    screen.away = "nothing is up"
    assert lines(screen) == ["the broker does not answer: nothing is up"] and screen.seen == (0, 0)
    screen.observed(1.0, typed(observation(P0, serial=7, events=[["joined", "p0", 0.0, "prefill"]])))
    screen.away = "gone\x1b[2J"
    shown = lines(screen, now=4.0)
    assert shown[:2] == ["the broker does not answer: gone\\x1b[2J", "below: as of 3 s ago"] and row(shown, "p0")
    assert screen.seen == (1, 7)
    screen.observed(5.0, typed(observation(P0, epoch=2)))
    assert not any("not answer" in line or "joined" in line for line in lines(screen)) and screen.seen == (2, 1)


def test_it_can_be_in_ascii():
    assert "\n".join(lines(after(observation(P0, D0)), plain=True)).isascii()
