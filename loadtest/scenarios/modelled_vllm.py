"""A worker whose answers take as long as a modelled engine needs: slots, a queue inside, prefill and decode by load.

    python -m loadtest.scenarios.modelled_vllm --port 9001 --witness 9100

A prompt has a token for every four bytes of the user's message; the answer has `max_tokens`. The first word of the
message names the request: with that name the worker tells its witness (see `witness`) of every chat request that
arrives and that ends, one line each. It serves what the gateway's monitor reads, canaries included.
"""

import asyncio
import time
from collections.abc import Iterator
from functools import partial

import click
import msgspec
import uvloop

from loadtest.pacing import NS, Pacer
from loadtest.scenarios.engine import Engine, EngineShape, Sequence, Token
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

BYTES_PER_TOKEN = 4
MAX_MODEL_LEN = 8192
CANARY = ""
"""The name of requests that no witness hears of."""

_METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="{model}"}} {running}.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="{model}"}} {waiting}.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="{model}"}} {kv_usage:.4f}
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{{engine="0",model_name="{model}"}} {preemptions}.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{engine="0",model_name="{model}"}} {generated}.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="{blocks}"}} 1.0
"""


class Message(msgspec.Struct):
    content: str


class ChatBody(msgspec.Struct):
    """The fields that shape an answer; all others are ignored."""

    messages: list[Message]
    max_tokens: int = 16
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def name(self) -> str:
        return self.messages[-1].content.partition(" ")[0]

    @property
    def prompt_tokens(self) -> int:
        return 1 + len(self.messages[-1].content) // BYTES_PER_TOKEN


class Worker:
    """The engine, the clock that drives it, and whoever is being answered."""

    def __init__(self, model: str, shape: EngineShape, pacer: Pacer, witness: asyncio.StreamWriter | None) -> None:
        self.model = model
        self._shape = shape
        self._pacer = pacer
        self._witness = witness
        self._engine = Engine(shape)
        self._answers: dict[Sequence, Answer] = {}
        self.chunk = CHUNK % model.encode()
        self.content = self.chunk % (CONTENT, b"")
        self.whole = WHOLE % model.encode()
        self.completion = COMPLETION % (model.encode(), USAGE % (2, 1))

    def metrics(self) -> bytes:
        engine = self._engine
        return _METRICS.format(
            model=self.model,
            running=engine.running,
            waiting=engine.waiting,
            kv_usage=engine.kv_usage,
            preemptions=engine.preemptions,
            generated=engine.generated,
            blocks=self._shape.kv_tokens // 16,
        ).encode()

    def begin(self, sequence: Sequence, answer: "Answer") -> None:
        """Raises ValueError for a request that is too long."""
        self._advance()
        self._engine.add(sequence, time.monotonic())
        self._answers[sequence] = answer
        self._tell("arrived", sequence)
        self._wake()

    def abort(self, sequence: Sequence) -> None:
        """The client left. Nothing happens if its answer is over."""
        if self._answers.pop(sequence, None) is not None:
            self._engine.abort(sequence)
            self._tell("aborted", sequence)

    def _advance(self) -> None:
        for token in self._engine.advance(time.monotonic()):
            answer = self._answers[token.sequence]
            if token.is_last:
                # Over before its last bytes leave: who reads them may use the seat.
                del self._answers[token.sequence]
                self._tell("ended", token.sequence)
            answer.take(token)

    def _wake(self) -> None:
        if self._engine.due is not None:
            self._pacer.at(round(self._engine.due * NS), self._on_due)

    def _on_due(self) -> None:
        due = self._engine.due
        if due is not None and due <= time.monotonic():
            self._advance()
            self._wake()

    def _tell(self, event: str, sequence: Sequence) -> None:
        if self._witness is not None and sequence.id != CANARY:
            held = sum(other.id != CANARY for other in self._answers)
            line = f"{event} {sequence.id} {time.monotonic_ns()} {held} {self._engine.waiting_most}\n"
            self._witness.write(line.encode())
            self._engine.waiting_most = 0


class Answer:
    """One answer under way."""

    def __init__(self, worker: Worker, connection: "Connection", sequence: Sequence) -> None:
        self._worker = worker
        self._connection = connection
        self._sequence = sequence
        self.is_over = False

    def abort(self) -> None:
        self._worker.abort(self._sequence)

    def take(self, token: Token) -> None:
        self.is_over = token.is_last
        for part in self._parts(token):
            self._connection.write(part)

    def _parts(self, token: Token) -> Iterator[bytes]:
        raise NotImplementedError


class StreamedAnswer(Answer):
    def __init__(self, worker: Worker, connection: "Connection", sequence: Sequence, *, with_usage: bool) -> None:
        super().__init__(worker, connection, sequence)
        self._with_usage = with_usage

    def _parts(self, token: Token) -> Iterator[bytes]:
        worker, sequence = self._worker, token.sequence
        if token.number == 1:
            yield STREAM_HEAD + framed(worker.chunk % (ROLE, b""))
        yield framed(worker.content % round(token.at * NS))
        if token.is_last:
            usage = b""
            if self._with_usage:
                counts = USAGE % (sequence.prompt_tokens + sequence.output_tokens, sequence.output_tokens)
                usage = framed(worker.chunk % (b"", counts))
            yield framed(worker.chunk % (FINISH, b"")) + usage + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class WholeAnswer(Answer):
    def _parts(self, token: Token) -> Iterator[bytes]:
        sequence = token.sequence
        if token.is_last:
            usage = USAGE % (sequence.prompt_tokens + sequence.output_tokens, sequence.output_tokens)
            self._connection.reply(b"200 OK", self._worker.whole % (b"tok " * sequence.output_tokens, usage))
        return iter(())


class CanaryAnswer(Answer):
    def _parts(self, token: Token) -> Iterator[bytes]:
        self._connection.reply(b"200 OK", self._worker.completion)
        return iter(())


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
        return self._answer is not None and not self._answer.is_over

    def post(self, body: bytes) -> None:
        try:
            if self.path == b"/v1/chat/completions":
                self._chat(msgspec.json.decode(body, type=ChatBody))
            elif self.path == b"/v1/completions":
                canary = Sequence(CANARY, prompt_tokens=1, output_tokens=1)
                self._begin(canary, CanaryAnswer(self._worker, self, canary))
            else:
                self.reply_not_found()
        except (msgspec.DecodeError, ValueError) as error:
            self.reply_bad_request(str(error))

    def _chat(self, body: ChatBody) -> None:
        sequence = Sequence(body.name, body.prompt_tokens, max(1, body.max_tokens))
        answer: Answer
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            answer = StreamedAnswer(self._worker, self, sequence, with_usage=with_usage)
        else:
            answer = WholeAnswer(self._worker, self, sequence)
        self._begin(sequence, answer)

    def _begin(self, sequence: Sequence, answer: Answer) -> None:
        self._worker.begin(sequence, answer)
        self._answer = answer

    def get(self) -> None:
        if self.path == b"/metrics":
            self.reply(b"200 OK", self._worker.metrics(), b"text/plain; version=0.0.4")
        elif self.path == b"/health":
            self.reply(b"200 OK", b"", b"text/plain")
        elif self.path == b"/v1/models":
            self.reply(b"200 OK", msgspec.json.encode(model_list(self._worker.model, MAX_MODEL_LEN)))
        else:
            self.reply_not_found()


async def serve(port: int, model: str, shape: EngineShape, witness_port: int | None) -> None:
    """Serve until cancelled, or until the witness is gone: then nobody is left to serve."""
    loop = asyncio.get_running_loop()
    reader, witness = await asyncio.open_connection("127.0.0.1", witness_port) if witness_port else (None, None)
    with Pacer(loop) as pacer:
        worker = Worker(model, shape, pacer, witness)
        server = await loop.create_server(partial(Connection, worker), "127.0.0.1", port, backlog=4096)
        async with server:
            if witness is not None:
                witness.write(f"worker 127.0.0.1:{port}\n".encode())
            if reader is None:
                await server.serve_forever()
            else:
                await reader.read()


@click.command(help=__doc__)
@click.option("--port", type=int, required=True)
@click.option("--model", default="m", show_default=True, help="The served model's name.")
@click.option("--witness", type=int, help="Port of 127.0.0.1 that hears of every request.")
@click.option("--shape", default="{}", help="JSON: the fields of `engine.EngineShape` that differ from its defaults.")
def main(port: int, model: str, witness: int | None, shape: str) -> None:
    uvloop.run(serve(port, model, msgspec.json.decode(shape.encode(), type=EngineShape), witness))


if __name__ == "__main__":
    main()
