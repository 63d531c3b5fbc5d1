"""What a worker's answer with an error status means to us, and how it is told to the client. Pure.

vLLM's error bodies are `{"error": {"message", "type", "param", "code": <int>}}`, for unknown paths `{"detail": ...}`
(0.32, as recorded in tests/wire). Clients get OpenAI's shape; the message of a refusal stays the worker's own.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from app.errors import ContextLengthExceeded, GatewayError, Overloaded, RouteNotFound, WorkerLost, WorkerRefused
from app.inference import Route

MESSAGE_CHARS = 2000


class Fault(StrEnum):
    """Why an attempt failed; the `reason` label of a retry."""

    REFUSED = "refused"
    """No connection, or a worker that does not know the model: it did no work, trying elsewhere is free."""
    SATURATED = "saturated"
    """It says that it is full: back-pressure, not a failure."""
    BROKE = "broke"
    """It said, before the first byte, that it failed."""
    LOST = "lost"
    """Its connection was lost before the first byte: it may have died, and of this request."""
    CUT = "cut"
    """Its connection was lost within an answer that does not stream: it may have died, and nobody has seen a byte."""
    GARBAGE = "garbage"
    """It answered with something that is no answer: not tried again, the next one would see the same request."""
    TIMEOUT = "timeout"
    """It did not answer in time; what it spent on it would be spent again."""

    @property
    def is_free(self) -> bool:
        """Whether trying elsewhere costs no worker anything."""
        return self is Fault.REFUSED or self is Fault.SATURATED

    @property
    def is_loss(self) -> bool:
        """Whether the worker may have died."""
        return self is Fault.LOST or self is Fault.CUT

    @property
    def is_final(self) -> bool:
        return self is Fault.GARBAGE or self is Fault.TIMEOUT


class AttemptFailed(Exception):
    """One attempt ended before its first byte; `error` is what the client hears if there is no other."""

    def __init__(self, fault: Fault, error: GatewayError) -> None:
        super().__init__(error.message)
        self.fault = fault
        self.error = error


class _Error(msgspec.Struct):
    message: str = ""
    param: str | None = None
    code: int | str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error | None = None


def refusal(status: int, body: bytes, *, route: Route, model: str, retry_after: bytes | None) -> Exception:
    """The exception that a worker's answer with `status` other than 200 becomes.

    A GatewayError is the client's own fault and final; an AttemptFailed is the worker's.
    """
    told = _told(body)
    if status in (429, 503):
        return AttemptFailed(Fault.SATURATED, Overloaded("All workers are busy.", retry_after_s=_seconds(retry_after)))
    if status == 404 and told is not None and told.param == "model":
        return AttemptFailed(
            Fault.REFUSED, WorkerLost("The worker does not serve this model any more.", retry_after_s=1)
        )
    if status in (404, 405) and told is None:
        return RouteNotFound(f"The model {model!r} does not offer {route.value}.")
    if 400 <= status < 500 and status not in (401, 403) and told is not None:
        return _client_error(status, told, route)
    return AttemptFailed(Fault.BROKE, WorkerLost("The worker failed to answer.", retry_after_s=1))


def late_status(begun: bytes) -> tuple[int, bytes] | None:
    """The status and body of a refusal that came as the first event of a stream; None for any other beginning.

    vLLM sends the head of a stream before its engine has looked at the request, so what only the engine refuses arrives
    as 200 and `data: {"error": ...}`. The client has seen nothing yet, so it can still be told by the status.
    """
    if not begun.startswith(b'data: {"error"'):
        return None
    data = begun.partition(b"\n")[0].removeprefix(b"data: ")
    told = _told(data)
    if told is None or not isinstance(told.code, int) or not 400 <= told.code < 600:
        return None
    return told.code, data


def _client_error(status: int, told: _Error, route: Route) -> GatewayError:
    message = told.message[:MESSAGE_CHARS]
    if told.param == "input_tokens" or "maximum context length" in message:
        return ContextLengthExceeded(message, param="messages" if route is Route.CHAT else "prompt")
    param = told.param.removeprefix("body.") if told.param else None
    return WorkerRefused(message, status=status, code="invalid_value", param=param)


def _told(body: bytes) -> _Error | None:
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.DecodeError:
        return None


def _seconds(retry_after: bytes | None) -> float:
    try:
        return min(max(float(retry_after or 1), 1.0), 10.0)
    except ValueError:
        return 1.0
