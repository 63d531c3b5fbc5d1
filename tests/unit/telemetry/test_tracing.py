"""Which requests are traced, and how their stages become spans."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from prometheus_client import CollectorRegistry

from app.errors import ConfigurationError, InvalidValue, UpstreamTimeout
from app.inference import InferenceRequest, Route, TokenUsage
from app.settings import Logs
from app.settings import Tracing as Settings
from app.telemetry import otlp
from app.telemetry.account import Accounts, RequestsLog
from app.telemetry.logs import open_log
from app.telemetry.metrics import Metrics
from app.telemetry.semantics import OPERATIONS
from app.telemetry.trace_context import TraceContext
from app.telemetry.tracing import Ended, RequestTrace, Tracing, batch_context

THEIRS = TraceContext(0xA, 0xB, is_sampled=True, state=b"a=b")


class Kept:
    """An export that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[RequestTrace, Ended]] = []

    def send(self, trace: RequestTrace, ended: Ended) -> None:
        self.sent.append((trace, ended))

    async def close(self) -> None:
        """Nothing is held."""


def request(**fields: Any) -> InferenceRequest:
    made = InferenceRequest.parse(b'{"model":"m","stream":true}', request_id="r", route=Route.CHAT, arrived=100.0)
    made.resolved_model = "m"
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def tracing(ratio: float, *, trusts_clients: bool = False) -> Tracing:
    return Tracing(Kept(), ratio, trusts_clients=trusts_clients, seed=7)


def test_the_ratio_is_kept() -> None:
    for ratio, least, most in ((0.0, 0, 0), (0.25, 400, 600), (1.0, 2000, 2000)):
        tracer = tracing(ratio)
        sampled = sum(tracer.begin(request())[0] is not None for _ in range(2000))
        assert least <= sampled <= most


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("is_sampled", [False, True])
def test_a_trusted_client_decides(ratio: float, is_sampled: bool) -> None:
    theirs = TraceContext(0xA, 0xB, is_sampled, b"a=b")
    trace, headers = tracing(ratio, trusts_clients=True).begin(request(trace_headers=theirs.headers))
    passed_on = TraceContext.of(headers)
    assert passed_on is not None
    assert (passed_on.trace_id, passed_on.is_sampled, passed_on.state) == (0xA, is_sampled, b"a=b")
    assert passed_on.span_id != 0xB
    assert (trace is not None) == is_sampled
    assert trace is None or (trace.parent, trace.links) == (theirs, ())


def test_a_stranger_decides_nothing() -> None:
    for ratio in (0.0, 1.0):
        trace, headers = tracing(ratio).begin(request(trace_headers=THEIRS.headers))
        passed_on = TraceContext.of(headers)
        assert passed_on is not None
        assert (passed_on.trace_id == 0xA, passed_on.is_sampled, passed_on.state) == (False, ratio == 1, b"")
        assert (trace is not None) == (ratio == 1)
        assert trace is None or (trace.parent, trace.links) == (None, (THEIRS,))


def test_lines_of_a_batch_link_to_the_same_span_everywhere() -> None:
    trace, _ = tracing(1.0).begin(request(batch_id="batch_1"))
    assert trace is not None
    assert trace.links == (batch_context("batch_1"),)
    assert batch_context("batch_1") == batch_context("batch_1") != batch_context("batch_2")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


def ended(error: BaseException | None, *, is_broken: bool = False) -> tuple[RequestTrace, Ended]:
    """A request that was sent twice, had a token, and ended so."""
    kept, clock = Kept(), Clock()
    log = RequestsLog(open_log(Logs()), "none")
    tracer = Tracing(kept, 1.0, trusts_clients=False, seed=7)
    account = Accounts(Metrics(CollectorRegistry()), log, clock, tracer).open(request())
    account.queued()
    for worker in ("w1", "w2"):
        account.admitted("v", 0.25)
        account.dispatched(clock(), worker)
        if worker == "w1":
            account.attempt_failed("lost")
            account.redispatched("lost")
    account.first_byte(clock())
    account.token(clock())
    account.usage = TokenUsage(7, 4, 2)
    if is_broken:
        account.fail(UpstreamTimeout("too long"))
    account.close(error)
    (sent,) = kept.sent
    return sent


def test_stages_become_spans_that_add_up() -> None:
    trace, end = ended(None)
    spans = list(otlp.spans_of(trace, end, Resource.get_empty(), 2_000_000_000_000_000_000))
    server = spans[-1]
    stages = [span for span in spans if span.parent == server.context]
    assert [span.name for span in stages] == ["receive", "route", "queue", "attempt", "queue", "attempt"]
    assert all(one.end_time == following.start_time for one, following in pairwise(stages))
    assert (stages[0].start_time, stages[-1].end_time) == (server.start_time, server.end_time)
    assert server.end_time == 2_000_000_000_000_000_000
    assert len({span.context.span_id for span in spans if span.context}) == len(spans) == 10
    assert [event.name for event in server.events] == ["sluice.redispatch", "sluice.first_token"]


@pytest.mark.parametrize(
    ("error", "is_broken", "status", "failure"),
    [
        (None, False, 200, ""),
        (None, True, 200, "upstream_timeout"),
        (InvalidValue("no"), False, 200, ""),
        (UpstreamTimeout("no"), False, 200, "upstream_timeout"),
        (RuntimeError("a bug"), False, 200, "internal_error"),
    ],
)
def test_how_it_ended(error: BaseException | None, is_broken: bool, status: int, failure: str) -> None:
    trace, end = ended(error, is_broken=is_broken)
    assert (end.status, end.failure) == (status, failure)
    *_, server = otlp.spans_of(trace, end, Resource.get_empty(), 10**18)
    assert server.status.is_ok != bool(failure)
    assert (server.attributes or {}).get("error.type", "") == failure


def test_attributes_have_their_registered_names() -> None:
    """What is not OpenTelemetry's is in our own name space, or in vLLM's."""
    trace, end = ended(UpstreamTimeout("no"))
    *_, server = otlp.spans_of(trace, end, Resource.get_empty(), 10**18)
    modules = (gen_ai_attributes, error_attributes, http_attributes)
    registered = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    told = {name for name in server.attributes or {} if not name.startswith(("sluice.", "gen_ai.latency."))}
    assert told <= registered
    assert {"gen_ai.usage.input_tokens", "gen_ai.usage.cache_read.input_tokens", "error.type"} <= told
    well_known = {member.value for member in gen_ai_attributes.GenAiOperationNameValues}
    assert {OPERATIONS[route] for route in (Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS)} <= well_known
    assert OPERATIONS.keys() == set(Route)


def test_the_ratio_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    assert otlp.sample_ratio(Settings()) == 0.5
    assert otlp.sample_ratio(Settings(sample_ratio=0)) == 0
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "half")
    with pytest.raises(ConfigurationError, match="OTEL_TRACES_SAMPLER_ARG"):
        otlp.sample_ratio(Settings())


@pytest.mark.parametrize("text", ["secret", ": secret", "a b: secret", "a: \xe9", "x: y\nsecret"])
def test_headers_that_are_none_are_told_without_them(tmp_path: Path, text: str) -> None:
    file = tmp_path / "headers"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as told:
        otlp.read_headers(file)
    assert "secret" not in str(told.value)
    file.write_text("A: b c\n\nd: e:f\n")
    assert otlp.read_headers(file) == {"a": "b c", "d": "e:f"}


def test_nothing_of_it_is_imported_while_it_is_off() -> None:
    """By us: FastAPI and redis import the parts that they know, where those are installed."""
    program = (
        "import sys; import app.api.server; from app.telemetry.tracing import open_tracing;"
        "assert open_tracing(None) is None;"
        "found = [name for name in sys.modules if name.startswith(('app.telemetry.otlp', 'opentelemetry.exporter'))];"
        "print(found)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[]"
