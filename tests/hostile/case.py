"""One bad input: what is sent, and what must come back. The tables of this directory are made of these."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
EMBEDDINGS = "/v1/embeddings"
SCORE = "/v1/score"
RERANK = "/v1/rerank"

HOST = b"host: x\r\n"
JSON = b"content-type: application/json\r\n"
GOOD = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'


@dataclass(frozen=True, slots=True)
class Case:
    """`row` of the requirements and `what` name it; `sent` is written to a fresh connection as it is.

    `statuses` are those of all answers until the server closes, in order; `code` is the error code of the last one,
    empty for a good answer; `param` is checked where it is not None.
    """

    row: str
    what: str
    sent: bytes = field(repr=False)
    statuses: tuple[int, ...]
    code: str = ""
    param: str | None = None

    @property
    def id(self) -> str:
        return f"{self.row}-{self.what}"

    @property
    def expected(self) -> str:
        return " then ".join(map(str, self.statuses)) + (f" `{self.code}`" if self.code else "")


def post(body: bytes, headers: bytes = JSON, path: str = CHAT) -> bytes:
    """A whole POST, after which the server is asked to close."""
    head = b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % (path.encode(), HOST, headers, len(body)) + body


def asking(fields: dict[str, Any], path: str = CHAT) -> bytes:
    """A POST of a good request with `fields` on top; None leaves a field out."""
    base: dict[str, Any] = {"model": "m"}
    match path:
        case "/v1/chat/completions" | "/v1/messages":
            base["messages"] = [{"role": "user", "content": "hi"}]
        case "/v1/completions":
            base["prompt"] = "hi"
        case _:
            base["input"] = "hi"
    if path == MESSAGES:
        base["max_tokens"] = 5
    return post(json.dumps({**base, **fields}).encode(), path=path)
