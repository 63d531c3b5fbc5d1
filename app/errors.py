"""Everything that can go wrong, as one tree.

    SluiceError
    ├── ConfigurationError          start-up or reload; one line for the operator, exit code 2
    ├── LaunchError                 `sluice up` and the offline commands; one line, exit code 1
    └── GatewayError                answered to a client as an OpenAI error object
        ├── MalformedRequest        400 malformed_request: what arrived is not the HTTP/1.1 it must be
        ├── InvalidJson             400 invalid_json
        ├── InvalidValue            400 invalid_value
        ├── UnsupportedParameter    400 unsupported_parameter
        ├── IdempotencyMismatch     400 idempotency_mismatch
        ├── ContextLengthExceeded   400 context_length_exceeded
        ├── WorkerRefused           4xx the worker's own answer to a bad request, in OpenAI's shape
        ├── InvalidApiKey           401 invalid_api_key
        │   └── KeyRevoked          401 key_revoked: while its request waited or ran
        ├── PermissionDenied        403 permission_denied
        ├── ModelNotFound           404 model_not_found
        ├── RouteNotFound           404 not_found
        ├── ObjectNotFound          404 object_not_found
        ├── MethodNotAllowed        405 method_not_allowed
        ├── RequestTimeout          408 request_timeout
        ├── Conflict                409 conflict
        ├── RequestTooLarge         413 request_too_large
        ├── UriTooLong              414 uri_too_long
        ├── UnsupportedMediaType    415 unsupported_media_type
        ├── RateLimitExceeded       429 rate_limit_exceeded
        ├── TenantQueueFull         429 tenant_queue_full
        ├── InsufficientQuota       429 insufficient_quota
        ├── ExpectationFailed       417 expectation_failed
        ├── HeadersTooLarge         431 headers_too_large
        ├── InternalError           500 internal_error
        ├── RequestQuarantined      500 request_quarantined
        ├── WorkerLost              502 worker_lost
        ├── UpstreamBadResponse     502 upstream_bad_response
        ├── Overloaded              503 overloaded
        ├── QueueTimeout            503 queue_timeout
        ├── NoHealthyWorker         503 no_healthy_worker
        ├── Draining                503 draining
        ├── DependencyUnavailable   503 dependency_unavailable
        ├── StorageUnavailable      503 storage_unavailable
        ├── UpstreamTimeout         504 upstream_timeout
        └── UpstreamStalled         504 upstream_stalled

A code is at once the `error.code` of the answer, the metric label and the log field. Statuses, types and the
retry headers follow OpenAI's API as its official clients read it: they obey `retry-after` between 0 and 60 s and
never retry where `x-should-retry` is `false`.
"""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0


class Allowance(NamedTuple):
    """What is left of one of a tenant's limits, told with every answer: requests or tokens, and how long until it is
    whole again."""

    limit: str
    most: int
    remaining: int
    reset_s: float


class SluiceError(Exception):
    """Base of all errors that Sluice raises on purpose."""


class ConfigurationError(SluiceError):
    """The configuration cannot be used; the message is one line that names the file and the key."""


class LaunchError(SluiceError):
    """Something that `sluice up` or an offline command needs is not there; the message is one line."""


class GatewayError(SluiceError):
    """A request ends in an error answer.

    `message` is shown to the client; it never carries another tenant's data, an address or a stack trace.
    `param` is the JSON path of the offending field. `retry_after_s` is clamped to 1..60 s and jittered on the
    way out, so that refused clients do not come back together. `allowances` are what is left of the tenant's limits,
    once that is known.
    """

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"
    should_retry: bool | None = None
    allowances: tuple[Allowance, ...] = ()

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def as_object(self) -> dict[str, Any]:
        """OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`, all four always present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        return json.dumps(self.as_object(), ensure_ascii=False).encode("utf-8", "replace")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The retry headers of this answer."""
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            wait = jittered(self.retry_after_s)
            headers.append((b"retry-after", str(round(wait)).encode()))
            headers.append((b"retry-after-ms", str(round(wait * 1000)).encode()))
        if self.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return headers


def jittered(wait_s: float) -> float:
    """`wait_s` plus up to half of it, inside the range that both official clients obey."""
    spread = wait_s * (1 + random.random() / 2)  # noqa: S311 - spreads clients out, guards nothing
    return min(max(spread, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)


class InvalidRequest(GatewayError):
    """The client's request cannot be served as it stands; the same request will fail again."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class MalformedRequest(InvalidRequest):
    code = "malformed_request"


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class InvalidValue(InvalidRequest):
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class IdempotencyMismatch(InvalidRequest):
    """The same Idempotency-Key came with another request before."""

    code = "idempotency_mismatch"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class WorkerRefused(InvalidRequest):
    """A worker's 4xx, told in OpenAI's shape: its status and message, our type and code."""

    def __init__(self, message: str, *, status: int, code: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


class InvalidApiKey(InvalidRequest):
    """No key, or none that opens anything here. Which of these it was is nobody's business."""

    status = 401
    code = "invalid_api_key"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class KeyRevoked(InvalidApiKey):
    """The key was good when the request came, and somebody has ended it since."""

    code = "key_revoked"


class PermissionDenied(InvalidRequest):
    """The key is good, and not for this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class RouteNotFound(InvalidRequest):
    status = 404
    code = "not_found"


class ObjectNotFound(InvalidRequest):
    """No such file or batch, or it is another tenant's: nobody can tell these apart."""

    status = 404
    code = "object_not_found"


class Conflict(InvalidRequest):
    """What is asked for does not fit the state of the object."""

    status = 409
    code = "conflict"
    should_retry = False


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"allow", self.allow.encode())]


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"


class RequestTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class UriTooLong(InvalidRequest):
    status = 414
    code = "uri_too_long"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class ExpectationFailed(InvalidRequest):
    status = 417
    code = "expectation_failed"


class HeadersTooLarge(InvalidRequest):
    status = 431
    code = "headers_too_large"


class TenantQueueFull(GatewayError):
    """The tenant's own share of the queue is full; others are not affected."""

    status = 429
    type = "rate_limit_error"
    code = "tenant_queue_full"


class RateLimitExceeded(GatewayError):
    """The client has used what a limit gives it, or asks for more than it ever gives: then waiting is no use."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InsufficientQuota(GatewayError):
    """The tenant has used its tokens of the day: not worth a client's own retries."""

    status = 429
    type = "rate_limit_error"
    code = "insufficient_quota"
    should_retry = False


class InternalError(GatewayError):
    """A bug of ours. The client learns the request id and nothing else."""


class RequestQuarantined(GatewayError):
    """Two workers died while they held this request: it is not given to a third."""

    code = "request_quarantined"
    should_retry = False


class WorkerLost(GatewayError):
    """The worker broke while it held the request, and no other could take it over."""

    status = 502
    code = "worker_lost"


class UpstreamBadResponse(GatewayError):
    """The worker answered with something that is not an answer; nothing of it is shown."""

    status = 502
    code = "upstream_bad_response"


class Unavailable(GatewayError):
    """Nothing is wrong with the request; the service cannot take it now."""

    status = 503

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = RETRY_AFTER_MIN_S) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)


class Overloaded(Unavailable):
    code = "overloaded"


class QueueTimeout(Unavailable):
    code = "queue_timeout"


class NoHealthyWorker(Unavailable):
    code = "no_healthy_worker"


class Draining(Unavailable):
    code = "draining"


class DependencyUnavailable(Unavailable):
    """Redis is out of reach, and the request cannot do without, or the configuration says that none can."""

    code = "dependency_unavailable"


class StorageUnavailable(Unavailable):
    """The storage of files and batches is full or out of reach: nothing is half written. `reason` is for the log."""

    code = "storage_unavailable"

    def __init__(
        self,
        message: str = "The storage of files cannot take or give anything now.",
        *,
        param: str | None = None,
        retry_after_s: float = 10,
        reason: str = "",
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.reason = reason


class UpstreamTimeout(GatewayError):
    """No first byte within the limit. The worker may have spent tokens on it, so clients are told not to retry."""

    status = 504
    code = "upstream_timeout"
    should_retry = False


class UpstreamStalled(GatewayError):
    """The stream stood still for longer than the gap limit."""

    status = 504
    code = "upstream_stalled"
    should_retry = False
