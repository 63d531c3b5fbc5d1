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
