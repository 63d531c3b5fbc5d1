"""Input in any pieces, ranges that cover it, and segments that come back as they were."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.batches.batch import Fault, Progress
from app.batches.lines import (
    HEAD_BYTES,
    Head,
    Inspection,
    Line,
    Record,
    Sound,
    answered,
    head_of,
    not_run,
    read_lines,
    records_of,
    segment,
)
from app.errors import UpstreamBadResponse
from app.settings import Batches

URL = "/v1/chat/completions"
LIMITS = Batches(lines=20, line_bytes=200, range_lines=4, range_bytes=1000)


def text(custom_id: str, **body: object) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "m", **body}}
    return json.dumps(line).encode()


def inspected(data: bytes, piece: int) -> Sound | tuple[Fault, ...]:
    inspection = Inspection(URL, LIMITS, lambda model: model == "m")
    for start in range(0, len(data), piece):
        inspection.feed(data[start : start + piece])
    return inspection.result()


ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \r\n"])


@given(st.lists(ENDS, min_size=1, max_size=15), st.integers(1, 400), st.booleans(), st.booleans())
def test_ranges_hold_every_line_once(ends: list[bytes], piece: int, bom: bool, ends_open: bool) -> None:
    texts = [text(f"c{number}") for number in range(len(ends))]
    data = b"\xef\xbb\xbf" * bom + b"".join(one + end for one, end in zip(texts, ends, strict=True))
    if ends_open:
        data = data.rstrip()
    sound = inspected(data, piece)
    assert isinstance(sound, Sound)
    read = [read_lines(data[run.start : run.end]) for run in sound.ranges]
    assert [line.custom_id for lines in read for line in lines] == [f"c{number}" for number in range(len(ends))]
    assert [len(lines) for lines in read] == [run.lines for run in sound.ranges]
    assert all(0 < run.lines <= LIMITS.range_lines for run in sound.ranges)


@given(st.binary(max_size=2000), st.integers(1, 500))
def test_no_bytes_break_it(data: bytes, piece: int) -> None:
    result = inspected(data, piece)
    assert isinstance(result, tuple)
    assert result


@given(st.integers(1, 500))
def test_a_line_without_end_is_not_kept(piece: int) -> None:
    result = inspected(text("a") + b"\n" + b"x" * 5000 + b"\n" + text("a"), piece)
    assert isinstance(result, tuple)
    assert [(fault.code, fault.line) for fault in result] == [("line_too_long", 2), ("duplicate_custom_id", 3)]


def test_enough_is_enough() -> None:
    inspection = Inspection(URL, Batches(), lambda model: True)
    inspection.feed(b"x\n" * 1000)
    assert inspection.is_over
    result = inspection.result()
    assert isinstance(result, tuple)
    assert len(result) == 100


@given(st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=50)), max_size=20), st.booleans())
def test_a_segment_comes_back(told: list[tuple[bool, bytes]], is_sealed: bool) -> None:
    records = [Record(index, good, body + b"\n", Progress()) for index, (good, body) in enumerate(told)]
    head = Head(Progress(2**40, 2**40, 2**60, 2**60, 2**60, 2**60), is_sealed)
    stored = segment(head, records)
    assert list(records_of(stored)) == records
    assert head_of(stored[:HEAD_BYTES]) == head


def test_an_answer_becomes_one_line() -> None:
    line = Line("c", "POST", URL, json.dumps({}).encode())  # type: ignore[arg-type]
    body = b'{\r\n "text": "a\\nb",\n "usage": {"prompt_tokens": 3, "completion_tokens": 4}\n}'
    record = answered(0, line, "r", body)
    assert record.text.count(b"\n") == 1
    assert json.loads(record.text)["response"]["body"]["text"] == "a\nb"
    assert record.cost == Progress(completed=1, input_tokens=3, output_tokens=4)
    with pytest.raises(UpstreamBadResponse):
        answered(0, line, "r", b'{"cut": ')
    told = json.loads(not_run(1, line, "batch_expired", "late").text)
    assert (told["response"], told["error"]) == (None, {"code": "batch_expired", "message": "late"})
