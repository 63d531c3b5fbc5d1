"""The structure of an answer: keys in their order and types of values, without the values."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

# Maps from a token to its log probability: the keys are data.
BY_TOKEN = {"top_logprobs", "prompt_logprobs"}
# Null or not by what the model said.
BY_CHANCE = {"stop_reason"}


def structure(value: Any, key: str = "") -> Any:
    """Keys and types. A run of list items of one structure counts once, so the length of a text does not matter."""
    if key in BY_CHANCE:
        return "any"
    if isinstance(value, list):
        return runs(value, key)
    if not isinstance(value, dict):
        return type(value).__name__
    if key in BY_TOKEN and "token" not in value:
        return ["token", *runs(value.values())]
    return [(name, structure(part, name)) for name, part in value.items()]


def runs(values: Iterable[Any], key: str = "") -> list[Any]:
    """Structures of a sequence of values, each run of equal ones once."""
    return [kind for kind, _ in groupby(structure(value, key) for value in values)]
