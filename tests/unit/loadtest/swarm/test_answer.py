"""Answers heard line by line, and what is left of them."""

import pytest

from loadtest.swarm.answer import Answer, Record, decode, encode, error_code, retry_after_s

ASKED = Record(1000.0, "chat", "flex", "acme")


def chunk(delta: str) -> bytes:
    return b'data: {"choices": [{"index": 0, "delta": %s}]}\n' % delta.encode()


def heard(*lines: tuple[bytes, float]) -> Answer:
    answer = Answer(10.0)
    for line, now_s in lines:
        answer.hear(line, now_s)
    return answer


WHOLE = (
    (chunk('{"role": "assistant", "content": ""}'), 10.1),
    (b": sluice-queue position=3\n", 10.2),
    (b"\n", 10.2),
    (chunk('{"reasoning": "hm"}'), 10.5),
    (chunk('{"content": "a"}'), 10.6),
    (chunk('{"content": "b"}'), 10.8),
    (b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}\n', 10.9),
    (b"data: [DONE]\n", 10.9),
)


def test_a_whole_answer_counts_from_the_first_generated_token() -> None:
    headers = {"x-sluice-queue-ms": "12.5", "x-sluice-variant": "m:v"}
    answer = heard(*WHOLE)
    record = answer.record(ASKED, 200, headers, 11.0)
    assert record.is_served
    assert not record.is_error
    assert record.ttft_s == pytest.approx(0.5)
    assert record.gaps_s == pytest.approx((0.1, 0.2))
    assert record.took_s == pytest.approx(1.0)
    assert record.tpot_s == pytest.approx(0.5 / 3)
    assert (record.tokens, record.prompt_tokens, record.queued_ms, record.variant) == (4, 7, 12.5, "m:v")
    assert answer.text == "ab"


def test_without_usage_chunks_are_counted() -> None:
    record = heard(*WHOLE[:-2], WHOLE[-1]).record(ASKED, 200, {}, 11.0)
    assert record.tokens == 3


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (WHOLE[:-1], "lost"),
        ((*WHOLE[:5], (b'data: {"error": {"code": "worker_lost"}}\n', 10.9)), "worker_lost"),
        ((*WHOLE[:5], (b"data: {]\n", 10.9)), "malformed"),
        ((), "lost"),
    ],
)
def test_what_does_not_end_in_done_is_an_error(lines: tuple[tuple[bytes, float], ...], code: str) -> None:
    record = heard(*lines).record(ASKED, 200, {}, 11.0)
    assert record.code == code
    assert record.is_error


def test_a_refusal_is_no_error() -> None:
    answer = Answer(10.0)
    answer.code = error_code(429, b'{"error": {"message": "no", "code": "tenant_queue_full"}}')
    record = answer.record(ASKED, 429, {}, 10.1)
    assert record.code == "tenant_queue_full"
    assert record.is_refused
    assert not record.is_error
    assert not record.is_served


def test_an_error_page_that_is_no_json_is_told_by_its_status() -> None:
    assert error_code(502, b"<html>Bad Gateway</html>") == "http_502"
    assert error_code(503, b"{}") == "http_503"


@pytest.mark.parametrize(("told", "waited"), [("2", 2.0), ("600", 30.0), ("0.01", 0.1), (None, 1.0), ("soon", 1.0)])
def test_retry_after_is_honoured_within_bounds(told: str | None, waited: float) -> None:
    headers = {} if told is None else {"retry-after": told}
    assert retry_after_s(headers, 30.0) == waited


def test_records_come_back_as_they_were_written() -> None:
    records = [heard(*WHOLE).record(ASKED, 200, {}, 11.0), ASKED]
    assert decode(map(encode, records)) == records
    with pytest.raises(ValueError, match="line 2 is no record"):
        decode([encode(ASKED), b"{}\n"])
