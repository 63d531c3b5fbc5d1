"""Bodies that are no JSON, or JSON that two decoders could read differently."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

from tests.hostile.case import GOOD, HOST, JSON, Case, asking, post

BROKEN, VALUE, LARGE, MEDIA = "invalid_json", "invalid_value", "request_too_large", "unsupported_media_type"


def _with(text: bytes) -> bytes:
    """A good body with `text` as one more field."""
    return post(GOOD[:-1] + b"," + text + b"}")


def _documents() -> Iterator[Case]:
    yield Case("B28", "empty body", post(b""), (400,), BROKEN)
    for body in (b"null", b"[]", b'"x"', b"1", b"true"):
        yield Case("B28", body.decode(), post(body), (400,), VALUE)
    for what, body in (
        ("truncated", GOOD[:-1]),
        ("trailing garbage", GOOD + b"x"),
        ("two documents", GOOD + GOOD),
        ("trailing comma", GOOD[:-1] + b",}"),
        ("comment", b"/**/" + GOOD),
        ("single quotes", GOOD.replace(b'"', b"'")),
    ):
        yield Case("B29", what, post(body), (400,), BROKEN)
    for kind in (b"", b"content-type: text/plain\r\n", b"content-type: application/x-www-form-urlencoded\r\n"):
        what = kind.decode().strip() or "no content-type"
        yield Case("B30", what, post(GOOD, kind), (415,), MEDIA)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"):
        yield Case("B31", encoding, post(GOOD.decode().encode(encoding)), (400,), BROKEN)
    yield Case("B32", "byte order mark", post(b"\xef\xbb\xbf" + GOOD), (400,), BROKEN)
    for what, text in (
        ("0xff", b"\xff"),
        ("overlong", b"\xc0\xaf"),
        ("surrogate", b"\xed\xa0\x80"),
        ("cut", b"\xe2\x82"),
    ):
        yield Case("B33", f"UTF-8: {what} in a message", post(GOOD.replace(b"hi", text)), (400,), BROKEN)
        yield Case("B33", f"UTF-8: {what} in an unknown field", _with(b'"x":"%b"' % text), (400,), BROKEN)


def _texts() -> Iterator[Case]:
    half = b"\\ud800"
    yield Case("B34", "half a surrogate in the model", post(b'{"model":"\\ud800"}'), (400,), VALUE, "model")
    sent = post(GOOD.replace(b"hi", half + b" hi"))
    yield Case("B34", "half a surrogate in a message", sent, (400,), VALUE, "messages[0].content")
    yield Case("B34", "second half alone", _with(b'"x":"\\udc00"'), (400,), VALUE, "x")
    yield Case("B34", "half a surrogate in a key", _with(b'"x":{"%b":1}' % half), (400,), VALUE, "x")
    yield Case("B35", "NUL in the model", asking({"model": "m\0"}), (400,), VALUE, "model")
    yield Case("B35", "line end in the user", asking({"user": "a\nb"}), (400,), VALUE, "user")
    yield Case("B35", "escape in a metadata key", asking({"metadata": {"\x1b[0m": "x"}}), (400,), VALUE, "metadata")
    controls = asking({"messages": [{"role": "user", "content": "\0\x1b[31m\r\n"}]})
    yield Case("B35", "control characters in a message", controls, (200,))


def _numbers() -> Iterator[Case]:
    for text in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"):
        yield Case(
            "B36", f"temperature {text.decode()}", _with(b'"temperature":%b' % text), (400,), VALUE, "temperature"
        )
        yield Case("B36", f"{text.decode()} inside an unknown field", _with(b'"x":[%b]' % text), (400,), VALUE, "x[0]")
    yield Case("B37", "integer of 5,000 digits", _with(b'"seed":' + b"1" * 5000), (400,), VALUE)
    yield Case("B37", "1e400 as an integer", _with(b'"max_tokens":1' + b"0" * 400), (400,), VALUE, "max_tokens")
    for name, value in (
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("max_tokens", 1.0),
        ("temperature", "0.5"),
        ("temperature", True),
        ("n", "1"),
        ("n", 1.0),
        ("stream", "yes"),
        ("stream", 1),
        ("logprobs", 1),
        ("stop", 7),
        ("seed", "1"),
        ("model", 1),
        ("messages", {}),
    ):
        yield Case("B38", f"{name}: {json.dumps(value)}", asking({name: value}), (400,), VALUE, name)


def _sizes() -> Iterator[Case]:
    for text in (b'"model":"m"', b'"mod\\u0065l":"m"', b'"model" : "other"', b'"messages":[]'):
        yield Case("B39", f"again {text.decode()}", _with(text), (400,), VALUE)
    spaced = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "aa":1234, "aa":1}'
    yield Case("B39", "again, as long as Python would write it", post(spaced), (400,), VALUE)
    yield Case("B39", "again, indented", post(GOOD.replace(b",", b",\n  ")[:-1] + b',\n "model": 1}'), (400,), VALUE)
    for depth in (65, 900, 100_000):
        nested = b'"x":' + b"[" * depth + b"]" * depth
        yield Case("B40", f"{depth} deep", _with(nested), (400,), BROKEN)
    yield Case("B40", "63 deep", _with(b'"x":' + b"[" * 63 + b"]" * 63), (200,))
    mixed = b'"x":' + b'{"a":[' * 40 + b"]}" * 40
    yield Case("B40", "80 deep, objects and lists", _with(mixed), (400,), BROKEN)
    tiny = b'{"model":"m","messages":[' + b",".join([b"{}"] * 1_000_000) + b"]}"
    yield Case("B41", "1,000,000 messages", post(tiny), (400,), VALUE)
    many = asking({"messages": [{"role": "user", "content": "x"}] * 2049})
    yield Case("B41", "2,049 messages", many, (400,), VALUE, "messages")
    keys = b",".join(b'"%d":1' % at for at in range(600_000))
    yield Case("B41", "600,000 keys", post(b"{" + keys + b"}"), (400,), VALUE)
    yield Case("B41", "257 keys in an object", asking({"x": {str(at): 1 for at in range(257)}}), (400,), VALUE, "x")


def _transport() -> Iterator[Case]:
    limit = 8 * 1024 * 1024
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + JSON
    yield Case("B42", "declared too large", head + b"content-length: %d\r\n\r\n" % (limit + 1), (413,), LARGE)
    piece = b"100000\r\n%b\r\n" % (b" " * 0x100000)
    yield Case("B42", "grows too large", head + b"transfer-encoding: chunked\r\n\r\n" + piece * 9, (413,), LARGE)
    for coding in (b"gzip", b"deflate", b"br", b"zstd"):
        headers = JSON + b"content-encoding: %b\r\n" % coding
        yield Case("B43", f"content-encoding: {coding.decode()}", post(b"\x1f\x8b", headers), (415,), MEDIA)
    bomb = gzip.compress(b" " * 4_000_000)
    yield Case("B44", "gzip bomb", post(bomb, JSON + b"content-encoding: gzip\r\n"), (415,), MEDIA)
    yield Case("B45", "unknown field", asking({"sampling_of_tomorrow": {"x": [1]}}), (200,))


BODIES = [*_documents(), *_texts(), *_numbers(), *_sizes(), *_transport()]
