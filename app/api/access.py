"""Who may ask for what: one declaration for each route, checked before any route is looked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import PermissionDenied, RouteNotFound
from app.inference import Route
from app.tenancy.authentication import Identification
from app.tenancy.directory import Caller

CALLER = "sluice.caller"
NOTES = "sluice.notes"
AUDITED = "/admin/"
ENCODED_BELOW = "/v1/models/"  # names of models may hold a slash, which clients encode


class Access(StrEnum):
    """Who may ask for a route. What nobody has declared is a tenant's: without a key not even its absence is told."""

    PROBE = "probe"
    PAGE = "page"
    """The operators' listener only, and no key: it is the same for everybody, and says nothing."""
    TENANT = "tenant"
    ADMIN = "admin"


_OPERATORS = frozenset({Access.PAGE, Access.ADMIN})

Declared = Iterable[tuple[Access, APIRouter]]


class Rules:
    """The access of each path, read from the path as it arrived: the same value that routes are found by."""

    def __init__(self, declared: Declared, operator_pages: Iterable[str] = ()) -> None:
        self._exact = dict.fromkeys((route.value for route in Route), Access.TENANT)
        self._exact.update(dict.fromkeys(operator_pages, Access.ADMIN))
        self._patterns: list[tuple[re.Pattern[str], Access]] = []
        for access, routes in declared:
            for route in routes.routes:
                self._declare(route, access)

    def _declare(self, route: object, access: Access) -> None:
        assert isinstance(route, APIRoute)  # noqa: S101 - this project's routers hold nothing else
        if route.param_convertors:
            self._patterns.append((route.path_regex, access))
        else:
            self._exact[route.path] = access

    def of(self, path: str) -> Access:
        return self._exact.get(path) or self._matched(path) or Access.TENANT

    def is_declared(self, path: str) -> bool:
        return path in self._exact or self._matched(path) is not None

    def _matched(self, path: str) -> Access | None:
        return next((access for pattern, access in self._patterns if pattern.match(path)), None)


class Guard:
    """Lets a request pass to its route, or refuses it, and notes in its scope who sent it.

    A path has one spelling: what a rule of a proxy in front forbids as `/metrics` must not get past it as `/%6detrics`.

    With a listener of their own, operators' routes are unknown on the public one, and clients' on theirs. Which
    listener a request came to is read from its socket, never from a header.
    """

    def __init__(self, rules: Rules, admin_port: int | None) -> None:
        self._rules = rules
        self._admin_port = admin_port

    def check(self, scope: Scope, identification: Identification) -> Access:
        """The access of the scope's route. Raises RouteNotFound, PermissionDenied, and what identification raises."""
        if b"%" in scope["raw_path"] and not scope["path"].startswith(ENCODED_BELOW):
            raise RouteNotFound(f"Unknown request URL: {scope['method']} {scope['path'][:200]}.")
        access = self._rules.of(scope["path"])
        if access is Access.PROBE:
            return access
        if self._admin_port is not None:
            is_admins = scope["server"][1] == self._admin_port
            if is_admins is not (access in _OPERATORS):
                raise RouteNotFound(f"Unknown request URL: {scope['method']} {scope['path'][:200]}.")
        if access is Access.PAGE:
            return access
        address = scope["client"]
        caller = identification.identify(scope["headers"], address[0] if address else "")
        scope[CALLER] = caller
        if access is Access.ADMIN and not caller.is_admin:
            if scope["path"].startswith(AUDITED):
                Audit.write(scope, PermissionDenied.status)
            raise PermissionDenied("This needs a key of scope admin.")
        return access


def caller_of(scope: Scope) -> Caller:
    """Who sent the request; it has passed the guard."""
    caller: Caller = scope[CALLER]
    return caller


def key_id_of(scope: Scope) -> str | None:
    """Of the key that the request came with."""
    key = caller_of(scope).key
    return None if key is None else key.id


def note(scope: Scope, **facts: str) -> None:
    """Let the audit line of this request tell what it was about."""
    scope[NOTES].update(facts)


class Audit:
    """One line for each request to a route below `/admin/`: who, what, and what came of it; never a key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[NOTES] = {}
        status = 500

        async def heard(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, heard)
        finally:
            self.write(scope, status)

    @staticmethod
    def write(scope: Scope, status: int) -> None:
        caller, address, notes = caller_of(scope), scope["client"], scope.get(NOTES, {})
        scope["state"]["runtime"].audit.info(
            "admin",
            request_id=scope["request_id"],
            action=f"{scope['method']} {scope['path'][:200]}",
            status=status,
            by=caller.key.id if caller.key else None,
            by_hint=caller.key.hint if caller.key else None,
            by_tenant=caller.tenant.name,
            address=address[0] if address else None,
            **{f"of_{name}": fact for name, fact in notes.items()},
        )
