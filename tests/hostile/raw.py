"""Answers read from a socket until the server closes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.integration.gateway.wire import connected, dechunked


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error object, once it has OpenAI's shape."""
        assert self.headers["content-type"] == "application/json"
        assert len(self.headers["x-request-id"]) == 32
        told = json.loads(self.body)
        assert list(told) == ["error"]
        error: dict[str, Any] = told["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["type"] in ("invalid_request_error", "server_error")
        assert 0 < len(error["message"]) < 1000
        assert "Traceback" not in error["message"]
        return error


async def exchange(url: str, *parts: bytes) -> list[Answer]:
    """Send `parts` on one connection; every answer until the server closes. Raises TimeoutError when it does not."""
    async with connected(url) as wire:
        for part in parts:
            try:
                await wire.send(part)
            except ConnectionError:
                break
        return answers(await wire.rest())


def answers(data: bytes) -> list[Answer]:
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"an answer is cut: {head[:200]!r}"
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if "content-length" in headers:
            length = int(headers["content-length"])
            body, data = data[:length], data[length:]
        elif headers.get("transfer-encoding") == "chunked":
            (body, whole), data = dechunked(data), b""
            assert whole
        else:
            body, data = data, b""
        found.append(Answer(int(status.split()[1]), headers, body))
    return found
