"""Who may ask for what: every route says, and what none has declared is open to nobody without a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute

from app.api.access import Access, Guard, Rules
from app.api.app import DECLARED, OPERATOR_PAGES, create_app
from app.errors import InvalidApiKey, PermissionDenied, RouteNotFound
from app.inference import Route
from app.settings import Settings
from app.tenancy.directory import Caller
from app.tenant import ANONYMOUS

RULES = Rules(DECLARED, OPERATOR_PAGES)
PUBLIC, ADMIN = 8000, 8001


def application() -> FastAPI:
    """The FastAPI application below the middleware."""
    app: Any = create_app(Settings())
    while not isinstance(app, FastAPI):
        app = app._app
    return app


def walk(routes: list[BaseRoute]) -> Iterator[str]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is None:
            yield route.path  # type: ignore[attr-defined]
        else:
            yield from walk(inner.routes)


def test_s3_every_route_has_declared_who_may_ask_for_it() -> None:
    paths = {*walk(application().router.routes), *Route}
    assert {"/v1/models", "/healthz", "/metrics", "/docs", "/admin/keys", "/v1/chat/completions"} <= paths
    undeclared = [path for path in paths if not RULES.is_declared(path.replace("{", "x").replace("}", ""))]
    assert undeclared == []


@pytest.mark.parametrize(
    ("path", "access"),
    [
        *((route.value, Access.TENANT) for route in Route),
        ("/v1/models", Access.TENANT),
        ("/v1/models/a/b:c", Access.TENANT),
        ("/health", Access.PROBE),
        ("/healthz", Access.PROBE),
        ("/readyz", Access.PROBE),
        ("/metrics", Access.ADMIN),
        ("/docs", Access.ADMIN),
        ("/openapi.json", Access.ADMIN),
        ("/admin/queue", Access.ADMIN),
        ("/admin/live", Access.ADMIN),
        ("/console", Access.PAGE),
        ("/console/console.js", Access.PAGE),
        ("/console/chat/completions", Access.ADMIN),
        ("/admin/keys/key_1", Access.ADMIN),
        ("/admin/keys/key_1/rotate", Access.ADMIN),
    ],
)
def test_the_access_of_a_path(path: str, access: Access) -> None:
    assert RULES.of(path) is access


@pytest.mark.parametrize("path", ["/", "/nowhere", "/healthz/", "/healthz/x", "//healthz", "/HEALTHZ", "/x/healthz"])
def test_what_nobody_declared_needs_a_key(path: str) -> None:
    assert not RULES.is_declared(path)
    assert RULES.of(path) is Access.TENANT


class Known:
    """An identification that knows everybody, or nobody."""

    def __init__(self, caller: Caller | None) -> None:
        self._caller = caller

    def identify(self, headers: object, address: str) -> Caller:
        if self._caller is None:
            raise InvalidApiKey("no")
        return self._caller


NOBODY, TENANT, OPERATOR = Known(None), Known(Caller(ANONYMOUS, False)), Known(Caller(ANONYMOUS, True))


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/models/x", "/healthz", "/metrics", "/docs", "/console", "/nowhere"]
)
@pytest.mark.parametrize("caller", [NOBODY, TENANT, OPERATOR])
@pytest.mark.parametrize("port", [PUBLIC, ADMIN])
@pytest.mark.parametrize("admin_port", [None, ADMIN])
def test_the_guard(path: str, caller: Known, port: int, admin_port: int | None) -> None:
    scope: dict[str, Any] = {
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "headers": [],
        "client": None,
        "server": ("h", port),
    }
    access = RULES.of(path)
    expected: type[Exception] | None = None
    if access is not Access.PROBE:
        if admin_port is not None and (port == ADMIN) is not (access in (Access.ADMIN, Access.PAGE)):
            expected = RouteNotFound
        elif access is not Access.PAGE and caller is NOBODY:
            expected = InvalidApiKey
        elif access is Access.ADMIN and caller is TENANT:
            expected = PermissionDenied
    guard = Guard(RULES, admin_port)
    if expected is None:
        assert guard.check(scope, caller) is access
    else:
        with pytest.raises(expected):
            guard.check(scope, caller)
