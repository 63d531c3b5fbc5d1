import json

from hypothesis import given
from hypothesis import strategies as st

from loadtest.client import Address, ChatRequest, ContentScanner, StampScanner

EVENTS = b"".join(
    b'data: {"id":"x","choices":[{"delta":{"content":"tok %d"}}]}\n\n' % stamp
    for stamp in (7, 1_795_247_277, 2**64 - 1)
)
STAMPS = [7, 1_795_247_277, 2**64 - 1]


def test_stamps_are_found_in_order() -> None:
    assert StampScanner().feed(EVENTS) == STAMPS


def test_stamps_survive_a_cut_at_any_byte() -> None:
    for cut in range(len(EVENTS) + 1):
        scanner = StampScanner()
        assert scanner.feed(EVENTS[:cut]) + scanner.feed(EVENTS[cut:]) == STAMPS, cut


@given(st.lists(st.integers(1, 40), min_size=1))
def test_stamps_survive_any_pieces(sizes: list[int]) -> None:
    scanner, found, rest = StampScanner(), [], EVENTS
    for size in sizes:
        found += scanner.feed(rest[:size])
        rest = rest[size:]
    assert found + scanner.feed(rest) == STAMPS


def test_one_byte_at_a_time() -> None:
    scanner = StampScanner()
    assert [stamp for byte in EVENTS for stamp in scanner.feed(bytes([byte]))] == STAMPS


def test_a_stamp_counts_once_its_end_is_seen() -> None:
    scanner = StampScanner()
    assert scanner.feed(b'{"content":"tok 12') == []
    assert scanner.feed(b'34"}') == [1234]
    assert scanner.feed(b"\n\n") == []


def test_what_carries_no_stamp_is_passed_over() -> None:
    assert StampScanner().feed(b'data: {"delta":{"role":"assistant"},"created":12}\n\ndata: [DONE]\n\n') == []


def test_a_request_is_complete_http_with_the_asked_prompt_size() -> None:
    request = ChatRequest(prompt_bytes=1_003, tokens=64, stream=True).encode(Address(4711))
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:4711\r\n")
    assert b"content-length: %d" % len(body) in head
    fields = json.loads(body)
    assert len(fields["messages"][-1]["content"]) == 1_003
    assert (fields["stream"], fields["stream_options"], fields["max_tokens"]) == (True, {"include_usage": True}, 64)


def test_a_request_that_does_not_stream_says_nothing_of_streams() -> None:
    body = ChatRequest(10, 1, stream=False).encode(Address(1)).partition(b"\r\n\r\n")[2]
    assert not json.loads(body).keys() & {"stream", "stream_options"}


CONTENT = b"".join(
    b'data: {"choices":[{"index":0,"delta":{%s},"logprobs":null}]}\n\n' % delta
    for delta in (b'"role":"assistant","content":""', b'"content":"The"', b'"content":""', b'"content":"\\n"', b"")
)


def test_content_chunks_without_stamps_are_counted_however_they_are_cut() -> None:
    for cut in range(len(CONTENT) + 1):
        scanner = ContentScanner()
        assert len(scanner.feed(CONTENT[:cut]) + scanner.feed(CONTENT[cut:])) == 2, cut
    scanner = ContentScanner()
    assert sum(len(scanner.feed(bytes([byte]))) for byte in CONTENT) == 2
