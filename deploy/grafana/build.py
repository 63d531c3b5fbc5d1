"""The dashboards, as code: `python deploy/grafana/build.py` writes `dashboards/*.json`, which Grafana provisions.

With `--check` it writes nothing and exits 1 if a file differs from what it would write.

Each panel answers one question, which is its title or its description; each query names series that the gateway or
vLLM really export, and `tests/monitoring` asks a real Prometheus for every one of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    GraphDrawStyle,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)

HERE = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WHERE = 'model=~"$model", variant=~"$variant"'
RATE = "[$__rate_interval]"
OBJECTIVE_S, OBJECTIVE_MISSED = "5.0", 0.01  # as in deploy/prometheus/rules.yml
INTERACTIVE = WHERE + ', band!="batch"'


@dataclass(frozen=True)
class Line:
    """One query; `legend` names its series by their labels."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Graph:
    """Series over time; `width` of Grafana's 24 columns. `quiet` says what it means that there are none, and from
    `bound` on it is worth a look."""

    title: str
    unit: str
    lines: Sequence[Line]
    about: str = ""
    width: int = 12
    is_stacked: bool = False
    quiet: str = "no traffic"
    bound: float | None = None

    def build(self) -> timeseries.Panel:
        panel = (
            timeseries.Panel()
            .title(self.title)
            .description(self.about)
            .unit(self.unit)
            .no_value(self.quiet)
            .min(0)
            .datasource(SOURCE)
            .span(self.width)
            .height(8)
            .draw_style(GraphDrawStyle.LINE)
            .line_width(1)
            .fill_opacity(40 if self.is_stacked else 8)
            .legend(
                common.VizLegendOptions()
                .show_legend(True)
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
            )
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        )
        if self.is_stacked:
            panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
        if self.bound is not None:
            style = common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED)
            panel = panel.thresholds(_thresholds(self.bound)).thresholds_style(style)
        for ref_id, line in zip(ascii_uppercase, self.lines, strict=False):
            panel = panel.with_target(_query(line).ref_id(ref_id))
        return panel


@dataclass(frozen=True)
class Figure:
    """One number, now; from `bound` on it is red."""

    title: str
    unit: str
    expr: str
    about: str = ""
    bound: float | None = None

    def build(self) -> stat.Panel:
        panel = (
            stat.Panel()
            .title(self.title)
            .description(self.about)
            .unit(self.unit)
            .no_value("no traffic")
            .datasource(SOURCE)
            .span(4)
            .height(4)
            .color_mode(BigValueColorMode.NONE)
            # The latest that is a number: a quantile of nothing is none.
            .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
            .with_target(_query(Line(self.expr, self.title)).ref_id("A"))
        )
        if self.bound is not None:
            panel = panel.color_mode(BigValueColorMode.VALUE).thresholds(_thresholds(self.bound))
        return panel


def _thresholds(bound: float) -> ThresholdsConfig:
    steps = [Threshold(value=None, color="green"), Threshold(value=bound, color="red")]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _query(line: Line) -> Dataquery:
    return Dataquery().expr(line.expr).legend_format(line.legend).datasource(SOURCE)


def quantile(share: float, metric: str, by: str = "", where: str = WHERE) -> str:
    grouping = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({share}, sum by ({grouping}) (rate({metric}_bucket{{{where}}}{RATE})))"


def mean(metric: str, where: str) -> str:
    return f"sum(rate({metric}_sum{{{where}}}{RATE})) / sum(rate({metric}_count{{{where}}}{RATE}))"


def quantiles(metric: str) -> list[Line]:
    return [Line(quantile(share, metric), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


def events(metric: str, by: str) -> str:
    """What is rare, a minute: 1 in the window is more than none, and what does not happen is not listed."""
    return f"60 * sum by ({by}) (rate({metric}{RATE})) > 0"


def share_by_weight() -> str:
    """What each named tenant was served by weight, of what all who were served anything were on the average."""
    served = f"sum by (tenant) (rate(sluice_tenant_tokens_total{RATE}))"
    weight = "max by (tenant) (sluice_tenant_weight)"
    return f"{served} / {weight} / scalar(sum({served} and {weight}) / sum({weight} and {served} > 0))"


def rate(metric: str, by: str, where: str = WHERE) -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}{RATE}))"


SERVICE: dict[str, Sequence[Graph | Figure]] = {
    "Now": [
        Figure("Requests", "reqps", f"sum(rate(sluice_requests_total{RATE}))"),
        Figure("Generated", "short", f"sum(rate(sluice_generation_tokens_total{RATE}))", "Tokens a second."),
        Figure("TTFT p95", "s", quantile(0.95, "sluice_time_to_first_token_seconds")),
        Figure("ITL p95", "s", quantile(0.95, "sluice_inter_token_latency_seconds")),
        Figure(
            "First token too late",
            "percentunit",
            "sluice:time_to_first_token_missed:ratio_rate_5m",
            f"Share of interactive requests without a first token within {OBJECTIVE_S} s; the objective allows 1 %.",
            bound=OBJECTIVE_MISSED,
        ),
        Figure("Failed", "percentunit", "sluice:requests_failed:ratio_rate_5m", "Of all that nobody cancelled.", 0.01),
    ],
    "First token": [
        Graph(
            "Time to first token",
            "s",
            quantiles("sluice_time_to_first_token_seconds"),
            "Arrival to first token; the dashed line is the objective.",
            bound=float(OBJECTIVE_S),
        ),
        Graph(
            "Where the first byte waits",
            "s",
            [
                Line(mean("sluice_queue_wait_seconds", INTERACTIVE), "queue: for a slot"),
                Line(mean("sluice_upstream_first_byte_seconds", INTERACTIVE), "worker: to its first byte"),
                Line(mean("sluice_gateway_overhead_seconds", INTERACTIVE), "gateway itself"),
            ],
            "Means of three parts, which add up; without batches. The first byte of an answer that does not stream"
            " comes with its last.",
            is_stacked=True,
        ),
        Graph("Inter-token latency", "s", quantiles("sluice_inter_token_latency_seconds")),
        Graph("Time per output token", "s", quantiles("sluice_time_per_output_token_seconds")),
    ],
    "Throughput": [
        Graph(
            "Tokens a second",
            "short",
            [
                Line(f"sum(rate(sluice_generation_tokens_total{{{WHERE}}}{RATE}))", "generated"),
                Line(f"sum(rate(sluice_prompt_tokens_total{{{WHERE}}}{RATE}))", "prompt"),
            ],
        ),
        Graph(
            "Goodput",
            "reqps",
            [
                Line(
                    f'sum(rate(sluice_time_to_first_token_seconds_bucket{{{WHERE}, le="{OBJECTIVE_S}"}}{RATE}))',
                    "first token in time",
                ),
                Line(f"sum(rate(sluice_time_to_first_token_seconds_count{{{WHERE}}}{RATE}))", "first token at all"),
            ],
            "Streams a second.",
        ),
        Graph(
            "How requests end",
            "reqps",
            [Line(f"sum by (outcome) (rate(sluice_requests_total{RATE}))", "{{outcome}}")],
            is_stacked=True,
        ),
        Graph(
            "Why they do not complete",
            "reqps",
            [Line(f'sum by (code) (rate(sluice_requests_total{{code!=""}}{RATE}))', "{{code}}")],
            "By the code that the client was told.",
            quiet="every request completed",
        ),
        Graph("Requests in flight", "short", [Line("sum(sluice_requests_in_flight)", "in flight")]),
        Graph("Whole answer", "s", quantiles("sluice_request_duration_seconds"), "Arrival to the answer's end."),
    ],
}

QUEUE: dict[str, Sequence[Graph | Figure]] = {
    "Who waits": [
        Graph("Waiting, by band", "short", [Line("sum by (band) (sluice_queue_depth)", "{{band}}")], is_stacked=True),
        Graph("Longest wait, by band", "s", [Line("max by (band) (sluice_queue_oldest_seconds)", "{{band}}")]),
        Graph(
            "Wait for a slot, p95 by band",
            "s",
            [Line(quantile(0.95, "sluice_queue_wait_seconds", "band"), "{{band}}")],
        ),
        Graph(
            "Slots",
            "short",
            [Line("sum(sluice_slots_held)", "held"), Line("sum(sluice_slots_capacity)", "there are")],
            "Slots held all the time while somebody waits: the workers are the limit.",
        ),
    ],
    "Who gets what": [
        Graph(
            "Generated tokens a second, by band",
            "short",
            [Line(rate("sluice_generation_tokens_total", "band"), "{{band}}")],
            is_stacked=True,
        ),
        Graph(
            "Requests, by band", "reqps", [Line("sum by (band) (rate(sluice_requests_total" + RATE + "))", "{{band}}")]
        ),
    ],
    "Tenants": [
        Graph(
            "Tokens a second, by tenant",
            "short",
            [Line(f"sum by (tenant) (rate(sluice_tenant_tokens_total{RATE}))", "{{tenant}}")],
            "Of prompts and answers.",
            is_stacked=True,
        ),
        Graph(
            "Share of the tokens against weight",
            "percentunit",
            [Line(share_by_weight(), "{{tenant}}")],
            "Of the named tenants that are served anything; 100 %, the dashed line, is what the weight gives. Who waits"
            " and stays below it does not get its due; above it is what others left. A batch takes what is left, too.",
            quiet="no named tenant is served",
            bound=1,
        ),
        Graph(
            "Completed requests, by tenant",
            "reqps",
            [Line(f'sum by (tenant) (rate(sluice_tenant_requests_total{{outcome="completed"}}{RATE}))', "{{tenant}}")],
        ),
        Graph(
            "Requests that did not complete, by tenant",
            "reqps",
            [
                Line(
                    f'sum by (tenant, outcome) (rate(sluice_tenant_requests_total{{outcome!="completed"}}{RATE})) > 0',
                    "{{tenant}}: {{outcome}}",
                )
            ],
            quiet="every request completed",
        ),
    ],
    "Who is refused, and why": [
        Graph(
            "Refused by a limit",
            "reqps",
            [Line(f"sum by (limit) (rate(sluice_limit_rejections_total{RATE}))", "{{limit}}")],
            "`hopeless`: it could not have been served in time.",
            width=8,
            quiet="no limit refused anybody",
        ),
        Graph(
            "Refused or expired, by code",
            "reqps",
            [Line(f'sum by (code) (rate(sluice_requests_total{{outcome=~"rejected|expired"}}{RATE}))', "{{code}}")],
            width=8,
            quiet="nobody was refused",
        ),
        Graph(
            "Turned away at the door, a minute",
            "cpm",
            [
                Line(events("sluice_auth_failures_total", "reason"), "key: {{reason}}"),
                Line(events("sluice_malformed_requests_total", "code"), "not HTTP: {{code}}"),
            ],
            "Without a key that is known, or what is no request; they are in no other panel.",
            width=8,
            quiet="nobody was turned away",
        ),
    ],
    "The shared ledger": [
        Graph(
            "Processes without Redis",
            "short",
            [Line("sum(sluice_admission_degraded)", "processes")],
            "Above 0: order and limits hold inside a process only.",
            bound=1,
        ),
        Graph(
            "Ledger told anew, leases lost, a minute",
            "cpm",
            [
                Line(events("sluice_ledger_resyncs_total", "reason"), "told anew: {{reason}}"),
                Line(f"60 * sum(rate(sluice_leases_fenced_total{RATE})) > 0", "leases lost"),
            ],
            quiet="the ledger is as it was",
        ),
    ],
}

WORKERS: dict[str, Sequence[Graph | Figure]] = {
    "Workers": [
        Graph(
            "State",
            "short",
            [Line("sum by (variant, state) (sluice_worker_state) > 0", "{{variant}} {{state}}")],
            "Workers of each variant in each state; `ready` ones generate.",
            is_stacked=True,
        ),
        Graph(
            "Slots held",
            "short",
            [
                Line("sum by (worker) (sluice_slots_held)", "{{worker}} held"),
                Line("max by (worker) (sluice_slots_capacity)", "{{worker}} slots"),
            ],
        ),
        Graph(
            "Inside vLLM",
            "short",
            [
                Line("sum by (worker) (vllm:num_requests_running)", "{{worker}} running"),
                Line("sum by (worker) (vllm:num_requests_waiting)", "{{worker}} waiting"),
            ],
            "Waiting inside vLLM stays near zero: who waits, waits in the gateway's queue, in its order.",
            quiet="no worker is scraped",
        ),
        Graph(
            "KV cache in use",
            "percentunit",
            [Line("max by (worker) (vllm:kv_cache_usage_perc)", "{{worker}}")],
            "Near the line vLLM begins to preempt.",
            quiet="no worker is scraped",
            bound=0.95,
        ),
        Graph(
            "Prefix cache hits",
            "percentunit",
            [
                Line(
                    f"sum by (worker) (rate(vllm:prefix_cache_hits_total{RATE}))"
                    f" / sum by (worker) (rate(vllm:prefix_cache_queries_total{RATE}))",
                    "{{worker}}",
                )
            ],
            "Share of prompt tokens that were in the cache.",
        ),
        Graph(
            "Second attempts and resumed streams, a minute",
            "cpm",
            [
                Line(events("sluice_retries_total", "reason"), "again: {{reason}}"),
                Line(events("sluice_resumes_total", "outcome"), "resume: {{outcome}}"),
            ],
            quiet="no attempt failed",
        ),
    ],
    "Variants, side by side": [
        Graph(
            "TTFT p95, by variant",
            "s",
            [Line(quantile(0.95, "sluice_time_to_first_token_seconds", "model, variant"), "{{model}}:{{variant}}")],
        ),
        Graph(
            "ITL p95, by variant",
            "s",
            [Line(quantile(0.95, "sluice_inter_token_latency_seconds", "model, variant"), "{{model}}:{{variant}}")],
        ),
        Graph(
            "Generated tokens a second, by variant",
            "short",
            [Line(rate("sluice_generation_tokens_total", "model, variant"), "{{model}}:{{variant}}")],
        ),
        Graph(
            "Requests, by variant",
            "reqps",
            [Line(rate("sluice_requests_total", "model, variant", WHERE + ', variant!=""'), "{{model}}:{{variant}}")],
            "Who was refused before a variant was chosen is not here.",
        ),
        Graph(
            "Why a variant served",
            "reqps",
            [
                Line(
                    f"sum by (model, variant, reason) (rate(sluice_variant_choices_total{{{WHERE}}}{RATE}))",
                    "{{model}}:{{variant}} {{reason}}",
                )
            ],
            "As `x-sluice-variant-reason` tells the client.",
            width=24,
        ),
    ],
}

BATCHES: dict[str, Sequence[Graph | Figure]] = {
    "Lines": [
        Graph(
            "Lines of unfinished batches",
            "short",
            [Line("max by (state) (sluice_batch_lines)", "{{state}}")],
            is_stacked=True,
            quiet="no batch is unfinished",
        ),
        Graph(
            "Lines in flight",
            "short",
            [
                Line("sum(sluice_batch_lines_in_flight)", "lines"),
                Line("sum(sluice_slots_capacity) - sum(sluice_slots_held)", "slots that stand free"),
            ],
            "Lines take what stands free, and give way to interactive requests.",
        ),
        Graph(
            "Lines a second",
            "short",
            [Line(f"sum by (outcome) (rate(sluice_batch_lines_ended_total{RATE}))", "{{outcome}}")],
            is_stacked=True,
            quiet="no batch yet",
        ),
        Graph(
            "Lines taken off their workers, a minute",
            "cpm",
            [Line(f"60 * sum(rate(sluice_batch_preemptions_total{RATE}))", "lines")],
            "For interactive requests that would have waited for their slots; they are run again.",
            quiet="no line had to give way",
        ),
        Graph(
            "Tokens a second in vain",
            "short",
            [Line(f"sum(rate(sluice_batch_preempted_tokens_total{RATE}))", "of lines taken off, estimated")],
            quiet="no line had to give way",
        ),
        Graph(
            "What interactive streams notice: TTFT p95",
            "s",
            [Line(quantile(0.95, "sluice_time_to_first_token_seconds", "band", INTERACTIVE), "{{band}}")],
        ),
    ],
}

DASHBOARDS = {
    "service": ("Service", SERVICE),
    "queue": ("Queue and fairness", QUEUE),
    "workers": ("Workers and variants", WORKERS),
    "batches": ("Batches", BATCHES),
}


def dashboard(uid: str, title: str, rows: dict[str, Sequence[Graph | Figure]]) -> Dashboard:
    built = (
        Dashboard(f"Sluice: {title}")
        .uid(f"sluice-{uid}")
        .tags(["sluice", "vllm"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_choice("model", "label_values(sluice_requests_total, model)"))
        .with_variable(_choice("variant", 'label_values(sluice_requests_total{model=~"$model"}, variant)'))
    )
    ids = count(1)
    for row, panels in rows.items():
        built = built.with_row(Row(row).id(next(ids)))
        for panel in panels:
            built = built.with_panel(panel.build().id(next(ids)))
    return built


def _choice(name: str, query: str) -> QueryVariable:
    return (
        QueryVariable(name)
        .label(name)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def written(uid: str) -> str:
    """The JSON of one dashboard, as it is committed."""
    title, rows = DASHBOARDS[uid]
    return (
        json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(dashboard(uid, title, rows).build())), indent=1) + "\n"
    )


def main() -> int:
    files = {HERE / "dashboards" / f"{uid}.json": written(uid) for uid in DASHBOARDS}
    if "--check" in sys.argv:
        return int(any(not file.exists() or file.read_text(encoding="utf-8") != text for file, text in files.items()))
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
