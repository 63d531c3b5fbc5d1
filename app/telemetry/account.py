"""The account of one request: when each stage happened, what it cost, and the one outcome it ends in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import sub
from types import TracebackType
from typing import Literal, NamedTuple, Self

from app.errors import Draining, GatewayError, InvalidRequest, QueueTimeout, Unavailable
from app.inference import Band, InferenceRequest, Outcome, Spent, TokenUsage
from app.telemetry.logs import Log
from app.telemetry.metrics import Metrics, Series
from app.telemetry.refusals import Kind, Refusals
from app.telemetry.trace_context import Header, trace_id_of
from app.telemetry.tracing import (
    BROKEN,
    CASCADE,
    QUEUE,
    RECEIVE,
    REDISPATCH,
    RESUME,
    ROUTE,
    Ended,
    RequestTrace,
    Tracing,
)

Clock = Callable[[], float]

UNRESOLVED = ""
GAPS_AT_ONCE = 64
NOTHING_USED = TokenUsage()
CLIENT_GONE = "client_gone"
CLIENT_STALLED = "client_stalled"
PREEMPTED = "preempted"
"""Of a request that gave its slot to a better one, and is sent again under another id: this one has cost nothing."""
TTFT_WEIGHT = 0.2
TTFT_KEPT_S = 10.0


@dataclass(slots=True)
class Timeline:
    """When the stages of a request happened, in monotonic seconds; pure, times come in as arguments.

    TTFT runs from arrival to the first *generated* token (content, reasoning or a tool call), not to the chunk that
    carries only the role. TPOT is (E2E - TTFT) / (tokens - 1). `token_times` are those of the token chunks whose gaps
    have not been taken yet, behind the last one before them.
    """

    arrived: float
    waited_s: float = 0.0
    dispatched: float | None = None
    first_byte: float | None = None
    first_token: float | None = None
    token_times: list[float] = field(default_factory=list)
    _gaps_taken: int = 0

    @property
    def token_chunks(self) -> int:
        return self._gaps_taken + len(self.token_times)

    def take_gaps(self) -> list[float]:
        """The gaps between token chunks since the last call."""
        times = self.token_times
        gaps = list(map(sub, times[1:], times))
        self._gaps_taken += len(gaps)
        del times[:-1]
        return gaps

    @property
    def overhead_s(self) -> float | None:
        """What the gateway itself took before the request left it."""
        return None if self.dispatched is None else max(0.0, self.dispatched - self.arrived - self.waited_s)

    def time_per_output_token(self, ended: float, completion_tokens: int) -> float | None:
        if self.first_token is None or completion_tokens < 2:
            return None
        return (ended - self.first_token) / (completion_tokens - 1)


class Ttfts:
    """The recent TTFT of streams, by model or variant: a mean in which each new one counts a fifth. Seconds."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}

    def note(self, model: str, ttft_s: float, now: float) -> None:
        mean = self.recent(model, now)
        self._means[model] = (now, ttft_s if mean is None else mean + TTFT_WEIGHT * (ttft_s - mean))

    def recent(self, model: str, now: float) -> float | None:
        """None if there was none for a while."""
        noted, mean = self._means.get(model, (float("-inf"), 0.0))
        return mean if now - noted <= TTFT_KEPT_S else None


class Aside(NamedTuple):
    """What was answered on one worker, and is not what the client gets."""

    variant: str
    series: Series | None
    timeline: Timeline
    usage: TokenUsage | None
    spent: TokenUsage | Spent | None


class Account:
    """Counts a request in flight until it is closed; observes everything about it, once, then.

    The outcome is decided by what it is closed with, the exception that passed through, or by `fail` for an answer that
    broke after its first byte, where no exception can reach the client any more.

    `trace_headers` go with the next attempt. Without a trace they are the client's own, and nothing else is noted.
    """

    __slots__ = (
        "_aside",
        "_broken",
        "_clock",
        "_log",
        "_metrics",
        "_paces",
        "_refusals",
        "_request",
        "_series",
        "_token_times",
        "_trace",
        "_tracing",
        "_ttfts",
        "timeline",
        "trace_headers",
        "usage",
        "variant",
        "variant_reason",
    )

    def __init__(
        self,
        request: InferenceRequest,
        metrics: Metrics,
        log: RequestsLog,
        clock: Clock,
        ttfts: Ttfts,
        paces: Ttfts,
        refusals: Refusals,
        tracing: Tracing | None,
    ) -> None:
        self._request = request
        self._refusals = refusals
        self.trace_headers: tuple[Header, ...] = request.trace_headers
        self._ttfts = ttfts
        self._paces = paces
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._series: Series | None = None
        self.variant = UNRESOLVED
        self.variant_reason = ""
        self._broken: GatewayError | None = None
        self._aside: Aside | None = None
        self.timeline = Timeline(request.arrived)
        self._token_times = self.timeline.token_times
        self.usage: TokenUsage | None = None
        metrics.in_flight.inc()
        self._tracing = tracing
        self._trace: RequestTrace | None = None
        if tracing is not None:
            self._begin(tracing)

    def __enter__(self) -> Self:
        return self

    def _begin(self, tracing: Tracing) -> None:
        self._trace, self.trace_headers = tracing.begin(self._request)
        if self._trace is not None:
            self._trace.enter(RECEIVE, self._request.arrived)
            self._trace.enter(ROUTE, self._clock())

    def queued(self) -> None:
        """It is known who may serve it; it waits for one of them from now on."""
        if self._trace is not None:
            self._trace.enter(QUEUE, self._clock())

    def admitted(self, variant: str, waited_s: float) -> None:
        """A slot was granted, on a worker of `variant`. Said again after a move to a worker of another variant.

        After the first byte this stage and the next two lie behind the request: one that goes on elsewhere passes
        them again without it being news.
        """
        if self.timeline.first_byte is not None:
            return
        self.variant = variant
        self.timeline.waited_s = waited_s
        self._series = self._metrics.series(self._request.resolved_model, variant, self._request.band)

    def dispatched(self, now: float, worker_id: str) -> None:
        if self._trace is not None:
            self.trace_headers = self._trace.attempt(now, worker_id, self.variant)
        if self.timeline.first_byte is None:
            self.timeline.dispatched = now

    def first_byte(self, now: float) -> None:
        if self._trace is not None:
            self._trace.first_byte(now, is_stream=self._request.stream)
        if self.timeline.first_byte is None:
            self.timeline.first_byte = now

    def attempt_failed(self, fault: str) -> None:
        """The attempt came to nothing."""
        if self._trace is not None:
            self._trace.fail(fault)

    def redispatched(self, fault: str) -> None:
        """There will be another attempt."""
        if self._trace is not None:
            now = self._clock()
            self._trace.note(REDISPATCH, now, fault=fault)
            self._trace.enter(QUEUE, now)

    def resuming(self, error: GatewayError) -> None:
        """The stream broke, and another worker is asked to go on."""
        if self._trace is not None:
            now = self._clock()
            self._trace.fail(error.code)
            self._trace.note(BROKEN, now, code=error.code)
            self._trace.enter(QUEUE, now)

    def resumed(self, result: str) -> None:
        """It is known what came of a stream that broke."""
        if self._trace is not None:
            self._trace.note(RESUME, self._clock(), result=result)

    def token(self, now: float) -> None:
        """A token chunk came. Gaps are observed in bulk: counting each where it falls costs as much as relaying it."""
        times = self._token_times
        times.append(now)
        if not 1 < len(times) <= GAPS_AT_ONCE:  # alone there is only the first: the last one counted stays
            self._look_at_tokens(now)

    def _look_at_tokens(self, now: float) -> None:
        line = self.timeline
        if line.first_token is not None:
            self._observe_gaps()
            return
        line.first_token = now
        model = self._request.resolved_model
        if self._request.band is not Band.BATCH:
            self._ttfts.note(model, now - line.arrived, now)
        if line.dispatched is not None:
            self._paces.note(f"{model}:{self.variant}", now - line.dispatched, now)

    def _observe_gaps(self) -> None:
        gaps = self.timeline.take_gaps()
        if self._series is not None:
            self._series.itl.observe_all(gaps)

    def set_aside(self) -> None:
        """What has been answered so far is not what the client gets; it has cost what it has. Once."""
        self._aside = Aside(self.variant, self._series, self.timeline, self.usage, self._spent(None))
        self._series, self.usage, self._broken = None, None, None
        self.timeline = Timeline(self.timeline.arrived, self.timeline.waited_s)
        self._token_times = self.timeline.token_times
        if self._trace is not None:
            now = self._clock()
            self._trace.note(CASCADE, now)
            self._trace.enter(QUEUE, now)

    def take_back(self) -> None:
        """The client gets what was set aside after all."""
        if self._aside is not None:
            self.variant, self._series, self.timeline, self.usage, _ = self._aside
            self._token_times = self.timeline.token_times
            self._aside = None

    def spent(self, error: BaseException | None) -> TokenUsage | Spent | None:
        """What a request that ends with `error` used of its tenant's limits, what was set aside included."""
        if error is not None and code_of(error) == PREEMPTED:
            return None
        spent = self._spent(error)
        return spent if self._aside is None else _together(self._aside.spent, spent)

    def _spent(self, error: BaseException | None) -> TokenUsage | Spent | None:
        """What a request that ends with `error` used of its tenant's limits; None is nothing, it was not even made.

        Free of charge is what no worker began to answer, unless that is the client's doing: a request that it gave up
        has been worked on, and a bad one is a request. Without the worker's word a chunk is a token.
        """
        is_streamed = self._request.stream
        if self.usage is not None:
            return self.usage
        if self.timeline.first_byte is not None:
            return Spent(None, self.timeline.token_chunks) if is_streamed else Spent(0, 0)
        if isinstance(error, InvalidRequest):
            return Spent(0, 0)
        if self.timeline.dispatched is not None and isinstance(error, asyncio.CancelledError):
            return Spent(None, 0 if is_streamed else None)
        return None

    def fail(self, error: GatewayError) -> None:
        """The answer broke after its first byte."""
        self._broken = error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """The request has ended, in `error` if it was not well. To be called once; never waits."""
        ended = self._clock()
        cause = error or self._broken
        outcome, code = outcome_of(cause), code_of(cause)
        model, band = self._request.resolved_model, self._request.band
        self._metrics.ended(model, self.variant, band, outcome, code, ended - self.timeline.arrived)
        usage = self._observe(self._series, ended, outcome) if self._series is not None else NOTHING_USED
        if self._aside is not None:
            usage = self._observe_aside(self._aside, usage)
        self._metrics.tenant_ended(self._request.tenant.name, outcome, usage)
        self._metrics.in_flight.dec()  # last, for other processes may look meanwhile: what is not in flight is counted
        if cause is not None:
            self._refusals.note(Kind(outcome, code, model, self._request.tenant.name, band), ended)
        if self._log.wants(outcome):
            self._log.write(self._request, self, outcome, code, ended)
        if self._trace is not None and self._tracing is not None:
            end = Ended(ended, self._request, self.timeline, self.variant, self.usage, outcome, code, cause)
            self._trace.end(ended, end.failure)
            self._tracing.export.send(self._trace, end)

    def _observe_aside(self, aside: Aside, used: TokenUsage) -> TokenUsage:
        """Count the tokens of what was set aside where they were generated; all that was used."""
        usage = aside.usage or TokenUsage(completion_tokens=aside.timeline.token_chunks)
        if aside.series is not None:
            aside.series.prompt_tokens.inc(usage.prompt_tokens)
            aside.series.generation_tokens.inc(usage.completion_tokens)
        return _sum(usage, used)

    def _observe(self, series: Series, ended: float, outcome: Outcome) -> TokenUsage:
        """Observe what happened on a worker; what was used there."""
        line = self.timeline
        self._observe_gaps()
        series.queue_wait.observe(line.waited_s)
        if line.overhead_s is not None:
            series.overhead.observe(line.overhead_s)
        if line.dispatched is not None and line.first_byte is not None:
            series.upstream_first_byte.observe(line.first_byte - line.dispatched)
        if line.first_token is not None:
            series.ttft.observe(line.first_token - line.arrived)
        # Without the worker's word on it, a lower bound: a chunk carries at least one token.
        usage = self.usage or TokenUsage(completion_tokens=line.token_chunks)
        series.prompt_tokens.inc(usage.prompt_tokens)
        series.generation_tokens.inc(usage.completion_tokens)
        per_token = line.time_per_output_token(ended, usage.completion_tokens)
        if per_token is not None and outcome is Outcome.COMPLETED:
            series.tpot.observe(per_token)
        return usage


def _sum(one: TokenUsage, other: TokenUsage) -> TokenUsage:
    return TokenUsage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
    )


def _together(one: TokenUsage | Spent | None, other: TokenUsage | Spent | None) -> TokenUsage | Spent | None:
    """What two attempts spent; unknown if it is of either."""
    if one is None or other is None:
        return one or other
    if isinstance(one, TokenUsage) and isinstance(other, TokenUsage):
        return _sum(one, other)
    return Spent(
        None if one.prompt_tokens is None or other.prompt_tokens is None else one.prompt_tokens + other.prompt_tokens,
        None
        if one.completion_tokens is None or other.completion_tokens is None
        else one.completion_tokens + other.completion_tokens,
    )


def outcome_of(cause: BaseException | None) -> Outcome:
    """The outcome that `cause` means. A request that nobody waits for any more was cancelled, whoever stopped it.

    Why a request was cancelled only who watches it knows: the cancellation carries the code as its message.
    """
    match cause:
        case None:
            return Outcome.COMPLETED
        case QueueTimeout():
            return Outcome.EXPIRED
        case InvalidRequest() | Unavailable() | GatewayError(status=429):
            return Outcome.REJECTED
        case asyncio.CancelledError(args=(code,)):
            return {CLIENT_STALLED: Outcome.CLIENT_STALLED, Draining.code: Outcome.FAILED}.get(code, Outcome.CANCELLED)
        case asyncio.CancelledError():
            return Outcome.CANCELLED
        case _:
            return Outcome.FAILED


def code_of(cause: BaseException | None) -> str:
    """The `code` label: a GatewayError's own, what a cancellation says, empty for a good end."""
    match cause:
        case None:
            return ""
        case GatewayError():
            return cause.code
        case asyncio.CancelledError():
            return str(cause.args[0]) if cause.args else CLIENT_GONE
        case _:
            return GatewayError.code


class RequestsLog:
    """One line for each request that ended, or for those that failed, or none."""

    def __init__(self, log: Log, wanted: Literal["all", "failed", "none"]) -> None:
        self._log = log
        self._wanted = wanted

    def wants(self, outcome: Outcome) -> bool:
        return self._wanted == "all" or (self._wanted == "failed" and outcome is Outcome.FAILED)

    def write(self, request: InferenceRequest, account: Account, outcome: Outcome, code: str, ended: float) -> None:
        line, usage = account.timeline, account.usage or TokenUsage()
        self._log.info(
            "request",
            request_id=request.id,
            client_request_id=request.client_id,
            trace_id=trace_id_of(account.trace_headers),
            route=request.route.value,
            model=request.resolved_model,
            variant=account.variant,
            variant_reason=account.variant_reason,
            tenant=request.tenant.name,
            band=request.band.value,
            stream=request.stream,
            outcome=outcome.value,
            code=code,
            queue_s=round(line.waited_s, 6),
            ttft_s=None if line.first_token is None else round(line.first_token - line.arrived, 6),
            duration_s=round(ended - line.arrived, 6),
            prompt_tokens=usage.prompt_tokens,
            generation_tokens=usage.completion_tokens,
        )


class Accounts:
    """Opens the account of each request."""

    def __init__(
        self, metrics: Metrics, requests_log: RequestsLog, clock: Clock, tracing: Tracing | None = None
    ) -> None:
        self._metrics = metrics
        self._log = requests_log
        self._clock = clock
        self._tracing = tracing
        self.ttfts = Ttfts()
        self.paces = Ttfts()
        """From dispatch to the first token, by variant."""
        self.refusals = Refusals()

    def open(self, request: InferenceRequest) -> Account:
        return Account(
            request, self._metrics, self._log, self._clock, self.ttfts, self.paces, self.refusals, self._tracing
        )
