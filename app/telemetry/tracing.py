"""Traces: which requests are traced, and what is noted of them on their way.

A trace is a list of stages, each of which begins where the one before it ends, so that they add up to the request:

    receive ─ route ─ queue ─ attempt ─ (queue ─ attempt …)
                              ├ first byte
                              └ stream

Only `begin` is on the way of a request that is not sampled. Spans are made of the stages once, when the request has
ended: nothing is opened, put into a context and closed again for each of them. What exists before is the id of the
span that a worker's own spans join, the attempt's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from app.errors import ConfigurationError, GatewayError
from app.inference import InferenceRequest, Outcome, TokenUsage
from app.telemetry.trace_context import Header, TraceContext

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from app.settings import Tracing as Settings
    from app.telemetry.account import Timeline

Facts = dict[str, str | int | float | bool]

RECEIVE = "receive"
ROUTE = "route"
QUEUE = "queue"
ATTEMPT = "attempt"
FIRST_BYTE = "first byte"
STREAM = "stream"

REDISPATCH = "sluice.redispatch"
BROKEN = "sluice.stream_broken"
RESUME = "sluice.resume"
CASCADE = "sluice.cascade"
"""A small variant was not sure, and a large one is asked."""


@dataclass(slots=True)
class Stage:
    """A part of a request, in monotonic seconds; `failure` is the code of why it ended badly."""

    name: str
    span_id: int
    began: float
    ended: float | None = None
    inner: list[Stage] = field(default_factory=list)
    facts: Facts = field(default_factory=dict)
    failure: str = ""

    def fail(self, code: str) -> None:
        """It will end badly, whatever comes of the request."""
        for stage in (self, *self.inner[-1:]):
            stage.failure = stage.failure or code

    def end(self, now: float) -> None:
        """Ending it again changes nothing."""
        for stage in (self, *self.inner[-1:]):
            stage.ended = now if stage.ended is None else stage.ended


@dataclass(frozen=True, slots=True)
class Event:
    """What happened between two stages."""

    name: str
    at: float
    facts: Facts


class RequestTrace:
    """What is noted of one sampled request. Pure: times come in as arguments.

    `context` is the request's own span, `parent` the client's where it is one trace with this, `links` those of others
    that have to do with it.
    """

    __slots__ = ("_draw", "context", "events", "links", "parent", "stages")

    def __init__(
        self,
        context: TraceContext,
        parent: TraceContext | None,
        links: tuple[TraceContext, ...],
        draw: Callable[[], int],
    ) -> None:
        """`draw` gives ids of spans."""
        self.context = context
        self.parent = parent
        self.links = links
        self.stages: list[Stage] = []
        self.events: list[Event] = []
        self._draw = draw

    def enter(self, name: str, now: float) -> Stage:
        """The next stage begins, and the one before it ends."""
        if self.stages:
            self.stages[-1].end(now)
        stage = Stage(name, self._draw(), now)
        self.stages.append(stage)
        return stage

    def attempt(self, now: float, worker_id: str, variant: str) -> tuple[Header, ...]:
        """An attempt begins; what its worker gets, for its spans to join."""
        resent = sum(stage.name == ATTEMPT for stage in self.stages)
        stage = self.enter(ATTEMPT, now)
        stage.facts = {"sluice.worker": worker_id, "sluice.variant": variant, "http.request.resend_count": resent}
        stage.inner.append(Stage(FIRST_BYTE, self._draw(), stage.began))
        of = self.context
        return TraceContext(of.trace_id, stage.span_id, is_sampled=True, state=of.state).headers

    def first_byte(self, now: float, *, is_stream: bool) -> None:
        stage = self.stages[-1]
        stage.inner[-1].end(now)
        if is_stream:
            stage.inner.append(Stage(STREAM, self._draw(), now))

    def fail(self, code: str) -> None:
        """The stage ends badly as soon as it is known what comes next."""
        self.stages[-1].fail(code)

    def note(self, name: str, now: float, **facts: str) -> None:
        self.events.append(Event(name, now, {f"sluice.{key}": value for key, value in facts.items()}))

    def end(self, now: float, failure: str) -> None:
        """The request has ended; `failure` is the code of why, if not well."""
        if failure:
            self.stages[-1].fail(failure)
        self.stages[-1].end(now)


@dataclass(frozen=True, slots=True)
class Ended:
    """What is told of a traced request besides its stages; `at` is monotonic seconds, `cause` what it ended in."""

    at: float
    request: InferenceRequest
    timeline: Timeline
    variant: str
    usage: TokenUsage | None
    outcome: Outcome
    code: str
    cause: BaseException | None

    @property
    def status(self) -> int | None:
        """The answer's; None where there was none, or where it depended on when the client was told to wait."""
        if self.cause is None or (self.request.stream and self.timeline.first_byte is not None):
            return 200
        if isinstance(self.cause, GatewayError) and not self.request.wants_queue_events:
            return self.cause.status
        return None

    @property
    def failure(self) -> str:
        """The code of what went wrong on this side; empty for a client's mistakes, its limits and its leaving."""
        if isinstance(self.cause, GatewayError):
            return self.code if self.cause.status >= 500 else ""
        return self.code if self.outcome is Outcome.FAILED else ""


class Export(Protocol):
    """Where spans go."""

    def send(self, trace: RequestTrace, ended: Ended) -> None:
        """Make its spans and queue them; never waits."""

    async def close(self) -> None:
        """Export what is queued, for a limited time."""


class Tracing:
    """Samples requests, and gives ids."""

    def __init__(self, export: Export, sample_ratio: float, *, trusts_clients: bool, seed: int | None = None) -> None:
        self.export = export
        self._random = random.Random(seed)  # noqa: S311 - ids of traces are no secrets; from the system's own without seed
        self._bound = round(sample_ratio * 2**64)
        self._trusts_clients = trusts_clients

    def begin(self, request: InferenceRequest) -> tuple[RequestTrace | None, tuple[Header, ...]]:
        """The trace of `request`, None if it is not sampled, and what its worker is told until an attempt begins.

        A client that is trusted has its trace continued, and decides whether it is sampled. Another's is linked to: it
        could make any number of requests be recorded, or write into a trace that is not its own.
        """
        theirs = TraceContext.of(request.trace_headers) if request.trace_headers else None
        parent = theirs if self._trusts_clients else None
        if parent is not None:
            context = TraceContext(parent.trace_id, self._span_id(), parent.is_sampled, parent.state)
        else:
            trace_id = self._random.getrandbits(128) | 1 << 127  # never zero
            # As OpenTelemetry's TraceIdRatioBased has it: by the id, so that everybody who asks decides alike.
            is_sampled = trace_id & (2**64 - 1) < self._bound
            context = TraceContext(trace_id, self._span_id(), is_sampled)
        if not context.is_sampled:
            return None, context.headers
        links = () if theirs is None or parent is not None else (theirs,)
        if request.batch_id:
            links = (*links, batch_context(request.batch_id))
        return RequestTrace(context, parent, links, self._span_id), context.headers

    def _span_id(self) -> int:
        return self._random.getrandbits(64) or 1


def batch_context(batch_id: str) -> TraceContext:
    """The span that stands for a batch: the same on every gateway that runs a part of it."""
    digest = blake2b(batch_id.encode(), digest_size=24).digest()
    return TraceContext(int.from_bytes(digest[:16]), int.from_bytes(digest[16:]), is_sampled=True)


def check_tracing(settings: Settings | None) -> None:
    """Raises ConfigurationError for what `open_tracing` could not use."""
    if settings is not None:
        _otlp().check(settings)


def open_tracing(settings: Settings | None) -> Tracing | None:
    """None where nothing is configured: then nothing of OpenTelemetry is imported. Raises ConfigurationError."""
    if settings is None:
        return None
    otlp = _otlp()
    if otlp.is_disabled():
        return None
    export = otlp.OtlpExport(settings)
    return Tracing(export, otlp.sample_ratio(settings), trusts_clients=settings.trust_clients)


def _otlp() -> ModuleType:
    try:
        from app.telemetry import otlp
    except ImportError:
        raise ConfigurationError("tracing: OpenTelemetry is not installed: `pip install 'sluice[traces]'`") from None
    return otlp


@asynccontextmanager
async def exported(tracing: Tracing | None) -> AsyncIterator[None]:
    """Until this is left spans are exported; then what is queued still is, for a limited time."""
    try:
        yield
    finally:
        if tracing is not None:
            await tracing.export.close()
