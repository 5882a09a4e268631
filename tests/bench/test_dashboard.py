"""tools/make_dashboard and conf/grafana.json: the file is what the tool writes, the library's schema has all of it,
and it shows every metric of docs/metrics.md, and no other."""

import json
import re
import shutil
import subprocess

import documented
import pytest
from click.testing import CliRunner
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tetri.bench import dashboard

#: Not drawn: what other programs read, and what only the variables use.
ELSEWHERE = {"tetri_info", *(name for name in documented.metrics() if name.startswith("vllm:"))}
UNITS = {"reqps", "ops", "s", "percentunit", "short", "Bps", "suffix: tok/s", "suffix: tok"}
BOARD = json.loads(dashboard.TARGET.read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [pytest.param(panel, target, id=panel["title"]) for panel in PANELS for target in panel["targets"]]


def test_the_file_is_what_the_tool_writes(tmp_path):
    result = CliRunner().invoke(dashboard.main, ["--out", str(tmp_path / "made.json")])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "made.json").read_text(encoding="utf-8") == dashboard.TARGET.read_text(encoding="utf-8")


def test_the_library_reads_all_of_it():
    plugins.register_default_plugins()
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(BOARD))) == BOARD


@pytest.mark.parametrize("panel, target", TARGETS)
def test_an_expression_asks_for_documented_metrics(panel, target):
    assert list(documented.problems(target["expr"], documented.series())) == []
    assert 'job="$job"' in target["expr"] or "vector" in target["expr"]
    named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    known = set().union(*(documented.series()[name] for name in documented.used(target["expr"])))
    assert named <= known


def test_what_is_not_documented_is_noticed():
    known = {"tetri_a_total": {"path", "job"}}
    assert list(documented.problems('sum by (path) (rate(tetri_a_total{job="x"}[5m]))', known)) == []
    assert list(documented.problems("tetri_b", known)) == ["no metric tetri_b"]
    assert list(documented.problems('sum by (iid) (tetri_a_total{reason="x"})', known)) == [
        "tetri_a_total has no label reason", "no metric has the label iid",
    ]  # fmt: skip


def test_every_metric_is_shown():
    shown = set().union(*(documented.used(target["expr"]) for panel in PANELS for target in panel["targets"]))
    names = {name for name in documented.metrics() if not shown & {name, f"{name}_bucket", f"{name}_sum"}}
    assert names == ELSEWHERE


def test_panels_have_units_words_and_a_place_and_queries_names_of_their_own():
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells and place["x"] + place["w"] <= dashboard.WIDTH, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in PANELS:
        assert [target["refId"] for target in panel["targets"]] == [*"ABC"[: len(panel["targets"])]]
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] in UNITS for panel in PANELS)


def test_a_reader_chooses_the_source_the_gateway_and_instances():
    assert [each["name"] for each in BOARD["templating"]["list"]] == ["datasource", "job", "instance", "iid"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on the PATH: it comes with Prometheus")
def test_prometheus_can_read_each_expression(tmp_path):
    texts = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [{"record": f"r{i}", "expr": text.replace("$__rate_interval", "1m")} for i, text in enumerate(texts)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
