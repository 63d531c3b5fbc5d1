"""Workers' error answers, as recorded from a real vLLM, told in OpenAI's shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import ContextLengthExceeded, GatewayError, RouteNotFound, WorkerRefused
from app.inference import Route
from app.relay.refusal import AttemptFailed, Fault, late_status, refusal

WIRE = Path(__file__).parents[2] / "wire"


def refused(name: str, route: Route = Route.CHAT) -> Exception:
    head, _, body = (WIRE / f"{name}.http").read_bytes().partition(b"\r\n\r\n")
    return refusal(int(head.split()[1]), body, route=route, model="m", retry_after=None)


def test_a_prompt_that_is_too_long() -> None:
    error = refused("err_context_too_long")
    assert isinstance(error, ContextLengthExceeded)
    assert error.param == "messages"
    assert "maximum context length is 2048 tokens" in error.message


@pytest.mark.parametrize("name", ["err_n0", "err_max_tokens_zero", "err_temperature_negative", "chat_json_schema_bad"])
def test_the_workers_own_words_reach_the_client(name: str) -> None:
    error = refused(name)
    assert isinstance(error, WorkerRefused | GatewayError)
    assert error.status == 400
    told = error.as_object()["error"]
    assert told["type"] == "invalid_request_error"
    assert isinstance(told["code"], str)
    assert told["message"]
    assert not (told["param"] or "").startswith("body.")


def test_a_route_that_the_model_does_not_offer() -> None:
    error = refused("err_embeddings", Route.EMBEDDINGS)
    assert isinstance(error, RouteNotFound)
    assert "/v1/embeddings" in error.message


def test_a_worker_that_does_not_know_the_model_did_no_work() -> None:
    error = refused("err_unknown_model")
    assert isinstance(error, AttemptFailed)
    assert error.fault is Fault.REFUSED


@pytest.mark.parametrize(
    ("status", "fault"), [(429, Fault.SATURATED), (503, Fault.SATURATED), (500, Fault.BROKE), (401, Fault.BROKE)]
)
def test_what_is_the_workers_fault(status: int, fault: Fault) -> None:
    error = refusal(status, b'{"error":{"message":"secret detail"}}', route=Route.CHAT, model="m", retry_after=b"7")
    assert isinstance(error, AttemptFailed)
    assert error.fault is fault
    assert "secret" not in error.error.message


@pytest.mark.parametrize(("header", "seconds"), [(b"3", 3), (b"900", 10), (b"soon", 1), (None, 1)])
def test_a_saturated_worker_says_when_within_reason(header: bytes | None, seconds: float) -> None:
    error = refusal(503, b"", route=Route.CHAT, model="m", retry_after=header)
    assert isinstance(error, AttemptFailed)
    assert error.error.retry_after_s == seconds


def test_a_refusal_that_comes_as_the_first_event_still_has_its_status() -> None:
    event = b'data: {"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}'
    late = late_status(event + b"\n\ndata: [DONE]\n\n")
    assert late is not None
    status, body = late
    error = refusal(status, body, route=Route.CHAT, model="m", retry_after=None)
    assert isinstance(error, WorkerRefused)
    assert (error.status, error.message) == (400, "no")


@pytest.mark.parametrize(
    "begun",
    [
        b'data: {"id":"x","choices":[]}\n\n',
        b'data: {"error": 7}\n\n',
        b'data: {"error":{"code":"x"}}\n\n',
        b": comment\n\n",
        b"data: {",
    ],
)
def test_any_other_beginning_is_relayed(begun: bytes) -> None:
    assert late_status(begun) is None
