"""Constraints on generation that a client asks for: JSON schemas, regular expressions, grammars. Pure.

The engine compiles each of them, in the process that serves everyone. What compiles for ever, or into a machine of
absurd size, is refused before it gets there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from app.errors import InvalidValue, UnsupportedParameter
from app.settings import Structured

COUNT_MAX = 65_536
CHOICES = 1000
ALTERNATIVES = 10_000

_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LISTED = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_SINGLE = frozenset(
    {
        "items",
        "additionalProperties",
        "additionalItems",
        "unevaluatedProperties",
        "unevaluatedItems",
        "propertyNames",
        "contains",
        "not",
        "if",
        "then",
        "else",
    }
)
_COUNTS = frozenset(
    {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains", "maxContains"}
)
# fmt: off
_PLAIN = frozenset({
    "$schema", "$id", "$ref", "$anchor", "$comment", "$vocabulary", "type", "enum", "const", "multipleOf",
    "maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum", "pattern", "required", "dependentRequired",
    "dependencies", "format", "title", "description", "default", "examples", "example", "deprecated",
    "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "uniqueItems", "nullable",
    "discriminator", "strict", "propertyOrdering",
})
# fmt: on
KEYWORDS = _NAMED | _LISTED | _SINGLE | _COUNTS | _PLAIN

_HOLDERS = ("text", "output_config")
FIELDS = frozenset({"response_format", "structured_outputs", "tools", *_HOLDERS})
"""The fields of a request that `check_requested` looks at."""
_OUTPUT_FIELDS = frozenset({"json", "choice", "json_object", "disable_any_whitespace", "disable_additional_properties"})
_REPEATED = re.compile(r"[*+]|\{\d*,?\d*\}")
_WIDE_RANGE = re.compile(r"\{\d*,?(\d{5,})\}|\{(\d{5,}),?\d*\}")


def check_requested(values: Mapping[str, Any], limits: Structured) -> None:
    """Refuse what a request asks of the structure of its answer. Raises InvalidValue or UnsupportedParameter."""
    _check_format(values.get("response_format"), "response_format", limits)
    for name in _HOLDERS:
        holder = values.get(name)
        if type(holder) is dict:
            _check_format(holder.get("format"), f"{name}.format", limits)
    outputs = values.get("structured_outputs")
    if type(outputs) is dict:
        _check_outputs(outputs, limits)
    tools = values.get("tools")
    for at, tool in enumerate(tools if type(tools) is list else ()):
        if type(tool) is dict:
            function = tool["function"] if type(tool.get("function")) is dict else tool
            where = f"tools[{at}]" if function is tool else f"tools[{at}].function"
            for name in ("parameters", "input_schema"):
                if type(function.get(name)) is dict:
                    check_schema(function[name], f"{where}.{name}", limits, only_known=False)


def _check_format(wanted: Any, where: str, limits: Structured) -> None:
    if type(wanted) is not dict:
        return
    if wanted.get("type") == "structural_tag" and not limits.grammar:
        raise _not_enabled(f"{where}.type")
    # Either may hold it, by the route; whichever the worker does not read must not hide the other.
    for holder, path in ((wanted, where), (wanted.get("json_schema"), f"{where}.json_schema")):
        if type(holder) is dict and type(holder.get("schema")) is dict:
            check_schema(holder["schema"], f"{path}.schema", limits)


def _check_outputs(outputs: Mapping[str, Any], limits: Structured) -> None:
    for name, value in outputs.items():
        where = f"structured_outputs.{name}"
        if value is None or name in _OUTPUT_FIELDS:
            continue
        if name == "regex" and limits.regex:
            check_regex(value, where, limits)
        elif name not in ("grammar", "structural_tag") or not limits.grammar:
            raise _not_enabled(where)
    choice = outputs.get("choice")
    if choice is not None and (type(choice) is not list or len(choice) > CHOICES):
        raise InvalidValue(f"At most {CHOICES} choices are expected.", param="structured_outputs.choice")
    schema = outputs.get("json")
    if type(schema) is str:
        schema = _parsed(schema)
    if type(schema) is dict:
        check_schema(schema, "structured_outputs.json", limits)


def _parsed(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidValue("It is not JSON.", param="structured_outputs.json") from None


def _not_enabled(where: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{where!r} is not enabled here.", param=where)


def check_regex(pattern: Any, where: str, limits: Structured) -> None:
    """Refuse a pattern that is long, or repeats what itself repeats. Raises InvalidValue."""
    if type(pattern) is not str or len(pattern.encode("utf-8", "replace")) > limits.regex_bytes:
        raise InvalidValue(f"A regular expression of at most {limits.regex_bytes} bytes is expected.", param=where)
    if _repeats_repetition(pattern) or _WIDE_RANGE.search(pattern):
        raise InvalidValue("The regular expression repeats a repetition, or too often.", param=where)


def _repeats_repetition(pattern: str) -> bool:
    """Whether a group that holds `*`, `+` or `{…}` is itself repeated by one of them."""
    pattern = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    pattern = re.sub(r"\[\^?\]?[^\]]*\]", "x", pattern)
    holds = [False]
    for at, char in enumerate(pattern):
        if char == "(":
            holds.append(False)
        elif char == ")" and len(holds) > 1:
            inner = holds.pop()
            if inner and _REPEATED.match(pattern, at + 1):
                return True
            holds[-1] |= inner
        elif _REPEATED.match(pattern, at):
            holds[-1] = True
    return False


def check_schema(schema: dict[str, Any], where: str, limits: Structured, *, only_known: bool = True) -> None:
    """Refuse a JSON schema that is deep, large, refers to itself or elsewhere, counts to absurd numbers, or (unless
    `only_known` is off) has keywords that are not JSON Schema's. Raises InvalidValue.
    """
    walk = _SchemaWalk(schema, where, limits, only_known=only_known)
    walk.check()


class _SchemaWalk:
    """Visits each subschema once, with the reference graph's edges beside those of containment."""

    def __init__(self, root: dict[str, Any], where: str, limits: Structured, *, only_known: bool) -> None:
        self._root = root
        self._where = where
        self._limits = limits
        self._only_known = only_known
        self._nodes = 0

    def check(self) -> None:
        """Depth first, without recursion; `open_` are the schemas on the way down, meeting one again is a cycle."""
        done: set[int] = set()
        open_: set[int] = {id(self._root)}
        stack: list[tuple[Any, Iterator[tuple[Any, int]]]] = [(self._root, self._below(self._root, 1))]
        while stack:
            node, below = stack[-1]
            child, depth = next(below, (None, 0))
            if child is None:
                stack.pop()
                open_.discard(id(node))
                done.add(id(node))
            elif id(child) in open_:
                raise self._refused("refers to itself")
            elif id(child) not in done:
                open_.add(id(child))
                stack.append((child, self._below(child, depth)))

    def _refused(self, what: str) -> InvalidValue:
        return InvalidValue(f"The JSON schema {what}.", param=self._where)

    def _below(self, node: dict[str, Any], depth: int) -> Iterator[tuple[Any, int]]:
        """The subschemas of `node` with their depths, and the one it refers to; checks `node` itself first."""
        self._nodes += 1
        if self._nodes > self._limits.schema_nodes:
            raise self._refused(f"has more than {self._limits.schema_nodes} parts")
        if depth > self._limits.schema_depth:
            raise self._refused(f"is more than {self._limits.schema_depth} deep")
        for name, value in node.items():
            self._check_keyword(name, value)
            for child in self._children(name, value):
                yield child, depth + 1
        if "$ref" in node:
            yield self._target(node["$ref"]), depth

    def _children(self, name: str, value: Any) -> list[Any]:
        found: list[Any] = []
        if name in _NAMED and type(value) is dict:
            found = list(value.values())
        elif (name in _LISTED or name == "items") and type(value) is list:
            found = value
        elif name in _SINGLE:
            found = [value]
        return [child for child in found if type(child) is dict]

    def _check_keyword(self, name: str, value: Any) -> None:
        if self._only_known and name not in KEYWORDS and not name.startswith("x-"):
            raise self._refused(f"has the unknown keyword {name[:50]!r}")
        if name in _COUNTS and (type(value) is not int or not 0 <= value <= COUNT_MAX):
            raise self._refused(f"has a {name} that is not a number from 0 to {COUNT_MAX}")
        if name == "pattern":
            check_regex(value, self._where, self._limits)
        if name == "enum" and (type(value) is not list or len(value) > ALTERNATIVES):
            raise self._refused(f"has an enum of more than {ALTERNATIVES}")

    def _target(self, reference: Any) -> dict[str, Any]:
        if type(reference) is not str or not reference.startswith("#"):
            raise self._refused("refers to something outside of itself")
        node: Any = self._root
        for part in reference.lstrip("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            node = node.get(name) if type(node) is dict else None
        if type(node) is not dict:
            raise self._refused("refers to something that is not there")
        return node
