"""The account of a request: each stage measured, one outcome counted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from app.errors import (
    InsufficientQuota,
    InvalidValue,
    NoHealthyWorker,
    QueueTimeout,
    RateLimitExceeded,
    TenantQueueFull,
    UpstreamTimeout,
    WorkerLost,
)
from app.inference import Band, InferenceRequest, Outcome, Route, Spent, TokenUsage
from app.telemetry.account import GAPS_AT_ONCE, Accounts, RequestsLog, Timeline, code_of, outcome_of
from app.telemetry.metrics import ITL_BUCKETS, Metrics, QuickHistogram

LABELS = {"model": "m", "variant": "v", "band": "default"}


class Lines:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(fields)

    debug = warning = error = exception = info


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """Accounts with everything they write to at hand."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.clock = Clock()
        self.log = Lines()
        self.accounts = Accounts(Metrics(self.registry), RequestsLog(self.log, "all"), self.clock)

    def request(self) -> InferenceRequest:
        request = InferenceRequest.parse(
            b'{"model":"m","stream":true}', request_id="r", route=Route.CHAT, arrived=100.0
        )
        request.resolved_model = "m"
        return request

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"sluice_{name}", labels)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_streamed_answer(desk: Desk) -> None:
    with desk.accounts.open(desk.request()) as account:
        assert desk.value("requests_in_flight") == 1
        account.admitted("v", waited_s=0.5)
        account.dispatched(100.6, "w")
        account.first_byte(101.0)
        account.token(101.5)
        account.token(101.7)
        account.token(102.1)
        account.usage = TokenUsage(7, 4)
        desk.clock.now = 102.5
    assert desk.value("requests_in_flight") == 0
    assert desk.value("time_to_first_token_seconds_sum", **LABELS) == pytest.approx(1.5)
    assert desk.value("queue_wait_seconds_sum", **LABELS) == pytest.approx(0.5)
    assert desk.value("gateway_overhead_seconds_sum", **LABELS) == pytest.approx(0.1)
    assert desk.value("upstream_first_byte_seconds_sum", **LABELS) == pytest.approx(0.4)
    assert desk.value("inter_token_latency_seconds_sum", **LABELS) == pytest.approx(0.6)
    assert desk.value("inter_token_latency_seconds_count", **LABELS) == 2
    assert desk.value("time_per_output_token_seconds_sum", **LABELS) == pytest.approx(1.0 / 3)
    assert desk.value("request_duration_seconds_sum", outcome="completed", **LABELS) == pytest.approx(2.5)
    assert desk.value("prompt_tokens_total", **LABELS) == 7
    assert desk.value("generation_tokens_total", **LABELS) == 4
    assert desk.value("requests_total", outcome="completed", code="", **LABELS) == 1


def test_a_stream_that_breaks_counts_what_was_sent(desk: Desk) -> None:
    with desk.accounts.open(desk.request()) as account:
        account.admitted("v", waited_s=0)
        for _ in range(5):
            account.token(101.0)
        account.fail(WorkerLost("gone"))
    assert desk.value("generation_tokens_total", **LABELS) == 5
    assert desk.value("requests_total", outcome="failed", code="worker_lost", **LABELS) == 1
    assert desk.value("time_per_output_token_seconds_count", **LABELS) == 0


@pytest.mark.parametrize("count", [1, 2, GAPS_AT_ONCE, GAPS_AT_ONCE + 1, 3 * GAPS_AT_ONCE + 7])
def test_gaps_are_observed_in_bulk_and_none_is_lost_or_doubled(desk: Desk, count: int) -> None:
    with desk.accounts.open(desk.request()) as account:
        account.admitted("v", waited_s=0)
        for number in range(count):
            account.token(101.0 + 0.5 * number)
        observed = desk.value("inter_token_latency_seconds_count", **LABELS) or 0
        assert count - 1 - observed < GAPS_AT_ONCE
    assert desk.value("inter_token_latency_seconds_count", **LABELS) == count - 1
    assert desk.value("inter_token_latency_seconds_sum", **LABELS) == pytest.approx(0.5 * (count - 1))
    assert desk.value("time_to_first_token_seconds_sum", **LABELS) == pytest.approx(1.0)
    assert desk.value("generation_tokens_total", **LABELS) == count


def test_a_request_for_nothing_we_know_has_no_label_of_its_own(desk: Desk) -> None:
    request = desk.request()
    request.resolved_model = ""
    with pytest.raises(InvalidValue), desk.accounts.open(request):
        raise InvalidValue("no")
    labels = {"model": "", "variant": "", "band": "default"}
    assert desk.value("requests_total", outcome="rejected", code="invalid_value", **labels) == 1


def test_the_line_in_the_log_has_the_metrics_code_and_nothing_of_the_prompt(desk: Desk) -> None:
    with pytest.raises(QueueTimeout), desk.accounts.open(desk.request()):
        raise QueueTimeout("late")
    (line,) = desk.log.lines
    assert (line["outcome"], line["code"], line["request_id"]) == ("expired", "queue_timeout", "r")


@pytest.mark.parametrize(
    ("cause", "outcome", "code"),
    [
        (None, Outcome.COMPLETED, ""),
        (InvalidValue(""), Outcome.REJECTED, "invalid_value"),
        (NoHealthyWorker(""), Outcome.REJECTED, "no_healthy_worker"),
        (RateLimitExceeded(""), Outcome.REJECTED, "rate_limit_exceeded"),
        (InsufficientQuota(""), Outcome.REJECTED, "insufficient_quota"),
        (TenantQueueFull(""), Outcome.REJECTED, "tenant_queue_full"),
        (QueueTimeout(""), Outcome.EXPIRED, "queue_timeout"),
        (WorkerLost(""), Outcome.FAILED, "worker_lost"),
        (UpstreamTimeout(""), Outcome.FAILED, "upstream_timeout"),
        (asyncio.CancelledError(), Outcome.CANCELLED, "client_gone"),
        (asyncio.CancelledError("client_gone"), Outcome.CANCELLED, "client_gone"),
        (asyncio.CancelledError("client_stalled"), Outcome.CLIENT_STALLED, "client_stalled"),
        (asyncio.CancelledError("draining"), Outcome.FAILED, "draining"),
        (ZeroDivisionError(), Outcome.FAILED, "internal_error"),
    ],
)
def test_outcomes(cause: BaseException | None, outcome: Outcome, code: str) -> None:
    assert (outcome_of(cause), code_of(cause)) == (outcome, code)


def test_series_are_bounded_by_the_configuration_not_by_clients(desk: Desk) -> None:
    for _ in range(50):
        with desk.accounts.open(desk.request()):
            pass
    samples = [
        sample
        for family in desk.registry.collect()
        for sample in family.samples
        if sample.name == "sluice_requests_total"
    ]
    assert len(samples) == 1
    assert Band.DEFAULT.value == samples[0].labels["band"]


def test_one_token_has_no_time_per_output_token() -> None:
    line = Timeline(0.0, first_token=1.0)
    assert line.time_per_output_token(2.0, completion_tokens=1) is None


def test_going_on_on_another_worker_is_no_new_beginning(desk: Desk) -> None:
    with desk.accounts.open(desk.request()) as account:
        account.admitted("v", waited_s=0.5)
        account.dispatched(100.6, "w")
        account.first_byte(101.0)
        account.token(101.5)
        account.admitted("v", waited_s=3.5)
        account.dispatched(104.0, "w")
        account.first_byte(104.5)
        account.token(105.0)
    assert desk.value("queue_wait_seconds_sum", **LABELS) == pytest.approx(0.5)
    assert desk.value("gateway_overhead_seconds_sum", **LABELS) == pytest.approx(0.1)
    assert desk.value("upstream_first_byte_seconds_sum", **LABELS) == pytest.approx(0.4)
    assert desk.value("time_to_first_token_seconds_sum", **LABELS) == pytest.approx(1.5)
    assert desk.value("inter_token_latency_seconds_sum", **LABELS) == pytest.approx(3.5)


@given(st.lists(st.floats(0, 100) | st.sampled_from(ITL_BUCKETS), max_size=40))
def test_the_quick_histogram_counts_as_the_library_does(amounts: list[float]) -> None:
    shown: list[dict[tuple[str, ...], float]] = []
    for kind in (Histogram, QuickHistogram, QuickHistogram):
        registry = CollectorRegistry()
        histogram = kind("h", "text", ["label"], buckets=ITL_BUCKETS, registry=registry).labels("x")
        if len(shown) == 2:
            assert isinstance(histogram, QuickHistogram)
            histogram.observe_all(amounts)
        else:
            for amount in amounts:
                histogram.observe(amount)
        shown.append(
            {
                (s.name, *s.labels.values()): s.value
                for f in registry.collect()
                for s in f.samples
                if not s.name.endswith("_created")
            }
        )
    assert shown[0] == pytest.approx(shown[1]) == shown[2]


def test_what_was_set_aside_is_paid_for_and_counted_where_it_was_generated() -> None:
    desk = Desk()
    account = desk.accounts.open(desk.request())
    account.admitted("small", 0.5)
    account.dispatched(101.0, "w")
    account.first_byte(102.0)
    account.usage = TokenUsage(10, 4)
    account.set_aside()
    assert account.spent(None) == TokenUsage(10, 4)
    account.admitted("v", 0.5)
    account.dispatched(103.0, "w")
    account.first_byte(104.0)
    account.token(104.0)
    assert account.spent(None) == Spent(None, 5)
    account.usage = TokenUsage(10, 6)
    assert account.spent(None) == TokenUsage(20, 10)
    account.close(None)
    assert desk.value("generation_tokens_total", model="m", variant="small", band="default") == 4
    assert desk.value("generation_tokens_total", **LABELS) == 6
    assert desk.value("tenant_tokens_total", tenant="other", direction="output") == 10
    assert desk.value("requests_total", **LABELS, outcome="completed", code="") == 1


def test_what_was_set_aside_can_be_taken_back() -> None:
    desk = Desk()
    account = desk.accounts.open(desk.request())
    account.admitted("v", 0.0)
    account.first_byte(102.0)
    account.usage = TokenUsage(10, 4)
    account.set_aside()
    account.take_back()
    assert account.spent(None) == TokenUsage(10, 4)
    account.close(None)
    assert desk.value("generation_tokens_total", **LABELS) == 4
