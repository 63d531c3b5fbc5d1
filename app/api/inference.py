"""The inference routes: the hot path, raw ASGI."""

from __future__ import annotations

import re
import time

from starlette.types import Receive, Scope, Send

from app.api.client import ClientWatch, read_body
from app.api.protocol import connection_of
from app.api.responses import send_reply
from app.errors import InvalidRequest
from app.inference import Band, InferenceRequest, Outcome, Route
from app.runtime import Runtime
from app.settings import Parameters
from app.telemetry.account import UNRESOLVED

TRACE_PARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(?:-[ -~]{0,128})?")
TRACE_STATE = re.compile(rb"[ -~]{1,512}")
TRACE_HEADERS = {b"traceparent": TRACE_PARENT, b"tracestate": TRACE_STATE}


class InferenceRoutes:
    """Serves a POST to any of the inference routes."""

    paths: dict[str, Route] = {route.value: route for route in Route}  # noqa: RUF012 - read-only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        runtime: Runtime = scope["state"]["runtime"]
        try:
            body = await read_body(scope, receive, runtime.settings.limits)
            request = self._request(scope, body, arrived, runtime.settings.parameters)
        except InvalidRequest as error:
            took_s = time.monotonic() - arrived
            runtime.metrics.ended(UNRESOLVED, UNRESOLVED, Band.DEFAULT, Outcome.REJECTED, error.code, took_s)
            raise
        client = connection_of(scope)
        with ClientWatch(client, runtime.settings.relay.client_stall_timeout_s):
            with await runtime.gateway.serve(request) as reply:
                await send_reply(reply, send, client)

    def _request(self, scope: Scope, body: bytes, arrived: float, limits: Parameters) -> InferenceRequest:
        request = InferenceRequest.parse(
            body, request_id=scope["request_id"], route=self.paths[scope["path"]], arrived=arrived, limits=limits
        )
        request.trace_headers = tuple(
            (name, value)
            for name, value in scope["headers"]
            if name in TRACE_HEADERS and TRACE_HEADERS[name].fullmatch(value)
        )
        return request
