"""An OpenTelemetry collector for tests: takes spans by OTLP over HTTP, and keeps them decoded."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Encoded
from opentelemetry.proto.trace.v1.trace_pb2 import Status

WAIT_S = 20.0


@dataclass(frozen=True)
class Event:
    name: str
    at_ns: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """Ids as hex, times in nanoseconds since 1970; `service` and `scope` say who made it."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    facts: dict[str, Any]
    events: tuple[Event, ...]
    links: tuple[tuple[str, str], ...]
    failed: bool
    state: str
    service: str

    @classmethod
    def of(cls, span: Encoded, service: str) -> Self:
        return cls(
            name=span.name,
            kind=Encoded.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            began_ns=span.start_time_unix_nano,
            ended_ns=span.end_time_unix_nano,
            facts=facts(span.attributes),
            events=tuple(Event(event.name, event.time_unix_nano, facts(event.attributes)) for event in span.events),
            links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            failed=span.status.code == Status.STATUS_CODE_ERROR,
            state=span.trace_state,
            service=service,
        )

    @property
    def took_ns(self) -> int:
        return self.ended_ns - self.began_ns


def facts(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair) for pair in pairs}


def _value(pair: KeyValue) -> Any:
    return getattr(pair.value, pair.value.WhichOneof("value") or "string_value")


class Trace:
    """The spans of one trace."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans

    @property
    def server(self) -> Span:
        """The gateway's own span of the request."""
        (found,) = [span for span in self.spans if span.kind == "server" and span.service == "sluice"]
        return found

    def below(self, parent: Span) -> list[Span]:
        """Its children, in the order of time."""
        return sorted(
            (span for span in self.spans if span.parent_id == parent.span_id),
            key=lambda span: (span.began_ns, span.ended_ns),
        )

    @property
    def stages(self) -> list[Span]:
        return self.below(self.server)

    def one(self, name: str) -> Span:
        (found,) = [span for span in self.spans if span.name == name]
        return found


class Collector:
    """Listens on a free port of 127.0.0.1. With `is_deaf` it takes connections and never answers."""

    def __init__(self, *, is_deaf: bool = False, status: int = 200) -> None:
        self.raw = b""
        self.headers: dict[str, str] = {}
        self.spans: list[Span] = []
        self.exports = 0
        self.status = status
        self._is_deaf = is_deaf
        self._news = asyncio.Condition()
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self._open):
            writer.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while await self._take(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        async with self._news:
            self.exports += 1
            self.headers = headers
            assert request.startswith("POST /v1/traces ")
            if self.status == 200 and not self._is_deaf:
                self._decode(gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body)
            self._news.notify_all()
        if self._is_deaf:
            await reader.read()
            return False
        writer.write(
            b"HTTP/1.1 %d x\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n" % self.status
        )
        return True

    def _decode(self, body: bytes) -> None:
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = facts(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                self.spans.extend(Span.of(span, service) for span in scope.spans)

    async def wait_for(self, holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Until it holds after an export. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._news:
            await self._news.wait_for(holds)

    async def server_span(self, request_id: str) -> Span:
        """The gateway's span of the request that it knows by this id."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.facts.get("sluice.request_id") == request_id]

        await self.wait_for(lambda: bool(found()))
        (span,) = found()
        return span

    async def trace(self, request_id: str) -> Trace:
        """The whole trace of that request: its own span is exported last."""
        return self.of((await self.server_span(request_id)).trace_id)

    def of(self, trace_id: str) -> Trace:
        return Trace([span for span in self.spans if span.trace_id == trace_id])
