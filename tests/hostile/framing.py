"""Bytes that are not the HTTP/1.1 they should be."""

from __future__ import annotations

from collections.abc import Iterator

from tests.hostile.case import CHAT, GOOD, HOST, JSON, Case, post

MALFORMED = "malformed_request"
SMUGGLED = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"
TARGET = CHAT.encode()


def get(headers: bytes = HOST, target: bytes = b"/healthz", line_end: bytes = b"\r\n") -> bytes:
    return b"GET %b HTTP/1.1" % target + line_end + headers + b"connection: close" + line_end * 2


def framed(headers: bytes, body: bytes = GOOD) -> bytes:
    """A POST whose framing headers are the case."""
    return b"POST %b HTTP/1.1\r\n%b%b%b\r\n%b" % (TARGET, HOST, JSON, headers, body)


def chunked(body: bytes) -> bytes:
    return framed(b"transfer-encoding: chunked\r\nconnection: close\r\n", body)


ONE_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)


def _lengths() -> Iterator[Case]:
    size = len(GOOD)
    yield Case("B5", "content-length shorter than the body", framed(b"content-length: 2\r\n"), (400, 400), MALFORMED)
    for given in (b"-1", b"+%d" % size, b"%d, %d" % (size, size), b"0x10", b"9" * 30, b""):
        what = f"content-length {given[:12].decode() or 'empty'}"
        yield Case("B6", what, framed(b"content-length: %b\r\n" % given), (400,), MALFORMED)
    for other in (size, size + 1):
        headers = b"content-length: %d\r\ncontent-length: %d\r\n" % (size, other)
        what = f"two content-lengths, {'equal' if other == size else 'different'}"
        yield Case("B7", what, framed(headers), (400,), MALFORMED)
    both = b"content-length: %d\r\ntransfer-encoding: chunked\r\n" % len(ONE_CHUNK)
    yield Case("B8", "both framings, a request behind", framed(both, ONE_CHUNK + SMUGGLED), (400,), MALFORMED)
    for coding in (
        b"xchunked",
        b"chunked, gzip",
        b"gzip, chunked",
        b"identity",
        b"chunked\r\ntransfer-encoding: chunked",
    ):
        row = "B10" if coding.startswith(b"gzip") else "B9"
        what = "transfer-encoding " + coding.split(b"\r")[0].decode() + (" twice" if b"\r" in coding else "")
        yield Case(row, what, framed(b"transfer-encoding: %b\r\n" % coding, ONE_CHUNK), (400,), MALFORMED)
    old = b"POST %b HTTP/1.0\r\n%btransfer-encoding: chunked\r\n\r\n" % (TARGET, JSON)
    yield Case("B9", "chunks in HTTP/1.0", old + ONE_CHUNK, (400,), MALFORMED)


def _syntax() -> Iterator[Case]:
    for what, header in (
        ("space before the colon", b"x-a : b"),
        ("space in a name", b"x a: b"),
        ("NUL in a value", b"x-a: \x00"),
        ("bare CR in a value", b"x-a: b\rc: d"),
        ("no colon", b"nothing"),
    ):
        yield Case("B11", what, get(HOST + header + b"\r\n"), (400,), MALFORMED)
    yield Case("B12", "folded header", get(HOST + b"x-a: b\r\n c\r\n"), (400,), MALFORMED)
    yield Case("B13", "bare LF line ends", get(b"host: x\n", line_end=b"\n"), (400,), MALFORMED)
    yield Case("B13", "bare LF after one header", get(b"host: x\nx-a: b\r\n"), (400,), MALFORMED)


def _chunks() -> Iterator[Case]:
    for row, what, body in (
        ("B14", "chunk size not hex", b"zz\r\nab\r\n0\r\n\r\n"),
        ("B14", "chunk not ended by CRLF", b"2\r\n{}xx0\r\n\r\n"),
        ("B15", "chunk with LF only", b"2\n{}\n0\n\n"),
        ("B15", "chunk size 2^64", b"10000000000000000\r\n{}\r\n"),
        ("B16", "chunk extension of 100 KiB", b"2;x=%b\r\n{}\r\n0\r\n\r\n" % (b"a" * 102_400)),
        ("B16", "trailers of 100 KiB", b"2\r\n{}\r\n0\r\n%b\r\n" % (b"x: %b\r\n" % (b"a" * 1000) * 100)),
    ):
        yield Case(row, what, chunked(body), (400,), MALFORMED)
    spaces = b"1\r\n \r\n" * 100_000
    yield Case("B16", "100,000 chunks of one byte", chunked(spaces + ONE_CHUNK), (200,))


def _targets() -> Iterator[Case]:
    yield Case("B17", "no host", get(b""), (400,), MALFORMED)
    yield Case("B17", "two hosts", get(HOST + b"host: y\r\n"), (400,), MALFORMED)
    for odd in (b"a/b", b"a#b", b"a?b", b"a@b", b"a b", b"", b"a:b", b"[::1", b"a,b", b"\xe4"):
        name = odd.decode("latin-1") or "empty"
        yield Case("B17", f"host {name}", get(b"host: %b\r\n" % odd), (400,), MALFORMED)
    for target in (b"http://other/healthz", b"//other:80/healthz"[1:] + b" x", b"healthz", b"*"):
        yield Case("B18", f"target {target.decode()}", get(target=target), (400,), MALFORMED)
    for target in (b"/v1/../metrics", b"/v1/%2e%2e/metrics", b"//v1/models", b"/v1/models%00", b"/v1/models;x"):
        yield Case("B21", f"target {target.decode()}", get(target=target), (404,))
    yield Case("B20", "target of 9 KiB", get(target=b"/" + b"a" * 9000), (414,), "uri_too_long")
    yield Case("B20", "target of 1 MiB", get(target=b"/" + b"a" * 1_048_576), (414,), "uri_too_long")


def _headers() -> Iterator[Case]:
    large = "headers_too_large"
    for size in (70 * 1024, 1024 * 1024):
        yield Case("B19", f"a header of {size // 1024} KiB", get(HOST + b"x: %b\r\n" % (b"a" * size)), (431,), large)
    yield Case("B19", "headers of 40 KiB", get(HOST + b"x: %b\r\n" % (b"a" * 1000) * 40), (431,), large)
    for count in (101, 30_000):
        yield Case("B19", f"{count} headers", get(HOST + b"x:y\r\n" * count), (431,), large)
    yield Case("B25", "expect: pigs", get(HOST + b"expect: pigs\r\n"), (417,), "expectation_failed")


def _protocols() -> Iterator[Case]:
    for what, sent in (
        ("HTTP/9.9", b"GET /healthz HTTP/9.9\r\nhost: x\r\n\r\n"),
        ("HTTP/2.0 in a request line", b"GET /healthz HTTP/2.0\r\nhost: x\r\n\r\n"),
        ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256))),
        ("random bytes", bytes((value * 167 + 13) % 256 for value in range(1024))),
        ("HTTP/0.9", b"GET /healthz\r\n\r\n"),
    ):
        yield Case("B22", what, sent, (400,), MALFORMED)
    for method in ("BREW", "CONNECT", "TRACE", "PROPFIND"):
        line = method.encode() + b" /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
        if method == "CONNECT":
            line = b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n"
        yield Case("B23", f"method {method}", line, (405,), "method_not_allowed")
    upgrade = b"connection: upgrade\r\nupgrade: %b\r\n"
    for protocol in (b"websocket", b"h2c"):
        sent = framed(upgrade % protocol + b"content-length: %d\r\n" % len(GOOD))
        yield Case("B24", f"upgrade to {protocol.decode()} with a body", sent, (400,), MALFORMED)
        yield Case("B24", f"upgrade to {protocol.decode()}", get(HOST + upgrade % protocol), (200,))
    many = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 99 + get()
    yield Case("B26", "100 requests sent ahead", many, (200,) * 100)
    flood = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 1000
    yield Case("B26", "1,000 requests sent ahead", flood, (*(200,) * 129, 400), MALFORMED)
    behind = post(GOOD).replace(b"connection: close\r\n", b"") + b"\x00garbage"
    yield Case("B26", "garbage behind a request", behind, (200, 400), MALFORMED)
    old = b"POST %b HTTP/1.0\r\n%bcontent-length: %d\r\n\r\n%b" % (TARGET, JSON, len(GOOD), GOOD)
    yield Case("B27", "HTTP/1.0 without keep-alive", old, (200,))


FRAMING = [*_lengths(), *_syntax(), *_chunks(), *_targets(), *_headers(), *_protocols()]
