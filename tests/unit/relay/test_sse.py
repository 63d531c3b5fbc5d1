"""The event splitter against a slow, obvious reference, with streams cut anywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import UpstreamBadResponse
from app.relay.sse import EVENT_MAX_BYTES, EventSplitter, data_of

LINE_ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
LINES = st.one_of(
    st.text('abc {}:"é😀', max_size=12).map(lambda text: b"data: " + text.encode()),
    st.just(b"data:x"),
    st.just(b": comment"),
    st.just(b"event: ping"),
    st.just(b"data"),
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A stream of whole events, line ends mixed at will; a CR is not followed by an LF that means another line end."""
    stream = b""
    for _ in range(draw(st.integers(0, 5))):
        for line in draw(st.lists(LINES, min_size=1, max_size=3)):
            stream += line + draw(LINE_ENDS)
        stream += draw(LINE_ENDS.filter(lambda end: not (stream.endswith(b"\r") and end == b"\n")))  # noqa: B023
    return stream


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:end] for start, end in pairwise(marks)]


def dispatched(stream: bytes) -> list[bytes]:
    """What WHATWG's algorithm, line by line, hands to a client: the data of each event that has any."""
    text, events, data = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), [], list[bytes]()
    *lines, rest = text.split(b"\n")
    assert rest == b""
    for line in lines:
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value[1:] if value.startswith(b" ") else value)
    return events


@given(streams(), st.lists(st.integers(0, 10_000), max_size=12))
def test_events_have_the_same_content_however_the_network_cuts_them(stream: bytes, places: list[int]) -> None:
    splitter = EventSplitter()
    events = [event for part in cut(stream, places) for event in splitter.feed(part)]
    assert b"".join(events) == stream
    assert not splitter.has_pending
    assert [data for event in events if (data := data_of(event))] == [data for data in dispatched(stream) if data]


@given(streams())
def test_one_byte_at_a_time_yields_the_same_events_as_at_once(stream: bytes) -> None:
    slow = EventSplitter()
    events = [event for byte in stream for event in slow.feed(bytes([byte]))]
    assert b"".join(events) == stream


@given(streams().filter(bool), st.data())
def test_a_half_event_stays_pending(stream: bytes, data: st.DataObject) -> None:
    splitter = EventSplitter()
    whole = b"".join(splitter.feed(stream + b"data: half"))
    assert whole == stream
    assert splitter.has_pending


def test_several_events_in_one_read_come_out_one_by_one() -> None:
    assert EventSplitter().feed(b"data: a\n\ndata: b\n\n") == [b"data: a\n\n", b"data: b\n\n"]


def test_an_event_without_end_is_refused_before_memory_is() -> None:
    splitter = EventSplitter()
    chunk = b"x" * 65_536
    for _ in range(EVENT_MAX_BYTES // len(chunk)):
        assert splitter.feed(chunk) == []
    with pytest.raises(UpstreamBadResponse):
        splitter.feed(chunk)


def test_a_whole_event_that_is_too_large_is_refused() -> None:
    with pytest.raises(UpstreamBadResponse):
        EventSplitter().feed(b"data: " + b"x" * EVENT_MAX_BYTES + b"\n\n")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"event: e\r\ndata: a\r\n\r\n", b"a"),
        (b": comment\n\n", b""),
        (b"data: a\rdata: b\r\r", b"a\nb"),
        (b"data:  two spaces\n\n", b" two spaces"),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes) -> None:
    assert data_of(event) == data


@given(streams(), st.lists(st.integers(0, 10_000), max_size=4))
def test_the_short_way_says_what_the_long_one_does(stream: bytes, places: list[int]) -> None:
    short, long = EventSplitter(), EventSplitter()
    for piece in cut(stream, places):
        only = short.only_data(piece)
        events = long.feed(piece)
        if only is None:
            assert short.feed(piece) == events
        else:
            assert events == [piece]
            assert data_of(piece) == only
            assert not long.has_pending


def test_an_event_behind_half_a_one_has_no_short_way() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\n") == []
    assert splitter.only_data(b"data: b\n\n") is None
    assert splitter.feed(b"data: b\n\n") == [b"data: a\ndata: b\n\n"]
    assert splitter.only_data(b"data: c\n\n") == b"c"
