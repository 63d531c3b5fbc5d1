"""Requests for the fake model, and the stamps that two equal answers may differ in."""

from __future__ import annotations

import re
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"

_STAMPS = re.compile(rb'("created(?:_at)?":\s*)\d+')


def chat(content: str = "one two three", *, model: str = "m", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


def unstamped(answer: bytes) -> bytes:
    """An answer without the second it was made in."""
    return _STAMPS.sub(rb"\g<1>0", answer)


def renamed(answer: bytes, request_id: str) -> bytes:
    """An answer to the request that the worker knew as `request_id`, as if its id were `same`: of 32 digits none is
    found by chance."""
    return answer.replace(request_id.encode(), b"same") if request_id else answer


def minted_id(head: str) -> str:
    """The id that the gateway gave a request whose answer begins with `head`; empty for a worker's own answer."""
    lines = (line.partition(": ") for line in head.split("\r\n"))
    return next((value for name, _, value in lines if name == "x-sluice-request-id"), "")
