"""Which versions of vLLM an operator is warned of."""

from __future__ import annotations

import pytest

from app.workers.versions import REVIEWED, doubt_about, parse_version


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.32.0", (0, 32, 0)),
        ("0.33.1.dev3+g1a2b3c.cpu", (0, 33, 1)),
        ("1.0", (1, 0, 0)),
        ("0.31.2rc1", (0, 31, 2)),
        ("dev", None),
        ("", None),
        (None, None),
        (32, None),
        ("9" * 5000, None),
    ],
)
def test_reading(text: object, version: tuple[int, int, int] | None) -> None:
    assert parse_version(text) == version


def test_only_what_is_older_is_doubted() -> None:
    assert doubt_about("0.31.9+cpu") == "vLLM 0.31.9 is older than 0.32.0 and lacks its security fixes"
    assert [doubt_about(text) for text in (".".join(map(str, REVIEWED)), "0.33.0", "1.0", "unknown", None)] == [
        None
    ] * 5
