"""An answer that goes on when its worker is lost: the one place where a resume happens."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from app.errors import GatewayError, UpstreamStalled, WorkerLost
from app.inference import InferenceRequest
from app.relay.answer import Answer, BegunStream, Sink, StreamedAnswer
from app.relay.resumable import NotResumable, Terms, continuation, terms_of
from app.relay.transcript import Transcript
from app.relay.translator import Translator
from app.settings import Relay as Limits
from app.telemetry.account import Account
from app.telemetry.metrics import Metrics

ARMED = "armed"


class Resume(StrEnum):
    """What came of a resumable stream that broke; the `outcome` label of a resume."""

    RESUMED = "resumed"
    FAILED = "failed"
    """Another slot was asked for, and nothing new came from it."""
    NOT_POSSIBLE = "not_possible"


class Carriers(Protocol):
    """The workers for one request: the one whose slot it holds, and the others of the same variant."""

    @property
    def context_length(self) -> int | None:
        """In tokens, where it is known; the workers of a variant agree."""

    @property
    def others(self) -> tuple[str, ...]: ...

    async def open(self, request: InferenceRequest) -> Answer:
        """The answer to `request` from the one whose slot is held, as `Relay.attempt` has it. Raises GatewayError."""

    async def move(self) -> None:
        """Take a slot of one of the others instead. Raises GatewayError."""


async def open_resumable(
    request: InferenceRequest,
    carriers: Carriers,
    limits: Limits,
    account: Account,
    metrics: Metrics,
    clock: Callable[[], float],
) -> Answer:
    """The answer to a streaming `request`, one that can be resumed where its terms allow it. Raises GatewayError."""
    try:
        terms = terms_of(request)
    except NotResumable as reason:
        answer = await carriers.open(request)
        answer.resume = f"not possible: {reason}"
        return answer
    answer = await carriers.open(terms.armed)
    if not isinstance(answer, StreamedAnswer):
        return answer
    return ResumableAnswer(answer.stream, terms, carriers, limits, account, metrics, clock)


class ResumableAnswer(StreamedAnswer):
    """A stream that another worker continues when this one is lost, at most `resumes_per_stream` times.

    If none can, it ends as any broken stream does. A continuation that breaks before it brought anything new is not
    tried again: what kills one worker may kill them all.
    """

    __slots__ = (
        "_carriers",
        "_is_continuing",
        "_lost",
        "_metrics",
        "_resumes_left",
        "_terms",
        "_transcript",
        "_translator",
        "_until",
    )

    def __init__(
        self,
        stream: BegunStream,
        terms: Terms,
        carriers: Carriers,
        limits: Limits,
        account: Account,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(stream, terms.request, account, clock)
        self.resume = ARMED
        self._terms = terms
        self._carriers = carriers
        self._metrics = metrics
        self._resumes_left = limits.resumes_per_stream
        self._until = terms.request.arrived + limits.total_timeout_s
        self._transcript = Transcript(terms.held_chars, limits.resume_max_tokens)
        self._translator = Translator(terms.request.route, self._transcript)
        self._is_continuing = False
        self._lost: GatewayError | None = None

    async def next(self) -> bytes:
        while True:
            part = await super().next()
            if part or self._lost is None:
                return part
            if part := await self._recover(self._lost):
                return part

    async def pour(self, sink: Sink) -> None:
        while True:
            await super().pour(sink)
            if self._lost is None:
                return
            if part := await self._recover(self._lost):
                sink.write(part)
                return

    def _pass(self, data: bytes) -> bytes:
        return self._take(self._splitter.feed(data))

    def _take(self, events: list[bytes]) -> bytes:
        """As for every stream, of the events in the client's own shape; those before an error still arrive."""
        translated = []
        for event in events:
            try:
                translated.append(self._translator.translate(event))
            except GatewayError as error:
                self._break(error)
                break
        relayed = super()._take([event for event in translated if event])
        if relayed and self._is_continuing:
            self._is_continuing = False
            self._count(Resume.RESUMED)
        return relayed

    def _break(self, error: GatewayError) -> bytes:
        """The events end here, which is not the end of the answer yet."""
        self._ended = True
        self._lost = None if self.is_whole else error
        return b""

    async def _recover(self, error: GatewayError) -> bytes:
        """Have the stream go on, or return what ends it."""
        self._lost = None
        if self._is_continuing:
            return self._end(error, Resume.FAILED)
        request = self._continuation(error)
        if request is None:
            return self._end(error, Resume.NOT_POSSIBLE)
        self._resumes_left -= 1
        self._account.resuming(error)
        self.close()
        try:
            await self._carriers.move()
            answer = await self._carriers.open(request)
        except GatewayError:
            return self._end(error, Resume.FAILED)
        if not isinstance(answer, StreamedAnswer):
            return self._end(error, Resume.FAILED)
        self._follow(answer.stream)
        self._translator.go_on()
        self._is_continuing = True
        return b""

    def _continuation(self, error: GatewayError) -> InferenceRequest | None:
        """The request to go on with; None where there is nothing to go on from, or nobody to ask."""
        is_workers_fault = isinstance(error, WorkerLost | UpstreamStalled)
        is_in_time = self._clock() < self._until
        if not (is_workers_fault and is_in_time and self._resumes_left and self._carriers.others):
            return None
        length, left = self._carriers.context_length, self._resumes_left - 1
        try:
            return continuation(self._terms, self._transcript, length, resumes_left=left)
        except NotResumable:
            return None

    def _end(self, error: GatewayError, outcome: Resume) -> bytes:
        self._count(outcome)
        return super()._break(error)

    def _count(self, outcome: Resume) -> None:
        self.resume = outcome
        self._account.resumed(outcome)
        self._metrics.resumes.labels(outcome).inc()
