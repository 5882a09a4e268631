"""make_picture: draw docs/request.svg, one request on its way through a deployment, from what a real run reports.

    tools/make_picture [--out FILE]

Starts emulated engines with the step times of a cost table, sends a few requests, and asks the broker twice: for an
Observation while the followed request decodes, and for its Timeline at the end. The upper half shows the instances in
two banks as the live page does, and the request's way between them in numbered steps; the lower half its waterfall.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import msgspec

from tetri import atomic
from tetri.bench.deployment import EMULATED, EXPECTED, REPOSITORY, START_S, configured, own_folder, polled, running
from tetri.bench.report import BenchError, Program, one_line, progress
from tetri.client import Client
from tetri.config import Config
from tetri.paths import FILE
from tetri.request import Stage
from tetri.wire.clients import InstanceStatus, Observation
from tetri.wire.observation import Timeline

PICTURE = REPOSITORY / "docs" / "request.svg"
SETTINGS = ("engine.cost=cpu-smollm2.toml", "engine.chunk_tokens=512", "emulated.blocks=512")
PROMPT, OUTPUT = 1400, 24  # tokens of the followed request: three chunks
OTHERS = ((300, 40), (200, 30), (90, 50), (600, 20))  # prompt and output tokens of those beside it
LOOK_AT = 6  # pieces of the answer, before the Observation is asked for
WIDTH, HEIGHT = 960, 594
CARD, CARD_HEIGHT = 300, 84
BANKS = {"prefill": 150, "decode": 640}  # role -> left edge of its cards
TOP, AXIS, ROW = 96, 320, 30  # of the first card, of the waterfall, of a row in it
LEFT, RIGHT, ROWS = 150, 850, 8  # of the waterfall's time axis; rows below it
TICKS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # distances of marks on it
STYLE = """
text { font: 13px system-ui, 'DejaVu Sans', sans-serif; fill: #1a2029 }
.dim { fill: #596273; font-size: 12px } .b { font-weight: 650 } .n { fill: #fff; font-size: 12px; font-weight: 650 }
.panel { fill: #fff; stroke: #d9dde3 } .track { fill: #e1e5ea } .ground { fill: #f4f5f7 }
.prefill { fill: #c97a00 } .decode { fill: #0f86a5 } .kv { fill: #7b51d3 } .broker { fill: #596273 }
.way { fill: none; stroke: #596273; stroke-width: 1.5; marker-end: url(#tip) } .way.kv { stroke: #7b51d3 }
@media (prefers-color-scheme: dark) {
text { fill: #e8ebf0 } .dim { fill: #98a2b3 } .panel { fill: #171b22; stroke: #2a303a } .ground { fill: #0f1217 }
.n { fill: #0f1217 } .track { fill: #2c333e } .prefill { fill: #f2a93b } .decode { fill: #41b8d5 } .kv { fill: #b393f5 }
.broker { fill: #98a2b3 } .way { stroke: #98a2b3 } .way.kv { stroke: #b393f5 }
}
"""
COLOURS = {Stage.QUEUED: "broker", Stage.PREFILL: "prefill", Stage.MOVING: "kv", Stage.WAITING: "kv"}


@click.command(cls=Program)
@click.option("--out", type=FILE, default=PICTURE, help="The picture (default: docs/request.svg).")
def main(out: Path) -> None:
    """Draw one request on its way through a deployment, from what a real run reports."""
    with one_line("make_picture", *EXPECTED, BenchError), own_folder("picture") as folder:
        config = configured(EMULATED, folder, "picture", SETTINGS)
        with running(config, progress, START_S):
            seen, timeline = followed(config)
        with atomic.file(out) as part:
            part.write_text(drawn(seen, timeline), encoding="utf-8")
    progress(f"{out}: request {timeline.rid}, {1000 * timeline_s(timeline):.0f} ms")


def followed(config: Config) -> tuple[Observation, Timeline]:
    """Send the requests. Returns the state while the followed one decodes, and its timeline at the end."""
    beside = [threading.Thread(target=_answered, args=(config, *lengths), daemon=True) for lengths in OTHERS]
    with Client(config.clients_address) as client:
        for thread in beside:
            thread.start()
        seen = None
        with client.stream([1 + n % 250 for n in range(PROMPT)], max_tokens=OUTPUT, ignore_eos=True) as answer:
            for number, _piece in enumerate(answer):
                seen = msgspec.convert(client.observe(), Observation) if number == LOOK_AT else seen
        assert answer.result is not None and seen is not None  # iterating raises if there is no result
        rid = answer.result.rid
        timeline = polled(lambda: msgspec.convert(client.explain(rid), Timeline), _complete, 5.0, 0.2)
    for thread in beside:
        thread.join()
    if not _complete(timeline):
        raise BenchError("the workers did not report what happened to the request within 5 s")
    return seen, timeline


def _answered(config: Config, prompt: int, output: int) -> None:
    with Client(config.clients_address) as client:
        client.generate([2 + n % 250 for n in range(prompt)], max_tokens=output, ignore_eos=True)


def _complete(timeline: Timeline) -> bool:
    """Whether the heartbeats with all that happened have arrived."""
    kinds = [event.kind for event in timeline.events]
    chunks = timeline.receipt.chunks if timeline.receipt else None
    return bool(chunks) and kinds.count("fetch") == chunks and "granted" in kinds


def timeline_s(timeline: Timeline) -> float:
    """Seconds from arrival to the end."""
    return max(span.start_s + span.seconds for span in timeline.stages)


# ---------------------------------------------------------------- the drawing


class Drawing:
    """An SVG of this size. Coordinates are pixels."""

    def __init__(self, width: int, height: int, title: str, text: str) -> None:
        box = f"0 0 {width} {height}"
        self.root = ElementTree.Element(
            "svg", xmlns="http://www.w3.org/2000/svg", viewBox=box, role="img", width=str(width), height=str(height)
        )
        self.put("title", text=title)
        self.put("desc", text=text)
        self.put("style", text=STYLE)
        tip = self.put("marker", id="tip", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7)
        tip.set("orient", "auto")
        ElementTree.SubElement(tip, "path", {"d": "M0 0L8 4L0 8z", "class": "broker"})
        self.put("rect", "ground", width=width, height=height, rx=10)

    def put(self, tag: str, kind: str = "", text: str = "", **at: Any) -> ElementTree.Element:
        """Add an element of class `kind`."""
        given = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in at.items()}
        made = ElementTree.SubElement(self.root, tag, {**({"class": kind} if kind else {}), **given})
        made.text = text or None
        return made

    def bar(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        """Add a filled bar, visible however short it is."""
        self.put("rect", kind, x=x, y=y, width=max(width, 2.0), height=height, rx=2)

    def write(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Add a line of text."""
        more = {} if anchor == "start" else {"text-anchor": anchor}
        self.put("text", kind, text, x=x, y=y, **more)

    def way(self, path: str, number: int, x: float, y: float, text: str, kind: str = "") -> None:
        """Add an arrow with its number and a text behind it."""
        self.put("path", f"way {kind}".strip(), d=path)
        self.put("circle", kind or "broker", cx=x, cy=y, r=9)
        self.write(x, y + 4, str(number), "n", "middle")
        self.write(x + 14, y + 4, text, "dim")

    def xml(self) -> str:
        """The document, a line for each element."""
        ElementTree.indent(self.root, "")
        return ElementTree.tostring(self.root, "unicode") + "\n"


def drawn(seen: Observation, timeline: Timeline) -> str:
    """The picture of a request in a deployment, as SVG."""
    title = "One request on its way through tetri"
    text = (
        f"A request of {timeline.prompt_tokens} prompt tokens: the instances in two banks, its way and its waterfall."
    )
    picture = Drawing(WIDTH, HEIGHT, title, text)
    own = {s.iid for s in timeline.stages}
    for role in BANKS:
        bank = [each for each in seen.status.instances if each.role == role]
        for index, each in enumerate(sorted(bank, key=lambda each: each.iid not in own)):
            _card(picture, each, index)
    _ways(picture, timeline)
    _waterfall(picture, timeline)
    return picture.xml()


def _card(picture: Drawing, it: InstanceStatus, index: int) -> None:
    """Draw an instance as the page does."""
    x, y = BANKS[it.role], TOP + index * (CARD_HEIGHT + 16)
    load, activity = it.load, it.activity
    used = (it.blocks - load.free_blocks) / it.blocks
    picture.put("rect", "panel", x=x, y=y, width=CARD, height=CARD_HEIGHT, rx=8)
    picture.bar(it.role, x, y, 4, CARD_HEIGHT)
    picture.write(x + 14, y + 21, it.iid, "b")
    picture.write(x + 40, y + 21, it.role, "dim")
    picture.write(x + CARD - 12, y + 21, f"KV {used:.0%} of {it.blocks} blocks", "dim", "end")
    picture.bar("track", x + 14, y + 32, CARD - 26, 10)
    picture.bar(it.role, x + 14, y + 32, (CARD - 26) * used, 10)
    if it.role == "prefill":
        fill = activity.chunk_tokens / activity.chunk_space if activity.chunk_space else 0.0
        facts = f"{load.queued} queued, chunk fill {fill:.0%}"
    else:
        batch = activity.decode_tokens / activity.decode_steps if activity.decode_steps else 0.0
        facts = f"{load.running} running, batch {batch:.1f}"
    picture.write(x + 14, y + 66, facts, "dim")


def _ways(picture: Drawing, timeline: Timeline) -> None:
    """Draw client and broker, and the request's way in numbered steps. Its instances are the first of their banks."""
    for x, name in ((20, "client"), (420, "broker")):
        picture.put("rect", "panel", x=x, y=20, width=110, height=34, rx=8)
        picture.write(x + 55, 42, name, "b", "middle")
    assert timeline.receipt is not None
    left, right, y = BANKS["prefill"], BANKS["decode"], TOP + CARD_HEIGHT // 2
    end = left + CARD
    picture.way("M130 32H418", 1, 200, 20, "Submit: prompt")
    picture.way(f"M430 54V72H110V{y}H{left - 2}", 2, 128, 86, f"Assign to {timeline.receipt.prefill_instance}")
    picture.way(f"M{end} {y}H{right - 2}", 3, end + 24, y - 16, f"KV in {timeline.receipt.chunks} chunks", "kv")
    picture.write(end + 38, y + 18, f"{timeline.receipt.kv_bytes:,} bytes", "dim")
    picture.way(f"M{end - 40} {TOP}V84H470V56", 4, 488, 74, "first token")
    picture.way(f"M{right + CARD} {y}h10V37H532", 5, 600, 24, "Tokens, one message a step")
    picture.way("M418 46H132", 6, 200, 60, "Delta: text")


def _waterfall(picture: Drawing, timeline: Timeline) -> None:
    """Draw the stages of the request, and what happened in them, over one time axis."""
    end = timeline_s(timeline)
    receipt = timeline.receipt
    assert receipt is not None

    def at(seconds: float) -> float:
        return LEFT + (RIGHT - LEFT) * seconds / end

    def row(index: int, name: str, kind: str, spans: Sequence[tuple[float, float]]) -> None:
        y = AXIS + index * ROW
        picture.write(LEFT - 12, y + 13, name, "dim", "end")
        for start, seconds in spans:
            picture.bar(kind, at(start), y, at(start + seconds) - at(start) - 1, 16)

    apart = next((each for each in TICKS_S if end / each <= 6), TICKS_S[-1])
    for number in range(int(end / apart) + 1):
        picture.put("rect", "track", x=at(number * apart), y=AXIS - 8, width=1, height=ROWS * ROW + 4)
        picture.write(at(number * apart), AXIS + ROWS * ROW + 14, f"{1000 * number * apart:,.0f} ms", "dim", "middle")
    for index, stage in enumerate(stage for stage in Stage if not stage.ended):
        spans = [(span.start_s, span.seconds) for span in timeline.stages if span.stage == stage]
        row(index, stage.value, COLOURS.get(stage, "decode"), spans)
        picture.write(930, AXIS + index * ROW + 13, f"{1000 * sum(each for _, each in spans):.1f} ms", "dim", "end")
    events = {kind: [(e.at, e.seconds) for e in timeline.events if e.kind == kind] for kind in ("chunk", "fetch")}
    row(5, f"chunks on {receipt.prefill_instance}", "prefill", events["chunk"])
    row(6, f"KV to {receipt.decode_instance}", "kv", events["fetch"])
    steps = [(s.start_s, s.seconds) for s in timeline.steps if s.iid == receipt.decode_instance]
    row(7, f"steps on {receipt.decode_instance}", "decode", steps)


if __name__ == "__main__":
    main(prog_name="make_picture")
