"""Every series that Sluice exports, declared once, on a registry that is passed in.

Seconds and tokens. Label values come from the configuration and from enumerations, never from what a client sends, so
their number stays bounded. With several gateway processes each writes to memory-mapped files in
`PROMETHEUS_MULTIPROC_DIR` and a scrape of any of them adds all up; that directory must be set before
`prometheus_client` is imported, which is why only this module imports it.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from app.inference import Band, Outcome, TokenUsage
from app.telemetry.tally import NOTHING_YET, Tally

# vLLM's own bucket edges, so that gateway and engine panels overlay.
TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
ITL_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
DURATION_BUCKETS = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    3840,
)
BATCH_BUCKETS = (1, 10, 60, 300, 900, 1800, 3600, 7200, 14400, 28800, 57600, 86400, 172800)
OVERHEAD_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.33, 2, 4, 10)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"

MOST_TENANTS = 100
OTHER_TENANTS = "other"

_LABELS = ("model", "variant", "band")


class QuickHistogram(Histogram):
    """A histogram that finds its bucket by bisection: each token of each stream is observed."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """As `Histogram.observe`, of a child; exemplars are not kept."""
        self._sum.inc(amount)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(1)

    def counts(self) -> list[float]:
        """How many fell into each bucket, of a child."""
        return [bucket.get() for bucket in self._buckets]

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Each of `amounts`. In order those of a bucket stand together, and there are few buckets."""
        ordered, begin = sorted(amounts), 0
        while begin < len(ordered):
            bucket = bisect_left(self._upper_bounds, ordered[begin])
            end = bisect_right(ordered, self._upper_bounds[bucket], begin)
            self._buckets[bucket].inc(end - begin)
            begin = end
        self._sum.inc(sum(amounts))


class ReadableCounter(Counter):
    """A counter that tells what it has counted."""

    @property
    def count(self) -> float:
        """Of a child, in this process."""
        counted: float = self._value.get()
        return counted


class Metrics:
    """The series of one process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> QuickHistogram:
            return QuickHistogram(name, text, _LABELS, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> ReadableCounter:
            return ReadableCounter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str, across: str = "livesum") -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode=across)  # type: ignore[arg-type]

        self._registry = registry
        self.ttft = histogram("sluice_time_to_first_token_seconds", "Arrival to first generated token.", TTFT_BUCKETS)
        self.queue_wait = histogram("sluice_queue_wait_seconds", "Arrival to grant of a slot.", TTFT_BUCKETS)
        self.upstream_first_byte = histogram(
            "sluice_upstream_first_byte_seconds", "Dispatch to the worker's first body byte.", TTFT_BUCKETS
        )
        self.overhead = histogram(
            "sluice_gateway_overhead_seconds", "Arrival to dispatch, less the wait for a slot.", OVERHEAD_BUCKETS
        )
        self.itl = histogram("sluice_inter_token_latency_seconds", "Gap between token chunks of a stream.", ITL_BUCKETS)
        self.tpot = histogram(
            "sluice_time_per_output_token_seconds", "(E2E - TTFT) / (tokens - 1) of a stream.", ITL_BUCKETS
        )
        self.duration = QuickHistogram(
            "sluice_request_duration_seconds",
            "Arrival to the end of the answer.",
            (*_LABELS, "outcome"),
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = counter("sluice_prompt_tokens_total", "Prompt tokens, as workers counted them.", *_LABELS)
        self.generation_tokens = counter("sluice_generation_tokens_total", "Generated tokens.", *_LABELS)
        self.requests = counter("sluice_requests_total", "Requests that ended.", *_LABELS, "outcome", "code")
        self.in_flight = gauge("sluice_requests_in_flight", "Requests between arrival and end.")
        self.queue_depth = gauge("sluice_queue_depth", "Tickets that wait for a slot.", "band")
        self.queue_oldest = gauge(
            "sluice_queue_oldest_seconds", "Longest wait among those who wait.", "band", across="livemax"
        )
        self.limit_rejections = counter("sluice_limit_rejections_total", "Requests that a limit refused.", "limit")
        self.admission_degraded = gauge(
            "sluice_admission_degraded", "Processes that admit without Redis now; 0 is well."
        )
        self.ledger_resyncs = counter(
            "sluice_ledger_resyncs_total", "Times the shared ledger was told anew who holds what.", "reason"
        )
        self.leases_fenced = counter(
            "sluice_leases_fenced_total", "Leases that were lost, and found their slot given to another."
        )
        self.slots_held = gauge("sluice_slots_held", "Slots that are held.", "worker")
        self.slots_capacity = gauge("sluice_slots_capacity", "Slots of a worker.", "worker", across="livemax")
        self.worker_state = gauge(
            "sluice_worker_state",
            "1 for the state that a worker is in.",
            "worker",
            "variant",
            "state",
            across="livemax",
        )
        self.config_reloads = counter(
            "sluice_config_reloads_total", "Changes of the configuration that were found.", "outcome"
        )
        self.config_current = gauge(
            "sluice_config_reload_success", "0 while the latest configuration is refused.", across="livemin"
        )
        self.retries = counter("sluice_retries_total", "Attempts that were repeated on another slot.", "reason")
        self.refused = counter("sluice_malformed_requests_total", "Requests refused before a route saw them.", "code")
        self.resumes = counter("sluice_resumes_total", "Resumable streams that broke, by what came of it.", "outcome")
        self.auth_failures = counter("sluice_auth_failures_total", "Requests that nobody was let in for.", "reason")
        self.open_doors = gauge("sluice_auth_disabled", "1 where no keys are asked for.", across="livemax")
        self.tenant_requests = counter(
            "sluice_tenant_requests_total", "Requests of a tenant that ended.", "tenant", "outcome"
        )
        self.tenant_tokens = counter(
            "sluice_tenant_tokens_total", "Tokens of a tenant, as workers counted them.", "tenant", "direction"
        )
        self.tenant_weights = gauge(
            "sluice_tenant_weight", "Share of a named tenant beside others'.", "tenant", across="livemax"
        )
        self._shown_tenants: frozenset[str] = frozenset()
        self._tenant_ends: dict[tuple[str, Outcome], tuple[Counter, Counter, Counter]] = {}
        self.variant_choices = counter(
            "sluice_variant_choices_total", "Requests whose variant was chosen.", "model", "variant", "reason"
        )
        self.variant_steps = counter(
            "sluice_variant_steps_total",
            "Steps down under pressure and up again, from one variant to another.",
            "model",
            "from",
            "to",
            "reason",
        )
        self.shadows = counter(
            "sluice_shadow_requests_total",
            "Copies for a shadow variant, by what became of them.",
            "model",
            "variant",
            "outcome",
        )
        self.shadow_agreement = Histogram(
            "sluice_shadow_agreement_ratio",
            "Words that a shadow's answer shares with the one that was returned.",
            ("model", "variant"),
            buckets=SHARE_BUCKETS,
            registry=registry,
        )
        self.shadow_length = Histogram(
            "sluice_shadow_length_ratio",
            "Length of a shadow's answer by that of the one that was returned.",
            ("model", "variant"),
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self.batch_lines = gauge("sluice_batch_lines", "Lines of unfinished batches.", "state", across="livemax")
        self.batch_lines_in_flight = gauge(
            "sluice_batch_lines_in_flight", "Lines that wait for a slot or are answered."
        )
        self.batch_lines_ended = counter("sluice_batch_lines_ended_total", "Lines whose record is stored.", "outcome")
        self.batch_preemptions = counter(
            "sluice_batch_preemptions_total", "Times that a line gave its slot to a better request."
        )
        self.batch_preempted_tokens = counter(
            "sluice_batch_preempted_tokens_total", "Tokens that lines had generated in vain by then, as estimated."
        )
        self.batch_duration = Histogram(
            "sluice_batch_duration_seconds",
            "Creation of a batch to its end.",
            ("status",),
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._series: dict[tuple[str, str, Band], Series] = {}
        self._ends: dict[tuple[str, str, Band, Outcome, str], tuple[ReadableCounter, Histogram]] = {}

    def series(self, model: str, variant: str, band: Band) -> Series:
        """The children of one label set. Cached: looking each up costs more than the observation itself."""
        key = (model, variant, band)
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = Series.of(self, key)
        return found

    def ended(self, model: str, variant: str, band: Band, outcome: Outcome, code: str, duration_s: float) -> None:
        """Count the one end of a request."""
        key = (model, variant, band, outcome, code)
        found = self._ends.get(key)
        if found is None:
            labels = (model, variant, band, outcome)
            found = self._ends[key] = self.requests.labels(*labels, code), self.duration.labels(*labels)
        count, duration = found
        count.inc()
        duration.observe(duration_s)

    def show_tenants(self, tenants: Sequence[str], weight_of: Callable[[str], float]) -> None:
        """Give these series of their own, after those that have some already, as long as they are not too many.

        The others share one, which has no weight: nobody knows how many they are.
        """
        known = self._shown_tenants
        added = [name for name in tenants if name not in known]
        self._shown_tenants = known | set(added[: MOST_TENANTS - len(known)])
        for name in self._shown_tenants:
            self.tenant_weights.labels(name).set(weight_of(name))

    def tenant_ended(self, tenant: str, outcome: Outcome, usage: TokenUsage) -> None:
        """Count a request's end, and what it used, for whoever pays."""
        key = (tenant if tenant in self._shown_tenants else OTHER_TENANTS, outcome)
        found = self._tenant_ends.get(key)
        if found is None:
            found = self._tenant_ends[key] = (
                self.tenant_requests.labels(*key),
                self.tenant_tokens.labels(key[0], "input"),
                self.tenant_tokens.labels(key[0], "output"),
            )
        requests, inputs, outputs = found
        requests.inc()
        if usage.prompt_tokens:
            inputs.inc(usage.prompt_tokens)
            outputs.inc(usage.completion_tokens)

    def tallies(self) -> dict[str, Tally]:
        """What each variant (`model:variant`) did so far, in this process alone; no request waits for it."""
        found: dict[str, Tally] = {}
        for (model, variant, _), series in self._series.items():
            name = f"{model}:{variant}"
            found[name] = found.get(name, NOTHING_YET) + series.tally()
        for (model, variant, *_), (ended, _) in self._ends.items():
            name = f"{model}:{variant}"
            found[name] = found.get(name, NOTHING_YET) + Tally(ended=ended.count)
        return found

    def requests_in_flight(self) -> int:
        """Of this process alone."""
        return int(next(iter(self.in_flight.collect())).samples[0].value)

    @property
    def shared_directory(self) -> Path | None:
        """Where the processes of this gateway keep what they share; None for one alone."""
        return Path(os.environ[MULTIPROC_DIR]) if MULTIPROC_DIR in os.environ else None

    def exposition(self) -> bytes:
        """All series in Prometheus' text format; of all processes when there are several. Blocks for milliseconds."""
        if MULTIPROC_DIR not in os.environ:
            return generate_latest(self._registry)
        _forget_killed(Path(os.environ[MULTIPROC_DIR]))
        merged = CollectorRegistry()
        MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return generate_latest(merged)

    def close(self) -> None:
        """Take this process' gauges out of the sum."""
        if MULTIPROC_DIR in os.environ:
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]


def _forget_killed(directory: Path) -> None:
    """Take the gauges of processes that no longer exist out of the sum: who was killed could not do it."""
    for values in directory.glob("gauge_live*_*.db"):
        try:
            os.kill(int(values.stem.rpartition("_")[2]), 0)
        except ProcessLookupError:
            values.unlink(missing_ok=True)


def open_metrics() -> Metrics:
    """See `Metrics`."""
    # They would be a third of all series, and nobody reads them.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    if MULTIPROC_DIR not in os.environ:
        ProcessCollector(registry=registry)
    return Metrics(registry)


@dataclass(slots=True)
class Series:
    """The children that one (model, variant, band) writes to."""

    ttft: QuickHistogram
    queue_wait: Histogram
    upstream_first_byte: Histogram
    overhead: Histogram
    itl: QuickHistogram
    tpot: Histogram
    prompt_tokens: Counter
    generation_tokens: ReadableCounter

    def tally(self) -> Tally:
        ttfts = {bucket: count for bucket, count in enumerate(self.ttft.counts()) if count}
        return Tally(self.generation_tokens.count, ttfts=ttfts)

    @classmethod
    def of(cls, metrics: Metrics, labels: tuple[str, str, Band]) -> Series:
        return cls(
            ttft=metrics.ttft.labels(*labels),
            queue_wait=metrics.queue_wait.labels(*labels),
            upstream_first_byte=metrics.upstream_first_byte.labels(*labels),
            overhead=metrics.overhead.labels(*labels),
            itl=metrics.itl.labels(*labels),
            tpot=metrics.tpot.labels(*labels),
            prompt_tokens=metrics.prompt_tokens.labels(*labels),
            generation_tokens=metrics.generation_tokens.labels(*labels),
        )
