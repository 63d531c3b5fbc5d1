"""A chunk that is relayed without being read must mean what it would have meant had it been read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from app.inference import InferenceRequest, Route, TokenUsage
from app.relay.answer import LESSONS, BegunStream, StreamedAnswer
from app.relay.passage import Passage, Way
from app.relay.upstream import Connection
from app.settings import Logs
from app.settings import Relay as Limits
from app.telemetry.account import Account, Accounts, RequestsLog
from app.telemetry.logs import open_log
from app.telemetry.metrics import Metrics
from app.workers.worker import Progress
from tests.stepping import Line, SteppingLoop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"%b"},"logprobs":null}]}\n\n'
ROLE = b'data: {"id":"x","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null}]}\n\n'
USAGE = b'"usage":{"prompt_tokens":1,"completion_tokens":2}'
DONE = b"data: [DONE]\n\n"
METRICS = Metrics(CollectorRegistry())
LOG = RequestsLog(open_log(Logs()), "none")


def framed(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def unframed(body: bytes) -> bytes:
    """The content of a chunked body, by the plainest reading; what is left of a chunk that is not whole is lost."""
    content = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        content += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return content


class Client:
    """Where an answer is poured. `passed` is what came in frames of the worker's; with `takes_chunks` off, nothing.

    `at_once` is what it got of what had come before it was poured.
    """

    def __init__(self, *, takes_chunks: bool) -> None:
        self.passed: list[bytes] = []
        self.body = self.at_once = b""
        self._takes_chunks = takes_chunks

    def write(self, part: bytes) -> None:
        self.body += part

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        return self._write_chunk if self._takes_chunks else None

    def _write_chunk(self, chunk: bytes) -> None:
        self.passed.append(chunk)
        self.body += unframed(chunk)

    def on_pause(self, listener: Callable[[bool], None] | None) -> None:
        """It always keeps up."""


class Held:
    def __init__(self, connection: Connection) -> None:
        self.open_connection = connection

    def close(self) -> None:
        """There is nothing to give back."""


def account_of(loop: asyncio.AbstractEventLoop) -> tuple[InferenceRequest, Account]:
    request = InferenceRequest.parse(b'{"model":"m","stream":true}', request_id="r", route=Route.CHAT, arrived=0.0)
    return request, Accounts(METRICS, LOG, loop.time).open(request)


Seen = tuple[bytes, int, TokenUsage | None, bool]


def relayed(pieces: list[bytes], client: Client, *, early: int = 0, begun: bytes = ROLE) -> Seen:
    """What a client got of a worker's bytes, the tokens counted, the usage learnt, and whether it was whole.

    `begun` is read before the answer is poured, and `early` of the `pieces` come in between.
    """
    loop = SteppingLoop()
    request, account = account_of(loop)
    connection, line = Connection(loop, Limits(), Progress()), Line()
    connection.connection_made(line)

    async def pour() -> Seen:
        connection.start(b"", b"")
        connection.data_received(HEAD + framed(begun))
        answer = StreamedAnswer(BegunStream(Held(connection), await connection.read()), request, account, loop.time)
        for piece in pieces[:early]:
            connection.data_received(piece)
        pouring = asyncio.create_task(answer.pour(client))
        await asyncio.sleep(0)
        client.at_once = client.body
        for piece in pieces[early:]:
            if not line.closed:
                try:
                    connection.data_received(piece)
                except RuntimeError:
                    pytest.fail("the worker's connection was told of it")
        connection.connection_lost(None)
        await pouring
        return client.body, account.timeline.token_chunks, account.usage, answer.is_whole

    try:
        return loop.run_until_complete(pour())
    finally:
        account.close(None)
        loop.close()


TEXTS = st.sampled_from([b"a", b" tok", "é漢".encode(), b"", b'\\"', b"\\n", b"x" * 300, b"\x01"])
INJECTED = st.sampled_from(
    [
        b'a"}}],%b,"choices":[{"delta":{"content":"b' % USAGE,
        b'a"}}],"error":{"code":1},"choices":[{"delta":{"content":"b',
        b'"},"logprobs":null}]}\n\ndata: {"id":"x","choices":[{"index":0,"delta":{"content":"b',
    ]
)
EVENTS = st.one_of(
    *[TEXTS.map(lambda text: CHUNK % text)] * 4,
    INJECTED.map(lambda text: CHUNK % text),
    st.sampled_from(
        [
            (CHUNK % b"tok").replace(b"null", b"[]"),
            (CHUNK % b"tok").replace(b"\n", b"\r\n"),
            b": comment\n\n",
            b"data: half an event\n",
            b'data: {"choices":[],%b}\n\n' % USAGE,
            b'data: {"error":{"message":"no","code":500}}\n\n',
            CHUNK % b"one" + CHUNK % b"two",
        ]
    ),
)
FRAMES = st.one_of(
    *[EVENTS.map(framed)] * 4,
    EVENTS.map(lambda event: b"%X\r\n%b\r\n" % (len(event), event)),
    EVENTS.map(lambda event: b"0%x;a=b\r\n%b\r\n" % (len(event), event)),
    EVENTS.map(lambda event: framed(event[:9]) + framed(event[9:])),
    EVENTS.map(lambda event: b"%x\r\n%b\r\n" % (len(event) + 1, event)),  # one byte too few: no HTTP any more
)


@st.composite
def arrivals(draw: st.DrawFn) -> list[bytes]:
    """A worker's chunks, nearly all of them in a piece of their own."""
    frames = [framed(CHUNK % b"tok"), *draw(st.lists(FRAMES, max_size=12))]
    frames += draw(st.sampled_from([[], [framed(DONE), b"0\r\n\r\n"], [framed(DONE) + b"0\r\n\r\n"]]))
    stream = b"".join(frames)
    marks = {0, len(stream)}
    for frame in frames:
        marks.add(max(marks - {len(stream)}) + len(frame))
    marks |= {place % len(stream) for place in draw(st.lists(st.integers(0, 10_000), max_size=3))}
    return [stream[start:end] for start, end in pairwise(sorted(marks))]


EVENT = CHUNK % b"tok"
LOOKS_WHOLE = framed(EVENT) + b"\n\n"
LONGER = EVENT + b"\r\n: " + b"x" * (0x100 - 6) + b"\n\n"


@settings(max_examples=300)
@given(arrivals())
@example([framed(EVENT), framed(b"data: half an event\n"), framed(EVENT)])
@example([framed(EVENT), b"%x\r\n" % len(LOOKS_WHOLE), framed(EVENT), b"\n\n\r\n"])
@example([framed(EVENT), b"1", framed(EVENT), framed(LONGER)[len(framed(EVENT)) + 1 :]])
def test_the_short_way_ends_where_the_long_one_does(pieces: list[bytes]) -> None:
    assert relayed(pieces, Client(takes_chunks=True)) == relayed(pieces, Client(takes_chunks=False))


def test_chunks_that_are_alike_are_passed_on_as_they_came() -> None:
    chunks = [framed(CHUNK % text) for text in (b"a", b"b", b"\\n", b"cc")]
    client = Client(takes_chunks=True)
    body, tokens, _, is_whole = relayed([*chunks, framed(DONE), b"0\r\n\r\n"], client)
    assert client.passed == [chunks[1], chunks[3]]
    assert body == ROLE + CHUNK % b"a" + CHUNK % b"b" + CHUNK % b"\\n" + CHUNK % b"cc" + DONE
    assert (tokens, is_whole) == (4, True)


def test_nothing_overtakes_what_came_before_the_answer_was_poured() -> None:
    events = [CHUNK % text for text in (b"a", b"b", b"c", b"d")]
    client = Client(takes_chunks=True)
    body, tokens, _, _ = relayed([framed(event) for event in events[1:]], client, early=1, begun=events[0])
    assert client.at_once == events[0] + events[1]
    assert body.startswith(b"".join(events))
    assert tokens == 4


def test_a_stream_whose_chunks_have_nothing_in_common_is_soon_left_alone() -> None:
    unlike = [framed((CHUNK % b"a").replace(b'"x"', b'"%d"' % number)) for number in range(LESSONS)]
    alike = [framed(CHUNK % b"a")] * 3
    client = Client(takes_chunks=True)
    _, tokens, _, _ = relayed([*unlike, *alike], client)
    assert (client.passed, tokens) == ([], LESSONS + 3)


def passage(event: bytes) -> Passage | None:
    return Passage.like(event, Way(lambda chunk: None, lambda now: None, lambda error: None, lambda: 0.0))


@pytest.mark.parametrize("key", ["content", "text", "reasoning", "reasoning_content"])
def test_what_differs_in_its_text_only_passes(key: str) -> None:
    event = b'data: {"id":"content","choices":[{"%b":"one","n":null}]}\n\n' % key.encode()
    alike = passage(event)
    assert alike is not None
    assert alike.take(framed(event))
    assert alike.take(framed(event.replace(b"one", b"another")))
    for other in (b"", b'o"ne', b"o\\u0041", b"o\nne", b"o\rne", b"o\x00ne"):
        assert not alike.take(framed(event.replace(b"one", other)))


def test_without_text_nothing_passes() -> None:
    assert passage(ROLE) is None
    assert passage(CHUNK % b"\\n") is None


def test_a_client_that_cannot_be_written_to_is_no_fault_of_the_worker() -> None:
    class Gone(Client):
        def _write_chunk(self, chunk: bytes) -> None:
            raise RuntimeError("the handler is closed")

    chunks = [framed(CHUNK % text) for text in (b"a", b"b")]
    with pytest.raises(RuntimeError, match="the handler is closed"):
        relayed(chunks, Gone(takes_chunks=True))
