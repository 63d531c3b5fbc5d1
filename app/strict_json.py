"""JSON as RFC 8259 has it, for bodies that a worker will read again with another decoder.

What two decoders could read differently, or only one of them survives, is refused: a key twice, a lone surrogate, a
number without end, depth without end. Pure, and linear in the size of the body: about 0.5 ms for a megabyte of text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from app.errors import InvalidJson, InvalidValue

DEPTH = 64
KEYS_PER_OBJECT = 256
CONTAINERS = 65_536
STRINGS = 131_072
ITEMS = 1_048_576
COUNTED_FROM_BYTES = 2 * 1024 * 1024
EXPLAINED_BYTES = 1024 * 1024
# Prompts of token ids: a megabyte of them would be 150,000 objects, of which nobody here asks more than their number.
TOKEN_FIELDS = frozenset({"prompt", "input", "tokens"})
TOKENS_FROM_BYTES = 4096
SHORTEST_FIELD_BYTES = 5

# These hold objects whose keys a client invents: schemas, and one entry for each token.
OPEN_FIELDS = frozenset({"tools", "functions", "response_format", "structured_outputs", "text", "logit_bias"})

_decode = msgspec.json.Decoder().decode
_decode_key = msgspec.json.Decoder(str).decode
_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_object(body: bytes) -> tuple[dict[str, msgspec.Raw], dict[str, Any]]:
    """The top-level fields of the object in `body`: as the client's own bytes, and decoded; see `TokenIds`.

    Raises InvalidJson for what is no JSON, InvalidValue for what is JSON and yet refused. Where a nested object has a
    key twice the last one counts, as it does in Python's decoder, which the worker uses.
    """
    if len(body) > COUNTED_FROM_BYTES:
        _check_counts(body)
    try:
        raw = _decode_raw(body)
        values = {name: _value(name, value) for name, value in raw.items()}
    except msgspec.ValidationError as error:
        raise _explained(body) or InvalidValue(_refused_value(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _explained(body) or InvalidJson(f"We could not parse the JSON body of your request: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    _check_duplicates(body, raw)
    if body.count(b"{") + body.count(b"[") > DEPTH or body.count(b",") >= KEYS_PER_OBJECT:
        _check_shape(values)
    return raw, values


def _refused_value(error: msgspec.ValidationError) -> str:
    if "out of range" in str(error):
        return "The request body has a number that is out of range."
    return "The request body is expected to be a JSON object."


def _too_deep() -> InvalidJson:
    return InvalidJson(f"The JSON body of your request is nested more than {DEPTH} deep.")


def _structure(body: bytes) -> bytes:
    """Valid JSON without its strings: brackets, commas, colons, numbers, literals."""
    return b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def _check_counts(body: bytes) -> None:
    """Refuse a large body for its number of parts before they become objects. Cheap counts that may be too high,
    because they look into strings, come first."""
    if body.count(b'"') > 2 * STRINGS:
        plain = body.replace(b"\\\\", b"")
        if plain.count(b'"') - plain.count(b'\\"') > 2 * STRINGS:
            raise InvalidValue(f"The request body has more than {STRINGS} strings.")
    containers = body.count(b"{") + body.count(b"[")
    if containers > CONTAINERS or body.count(b",") > ITEMS:
        structure = _structure(body)
        if structure.count(b"{") + structure.count(b"[") > CONTAINERS:
            raise InvalidValue(f"The request body has more than {CONTAINERS} objects and lists.")
        if structure.count(b",") > ITEMS:
            raise InvalidValue(f"The request body has more than {ITEMS} values.")


class TokenIds:
    """A long flat list of whole numbers, as a prompt of token ids is. They are known to be that, and never made."""


def _value(name: str, raw: msgspec.Raw) -> Any:
    is_token_ids = name in TOKEN_FIELDS and len(raw) > TOKENS_FROM_BYTES and _has_only_integers(bytes(raw))
    return TokenIds() if is_token_ids else _decode(raw)


def _has_only_integers(array: bytes) -> bool:
    """Whether `array`, valid JSON, is a flat list of whole numbers that are all in a float's range."""
    kinds = array.translate(_KINDS)
    return kinds[:1] == b"[" and kinds.find(b"[", 1) < 0 and b"x" not in kinds and _TOO_LONG not in kinds


_TOO_LONG = b"0" * 300
_KINDS = bytes(
    ord("0") if chr(byte) in "0123456789" else byte if chr(byte) in "[], \n\r\t" else ord("x") for byte in range(256)
)
_SEPARATOR = re.compile(rb'[\s{,]*"([^"\\]*+(?:\\.[^"\\]*+)*+)"\s*+:\s*+')
_END = re.compile(rb"\s*\}\s*")


def _check_duplicates(body: bytes, raw: dict[str, msgspec.Raw]) -> None:
    """Refuse a key that is twice at the top level.

    `raw` keeps only the last value of such a key. So without one, and only then, the values stand in the body one
    after another, each behind its own key, up to the end. Written without spaces, the body's length alone tells.
    """
    compact = 1 + sum([len(key) + len(value) for key, value in raw.items()]) + 4 * len(raw)
    if len(body) - compact < SHORTEST_FIELD_BYTES:
        return
    at = 0
    for key, value in raw.items():
        separator = _SEPARATOR.match(body, at)
        if separator is None or (separator[1] != key.encode() and _key(separator[1]) != key):
            break
        at = separator.end()
        if not body.startswith(value, at):
            break
        at += len(value)
    else:
        if not raw or _END.fullmatch(body, at):
            return
    raise InvalidValue("The request body has a key twice.")


def _key(text: bytes) -> str:
    return _decode_key(b'"%b"' % text) if b"\\" in text else text.decode()


def _check_shape(values: dict[str, Any]) -> None:
    """Bound depth everywhere, and the keys of each object outside of schemas."""
    _check_keys(values, None)
    for name, value in values.items():
        if type(value) is dict or type(value) is list:
            _check_levels(name, value)


def _check_levels(name: str, value: dict[str, Any] | list[Any]) -> None:
    level: list[Any] = [value]
    for _ in range(DEPTH - 1):
        if name not in OPEN_FIELDS:
            for node in level:
                if type(node) is dict:
                    _check_keys(node, name)
        level = [child for node in level for child in _containers(node)]
        if not level:
            return
    raise _too_deep()


def _containers(node: Any) -> Any:
    if type(node) is dict:
        return [child for child in node.values() if type(child) is dict or type(child) is list]
    kinds = set(map(type, node))
    if dict in kinds or list in kinds:
        return [child for child in node if type(child) is dict or type(child) is list]
    return ()


def _check_keys(node: dict[str, Any], name: str | None) -> None:
    if len(node) > KEYS_PER_OBJECT:
        raise InvalidValue(f"An object has more than {KEYS_PER_OBJECT} keys.", param=name)


def _explained(body: bytes) -> InvalidValue | None:
    """What a lenient decoder would have read in a body that was refused, if that is what was wrong with it."""
    if len(body) > EXPLAINED_BYTES:
        return None
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        return None
    for path, leaf in _leaves(value):
        if isinstance(leaf, str) and _SURROGATE.search(leaf):
            return InvalidValue("The text has half a surrogate pair.", param=path)
        if isinstance(leaf, float) and (leaf != leaf or leaf in (float("inf"), float("-inf"))):
            return InvalidValue("The number is not finite.", param=path)
    return None


def _leaves(value: Any) -> Iterator[tuple[str | None, Any]]:
    """Every scalar and every key below `value`, with the path of where it stands."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            for key, child in node.items():
                yield path or None, key
                stack.append((f"{path}.{key}" if path else key, child))
        elif isinstance(node, list):
            stack.extend((f"{path}[{at}]", child) for at, child in enumerate(node))
        else:
            yield path or None, node
