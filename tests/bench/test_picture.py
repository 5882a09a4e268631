"""docs/request.svg: what the tool draws of a run, and that the picture in the pages is one."""

from xml.etree import ElementTree

import pytest

from tetri.bench import picture
from tetri.bench.picture import HEIGHT, PICTURE, WIDTH, Drawing, drawn, timeline_s
from tetri.request import Receipt, Stage
from tetri.wire.clients import InstanceStatus, Observation, Status
from tetri.wire.load import Load
from tetri.wire.observation import Activity, Measures, StageSpan, StepSpan, Timeline, TraceEvent

SVG = "{http://www.w3.org/2000/svg}"
STAGES = ("queued", "prefill", "moving", "waiting", "decode")


def instance(iid, role, free, **activity):
    load = Load(free_blocks=free, queued=3, running=2)
    return InstanceStatus(
        iid=iid, role=role, state="ready", incarnation=1, blocks=200, load=load, held=0, activity=Activity(**activity)
    )


SEEN = Observation(
    epoch=1,
    serial=2,
    measures=Measures(counts={}, histograms={}),
    status=Status(
        instances=[
            instance("d0", "decode", 150, decode_steps=2, decode_tokens=5),
            instance("p0", "prefill", 200),
            instance("p1", "prefill", 100, chunk_tokens=300, chunk_space=400),
        ],
        requests={},
        counters={},
        model="m",
    ),
)
TIMELINE = Timeline(
    rid="r",
    choice=0,
    choices=1,
    age_s=2.0,
    prompt_tokens=600,
    outputs=3,
    attempts=1,
    stage=Stage.DONE,
    receipt=Receipt(prompt_tokens=600, kv_bytes=38400, chunks=2, prefill_instance="p1", decode_instance="d0"),
    stages=[StageSpan(Stage(name), 1, "d0" if name == "decode" else "p1", i / 5, 0.2) for i, name in enumerate(STAGES)],
    events=[
        TraceEvent("chunk", "r", 1, 0.2, "p1", 0.1, first=0, last=512),
        TraceEvent("chunk", "r", 1, 0.3, "p1", 0.1, first=512, last=600),
        TraceEvent("fetch", "r", 1, 0.4, "d0", 0.05, "p1"),
    ],
    steps=[
        StepSpan(0.3, 0.1, "p1", 1, 0, 88, 1),
        StepSpan(0.8, 0.1, "d0", 1, 1, 0, 1),
        StepSpan(0.9, 0.1, "d0", 1, 1, 0, 1),
    ],
)


def texts(root):
    return [each.text for each in root.iter(f"{SVG}text")]


def test_it_says_what_the_run_was():
    root = ElementTree.fromstring(drawn(SEEN, TIMELINE))
    found = texts(root)
    assert {"client", "broker", "p0", "p1", "d0", "Assign to p1", "KV in 2 chunks", "38,400 bytes"} <= {*found}
    assert {"KV 50% of 200 blocks", "KV 25% of 200 blocks"} <= {*found}
    assert {"3 queued, chunk fill 75%", "2 running, batch 2.5"} <= {*found}
    assert tuple(found[i - 1] for i, text in enumerate(found) if text == "200.0 ms") == STAGES
    assert found.index("p1") < found.index("p0"), "the request's own instance comes first"


def test_bars_lie_where_the_times_are():
    root = ElementTree.fromstring(drawn(SEEN, TIMELINE))
    left, scale = picture.LEFT, (picture.RIGHT - picture.LEFT) / timeline_s(TIMELINE)
    bars = [
        (float(bar.get("x")), float(bar.get("width"))) for bar in root.iter(f"{SVG}rect") if bar.get("height") == "16"
    ]
    assert timeline_s(TIMELINE) == 1.0 and len(bars) == 5 + 2 + 1 + 2
    assert (left + 0.2 * scale, 0.2 * scale - 1) in [pytest.approx(bar) for bar in bars]
    assert all(left <= x and x + width <= picture.RIGHT for x, width in bars)


def test_a_short_bar_can_be_seen():
    drawing = Drawing(10, 10, "t", "d")
    drawing.bar("kv", 1, 1, 0.01, 5)
    assert 'width="2"' in drawing.xml()


@pytest.fixture(scope="module")
def committed():
    return PICTURE.read_text(encoding="utf-8")


def test_the_picture_in_the_pages_is_small_and_needs_nothing_from_outside(committed):
    root = ElementTree.fromstring(committed)
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}" and len(committed) < 20_000
    assert "http" not in committed.replace('xmlns="http://www.w3.org/2000/svg"', "") and "script" not in committed
    for each in root.iter(f"{SVG}text"):
        assert 0 <= float(each.get("x")) <= WIDTH and 0 <= float(each.get("y")) <= HEIGHT


def test_it_names_what_the_page_names(committed):
    found = " ".join(texts(ElementTree.fromstring(committed)))
    assert all(name in found for name in (*STAGES, "p0", "d0", "chunk fill", "batch", "blocks", "queued", "running"))


def test_the_tool_draws_a_real_run(tmp_path, capfd):
    out = tmp_path / "made.svg"
    with pytest.raises(SystemExit) as ended:
        picture.main(["--out", str(out)], prog_name="make_picture")
    assert ended.value.code == 0, capfd.readouterr().err
    found = texts(ElementTree.fromstring(out.read_text(encoding="utf-8")))
    assert {"KV in 3 chunks", "90,112 bytes", *STAGES} <= {*found}
