"""A client light enough to measure with: raw HTTP/1.1 exchanges over keep-alive connections."""

import asyncio
import json
import re
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import httptools

CHAT_PATH = "/v1/chat/completions"
KEY = "sk-sluice-" + "loadtest" * 4
"""What every request shows; only targets that ask for keys look at it."""
REFUSAL_KEPT = 1024
"""Bytes kept of an answer whose status is not 200."""


@dataclass(frozen=True)
class Address:
    """Where something listens; loopback only."""

    port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class ChatRequest:
    """One kind of chat request. `prompt_bytes` is the size of the user's message."""

    prompt_bytes: int
    tokens: int
    stream: bool
    model: str = "m"

    def encode(self, address: Address) -> bytes:
        """The whole request as it goes on the wire."""
        prompt = ("word " * (self.prompt_bytes // 5 + 1))[: self.prompt_bytes]
        messages = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": prompt}]
        body: dict[str, object] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.tokens,
            "temperature": 0,
        }
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body).encode()
        host = f"{address.host}:{address.port}"
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        head += f"authorization: Bearer {KEY}\r\ncontent-length: {len(content)}\r\n\r\n"
        return head.encode() + content


class StampScanner:
    """Finds the worker's stamps (`"tok <nanoseconds>"`) in a body that arrives cut at any byte."""

    _STAMP = re.compile(rb'"tok (\d+)"')
    _LONGEST = len(b'"tok ') + 20  # 20 digits hold any 64-bit number

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, piece: bytes) -> list[int]:
        """The stamps completed by this piece, in order."""
        data = self._tail + piece
        stamps, end = [], 0
        for match in self._STAMP.finditer(data):
            stamps.append(int(match[1]))
            end = match.end()
        self._tail = data[max(end, len(data) - self._LONGEST) :]
        return stamps


class ContentScanner:
    """Finds the content chunks of a real vLLM's stream, which carry no stamps: each is due when it is seen."""

    _CONTENT = re.compile(rb'"delta":\{"content":"[^"]')
    _LONGEST = len(b'"delta":{"content":"')

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, piece: bytes) -> list[int]:
        """The time now, once for every content chunk that began in this piece."""
        data = self._tail + piece
        count, end = 0, 0
        for match in self._CONTENT.finditer(data):
            count, end = count + 1, match.end()
        self._tail = data[max(end, len(data) - self._LONGEST) :]
        return [time.monotonic_ns()] * count


class Scanner(Protocol):
    """Finds the content chunks of one answer."""

    def feed(self, piece: bytes) -> list[int]:
        """When each content chunk that this piece completes was due."""


class Load(Protocol):
    """What drives connections and hears what happens on them. Times are CLOCK_MONOTONIC nanoseconds."""

    def on_token(self, connection: "Connection", due_ns: int, now_ns: int) -> None:
        """A content chunk arrived that the worker had due at `due_ns`."""

    def on_answer(self, connection: "Connection", status: int, now_ns: int) -> None:
        """The answer is complete; the connection is free again if `connection.reusable`."""

    def on_lost(self, connection: "Connection") -> None:
        """The connection closed, with an exchange under way if `connection.busy`."""


class Connection(asyncio.Protocol):
    """One connection that carries one exchange at a time."""

    def __init__(self, load: Load, scanner: type[Scanner] = StampScanner) -> None:
        self._load = load
        self._new_scanner = scanner
        self.busy = False
        self.reusable = True
        self.sent_ns = 0
        """When the current exchange was due to be sent; latencies count from here."""
        self.tokens = 0
        """Content chunks of the current exchange so far."""
        self.headers: dict[bytes, bytes] = {}
        """Of the current answer, names in lower case."""
        self.refusal = b""
        """The beginning of an answer that is none."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports share no base class with asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpResponseParser(self)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes, due_ns: int) -> None:
        """Start an exchange that counts from `due_ns`."""
        self.busy, self.sent_ns, self.tokens = True, due_ns, 0
        self.headers, self.refusal = {}, b""
        self._scanner = self._new_scanner()
        # On a connection that is closing, `on_lost` follows and tells the load that this exchange is lost.
        if not self._transport.is_closing():
            self._transport.write(request)

    def abort(self) -> None:
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._load.on_lost(self)

    def data_received(self, data: bytes) -> None:
        self._now_ns = time.monotonic_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self.reusable = self._parser.should_keep_alive()

    def on_body(self, piece: bytes) -> None:
        if self._status != 200:
            self.refusal += piece[: REFUSAL_KEPT - len(self.refusal)]
        for due_ns in self._scanner.feed(piece):
            self.tokens += 1
            self._load.on_token(self, due_ns, self._now_ns)

    def on_message_complete(self) -> None:
        if self._status >= 200:
            self.busy = False
            self._load.on_answer(self, self._status, self._now_ns)


async def connect(load: Load, address: Address, scanner: type[Scanner] = StampScanner) -> Connection:
    """Open one connection; `scanner` finds the content chunks of its answers.

    Raises:
        OSError: refused, or not accepted within 5 s.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        _, connection = await loop.create_connection(partial(Connection, load, scanner), address.host, address.port)
    return connection
