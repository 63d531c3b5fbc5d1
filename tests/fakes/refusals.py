"""The ways in which vLLM 0.32 refuses a request, as exceptions that carry the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

Body = Mapping[str, Any]


class Refusal(Exception):
    """An answer other than 200, as a JSON body."""

    def __init__(self, status: int, body: Body, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.headers = headers


def refusal(status: int, message: str, kind: str, param: str | None = None) -> Refusal:
    """A refusal with the error object of vLLM: message, type, param, integer code."""
    return Refusal(status, {"error": {"message": message, "type": kind, "param": param, "code": status}})


def bad_request(message: str, parameter: str | None = None, value: object = None) -> Refusal:
    """A parameter that the engine refuses; the parameter and its value follow the message in brackets."""
    facts = [f"parameter={parameter}"] if parameter else []
    facts += [f"value={value}"] if value is not None else []
    text = f"{message} ({', '.join(facts)})" if facts else message
    return refusal(HTTPStatus.BAD_REQUEST, text, "BadRequestError", parameter)


def detail(status: HTTPStatus, headers: tuple[tuple[str, str], ...] = ()) -> Refusal:
    """FastAPI's own shape, which vLLM keeps for unknown routes and wrong methods."""
    return Refusal(status, {"detail": status.phrase}, headers)


def invalid(kind: str, where: str, message: str, value: object, context: Body | None = None) -> Refusal:
    """A pydantic validation error in vLLM's wording."""
    error: dict[str, object] = {"type": kind, "loc": where, "msg": message, "input": _summary(value)}
    if context:
        error["ctx"] = dict(context)
    return invalid_many(where, [error])


def invalid_many(where: str | None, errors: Sequence[object]) -> Refusal:
    label = "error" if len(errors) == 1 else "errors"
    text = "\n".join([f"{len(errors)} validation {label}:", *(f"  {error}" for error in errors)])
    return refusal(HTTPStatus.BAD_REQUEST, text, HTTPStatus.BAD_REQUEST.phrase, where)


def missing(body: Body | None, *names: str) -> Refusal:
    """The refusal of a body that lacks required fields (one of several alternatives: all are named)."""
    places = [f"body.{name}" for name in names]
    facts = {"msg": "Field required", "input": _summary(body)}
    return invalid_many(places[0], [{"type": "missing", "loc": place, **facts} for place in places])


def _summary(value: object) -> str:
    if isinstance(value, str):
        return value[:200] + "...[truncated]" if len(value) > 200 else value
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    return str(value)
