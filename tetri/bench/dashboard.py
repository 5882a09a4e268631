"""make_dashboard: writes the Grafana dashboard, conf/grafana.json, from the tables below.

In an expression, `{}` stands for the labels of the chosen gateway, `{iid}` for those and the chosen instances, and `[]`
for the interval of rates. One gateway is chosen, since each has the metrics of its whole deployment.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

import click
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model

from tetri.bench.deployment import REPOSITORY
from tetri.bench.report import Program, one_line, progress
from tetri.paths import OUT_FILE

TARGET = REPOSITORY / "conf" / "grafana.json"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
GATEWAY = 'job="$job",instance="$instance"'
WIDTH, STAT_HEIGHT, GRAPH_HEIGHT = 24, 4, 8
PER_S, TOKENS_PER_S, SECONDS, SHARE, NUMBER, BYTES_PER_S = "reqps", "suffix: tok/s", "s", "percentunit", "short", "Bps"


class Panel(NamedTuple):
    """A graph, or a number with its trend. `about`: what it shows, and what a reader does with it. `lines`: legend ->
    expression."""

    title: str
    unit: str
    about: str
    lines: dict[str, str]
    stacked: bool = False


def quantiles(metric: str) -> dict[str, str]:
    """Lines for three percentiles of a histogram."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        name: f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{}}[])))"
        for name, share in shares.items()
    }


def mean(metric: str, by: str = "", labels: str = "{}") -> str:
    """The mean of a histogram's values, for each value of the label `by` if there is one."""
    over = f"sum by ({by})" if by else "sum"
    return f"{over} (rate({metric}_sum{labels}[])) / {over} (rate({metric}_count{labels}[]))"


def ratio(over: str, under: str, by: str, labels: str = "{iid}") -> str:
    """What a counter has grown, for each unit that another has grown."""
    return f"sum by ({by}) (rate({over}{labels}[])) / sum by ({by}) (rate({under}{labels}[]))"


OVERVIEW = [
    Panel("Requests", PER_S, "Choices that end each second.", {"": "sum (rate(tetri_requests_ended_total{}[]))"}),
    Panel("Output", TOKENS_PER_S, "Output tokens of all instances.", {"": "sum (rate(tetri_decode_tokens_total{}[]))"}),
    Panel("Open", NUMBER, "Choices that are queued or served.", {"": "sum (tetri_requests_open{})"}),
    Panel("TTFT p99", SECONDS, "Time to the first token.", {"": quantiles("tetri_ttft_seconds")["p99"]}),
    Panel("TPOT p99", SECONDS, "Per output token after the first.", {"": quantiles("tetri_tpot_seconds")["p99"]}),
    Panel("Ready", NUMBER, "Instances that are ready.", {"": "sum (tetri_instance_up{})"}),
    Panel("Lost", NUMBER, "Instances that are lost.", {"": "count (tetri_instance_up{} == 0) or vector(0)"}),
    Panel("Degraded", NUMBER, "`tetri-cli status` names these.", {"": "max (tetri_degraded{})"}),
]
REQUESTS = [
    Panel("Ended", PER_S, "Choices that ended, by reason.",
          {"{{reason}}": "sum by (reason) (rate(tetri_requests_ended_total{}[]))"}, stacked=True),
    Panel("Open, by stage", NUMBER, "Where open choices are: queued → prefill → moving → waiting → decode.",
          {"{{stage}}": "sum by (stage) (tetri_requests_open{})"}, stacked=True),
    Panel("Tokens", TOKENS_PER_S, "Of ended choices. Local: KV stayed; adopted: it came as bytes; recomputed: again.",
          {"{{kind}}": "sum by (kind) (rate(tetri_tokens_total{}[]))"}),
    Panel("Refused", PER_S, "full: add instances. Others: mistakes of clients.",
          {"{{reason}}": "sum by (reason) (rate(tetri_requests_refused_total{}[]))"}, stacked=True),
    Panel("Retries", PER_S, "Attempts that were started again, by reason.",
          {"{{reason}}": "sum by (reason) (rate(tetri_retries_total{}[]))"}, stacked=True),
    Panel("HTTP answers of this gateway", PER_S, "By status.",
          {"{{status}}": "sum by (status) (rate(tetri_http_answers_total{}[]))"}, stacked=True),
]  # fmt: skip
LATENCY = [
    Panel("TTFT", SECONDS, "Time to the first token, from arrival.", quantiles("tetri_ttft_seconds")),
    Panel("ITL", SECONDS, "Time between two output tokens, as they reach the broker.", quantiles("tetri_itl_seconds")),
    Panel("TPOT", SECONDS, "Of a choice: seconds per output token after the first.", quantiles("tetri_tpot_seconds")),
    Panel("JCT", SECONDS, "From arrival to the end.", quantiles("tetri_jct_seconds")),
    Panel("Mean time in each stage", SECONDS, "Of ended choices. The sum is the mean JCT.",
          {"{{stage}}": mean("tetri_stage_seconds", "stage")}, stacked=True),
    Panel("Queue, predicted and real", SECONDS, "Means. Far apart: the cost table does not fit this machine.",
          {"predicted": mean("tetri_queue_predicted_seconds"),
           "real": mean("tetri_stage_seconds", labels='{,stage="queued"}')}),
    Panel("Attainment", SHARE, "Requests that keep their limits of TTFT and TPOT: their own, else those of [slo].",
          {"kept": 'sum (rate(tetri_slo_requests_total{,result="met"}[])) / sum (rate(tetri_slo_requests_total{}[]))'}),
    Panel("Goodput", PER_S, "Requests that keep their limits, each second, beside all that count.",
          {"kept": 'sum (rate(tetri_slo_requests_total{,result="met"}[]))',
           "all": "sum (rate(tetri_slo_requests_total{}[]))"}),
    Panel("Missed limits", PER_S, "ttft: more prefill. tpot: more decode. both: more of all. failed: see Ended.",
          {"{{result}}": 'sum by (result) (rate(tetri_slo_requests_total{,result!="met"}[]))'}, stacked=True),
]  # fmt: skip
INSTANCES = [
    Panel("Prefill queue", SECONDS, "Predicted prefill work in the queue of each instance.",
          {"{{iid}}": "tetri_queued_seconds{iid}"}),
    Panel("Prompts in the queue", NUMBER, "Of each instance.", {"{{iid}}": "tetri_queued_prompts{iid}"}),
    Panel("Busy", SHARE, "Share of time in which the engine computed.", {"{{iid}}": "tetri_busy_share{iid}"}),
    Panel("Chunk fill", SHARE, "Prompt tokens computed, of those for which the steps had space.",
          {"{{iid}}": ratio("tetri_chunk_tokens_total", "tetri_chunk_space_tokens_total", "iid")}),
    Panel("Mean batch", NUMBER, "Output tokens of a step with a decode batch.",
          {"{{iid}}": ratio("tetri_decode_tokens_total", "tetri_decode_steps_total", "iid")}),
    Panel("KV use", SHARE, "Used KV blocks. At 100 % requests wait, or are preempted.",
          {"{{iid}}": "1 - tetri_kv_free_blocks{iid} / tetri_kv_blocks{iid}"}),
    Panel("Decode requests", NUMBER, "Waiting for the batch, in it, and how many of both are predicted to be heavy.",
          {"{{iid}} {{state}}": "tetri_decode_requests{iid}", "{{iid}} heavy": "tetri_heavy_decodes{iid}"}),
    Panel("Chunk", "suffix: tok", "Mean prompt tokens of a step with a chunk.",
          {"{{iid}}": ratio("tetri_chunk_tokens_total", "tetri_chunk_steps_total", "iid")}),
    Panel("Step", SECONDS, "Mean time of an engine step.",
          {"{{iid}}": ratio("tetri_step_seconds_total", "tetri_steps_total", "iid")}),
    Panel("Preemptions", "ops", "Decode requests that lost their memory, each second.",
          {"{{iid}}": "sum by (iid) (rate(tetri_preemptions_total{iid}[]))"}),
    Panel("Recomputed", TOKENS_PER_S, "Tokens of preempted requests that were computed again.",
          {"{{iid}}": "sum by (iid) (rate(tetri_recomputed_tokens_total{iid}[]))"}),
    Panel("Prompt tokens", TOKENS_PER_S, "Prompt tokens computed, of each instance.",
          {"{{iid}}": "sum by (iid) (rate(tetri_chunk_tokens_total{iid}[]))"}),
]  # fmt: skip
TRANSFER = [
    Panel("KV received", BYTES_PER_S, "Of all instances, by path.",
          {"{{path}}": "sum by (path) (rate(tetri_kv_received_bytes_total{iid}[]))"}, stacked=True),
    Panel("While a chunk moves", BYTES_PER_S, "Bytes per second of moving: how fast each path is.",
          {"{{path}}": ratio("tetri_kv_received_bytes_total", "tetri_kv_received_seconds_total", "path")}),
    Panel("Time of a KV chunk", SECONDS, "From its announcement until it is in the engine's blocks.",
          {"{{path}}": ratio("tetri_kv_received_seconds_total", "tetri_kv_received_chunks_total", "path")}),
    Panel("KV received, by instance", BYTES_PER_S, "All paths.",
          {"{{iid}}": "sum by (iid) (rate(tetri_kv_received_bytes_total{iid}[]))"}),
    Panel("KV chunks", "ops", "By path.", {"{{path}}": "sum by (path) (rate(tetri_kv_received_chunks_total{iid}[]))"}),
    Panel("Failed fetches", "ops", "By path and instance. `tetri-cli ready` says why.",
          {"{{path}} {{iid}}": "sum by (path, iid) (rate(tetri_kv_failures_total{iid}[]))"}),
]  # fmt: skip
LENGTHS = [
    Panel("Prompts", "suffix: tok", "Tokens of a prompt.", quantiles("tetri_prompt_tokens")),
    Panel("Outputs", "suffix: tok", "Output tokens of a choice.", quantiles("tetri_output_tokens")),
    Panel("Predicted lengths", SHARE, "Right: the likeliest bucket. Inside: shorter than the high end of the range.",
          {"right": "sum (rate(tetri_lengths_right_total{iid}[])) / sum (rate(tetri_lengths_scored_total{iid}[]))",
           "inside": "sum (rate(tetri_lengths_inside_total{iid}[])) / sum (rate(tetri_lengths_scored_total{iid}[]))"}),
]  # fmt: skip
ROLES = [
    Panel("Ready instances", NUMBER, "By role.", {"{{role}}": "sum by (role) (tetri_instance_up{})"}, stacked=True),
    Panel("Changes of role", NUMBER, "In each interval.",
          {"{{was}} → {{role}}": "sum by (was, role) (increase(tetri_role_changes_total{}[]))"}, stacked=True),
]  # fmt: skip
HEALTH = [
    Panel("Measured / predicted step time", NUMBER, "1: the cost table fits this machine (docs/cost.md).",
          {"{{iid}} {{phase}}": "tetri_step_ratio{iid}"}),
    Panel("KV that cannot be read", NUMBER, "Of the first instance by the second; any: by none.",
          {"{{iid}} → {{peer}}": "tetri_breaker_open{iid} > 0"}),
    Panel("Age of the cluster view", SECONDS, "It grows while the monitor is down.",
          {"age": "max (tetri_monitor_age_seconds{})"}),
    Panel("Lost", NUMBER, "Instances whose heartbeats have stopped, and the broker if it does not answer.",
          {"{{role}} {{iid}}": "1 - tetri_instance_up{iid} > 0", "broker": "1 - tetri_broker_up{} > 0"}),
    Panel("Degraded", NUMBER, "Things that work worse than they should; `tetri-cli status` names them.",
          {"degraded": "max (tetri_degraded{})"}),
    Panel("Open HTTP answers", NUMBER, "Of this gateway.", {"open": "sum (tetri_http_open{})"}),
]  # fmt: skip
ROWS = {
    "Requests": REQUESTS, "Latency": LATENCY, "Instances": INSTANCES, "KV transfer": TRANSFER, "Lengths": LENGTHS,
    "Roles": ROLES, "Health": HEALTH,
}  # fmt: skip


def expression(text: str) -> str:
    """PromQL with the labels and the interval filled in."""
    instances = f'{{{GATEWAY},iid=~"$iid"}}'
    filled = text.replace("{iid}", instances).replace("{}", f"{{{GATEWAY}}}").replace("{,", f"{{{GATEWAY},")
    return filled.replace("[]", "[$__rate_interval]")


def graph(panel: Panel, number: int, width: int) -> timeseries.Panel:
    """A panel with lines over time."""
    made = timeseries.Panel().title(panel.title).description(panel.about).id(number).datasource(SOURCE)
    made = made.unit(panel.unit).min(0).height(GRAPH_HEIGHT).span(width).show_points(shapes.VisibilityMode.NEVER)
    made = made.line_width(1).fill_opacity(40 if panel.stacked else 5)
    if panel.unit == SHARE:
        made = made.max(1)
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    tooltip = common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
    legend = common.VizLegendOptions().show_legend(True).placement(shapes.LegendPlacement.BOTTOM)
    made = made.tooltip(tooltip).legend(legend.display_mode(shapes.LegendDisplayMode.LIST).calcs([]))
    for target in queries(panel):
        made = made.with_target(target)
    return made


def single(panel: Panel, number: int, width: int) -> stat.Panel:
    """A panel with the newest value as a number, over its trend."""
    made = stat.Panel().title(panel.title).description(panel.about).id(number).datasource(SOURCE).unit(panel.unit)
    made = made.height(STAT_HEIGHT).span(width).graph_mode(shapes.BigValueGraphMode.AREA)
    made = made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    for target in queries(panel):
        made = made.with_target(target)
    return made


def queries(panel: Panel) -> Iterator[prometheus.Dataquery]:
    """What Prometheus is asked: a query for each line, or for several that differ in labels."""
    for ref_id, (legend, text) in zip(ascii_uppercase, panel.lines.items(), strict=False):
        asked = prometheus.Dataquery().expr(expression(text)).legend_format(legend).ref_id(ref_id)
        yield asked.range().datasource(SOURCE)


def variables() -> list[dashboard.QueryVariable]:
    """What a reader chooses at the top: Prometheus's job, the gateway, and instances."""
    scraped = _values("job", "Job", "label_values(tetri_info, job)")
    gateway = _values("instance", "Gateway", 'label_values(tetri_info{job="$job"}, instance)')
    instances = _values("iid", "Instances", f"label_values(tetri_instance_up{{{GATEWAY}}}, iid)")
    return [scraped, gateway, instances.multi(True).include_all(True).all_value(".*").current(_option("All", "$__all"))]


def _values(name: str, label: str, text: str) -> dashboard.QueryVariable:
    made = dashboard.QueryVariable(name).label(label).query(text).datasource(SOURCE)
    return made.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.NATURAL_ASC)


def _option(text: str, value: str) -> model.VariableOption:
    return model.VariableOption(selected=True, text=text, value=value)


def made() -> str:
    """The dashboard as JSON."""
    board = dashboard.Dashboard("tetri").uid("tetri").tags(["tetri", "llm"]).refresh("10s").time("now-30m", "now")
    board = board.description("Requests, latency, instances and KV transfer of a tetri deployment.").timezone("browser")
    board = board.tooltip(model.DashboardCursorSync.CROSSHAIR).editable()
    board = board.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for variable in variables():
        board = board.with_variable(variable)
    numbers = count(1)
    for panel in OVERVIEW:
        board = board.with_panel(single(panel, next(numbers), WIDTH // len(OVERVIEW)))
    for title, panels in ROWS.items():
        board = board.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            board = board.with_panel(graph(panel, next(numbers), WIDTH // min(3, len(panels))))
    return JSONEncoder(sort_keys=True, indent=1, ensure_ascii=False).encode(board.build()) + "\n"


@click.command(cls=Program)
@click.option("--out", type=OUT_FILE, default=TARGET, help="The file to write (default: conf/grafana.json).")
def main(out: Path) -> None:
    """Write the Grafana dashboard."""
    with one_line("make_dashboard", OSError):
        out.write_text(made(), encoding="utf-8")
    progress(f"wrote {out}")


if __name__ == "__main__":
    main(prog_name="make_dashboard")
