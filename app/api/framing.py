"""What an HTTP/1.1 request must look like before any route sees it. Pure: bytes and numbers in, GatewayError out.

RFC 9112 lets a server be lenient in places where two servers in a row then disagree about where a request ends, or
whom it is for. None of that leniency is wanted here: the parser (llhttp, strict) refuses most of it, this is the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.errors import (
    ExpectationFailed,
    GatewayError,
    HeadersTooLarge,
    MalformedRequest,
    MethodNotAllowed,
)
from app.settings import Limits

Header = tuple[bytes, bytes]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
ALLOWED = "GET, HEAD, POST"
VERSIONS = frozenset({"1.0", "1.1"})
CHUNK_OVERHEAD_BYTES = 1024
CHUNK_FRAME_BYTES = 32

_HOST = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_REQUEST_LINE = re.compile(rb"([A-Z][A-Z-]{0,31}) /[!-~]* HTTP/1\.[01]\r\n")
_FRAMING = frozenset({b"host", b"transfer-encoding", b"content-length", b"expect"})


def check_head(method: str, version: str, target: bytes, headers: Sequence[Header], limits: Limits) -> None:
    """Refuse a request for its head; header names are in lower case. Raises GatewayError."""
    if version not in VERSIONS:
        raise MalformedRequest("Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    if method not in METHODS:
        raise unknown_method(method)
    if not target.startswith(b"/"):
        raise MalformedRequest("The request target must be a path.")
    size = 0
    framing: dict[bytes, bytes] = {}
    for name, value in headers:
        size += len(name) + len(value) + 4
        if name in _FRAMING:
            if name in framing:
                raise MalformedRequest(f"The header {name.decode()} is there twice.")
            framing[name] = value
    if size > limits.header_bytes:
        raise HeadersTooLarge(f"The headers are larger than {limits.header_bytes} bytes.")
    _check_framing(version, framing)


def _check_framing(version: str, framing: dict[bytes, bytes]) -> None:
    host = framing.get(b"host")
    if host is None and version == "1.1":
        raise MalformedRequest("The header host is missing.")
    if host is not None and not _HOST.fullmatch(host):
        raise MalformedRequest("The header host is not a host.")
    encoding = framing.get(b"transfer-encoding")
    if encoding is not None and (encoding.lower() != b"chunked" or version == "1.0" or b"content-length" in framing):
        raise MalformedRequest("The only transfer-encoding is chunked, in HTTP/1.1, without a content-length.")
    length = framing.get(b"content-length")
    if length is not None and not _LENGTH.fullmatch(length):
        raise MalformedRequest("The content-length is not a length.")
    if framing.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise ExpectationFailed("The expectation cannot be met.")


def check_upgrade(headers: Sequence[Header]) -> None:
    """Refuse to ignore a request for another protocol where a body follows: the parser would not read it as one."""
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0):
            raise MalformedRequest("A request with a body cannot change the protocol.")


def unknown_method(method: str) -> GatewayError:
    return MethodNotAllowed(f"{method} is not allowed.", allow=ALLOWED)


def unknown_method_in(data: bytes) -> bool:
    """Whether `data` begins like a request of HTTP/1, so that its method is what the parser does not know."""
    line = _REQUEST_LINE.match(data)
    return line is not None and line[1].decode() not in METHODS


def check_chunk_overhead(overhead_bytes: int, chunks: int) -> None:
    """Refuse a chunked body that is mostly frame: chunk extensions and trailers mean nothing here.

    `overhead_bytes` are the bytes of the body so far that were not content. Raises MalformedRequest.
    """
    if overhead_bytes > CHUNK_OVERHEAD_BYTES + CHUNK_FRAME_BYTES * chunks:
        raise MalformedRequest("The chunks' extensions or trailers are too large.")


def body_time_s(received_bytes: int, limits: Limits) -> float:
    """How long a body may have taken so far, in seconds since its headers: the grace, and what its lowest rate gives
    it for the bytes that came, but never more than its whole time."""
    return min(limits.body_timeout_s, limits.body_grace_s + received_bytes / limits.body_bytes_per_s)
