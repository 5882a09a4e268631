"""The measurement of running decodes that move, on emulated engines without step times: few of them, both ways."""

import asyncio

from tetri.bench import migrate
from tetri.bench.deployment import LOAD_S, configured, own_folder, running
from tetri.request import Stage
from tetri.wire.observation import StepSpan, Timeline, TraceEvent


def timeline(*steps, events=()):
    spans = [StepSpan(start, seconds, iid, 1, 2, 0, 1) for iid, start, seconds in steps]
    fields = {"rid": "r", "choice": 0, "choices": 1, "age_s": 9.0, "prompt_tokens": 3, "outputs": len(spans)}
    return Timeline(**fields, attempts=1, stage=Stage.DONE, steps=spans, events=list(events))


def test_a_gap_is_from_the_last_step_there_to_the_end_of_the_first_one_here():
    copies = [TraceEvent("fetch", "r", 1, at, "d1", seconds) for at, seconds in ((1.0, 0.5), (1.5, 0.25))]
    steps = ("p0", 0.0, 1.0), ("d0", 1.0, 0.5), ("d0", 1.5, 0.25), ("d1", 2.0, 0.125)
    stood_s, limit_s = migrate.gap(timeline(*steps, events=copies))
    assert (stood_s, limit_s) == (0.375, 0.25 + 2 * 0.125 + 0.25 + migrate.SLACK_S)
    assert migrate.gap(timeline(*steps[:3])) is None, "it did not move"


def test_all_move_once_and_none_of_them_changes():
    with own_folder("migrate") as folder:
        path = folder / "bench.toml"
        path.write_text(migrate.conf("emulated"), encoding="utf-8")
        config = configured(path, folder, "migrate", ["emulated.time_scale=0.1"])
        with running(config, lambda line: None, LOAD_S):
            run = migrate.Run(config, 400, "", lambda line: None)
            found = asyncio.run(run.all(migrate.prompts(4, 1), 2))
    made = migrate.judged(found, "kill")  # how long they stand still depends on the machine
    assert made["differ"] == 0 and made["moved"] + made["computed_again"] >= 4, migrate.shown(made)
