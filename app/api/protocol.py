"""One client connection: uvicorn's httptools protocol, guarded, with a few things added that ASGI has no words for.

A request finds its connection in its scope. It can ask to be called when the client leaves, instead of keeping a task
that waits in `receive`; it can write parts of a streamed body without waiting, and be told when the client does not
keep up; and it can close the connection at once, whatever is still unsent. What it answers is in `response`.

The guard: what is not a well-formed request, or does not arrive in time, is answered with an OpenAI error, in its
turn among the answers of this connection, and the connection is closed. A request that arrives in one piece costs no
timer and a handful of comparisons.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

from httptools import HttpParserCallbackError, HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api import framing
from app.api.refusal import refusing
from app.api.response import RESPONSE, EndedByClose, JoinedWrites, Response
from app.errors import (
    GatewayError,
    HeadersTooLarge,
    InternalError,
    MalformedRequest,
    RequestTimeout,
    UriTooLong,
)
from app.settings import Limits

CONNECTION = "sluice.connection"
PIPELINED_REQUESTS = 128
LINGER_S = 2.0
PAUSED_S = 1.0


class Phase(Enum):
    """What of the latest request has arrived."""

    BETWEEN = auto()
    """All of it; or there was none yet."""
    HEAD = auto()
    BODY = auto()


class ClientConnection(HttpToolsProtocol):
    """See the module. `on_disconnect` is called at most once, from the event loop, when the connection is lost."""

    on_disconnect: Callable[[], None] | None = None
    on_stall: Callable[[], None] | None = None
    """Called each time the client begins not to keep up."""
    paused_since: float | None = None
    """Since when, on the event loop's clock, the client has not kept up with what is written to it."""
    _on_pause: Callable[[bool], None] | None = None

    def __init__(self, *, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._phase = Phase.BETWEEN
        self._deadline: asyncio.TimerHandle | None = None
        self._body_began = 0.0
        self._body_bytes = 0
        self._body_chunks = 0
        self._head_bytes = 0
        self._chunk_overhead = 0
        self._begun = 0
        self._is_chunked = False
        self._keeps_alive = True
        self._is_deaf = False
        self._is_unframed = False
        self._idle_since = 0.0

    # the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._write = transport.write
        joined = JoinedWrites(transport, self._lingers)
        self._write_through = joined.write_through
        super().connection_made(joined)  # type: ignore[arg-type]
        self._arm(self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()

    def quiet(self) -> None:
        """The answer to the latest request, and any later one, is the connection's last. An idle one stays."""
        self._keeps_alive = False
        if not self._is_answered:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """As uvicorn's, but for the timer of an idle connection: moved when it fires, not for every answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._await_idle(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        """Nothing: the timer finds out by itself whether the connection was idle."""

    def _await_idle(self, delay_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(delay_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self.transport.is_closing() or not self._is_answered or self._phase is not Phase.BETWEEN:
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._await_idle(left_s)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        self._keeps_alive = False
        super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.paused_since = self.loop.time()
        if self.on_stall is not None:
            self.on_stall()
        if self._on_pause is not None:
            self._on_pause(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.paused_since = None
        if self._on_pause is not None:
            self._on_pause(False)

    def on_pause(self, listener: Callable[[bool], None] | None) -> None:
        """See `relay.answer.Sink`."""
        self._on_pause = listener
        if listener is not None and self.paused_since is not None:
            listener(True)

    def write(self, part: bytes) -> None:
        """A part of the body of a response that is streamed: `Response` has sent its head."""
        self._write(part if self._is_unframed else b"%x\r\n%b\r\n" % (len(part), part))

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        """See `relay.answer.Sink`."""
        return None if self._is_unframed else self._write

    def abort(self) -> None:
        """Close now. An orderly close would wait, for ever, until the client has read what is buffered."""
        self.transport.abort()

    def _lingers(self) -> bool:
        """Whether to end by a half-close: a client that still sends would get a reset, and lose the answer by it.

        What it sends from now on is not looked at, and after LINGER_S it is not waited for.
        """
        if self._phase is Phase.BETWEEN and not self._is_deaf:
            return False
        self._is_deaf = True
        self._disarm()
        self._deadline = self.loop.call_later(LINGER_S, self.abort)
        self.flow.resume_reading()
        return True

    # what arrives

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        before, self._begun = self._phase, 0
        body_before = self._body_bytes
        try:
            self.parser.feed_data(data)
            if self._phase is not Phase.BETWEEN or self._is_chunked:
                self._check_progress(data, before, body_before)
        except HttpParserUpgrade:
            self._ignore_upgrade()
        except (GatewayError, HttpParserError) as error:
            self._refuse(_refusal(error, data))
        else:
            if self._phase is not Phase.BETWEEN or self._is_answered:
                self._await_more()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._disarm()
        self._phase = Phase.HEAD
        self._is_chunked = False
        self._begun += 1
        self._head_bytes = self._body_bytes = self._body_chunks = self._chunk_overhead = 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > self._limits.target_bytes:
            raise UriTooLong(f"The request target is longer than {self._limits.target_bytes} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is Phase.BODY:
            return  # trailers mean nothing here
        if len(self.headers) >= self._limits.header_count:
            raise HeadersTooLarge(f"There are more than {self._limits.header_count} headers.")
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue = True
        elif name == b"transfer-encoding":
            self._is_chunked = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        method, version = self.parser.get_method().decode("ascii"), self.parser.get_http_version()
        framing.check_head(method, version, self.url, self.headers, self._limits)
        if self.parser.should_upgrade():
            framing.check_upgrade(self.headers)
        if len(self.pipeline) >= PIPELINED_REQUESTS:
            raise MalformedRequest(f"More than {PIPELINED_REQUESTS} requests were sent ahead of their answers.")
        super().on_headers_complete()
        # The application is a task that has not begun yet.
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        response = Response(self.cycle, self._write_through, is_framed=version != "1.0")
        self.scope[RESPONSE] = response  # type: ignore[literal-required]
        self._disarm()
        self._phase = Phase.BODY
        self._body_began = self.loop.time()
        # Until all of the request has come, an answer to it can only be followed by the connection's end.
        self._keeps_alive = self.cycle.keep_alive
        self.cycle.keep_alive = False
        if version == "1.0":
            self._is_unframed = True
            self.cycle.send = EndedByClose(self.cycle).send  # type: ignore[method-assign]

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_chunks += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        self._phase = Phase.BETWEEN
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive
        super().on_message_complete()

    def _check_progress(self, data: bytes, before: Phase, body_before: int) -> None:
        """Bound what the parser keeps or skips without telling: a head without end, the frame of chunks."""
        if before is Phase.HEAD and self._phase is Phase.HEAD and not self._begun:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.header_bytes:
                raise HeadersTooLarge(f"The headers are larger than {self._limits.header_bytes} bytes.")
        if self._is_chunked and self._phase is not Phase.HEAD:
            if before is Phase.BODY and not self._begun:
                self._chunk_overhead += len(data) - (self._body_bytes - body_before)
            elif before is not Phase.BODY and self._begun <= 1:
                self._chunk_overhead += len(data) - data.find(b"\r\n\r\n") - 4 - self._body_bytes
            try:
                framing.check_chunk_overhead(self._chunk_overhead, self._body_chunks)
            except MalformedRequest:
                self._phase = Phase.BODY  # it is not taken for whole, even if its end has come
                raise

    def _ignore_upgrade(self) -> None:
        """Answer as if no other protocol had been asked for, and close: what follows could be in either."""
        self._is_deaf = True
        self.cycle.keep_alive = False

    @property
    def _is_answered(self) -> bool:
        """Whether no answer is owed to the latest request; there may have been none."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is None or cycle.response_complete

    # time

    def _await_more(self) -> None:
        if self._deadline is None:
            is_body = self._phase is Phase.BODY
            self._arm(framing.body_time_s(self._body_bytes, self._limits) if is_body else self._limits.header_timeout_s)

    def _arm(self, delay_s: float) -> None:
        self._deadline = self.loop.call_later(delay_s, self._check_deadline)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check_deadline(self) -> None:
        self._deadline = None
        if self.flow.read_paused:
            self._arm(PAUSED_S)
        elif self._phase is Phase.BETWEEN:
            self.transport.close()
        elif self._phase is Phase.HEAD:
            self._refuse(RequestTimeout(f"The headers did not arrive within {self._limits.header_timeout_s:g} s."))
        else:
            left_s = framing.body_time_s(self._body_bytes, self._limits) - (self.loop.time() - self._body_began)
            if left_s > 0:
                self._arm(left_s)
            else:
                self._refuse(RequestTimeout("The request body did not arrive in time."))

    # refusal

    def _refuse(self, error: GatewayError) -> None:
        """Answer with `error`, after the answers that are still owed, and close."""
        self._is_deaf = True
        self._disarm()
        owed, latest = len(self.pipeline), self.cycle
        is_answered = self._is_answered
        if self._phase is Phase.BODY and not is_answered:
            if latest.response_started:
                return
            if owed:
                self.pipeline.popleft()
            else:
                latest.disconnected = True
                latest.message_event.set()
                is_answered = True
        self._answer(error, in_turn=not is_answered)

    def _answer(self, error: GatewayError, *, in_turn: bool) -> None:
        self.scope.setdefault("method", "GET")
        request_id = os.urandom(16).hex().encode()
        self.cycle = cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=[*self.server_state.default_headers, (b"x-request-id", request_id)],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        if in_turn:
            self.pipeline.appendleft((cycle, refusing(error)))  # type: ignore[arg-type]
        else:
            self._start_asgi_task(cycle, refusing(error))  # type: ignore[arg-type]


def _refusal(error: Exception, data: bytes) -> GatewayError:
    """What the client hears of an error that reading `data` ended in."""
    if isinstance(error, GatewayError):
        return error
    cause = error.__context__ if isinstance(error, HttpParserCallbackError) else error
    match cause:
        case GatewayError():
            return cause
        case HttpParserInvalidMethodError() if framing.unknown_method_in(data):
            return framing.unknown_method("This method")
        case HttpParserError() | UnicodeError():
            return MalformedRequest("The request is not well-formed HTTP/1.1.")
        case _:
            return InternalError("The server had an error while processing your request.")


def connection_of(scope: Scope) -> ClientConnection:
    connection: ClientConnection = scope[CONNECTION]
    return connection


def forget(scope: Scope) -> None:
    """Let go of connection and response at the end of a request: they hold the scope, and only a collector would."""
    del scope[CONNECTION], scope[RESPONSE]
