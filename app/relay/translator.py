"""The chunks of a resumable stream, on their way to the client. Pure.

From the first worker they lose the token ids that only the gateway asked for. From a worker that continues the stream
they are those of a text completion, and become what the client's stream has: the same id, time, model and kind of
chunk, only text that it does not have yet, and the usage of the whole. Shapes and their order as vLLM 0.32 sends them.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from app.errors import WorkerLost
from app.inference import Route
from app.relay.dialect import DONE
from app.relay.sse import data_of
from app.relay.transcript import Transcript, diverged

CHUNK_OBJECTS = {Route.CHAT: "chat.completion.chunk", Route.COMPLETIONS: "text_completion"}

# Inside a JSON string every quote is escaped, so this finds keys only.
_IDS = re.compile(rb'("(?:prompt_)?token_ids":\s*)\[[^\]]*\]')


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def is_plain(self) -> bool:
        return not (self.reasoning or self.reasoning_content or self.refusal or self.tool_calls)

    @property
    def is_empty(self) -> bool:
        return self.is_plain and self.role is None and self.content is None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Error(msgspec.Struct):
    code: int | str | None = None


class _Chunk(msgspec.Struct):
    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    error: _Error | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_encode = msgspec.json.Encoder().encode


class Translator:
    """Makes one stream for the client of what one worker after another sends, and keeps the transcript of it."""

    def __init__(self, route: Route, transcript: Transcript) -> None:
        self._route = route
        self._transcript = transcript
        self._first: _Chunk | None = None
        self._tokens_before = 0
        self._is_continued = False

    def go_on(self) -> None:
        """The next event comes from a worker that was given the tokens up to the transcript's seam."""
        self._transcript.rewind()
        self._tokens_before = self._transcript.seam.tokens
        self._is_continued = True

    def translate(self, event: bytes) -> bytes:
        """What the client gets of one event, empty for nothing.

        Raises WorkerLost for an error of the worker's own, and for a text that is not the one begun.
        """
        data = data_of(event)
        if not data or data == DONE:
            if data and self._transcript.lags:
                raise diverged()
            return event
        try:
            chunk = _decode_chunk(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._transcript.close("a chunk that was not understood")
            return event
        if chunk.error is not None:
            self._give_up(chunk.error)
            return event
        return self._continued(chunk, data) if self._is_continued else self._begun(chunk, data, event)

    def _give_up(self, error: _Error) -> None:
        """An engine that dies says so inside the stream; what it refuses, another one would refuse too."""
        if self._is_continued or (isinstance(error.code, int) and error.code >= 500):
            raise WorkerLost("The worker reported an error inside its stream.")

    def _begun(self, chunk: _Chunk, data: bytes, event: bytes) -> bytes:
        self._first = self._first or chunk
        prompt = chunk.prompt_token_ids
        is_needed = True
        for choice in chunk.choices:
            prompt = prompt or choice.prompt_token_ids
            if prompt:
                self._transcript.begin(prompt)
            is_needed = self._note(choice)
        if not is_needed:
            return b""
        stripped, ids = _IDS.subn(rb"\1null", data)
        return b"data: %b\n\n" % stripped.replace(b"\n", b" ") if ids else event

    def _note(self, choice: _Choice) -> bool:
        """Note the choice; whether the client would have got its chunk if no token ids had been asked for."""
        delta = choice.delta
        text = (choice.text if delta is None else delta.content) or ""
        if delta is not None and not delta.is_plain:
            self._transcript.close("not plain text")
        elif choice.token_ids is not None:
            self._transcript.add(choice.token_ids, text)
        elif text:
            self._transcript.close("no token ids")
        if choice.finish_reason is not None:
            self._transcript.close("finished")
            return True
        return delta is None or not delta.is_empty

    def _continued(self, chunk: _Chunk, data: bytes) -> bytes:
        body: dict[str, Any] = msgspec.json.decode(data)
        first = self._first or chunk
        body |= {"id": first.id, "object": CHUNK_OBJECTS[self._route], "created": first.created, "model": first.model}
        if body.get("usage"):
            body["usage"] = self._whole_usage(body["usage"])
        choices = [self._choice(index, choice) for index, choice in enumerate(chunk.choices)]
        if choices and choices == [None]:
            return b""
        body["choices"] = choices
        return b"data: %b\n\n" % _encode(body)

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any] | None:
        fresh = self._transcript.add(choice.token_ids or (), choice.text or "")
        if choice.finish_reason is not None:
            if self._transcript.lags:
                raise diverged()
            self._transcript.close("finished")
        elif not fresh:
            return None
        end = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        if self._route is Route.COMPLETIONS:
            return {"index": index, "text": fresh, "logprobs": None, **end, "prompt_token_ids": None, "token_ids": None}
        if choice.finish_reason is None:
            del end["stop_reason"]
        delta = {"content": fresh} if fresh else {}
        return {"index": index, "delta": delta, "logprobs": None, **end, "token_ids": None}

    def _whole_usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Of the whole answer: what was continued from was prompt to this worker, and generated to the client."""
        prompt = usage["prompt_tokens"] - self._tokens_before
        whole = {**usage, "prompt_tokens": prompt}
        whole["completion_tokens"] = (usage.get("completion_tokens") or 0) + self._tokens_before
        details = usage.get("prompt_tokens_details")
        if details and details.get("cached_tokens"):
            whole["prompt_tokens_details"] = {**details, "cached_tokens": min(details["cached_tokens"], prompt)}
        return whole
