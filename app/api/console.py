"""`/console`, the operator's page, and `/admin/live`, what it shows.

The page is the same for everybody and says nothing: whoever can reach the operators' listener may load it. All that it
shows comes from `/admin/live`, all that it asks goes to CONSOLE_CHAT, and both want a key of scope admin.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.access import key_id_of
from app.api.client import ClientGone, ClientWatch
from app.api.dependencies import RuntimeOf
from app.api.protocol import connection_of
from app.console.console import Viewer
from app.errors import GatewayError, RouteNotFound
from app.runtime import Runtime

pages = APIRouter(include_in_schema=False)
routes = APIRouter(include_in_schema=False)

PAGE = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@pages.get("/console")
def page() -> Response:
    return _asset(PAGE)


@pages.get("/console/{name}")
def asset(name: str) -> Response:
    return _asset(name)


def _asset(name: str) -> Response:
    folder = resources.files("app.console").joinpath("page")
    found = next((file for file in folder.iterdir() if file.name == name), None)
    if found is None:
        raise RouteNotFound(f"The console has no {name[:100]!r}.")
    kind = _MEDIA_TYPES["." + name.rpartition(".")[2]]
    return Response(found.read_bytes(), media_type=kind, headers=_HEADERS)


@routes.get("/admin/live")
async def live(runtime: RuntimeOf, request: Request) -> Response:
    return Live(runtime)


class Live(Response):
    """A snapshot a second, as server-sent events, until the viewer leaves, does not keep up or is no operator any
    more, or the gateway is about to stop."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stall_s = self._runtime.settings.relay.client_stall_timeout_s
        watch = ClientWatch(connection_of(scope), stall_s, self._runtime.served, key_id_of(scope))
        with self._runtime.console.viewer() as viewer, suppress(ClientGone, GatewayError, TimeoutError), watch:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._tell(viewer, scope, send)
        await send({"type": "http.response.body", "body": b""})

    async def _tell(self, viewer: Viewer, scope: Scope, send: Send) -> None:
        while self._may_go_on(scope):
            event = b"event: snapshot\ndata: %b\n\n" % await viewer.next()
            await send({"type": "http.response.body", "body": event, "more_body": True})

    def _may_go_on(self, scope: Scope) -> bool:
        address = scope["client"]
        try:
            caller = self._runtime.identification.identify(scope["headers"], address[0] if address else "")
        except GatewayError:
            return False
        return caller.is_admin and not self._runtime.drain.is_quiet
