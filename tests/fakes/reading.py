"""Reading answers byte by byte, independently of any code under test."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event: its name (empty when it has none) and its data, lines joined by LF."""

    name: str
    data: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def events(stream: bytes) -> list[Event]:
    """All complete events of a stream, after the HTML standard: CR, LF or CRLF, comments, many data lines."""
    found: list[Event] = []
    name, data = "", list[str]()
    for line in re.split(r"\r\n|\n|\r", stream.decode()):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found.append(Event(name, "\n".join(data)))
            name, data = "", []
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return found


def chunks(body: bytes) -> list[bytes]:
    """The chunks of a whole chunked HTTP body. Raises ValueError when it is malformed or not ended."""
    found: list[bytes] = []
    while True:
        size_line, separator, rest = body.partition(b"\r\n")
        size = int(size_line, 16)
        if not separator or rest[size : size + 2] != b"\r\n":
            raise ValueError(f"cut chunk after {len(found)} chunks")
        if size == 0:
            return found
        found.append(rest[:size])
        body = rest[size + 2 :]


async def post_raw(url: str, path: str, body: dict[str, Any]) -> tuple[bytes, bytes]:
    """POST JSON on a socket of its own and read to the end: (head, body), both empty when nothing came.

    Raises ConnectionResetError when the peer resets.
    """
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(content), content))
        answer = await reader.read(-1)
    finally:
        writer.close()
    before, _, after = answer.partition(b"\r\n\r\n")
    return before, after
