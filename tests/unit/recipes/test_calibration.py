"""The text that recipes measure on."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import ConfigurationError
from app.recipes.calibration import LEAST_CHARS, read_calibration

PARAGRAPH = "All happy families are alike. " * 10


def test_the_default_text_is_the_same_each_time_and_long_enough_for_every_recipe() -> None:
    first, second = read_calibration(None), read_calibration(None)
    assert first == second
    assert sum(map(len, first.entries)) > 300_000


def test_plain_text_is_parted_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([PARAGRAPH] * 20))
    assert read_calibration(path).entries == (PARAGRAPH.strip(),) * 20


def test_a_line_of_jsonl_is_a_text_or_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "{PARAGRAPH * 20}"}}\n\n{{"messages": [{{"role": "user", "content": "Hi"}}]}}\n')
    assert read_calibration(path).entries == (PARAGRAPH * 20, [{"role": "user", "content": "Hi"}])


def test_another_text_has_another_digest(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).write_text((name + PARAGRAPH) * 20)
        digests.add(read_calibration(tmp_path / name).sha256)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "No such file"),
        ("bytes.txt", b"\xff" * LEAST_CHARS, "not UTF-8 text"),
        ("short.txt", b"Too short.", f"too short, it has 10 characters and {LEAST_CHARS} are needed"),
        ("bad.jsonl", b"x" * LEAST_CHARS, "line 1: an object with `text` or `messages`"),
        ("list.jsonl", b"[1]\n" * LEAST_CHARS, "line 1: an object with"),
    ],
)
def test_a_file_that_is_no_use_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_calibration(tmp_path / name)
