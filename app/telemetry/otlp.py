"""Spans as OpenTelemetry has them, and their way to a collector. The only module that imports its SDK.

Spans are made whole, from stages that are over: the SDK's tracer would open each of them, keep it in a context variable
and lock it at every change, for several times the CPU. Queue, thread, retries and encoding are the SDK's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_COMPRESSION,
    OTEL_EXPORTER_OTLP_TRACES_COMPRESSION,
    OTEL_SDK_DISABLED,
    OTEL_SERVICE_NAME,
    OTEL_TRACES_SAMPLER_ARG,
)
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from app.errors import ConfigurationError
from app.settings import Tracing as Settings
from app.telemetry.semantics import facts_of, name_of
from app.telemetry.trace_context import TraceContext
from app.telemetry.tracing import ATTEMPT, REDISPATCH, Ended, Facts, RequestTrace, Stage

SERVICE = "sluice"
SCOPE = InstrumentationScope(SERVICE)
BATCH_SPANS = 512
HEADERS_MAX_BYTES = 16 * 1024
FIRST_TOKEN = "sluice.first_token"  # noqa: S105 - an event

_RECORDED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)
_FAILED = Status(StatusCode.ERROR)


class OtlpExport:
    """See `tracing.Export`: a bounded queue, and a thread that empties it.

    What the collector does not take is tried again for `export_timeout_s` and then lost; so are the oldest spans of a
    full queue. The log says so, at most once in 20 s.
    """

    def __init__(self, settings: Settings, exporter: SpanExporter | None = None) -> None:
        """`exporter` stands for the collector that `settings` name. Raises ConfigurationError."""
        logging.getLogger("opentelemetry").setLevel(logging.WARNING)
        self._flush_timeout_s = settings.flush_timeout_s
        self._resource = _resource(settings)
        self._processor = BatchSpanProcessor(
            exporter or _exporter(settings),
            max_queue_size=settings.queue_spans,
            schedule_delay_millis=settings.export_interval_s * 1000,
            max_export_batch_size=min(BATCH_SPANS, settings.queue_spans),
        )

    def send(self, trace: RequestTrace, ended: Ended) -> None:
        for span in spans_of(trace, ended, self._resource, time.time_ns()):
            self._processor.on_end(span)

    async def close(self) -> None:
        # A thread that the interpreter does not wait for: a collector that hangs must not hold up our end.
        flush = threading.Thread(target=self._processor.shutdown, daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, self._flush_timeout_s)


def is_disabled() -> bool:
    """Whether the environment says that nothing is to be traced, whatever the configuration says."""
    return os.environ.get(OTEL_SDK_DISABLED, "").strip().lower() == "true"


def check(settings: Settings) -> None:
    """Raises ConfigurationError for what an export could not be opened with."""
    sample_ratio(settings)
    if settings.headers_file is not None:
        read_headers(settings.headers_file)


def sample_ratio(settings: Settings) -> float:
    """The share of requests that are traced. Raises ConfigurationError."""
    if settings.sample_ratio is not None:
        return settings.sample_ratio
    text = os.environ.get(OTEL_TRACES_SAMPLER_ARG) or "1"
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1
    if not 0 <= ratio <= 1:
        raise ConfigurationError(f"${OTEL_TRACES_SAMPLER_ARG}: expected a share between 0 and 1")
    return ratio


def spans_of(trace: RequestTrace, ended: Ended, resource: Resource, ended_ns: int) -> Iterator[ReadableSpan]:
    """The spans of a request that ended at `ended_ns`, nanoseconds since 1970: the stages', and last its own."""
    epoch_ns = ended_ns - round(ended.at * 1e9)
    state = TraceState.from_header([trace.context.state.decode()]) if trace.context.state else None
    own = _context(trace.context.trace_id, trace.context.span_id, state)

    def at(moment: float) -> int:
        return epoch_ns + round(moment * 1e9)

    def of(stage: Stage, context: SpanContext, parent: SpanContext) -> ReadableSpan:
        return ReadableSpan(
            stage.name,
            context,
            parent=parent,
            resource=resource,
            attributes={**stage.facts, "error.type": stage.failure} if stage.failure else stage.facts,
            kind=SpanKind.CLIENT if stage.name == ATTEMPT else SpanKind.INTERNAL,
            status=_FAILED if stage.failure else _UNSET,
            start_time=at(stage.began),
            end_time=at(ended.at if stage.ended is None else stage.ended),
            instrumentation_scope=SCOPE,
        )

    for stage in trace.stages:
        context = _context(own.trace_id, stage.span_id, state)
        for inner in stage.inner:
            yield of(inner, _context(own.trace_id, inner.span_id, state), context)
        yield of(stage, context, own)
    events = [Event(event.name, event.facts, at(event.at)) for event in trace.events]
    if ended.timeline.first_token is not None:
        events.append(Event(FIRST_TOKEN, {}, at(ended.timeline.first_token)))
    yield ReadableSpan(
        name_of(ended.request),
        own,
        parent=_remote(trace.parent) if trace.parent is not None else None,
        resource=resource,
        attributes=facts_of(ended) | _counts(trace),
        events=sorted(events, key=lambda event: event.timestamp),
        links=[Link(_remote(link)) for link in trace.links],
        kind=SpanKind.SERVER,
        status=_FAILED if ended.failure else _UNSET,
        start_time=at(ended.timeline.arrived),
        end_time=ended_ns,
        instrumentation_scope=SCOPE,
    )


def _counts(trace: RequestTrace) -> Facts:
    redispatched = sum(event.name == REDISPATCH for event in trace.events)
    return {"sluice.redispatched": redispatched} if redispatched else {}


def _context(trace_id: int, span_id: int, state: TraceState | None) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=_RECORDED, trace_state=state)


def _remote(context: TraceContext) -> SpanContext:
    return SpanContext(context.trace_id, context.span_id, is_remote=True, trace_flags=_RECORDED)


def _resource(settings: Settings) -> Resource:
    """Named by the settings, else by the environment, else `sluice`."""
    resource = Resource.create()
    name = settings.service_name or os.environ.get(OTEL_SERVICE_NAME)
    if name is None and not str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return resource  # named by OTEL_RESOURCE_ATTRIBUTES
    return resource.merge(Resource({SERVICE_NAME: name or SERVICE}))


def _exporter(settings: Settings) -> OTLPSpanExporter:
    chosen = OTEL_EXPORTER_OTLP_TRACES_COMPRESSION in os.environ or OTEL_EXPORTER_OTLP_COMPRESSION in os.environ
    return OTLPSpanExporter(
        endpoint=settings.endpoint,
        headers=read_headers(settings.headers_file) if settings.headers_file is not None else None,
        timeout=settings.export_timeout_s,
        compression=None if chosen else Compression.Gzip,
    )


def read_headers(path: Path) -> dict[str, str]:
    """Lines `name: value`. Raises ConfigurationError, which never holds any of them."""
    try:
        with path.open("rb") as opened:
            text = opened.read(HEADERS_MAX_BYTES + 1).decode("ascii", "replace")
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from None
    headers = {}
    for line in text.splitlines():
        name, colon, value = (part.strip() for part in line.partition(":"))
        is_header = colon and name and all("!" <= char <= "~" for char in name) and value.isprintable()
        if line.strip() and not (is_header and value.isascii() and len(text) <= HEADERS_MAX_BYTES):
            raise ConfigurationError(f"{path}: expected lines `name: value`")
        if line.strip():
            headers[name.lower()] = value
    return headers
