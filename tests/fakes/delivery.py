"""Answers put on the wire, broken where a fault says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from itertools import pairwise
from typing import Any

from tests.fakes.faults import Faults
from tests.fakes.server import JSON, Exchange, Header

SSE = "text/event-stream; charset=utf-8"
DONE = b"[DONE]"
SURPLUS = 16
HUGE = 2 * 1024 * 1024
SETTLED_S = 0.2
Hang = Callable[[], Awaitable[None]]


class Cut(Exception):
    """The answer has ended, by a fault, before it was whole."""


def dump(payload: Any) -> bytes:
    """JSON as vLLM writes it: compact, not escaped."""
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


ENGINE_ERROR = {
    "error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500},
}


class EventStream:
    """Server-sent events on a chunked answer. `faults` decide about the place of a break and the way of writing."""

    def __init__(self, exchange: Exchange, faults: Faults, hang: Hang, headers: list[Header]) -> None:
        self._exchange = exchange
        self._faults = faults
        self._hang = hang
        self._headers = headers
        self._opened = False
        self._sent = 0
        self._last = b""
        # With a false content-length the whole body must be known before the headers.
        self._held: list[bytes] | None = [] if "short_cl" in faults or "long_cl" in faults else None

    async def open(self) -> None:
        """Send status and headers, once."""
        if self._held is None and not self._opened:
            await self._exchange.open_stream(SSE, self._headers)
        self._opened = True

    async def fail(self, error: Mapping[str, Any]) -> None:
        """End the stream as vLLM does when the engine fails: an error event, `[DONE]`, an orderly end."""
        # This one event is written by json.dumps: spaces, escaped.
        await self._write(self._frame(json.dumps(error).encode(), None))
        if "late_event_after_error" in self._faults:
            await self._write(self._frame(self._last, None))
        if "no_done" not in self._faults:
            await self._write(self._frame(DONE, None))
        await self._exchange.end()

    async def send(self, payload: bytes, name: str | None = None) -> None:
        """Send one event. Raises Cut when the fault has struck."""
        await self._strike(at_end=False)
        self._last = payload
        await self._write(self._frame(payload, name))
        self._sent += 1

    async def finish(self, *, done: bool) -> None:
        """End the stream, with `[DONE]` where the protocol has it. Raises Cut when the fault strikes here."""
        await self._strike(at_end=True)
        if done and "no_done" not in self._faults:
            await self._write(self._frame(DONE, None))
        if "late_event_after_done" in self._faults:
            await self._write(self._frame(self._last, None))
        if self._held is not None:
            await self._send_held(b"".join(self._held))
        if "hang_at_end" in self._faults:
            await self._hang()
        await self._exchange.end()

    async def _strike(self, *, at_end: bool) -> None:
        """Let the fault strike once its number of events is out, at the latest where the stream would end."""
        name = self._faults.cut()
        if name is None:
            return
        place = 2 if name == "huge_event" else int(self._faults.number(name, 2))
        if self._sent != place and not (at_end and self._sent < place):
            return
        await getattr(self, f"_{name}")()

    async def _die_after(self) -> None:
        self._exchange.close()
        raise Cut

    async def _reset_after(self) -> None:
        if self._sent:  # a reset takes along what has not been read yet: as a rule, this has
            await asyncio.sleep(SETTLED_S)
        self._exchange.reset()
        raise Cut

    async def _hang_after(self) -> None:
        await self._hang()

    async def _bad_chunk(self) -> None:
        await self._exchange.raw(b"zz\r\nnot a chunk\r\n")
        self._exchange.close()
        raise Cut

    async def _half_event(self) -> None:
        frame = self._frame(self._last or b"{}", None)
        await self._write(frame[: len(frame) // 2])
        await self._exchange.end()
        raise Cut

    async def _error_event(self) -> None:
        await self.fail(ENGINE_ERROR)
        raise Cut

    async def _huge_event(self) -> None:
        size = int(self._faults.number("huge_event", HUGE))
        await self._write(self._frame(dump({"object": "chat.completion.chunk", "choices": [], "x": "x" * size}), None))

    def _frame(self, payload: bytes, name: str | None) -> bytes:
        lines = [b"event: " + name.encode()] if name else []
        if "sse_multiline" in self._faults and payload != DONE:
            text = json.dumps(json.loads(payload), ensure_ascii=False, indent=1).encode()
            lines += [b"data: " + line for line in text.split(b"\n")]
        else:
            lines.append(b"data: " + payload)
        if "sse_comments" in self._faults:
            lines = [b": before", b":", *lines, b": after"]
        ending = b"\r\n" if "sse_crlf" in self._faults else b"\r" if "sse_cr" in self._faults else b"\n"
        return ending.join(lines) + ending + ending

    async def _write(self, frame: bytes) -> None:
        if self._held is not None:
            self._held.append(frame)
        else:
            await write_chunks(self._exchange, frame, self._faults)

    async def _send_held(self, body: bytes) -> None:
        await send_misdeclared(self._exchange, 200, body, SSE, self._headers, self._faults)


async def write_chunks(exchange: Exchange, data: bytes, faults: Faults) -> None:
    """Write data as one HTTP chunk, or cut up as the fault says."""
    if "one_byte_chunks" in faults:
        await exchange.raw(b"".join(b"1\r\n%c\r\n" % byte for byte in data))
        return
    if "split_utf8" not in faults:
        await exchange.chunk(data)
        return
    # Every continuation byte begins a new chunk, so each multi-byte character is torn apart.
    cuts = [0, *(at for at, byte in enumerate(data) if byte & 0xC0 == 0x80), len(data)]
    for begin, end in pairwise(cuts):
        await exchange.chunk(data[begin:end])
        await asyncio.sleep(0)


async def send_misdeclared(
    exchange: Exchange, status: int, body: bytes, kind: str, headers: list[Header], faults: Faults
) -> None:
    """Send a body under a content-length that is too small (short_cl) or too large (long_cl). Raises Cut."""
    length = len(body) - min(SURPLUS, len(body)) if "short_cl" in faults else len(body) + SURPLUS
    head = exchange.head(status, [("content-length", str(length)), ("content-type", kind), *headers])
    await exchange.raw(head + body)
    if "long_cl" in faults:
        exchange.close()
    raise Cut


async def send_body(
    exchange: Exchange, status: int, body: bytes, headers: list[Header], faults: Faults, hang: Hang
) -> None:
    """Send a plain JSON answer, broken as the fault says. Raises Cut when it has not been sent whole."""
    name = faults.cut()
    if "short_cl" in faults or "long_cl" in faults:
        await send_misdeclared(exchange, status, body, JSON, headers, faults)
    elif "one_byte_chunks" in faults or "split_utf8" in faults or name == "bad_chunk":
        await _send_chunked(exchange, body, headers, faults)
    elif name in ("die_after", "reset_after", "hang_after"):
        await _send_part(exchange, status, body, headers, faults, hang)
    elif name == "half_event":
        await exchange.answer(status, body[: len(body) // 2], JSON, headers)
    elif name == "huge_event":
        padding = b',"x":"' + b"x" * int(faults.number(name, HUGE)) + b'"}'
        await exchange.answer(status, body[:-1] + padding, JSON, headers)
    elif name == "error_event":
        await exchange.answer(500, dump(ENGINE_ERROR), JSON, headers)
    else:
        await exchange.answer(status, body, JSON, headers)


async def _send_chunked(exchange: Exchange, body: bytes, headers: list[Header], faults: Faults) -> None:
    await exchange.open_stream(JSON, headers)
    if "bad_chunk" in faults:
        await exchange.chunk(body[: len(body) // 2])
        await exchange.raw(b"zz\r\nnot a chunk\r\n")
        exchange.close()
        raise Cut
    await write_chunks(exchange, body, faults)
    await exchange.end()


async def _send_part(
    exchange: Exchange, status: int, body: bytes, headers: list[Header], faults: Faults, hang: Hang
) -> None:
    """Send the honest headers and the first n bytes, then die, reset or hang."""
    name = faults.cut() or ""
    part = min(int(faults.number(name, len(body) // 2)), len(body) - 1)
    await exchange.raw(
        exchange.head(status, [("content-length", str(len(body))), ("content-type", JSON), *headers]) + body[:part]
    )
    if name == "hang_after":
        await hang()
        await exchange.raw(body[part:])
        return
    if name == "die_after":
        exchange.close()
    else:
        exchange.reset()
    raise Cut
