"""What is refused of a body that is JSON all the same, against a slow and obvious reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import GatewayError, InvalidJson, InvalidValue
from app.strict_json import TOKENS_FROM_BYTES, TokenIds, read_object

KEYS = st.sampled_from(["a", "b", 'q"', "\\", "é", "", "a b", "{", "model"])
VALUES = st.recursive(
    st.none() | st.integers(-3, 300) | st.sampled_from(["", "a", '"a":1', "},{", "\\", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
SPACES = st.sampled_from(["", " ", "\n", "\t "])
WRITERS: list[Callable[[Any], str]] = [
    json.dumps,
    lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False),
    lambda value: json.dumps(value, indent=1),
]


@given(st.lists(st.tuples(KEYS, VALUES), max_size=4), SPACES, st.sampled_from(WRITERS), st.sampled_from(WRITERS))
def test_a_key_twice_is_found_however_it_is_written(
    pairs: list[tuple[str, Any]], space: str, write_key: Callable[[Any], str], write: Callable[[Any], str]
) -> None:
    fields = [f"{space}{write_key(key)}{space}:{space}{write(value)}{space}" for key, value in pairs]
    body = f"{space}{{{','.join(fields) or space}}}{space}".encode()
    if len({key for key, _ in pairs}) < len(pairs):
        with pytest.raises(InvalidValue, match="a key twice"):
            read_object(body)
    else:
        raw, values = read_object(body)
        assert values == dict(pairs) == {key: json.loads(bytes(value)) for key, value in raw.items()}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_long_list_of_token_ids_is_known_and_not_made(separators: tuple[str, str]) -> None:
    tokens = list(range(TOKENS_FROM_BYTES))
    body = json.dumps({"model": "m", "prompt": tokens, "stop_token_ids": tokens}, separators=separators).encode()
    raw, values = read_object(body)
    assert isinstance(values["prompt"], TokenIds)
    assert values["stop_token_ids"] == tokens
    assert json.loads(bytes(raw["prompt"])) == tokens


@pytest.mark.parametrize("odd", ["-1", "1.5", "1e3", '"1"', "null", "[1]", "true"])
def test_a_list_with_anything_else_in_it_is_made(odd: str) -> None:
    tokens = ",".join(["1"] * TOKENS_FROM_BYTES)
    _, values = read_object(f'{{"prompt":[{tokens},{odd}]}}'.encode())
    assert values["prompt"][-1] == json.loads(odd)


@pytest.mark.parametrize("odd", ["9" * 5000, "1e999", "01", "1 2", "", '"\\ud800"'])
def test_what_is_refused_in_a_short_list_is_refused_in_a_long_one(odd: str) -> None:
    for count in (1, TOKENS_FROM_BYTES):
        with pytest.raises((InvalidJson, InvalidValue)) as refused:
            read_object(f'{{"prompt":[{",".join(["1"] * count)},{odd}]}}'.encode())
        assert isinstance(refused.value, GatewayError)
