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

# These hold objects whose keys a client invents: schemas, and one entry for each token.
OPEN_FIELDS = frozenset({"tools", "functions", "response_format", "structured_outputs", "text", "logit_bias"})

_decode = msgspec.json.Decoder().decode
_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_object(body: bytes) -> tuple[dict[str, msgspec.Raw], dict[str, Any]]:
    """The top-level fields of the object in `body`: as the client's own bytes, and decoded.

    Raises InvalidJson for what is no JSON, InvalidValue for what is JSON and yet refused. Where a nested object has a
    key twice the last one counts, as it does in Python's decoder, which the worker uses.
    """
    if len(body) > COUNTED_FROM_BYTES:
        _check_counts(body)
    try:
        raw = _decode_raw(body)
        values: dict[str, Any] = _decode(body)
    except msgspec.ValidationError as error:
        raise _explained(body) or InvalidValue(_refused_value(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _explained(body) or InvalidJson(f"We could not parse the JSON body of your request: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    _check_duplicates(body, raw)
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


def _check_duplicates(body: bytes, raw: dict[str, msgspec.Raw]) -> None:
    """Refuse a key that is twice at the top level.

    The two usual ways to write JSON, without spaces and as Python does, are known to have none by their length and by
    writing the fields once more; any other way is counted, at some 2 ms for a megabyte.
    """
    compact = 1 + sum([len(key) + len(value) for key, value in raw.items()]) + 4 * len(raw)
    shortest_field = 5
    spaces = len(body) - compact
    if spaces < shortest_field or (spaces == 2 * len(raw) - 1 and body == _as_python_writes(raw)):
        return
    if _top_level_keys(_structure(body)) != len(raw):
        raise InvalidValue("The request body has a key twice.")


def _as_python_writes(raw: dict[str, msgspec.Raw]) -> bytes:
    return b"{%b}" % b", ".join([b'"%b": %b' % (key.encode(), value) for key, value in raw.items()])


_INNERMOST = re.compile(rb"[\[{][^\[\]{}]*[\]}]")


def _top_level_keys(structure: bytes) -> int:
    inside = structure.strip()[1:-1]
    while b"[" in inside or b"{" in inside:
        inside = _INNERMOST.sub(b"", inside)
    return inside.count(b":")


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
