"""Who is asking, told from the headers of a request."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Protocol

from app.errors import DependencyUnavailable, InvalidApiKey, InvalidValue, RateLimitExceeded
from app.telemetry.metrics import Metrics
from app.tenancy.directory import Caller, Directory
from app.tenancy.failures import Failures
from app.tenancy.keys import KEY_MAX_BYTES, Pepper
from app.tenancy.tenants import Tenants

Headers = Iterable[tuple[bytes, bytes]]

TENANT_HEADER = b"x-sluice-tenant"
TENANT_NAME = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_BEARER = b"bearer "
_KEY_HEADERS = frozenset({b"authorization", b"x-api-key", b"api-key"})


class Failure(StrEnum):
    """Why somebody was not let in. For operators: clients all hear the same."""

    MISSING = "missing"
    UNKNOWN = "unknown"
    ENDED = "ended"


class Identification(Protocol):
    """Tells who is asking."""

    def identify(self, headers: Headers, address: str) -> Caller:
        """Who sent a request with these headers from `address`.

        Raises InvalidApiKey, RateLimitExceeded (too many failures), DependencyUnavailable (no keys were read yet) or
        InvalidValue.
        """


def presented_key(headers: Headers) -> bytes:
    """The one key that these headers hold, empty if there is none or more than one.

    As OpenAI's clients send it (`authorization: Bearer`), Anthropic's (`x-api-key`) or Azure's (`api-key`). A client
    may use several of these ways as long as it says the same in each.
    """
    found = b""
    seen = 0
    for name, value in headers:
        if name in _KEY_HEADERS:
            seen += 1
            if name == b"authorization":
                if value[:7].lower() != _BEARER:
                    return b""
                value = value[7:].strip()
            if seen > 1 and value != found:
                return b""
            found = value
    return found if len(found) <= KEY_MAX_BYTES else b""


class KeyIdentification:
    """Lets in who holds a key that has not ended.

    A key is looked up by its digest, so how far a guess agrees with a key shows in nothing; and whatever is wrong, one
    digest is computed and one answer given.
    """

    def __init__(
        self,
        directory: Directory,
        pepper: Pepper,
        failures: Failures,
        metrics: Metrics,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._pepper = pepper
        self._failures = failures
        self._metrics = metrics
        for failure in Failure:
            metrics.auth_failures.labels(failure)
        self._clock = clock
        self._wall = wall

    def identify(self, headers: Headers, address: str) -> Caller:
        key = presented_key(headers)
        caller = self._directory.find(self._pepper.digest(key))
        if caller is None or caller.key is None or caller.expires_s <= self._wall():
            raise self._refusal(key, caller, address)
        self._directory.note_used(caller.key)
        return caller

    def _refusal(self, key: bytes, caller: Caller | None, address: str) -> Exception:
        reason = Failure.ENDED if caller is not None else Failure.UNKNOWN if key else Failure.MISSING
        if reason is Failure.UNKNOWN and not self._directory.is_complete:
            return DependencyUnavailable("API keys cannot be checked now. Please try again.", retry_after_s=2)
        self._metrics.auth_failures.labels(reason).inc()
        wait_s = self._failures.count(address, self._clock())
        if wait_s:
            return RateLimitExceeded("Too many requests with an incorrect API key.", retry_after_s=wait_s)
        return InvalidApiKey("Incorrect API key provided, or none at all.")


class OpenDoor:
    """Lets everybody in, under no name; or under the one that a proxy of one's own has put into a header."""

    def __init__(self, tenants: Tenants, *, trusts_header: bool) -> None:
        self._tenants = tenants
        self._trusts_header = trusts_header
        self._look_up_tenants()
        tenants.listen(self._look_up_tenants)

    def identify(self, headers: Headers, address: str) -> Caller:
        if self._trusts_header:
            for name, value in headers:
                if name == TENANT_HEADER:
                    return Caller(self._tenants.get(_tenant_name(value)), is_admin=True)
        return self._anybody

    def _look_up_tenants(self) -> None:
        self._anybody = Caller(self._tenants.anonymous, is_admin=True)


def _tenant_name(value: bytes) -> str:
    if not TENANT_NAME.fullmatch(value):
        raise InvalidValue("The header x-sluice-tenant is expected to be a tenant's name.")
    return value.decode()
