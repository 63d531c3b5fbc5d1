"""The inference routes: the hot path, raw ASGI."""

from __future__ import annotations

import time
from collections.abc import Iterable
from math import inf

from msgspec.structs import replace
from starlette.types import Receive, Scope, Send

from app.api.access import caller_of, key_id_of
from app.api.client import ClientWatch, read_body
from app.api.protocol import connection_of
from app.api.queue_events import serve_announced
from app.api.response import response_of
from app.api.responses import end_stream, send_reply
from app.errors import GatewayError, InvalidRequest, InvalidValue
from app.inference import InferenceRequest, Route
from app.preference import policy_of, session_of
from app.runtime import Runtime
from app.settings import Settings
from app.telemetry.trace_context import TRACE_PARENT, TRACE_STATE, accepted

TRACE_HEADERS = frozenset({TRACE_PARENT, TRACE_STATE})
TIMEOUT_HEADER = b"x-sluice-timeout-ms"
CLIENT_TIMEOUT_HEADER = b"x-stainless-read-timeout"  # OpenAI's clients say how long they wait in silence, seconds
CONSOLE_CHAT = "/console/chat/completions"
"""Route.CHAT for operators, on their listener: the console can reach no other. Its tenant is that of their key."""
QUEUE_EVENTS_HEADER = b"x-sluice-queue-events"
POLICY_HEADER = b"x-sluice-policy"
SESSION_HEADER = b"x-sluice-session"
READ_HEADERS = frozenset(
    {*TRACE_HEADERS, TIMEOUT_HEADER, CLIENT_TIMEOUT_HEADER, QUEUE_EVENTS_HEADER, POLICY_HEADER, SESSION_HEADER}
)


def read_headers(request: InferenceRequest, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """What the headers say about a request: until when, of which trace, by which policy. Raises InvalidValue."""
    traces = []
    for name, value in headers:
        if name not in READ_HEADERS:
            continue
        if name in TRACE_HEADERS:
            traces.append((name, value))
        elif name == TIMEOUT_HEADER:
            request.deadline = min(request.deadline, request.arrived + _milliseconds(value) / 1000)
        elif name == CLIENT_TIMEOUT_HEADER:
            request.deadline = min(request.deadline, request.arrived + _patience_s(value))
        elif name == QUEUE_EVENTS_HEADER:
            request.wants_queue_events = request.stream and value == b"1"
        elif name == POLICY_HEADER:
            policy = policy_of(value.decode("latin-1"), POLICY_HEADER.decode())
            request.preference = replace(request.preference, policy=policy)
        elif name == SESSION_HEADER:
            session = session_of(value.decode("latin-1"), SESSION_HEADER.decode())
            request.preference = replace(request.preference, session=session)
    if traces:
        request.trace_headers = accepted(traces)


def _milliseconds(value: bytes) -> int:
    if not value.isdigit() or not 0 < int(value[:12]) < 10**9:
        raise InvalidValue("The header x-sluice-timeout-ms is expected to be a positive number of milliseconds.")
    return int(value)


def _patience_s(value: bytes) -> float:
    """A client's own limit is a hint: one that makes no sense is none."""
    try:
        seconds = float(value)
    except ValueError:
        return inf
    return seconds if seconds > 0 else inf


class InferenceRoutes:
    """Serves a POST to any of the inference routes."""

    paths: dict[str, Route] = {  # noqa: RUF012 - read-only
        **{route.value: route for route in Route},
        CONSOLE_CHAT: Route.CHAT,
    }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        runtime: Runtime = scope["state"]["runtime"]
        try:
            body = await read_body(scope, receive, runtime.settings.limits)
            request = self._request(scope, body, arrived, runtime.settings)
        except InvalidRequest as error:
            runtime.gateway.refused(self._unread(scope, arrived), error)
            raise
        client, response = connection_of(scope), response_of(scope)
        try:
            stall_s = runtime.settings.relay.client_stall_timeout_s
            with ClientWatch(client, stall_s, runtime.served, key_id_of(scope)):
                if request.wants_queue_events:
                    await serve_announced(runtime.gateway, request, response, client)
                    return
                with await runtime.gateway.serve(request) as reply:
                    await send_reply(reply, response, client)
        except GatewayError as error:
            end_stream(error, request.route, response, client)
            raise

    def _request(self, scope: Scope, body: bytes, arrived: float, settings: Settings) -> InferenceRequest:
        request = InferenceRequest.parse(
            body,
            request_id=scope["request_id"],
            route=self.paths[scope["path"]],
            arrived=arrived,
            limits=settings.parameters,
            tenant=caller_of(scope).tenant,
        )
        request.client_id = scope["client_request_id"]
        read_headers(request, scope["headers"])
        return request

    def _unread(self, scope: Scope, arrived: float) -> InferenceRequest:
        """Stands for what was refused before it was a request."""
        unread = InferenceRequest.unread(
            request_id=scope["request_id"],
            route=self.paths[scope["path"]],
            arrived=arrived,
            tenant=caller_of(scope).tenant,
        )
        unread.client_id = scope["client_request_id"]
        unread.trace_headers = accepted(header for header in scope["headers"] if header[0] in TRACE_HEADERS)
        return unread
