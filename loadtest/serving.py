"""What stands in for vLLM has in common: HTTP/1.1 on a raw asyncio protocol, and vLLM's shape of a chat answer.

The order of a stream's chunks is vLLM's: role, content, finish, usage if asked for, `[DONE]`. The text of each content
chunk is a stamp, `tok 12345`: the CLOCK_MONOTONIC nanosecond at which it was *due*, so a client on the same machine
sees how late it arrives, whoever was late. As in vLLM's streams, nothing else differs from chunk to chunk.
"""

import asyncio
import socket
from typing import cast

import httptools
import msgspec

CREATED = b'"created":1795247277,"model":"%s",'
CHUNK = b'data: {"id":"chatcmpl-x","object":"chat.completion.chunk",' + CREATED + b'"choices":[%%s]%%s}\n\n'
ROLE = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
CONTENT = b'{"index":0,"delta":{"content":"tok %d"},"logprobs":null,"finish_reason":null,"token_ids":null}'
FINISH = b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}'
USAGE = b',"usage":{"prompt_tokens":12,"total_tokens":%d,"completion_tokens":%d}'
WHOLE = (
    b'{"id":"chatcmpl-x","object":"chat.completion",' + CREATED + b'"choices":[{"index":0,"message":{"role":'
    b'"assistant","content":"%%s"},"logprobs":null,"finish_reason":"stop"}]%%s}'
)
# For canaries only: one token, at once.
COMPLETION = (
    b'{"id":"cmpl-x","object":"text_completion",' + CREATED + b'"choices":[{"index":0,"text":"tok","logprobs":null,'
    b'"finish_reason":"length","stop_reason":null}]%s}'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


def framed(data: bytes) -> bytes:
    """One chunk of HTTP/1.1 chunked coding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def model_list(model: str, max_model_len: int) -> dict[str, object]:
    """The answer of `/v1/models`."""
    card = {"id": model, "object": "model", "created": 1795247277, "owned_by": "vllm", "root": model}
    return {"object": "list", "data": [card | {"parent": None, "max_model_len": max_model_len}]}


class ServerConnection(asyncio.Protocol):
    """One client connection, kept alive; subclasses answer its requests, one at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports share no base class with asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpRequestParser(self)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self.path = url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        if self.is_answering:
            self._transport.close()  # a pipelined request; nothing measured here sends one
        elif self._parser.get_method() == b"POST":
            self.post(b"".join(self._body))
        else:
            self.get()

    def write(self, data: bytes) -> None:
        # The loop tells of a lost connection one turn after it is gone; uvloop raises on a write in between.
        if not self._transport.is_closing():
            self._transport.write(data)

    def reply(self, status: bytes, body: bytes, content_type: bytes = b"application/json") -> None:
        head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (status, content_type, len(body))
        self.write(head + body)

    def reply_not_found(self) -> None:
        """As vLLM answers what it does not serve; some relays probe for routes and fall back on this."""
        self.reply(b"404 Not Found", b'{"detail":"Not Found"}')

    def reply_bad_request(self, message: str) -> None:
        error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
        self.reply(b"400 Bad Request", msgspec.json.encode({"error": error}))

    @property
    def is_answering(self) -> bool:
        """Whether an answer is still under way."""
        raise NotImplementedError

    def post(self, body: bytes) -> None:
        raise NotImplementedError

    def get(self) -> None:
        raise NotImplementedError
