"""The relay: attempts on workers, and a second one only before the first byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from app.errors import GatewayError, UpstreamBadResponse, WorkerLost
from app.inference import InferenceRequest, TokenUsage
from app.relay.answer import JSON_TYPE, SSE_TYPE, Answer, BegunStream, StreamedAnswer, WholeAnswer
from app.relay.dialect import usage_of_answer
from app.relay.refusal import AttemptFailed, Fault, late_status, refusal
from app.relay.resumption import open_resumable
from app.relay.upstream import ConnectFailed, Connection, Header, Upstream
from app.settings import Relay as Limits
from app.telemetry.account import Account
from app.telemetry.metrics import Metrics
from app.workers import worker as transitions
from app.workers.registry import Registry
from app.workers.worker import Worker

WHOLE_ANSWER_MAX_BYTES = 8 * 1024 * 1024


class Slot(Protocol):
    """What the relay needs of a lease: where it may send, and a way to go elsewhere."""

    @property
    def worker_id(self) -> str: ...

    @property
    def waited_s(self) -> float: ...

    async def move(self, candidates: tuple[str, ...]) -> None: ...


class Relay:
    """Owns the connections to all workers."""

    def __init__(self, registry: Registry, limits: Limits, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._upstreams = {worker.id: Upstream(worker.address, limits) for worker in registry}

    async def open(
        self, request: InferenceRequest, slot: Slot, candidates: tuple[str, ...], account: Account
    ) -> Answer:
        """The answer to `request`: see `attempt`, and `resumption` for streams of models that go on elsewhere."""
        if not request.stream or not self._registry[slot.worker_id].variant.resumes:
            return await self.attempt(request, slot, candidates, account)
        carriers = _Carriers(self, self._registry, slot, candidates, account)
        return await open_resumable(request, carriers, self._limits, account, self._metrics, self._clock)

    async def attempt(
        self, request: InferenceRequest, slot: Slot, candidates: tuple[str, ...], account: Account
    ) -> Answer:
        """The worker's answer to `request`, from its first body byte on.

        Tries another slot once if the first attempt fails before that byte, and once for each worker that could not
        even be reached. Raises GatewayError.
        """
        failures = 0
        for _ in range(len(candidates) + 1):
            worker = self._registry[slot.worker_id]
            account.admitted(worker.variant.name, slot.waited_s)
            try:
                return await self._attempt(request, worker, account)
            except AttemptFailed as failure:
                self._note(worker, failure)
                failures += failure.fault is not Fault.REFUSED
                if failures > 1 or failure.fault in (Fault.GARBAGE, Fault.TIMEOUT):
                    raise failure.error from None
                last = failure.error
                self._metrics.retries.labels(failure.fault).inc()
            await slot.move((*(other for other in candidates if other != worker.id), worker.id))
        raise last

    def close(self) -> None:
        for upstream in self._upstreams.values():
            upstream.close()

    async def _attempt(self, request: InferenceRequest, worker: Worker, account: Account) -> Answer:
        with ExitStack() as held:
            held.enter_context(_carried_by(worker))
            body = request.body_for(worker.address.served_model)
            account.dispatched(self._clock())
            try:
                exchange = held.enter_context(
                    await self._upstreams[worker.id].send(request.route, _headers(request), body)
                )
            except ConnectFailed as error:
                raise AttemptFailed(
                    Fault.REFUSED, WorkerLost(f"No worker could be reached: {error}", retry_after_s=1)
                ) from None
            connection = exchange.connection
            begun = await self._first_bytes(request, connection)
            account.first_byte(self._clock())
            self._registry.change(worker, transitions.succeeded(worker.condition))
            if request.stream and connection.headers[b"content-type"].startswith(SSE_TYPE):
                return StreamedAnswer(BegunStream(held.pop_all(), connection, begun), request, account, self._clock)
            account.usage = _usage_of(begun)
            return WholeAnswer(begun)

    async def _first_bytes(self, request: InferenceRequest, connection: Connection) -> bytes:
        """The first bytes of a stream, or the whole of any other answer. Raises GatewayError or AttemptFailed."""
        try:
            await connection.read_head()
            if connection.status == 200 and connection.headers.get(b"content-type", b"").startswith(SSE_TYPE):
                body = await _begun_stream(connection)
                late = late_status(body)
                if late is None:
                    return body
                status, body = late
            else:
                body = await _whole_body(connection)
                status = connection.status
        except UpstreamBadResponse as error:
            raise AttemptFailed(Fault.GARBAGE, error) from None
        except WorkerLost as error:
            error.retry_after_s = 1
            raise AttemptFailed(Fault.BROKE, error) from None
        except GatewayError as error:
            raise AttemptFailed(Fault.TIMEOUT, error) from None
        if status != 200:
            raise refusal(
                status,
                body,
                route=request.route,
                model=request.resolved_model,
                retry_after=connection.headers.get(b"retry-after"),
            )
        if not connection.headers.get(b"content-type", b"").startswith(JSON_TYPE):
            raise AttemptFailed(Fault.GARBAGE, UpstreamBadResponse("The worker's answer is not JSON."))
        return body

    def _note(self, worker: Worker, failure: AttemptFailed) -> None:
        """Let the registry know what the failure says about the worker. Back-pressure says nothing."""
        condition = worker.condition
        if failure.fault is Fault.REFUSED:
            self._registry.change(worker, transitions.refused(condition, failure.error.message))
        elif failure.fault is not Fault.SATURATED:
            self._registry.change(worker, transitions.failed(condition, failure.error.message))


@dataclass(slots=True)
class _Carriers:
    """See `resumption.Carriers`."""

    relay: Relay
    registry: Registry
    slot: Slot
    candidates: tuple[str, ...]
    account: Account

    @property
    def context_length(self) -> int | None:
        return self.registry[self.slot.worker_id].context_length

    @property
    def others(self) -> tuple[str, ...]:
        mine = self.registry[self.slot.worker_id]
        return tuple(
            worker_id
            for worker_id in self.candidates
            if worker_id != mine.id and self.registry[worker_id].variant is mine.variant
        )

    async def open(self, request: InferenceRequest) -> Answer:
        return await self.relay.attempt(request, self.slot, self.candidates, self.account)

    async def move(self) -> None:
        self.candidates = self.others
        await self.slot.move(self.candidates)


@contextmanager
def _carried_by(worker: Worker) -> Iterator[None]:
    worker.in_flight += 1
    try:
        yield
    finally:
        worker.in_flight -= 1


async def _begun_stream(connection: Connection) -> bytes:
    begun = await connection.read()
    if not begun:
        raise WorkerLost("The worker ended its answer before it began.")
    return begun


async def _whole_body(connection: Connection) -> bytes:
    parts = []
    size = 0
    while part := await connection.read():
        size += len(part)
        if size > WHOLE_ANSWER_MAX_BYTES:
            raise UpstreamBadResponse("The worker's answer is too large.")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _usage_of(body: bytes) -> TokenUsage | None:
    try:
        return usage_of_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise AttemptFailed(Fault.GARBAGE, UpstreamBadResponse("The worker's answer is not JSON.")) from None


def _headers(request: InferenceRequest) -> tuple[Header, ...]:
    return ((b"x-request-id", request.id.encode()), *request.trace_headers)
