"""A very light stand-in for a vLLM worker, for measuring what stands in front of it.

It speaks HTTP/1.1 on a raw asyncio protocol, so that its own cost stays far below any relay's (see `serving`).

    python -m loadtest.fake_vllm --port 9001 --model m

`POST /pace {"ttft_ms": 0, "itl_ms": 20}` sets the speed of the answers that follow; 0 means at once. Speed is set
out of band because some relays drop request fields they do not know.
"""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click
import msgspec
import uvloop

from loadtest.pacing import Pacer
from loadtest.serving import (
    CHUNK,
    COMPLETION,
    CONTENT,
    FINISH,
    ROLE,
    STREAM_HEAD,
    USAGE,
    WHOLE,
    ServerConnection,
    StreamOptions,
    framed,
    model_list,
)

MAX_TOKENS = 100_000
"""Longest answer; with the chunk's ~170 bytes it bounds what one unread answer can hold in memory."""

_METRICS = (
    '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{engine="0",model_name="{0}"}} {1}.0\n'
    '# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{{engine="0",model_name="{0}"}} 0.0\n'
    '# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{{engine="0",model_name="{0}"}} 0.1\n'
)


class ChatBody(msgspec.Struct):
    """The fields that shape an answer; all others are ignored. `user` is what the record says of it."""

    user: str = ""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def tokens(self) -> int:
        return max(1, min(MAX_TOKENS, self.max_completion_tokens or self.max_tokens or 16))


class Pace(msgspec.Struct, frozen=True):
    """Speed of an answer, in milliseconds: to the first token, and between tokens."""

    ttft_ms: float = 0.0
    itl_ms: float = 0.0

    def due_ns(self, start_ns: int, index: int) -> int:
        """When token `index` (from 0) of an answer begun at `start_ns` is due."""
        return start_ns + round((self.ttft_ms + index * self.itl_ms) * 1e6)


@dataclass
class Worker:
    """What all connections share: the model's name, the pace, the counters."""

    model: str
    pacer: Pacer
    pace: Pace
    running: int = 0
    served: int = 0
    aborted: int = 0
    record: int | None = None
    """A file that gets a line for each answer that was written whole: it outlives this process, however that ends."""

    def __post_init__(self) -> None:
        self.chunk = CHUNK % self.model.encode()
        self.whole = WHOLE % self.model.encode()
        self.completion = COMPLETION % (self.model.encode(), USAGE % (2, 1))


def tokenized(body: bytes) -> bytes:
    """The answer of `/tokenize`, with a token for every five bytes; cache-aware relays ask before they route."""
    count = len(body) // 5 + 1
    tokens = b"17," * (count - 1) + b"17"
    return b'{"count":%d,"max_model_len":1048576,"tokens":[%s],"token_strs":null}' % (count, tokens)


class Answer:
    """One answer under way, written to its connection as its tokens fall due."""

    def __init__(self, worker: Worker, connection: "Connection", body: ChatBody) -> None:
        self._worker, self._connection, self._body = worker, connection, body
        self._pace, self._start_ns, self._sent = worker.pace, time.monotonic_ns(), 0
        self._content = worker.chunk % (CONTENT, b"")
        self.closed = False
        worker.running += 1

    def begin(self) -> None:
        """Write what is due and leave the rest to the pacer."""
        if not self._body.stream:
            self._wait(self._pace.due_ns(self._start_ns, self._body.tokens - 1), self._write_whole)
        else:
            self._wait(self._pace.due_ns(self._start_ns, 0), self._write_first)

    def abort(self) -> None:
        """The client left: nothing more is written."""
        if not self.closed:
            self._worker.aborted += 1
            self._close()

    def _close(self) -> None:
        self.closed = True
        self._worker.running -= 1

    def _wait(self, due_ns: int, act: Callable[[], None]) -> None:
        if due_ns <= time.monotonic_ns():
            act()
        else:
            self._worker.pacer.at(due_ns, act)

    def _write_whole(self) -> None:
        if self.closed:
            return
        usage = USAGE % (self._body.tokens + 12, self._body.tokens)
        self._connection.reply(b"200 OK", self._worker.whole % (b"tok " * self._body.tokens, usage))
        self._finish()

    def _write_first(self) -> None:
        if self.closed:
            return
        self._connection.write(STREAM_HEAD + framed(self._worker.chunk % (ROLE, b"")))
        self._write_token()

    def _write_token(self) -> None:
        """Write every token that is due, one write each as vLLM does; the stamp is the due time, not the write's."""
        while not self.closed:
            due_ns = self._pace.due_ns(self._start_ns, self._sent)
            self._connection.write(framed(self._content % (due_ns if self._pace.itl_ms else time.monotonic_ns())))
            self._sent += 1
            if self._sent == self._body.tokens:
                self._write_end()
                return
            next_ns = self._pace.due_ns(self._start_ns, self._sent)
            if next_ns > time.monotonic_ns():
                self._worker.pacer.at(next_ns, self._write_token)
                return

    def _write_end(self) -> None:
        end = framed(self._worker.chunk % (FINISH, b""))
        if self._body.stream_options and self._body.stream_options.include_usage:
            end += framed(self._worker.chunk % (b"", USAGE % (self._sent + 12, self._sent)))
        self._connection.write(end + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self._finish()

    def _finish(self) -> None:
        self._worker.served += 1
        if self._worker.record is not None:
            os.write(self._worker.record, self._body.user.encode() + b"\n")
        self._close()


class Connection(ServerConnection):
    """One client connection; one answer at a time."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._answer: Answer | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer:
            self._answer.abort()

    @property
    def is_answering(self) -> bool:
        return self._answer is not None and not self._answer.closed

    def post(self, body: bytes) -> None:
        try:
            if self.path == b"/pace":
                self._worker.pace = msgspec.json.decode(body, type=Pace)
                self.reply(b"200 OK", msgspec.json.encode(self._worker.pace))
            elif self.path == b"/v1/chat/completions":
                self._answer = Answer(self._worker, self, msgspec.json.decode(body, type=ChatBody))
                self._answer.begin()
            elif self.path == b"/v1/completions":
                self.reply(b"200 OK", self._worker.completion)
            elif self.path == b"/tokenize":
                self.reply(b"200 OK", tokenized(body))
            else:
                self.reply_not_found()
        except msgspec.DecodeError as error:
            self.reply_bad_request(str(error))

    def get(self) -> None:
        worker, answers = self._worker, self._answers()
        if self.path == b"/metrics":
            self.reply(b"200 OK", _METRICS.format(worker.model, worker.running).encode(), b"text/plain; version=0.0.4")
        elif self.path in (b"/health", b"/ping"):
            self.reply(b"200 OK", b"", b"text/plain")
        elif self.path in answers:
            self.reply(b"200 OK", msgspec.json.encode(answers[self.path]))
        else:
            self.reply_not_found()

    def _answers(self) -> dict[bytes, object]:
        worker = self._worker
        return {
            b"/v1/models": model_list(worker.model, 1_048_576),
            b"/load": {"server_load": worker.running},
            b"/version": {"version": "0.32.0"},
            b"/stats": {"running": worker.running, "served": worker.served, "aborted": worker.aborted},
        }


async def serve(host: str, port: int, model: str, pace: Pace, record: int | None = None) -> None:
    """Serve until cancelled."""
    loop = asyncio.get_running_loop()
    with Pacer(loop) as pacer:
        server = await loop.create_server(
            partial(Connection, Worker(model, pacer, pace, record=record)), host, port, backlog=4096
        )
        async with server:
            await server.serve_forever()


@click.command(help=__doc__)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
@click.option("--model", default="m", show_default=True, help="The served model's name.")
@click.option("--ttft-ms", type=float, default=0.0, help="To the first token.")
@click.option("--itl-ms", type=float, default=0.0, help="Between tokens.")
@click.option("--record", type=click.Path(dir_okay=False), help="Append the `user` of each finished request here.")
def main(host: str, port: int, model: str, ttft_ms: float, itl_ms: float, record: str | None) -> None:
    opened = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if record else None
    uvloop.run(serve(host, port, model, Pace(ttft_ms, itl_ms), opened))


if __name__ == "__main__":
    main()
