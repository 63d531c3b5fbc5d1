"""The error tree: OpenAI's shape, statuses, retry headers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from app import errors
from app.errors import GatewayError, MethodNotAllowed, WorkerRefused

TABLE = {
    "invalid_json": 400, "invalid_value": 400, "unsupported_parameter": 400, "context_length_exceeded": 400,
    "model_not_found": 404, "not_found": 404, "method_not_allowed": 405, "request_timeout": 408,
    "request_too_large": 413, "unsupported_media_type": 415, "internal_error": 500, "request_quarantined": 500,
    "worker_lost": 502,
    "upstream_bad_response": 502, "overloaded": 503, "queue_timeout": 503, "no_healthy_worker": 503,
    "draining": 503, "upstream_timeout": 504, "upstream_stalled": 504,
}  # fmt: skip


def leaves(root: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    for kind in root.__subclasses__():
        yield from leaves(kind)
        if not kind.__subclasses__():
            yield kind


PLAIN = [kind for kind in leaves() if kind not in (WorkerRefused, MethodNotAllowed)]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_every_error_is_an_openai_error_object(kind: type[GatewayError]) -> None:
    told = json.loads(kind("why", param="p").body())["error"]
    assert told == {"message": "why", "type": kind.type, "param": "p", "code": kind.code}
    by_status = {403: "permission_error", 429: "rate_limit_error"}
    assert told["type"] == by_status.get(kind.status, "invalid_request_error" if kind.status < 500 else "server_error")


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_codes_have_the_statuses_that_clients_know(kind: type[GatewayError]) -> None:
    if kind.code in TABLE:
        assert TABLE[kind.code] == kind.status


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for kind in leaves():
        assert f"── {kind.__name__} " in errors.__doc__, kind


@pytest.mark.parametrize("wait_s", [0.01, 1, 5, 59, 4000])
def test_retry_after_stays_where_both_official_clients_obey_it(wait_s: float) -> None:
    for _ in range(50):
        headers = dict(errors.Overloaded("full", retry_after_s=wait_s).headers())
        assert 1 <= int(headers[b"retry-after"]) <= 60
        assert 1000 <= int(headers[b"retry-after-ms"]) <= 60_000


def test_refused_clients_do_not_come_back_together() -> None:
    waits = {dict(errors.Overloaded("full", retry_after_s=10).headers())[b"retry-after-ms"] for _ in range(20)}
    assert len(waits) > 5


def test_a_client_is_told_not_to_repeat_what_may_have_cost_tokens() -> None:
    assert (b"x-should-retry", b"false") in errors.UpstreamTimeout("late").headers()
