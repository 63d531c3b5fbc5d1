"""The text of an answer, overheard on its way."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from app.inference import InferenceRequest
from app.relay.answer import StreamedAnswer
from app.relay.sse import data_of
from app.telemetry.account import Account

HEARD_MAX_CHARS = 64 * 1024


class _Said(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Said | None = None
    delta: _Said | None = None
    text: str | None = None


class _Part(msgspec.Struct):
    choices: list[_Choice] = []


_decode = msgspec.json.Decoder(_Part).decode


def text_of(data: bytes) -> str | None:
    """The text of the first choice in a whole answer or a chunk; None for what has none, or cannot be read."""
    try:
        choices = _decode(data).choices
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not choices:
        return None
    said = choices[0].message or choices[0].delta
    return choices[0].text if said is None else said.content


class TappedStream(StreamedAnswer):
    """A stream that tells its text once it is whole. One of more than HEARD_MAX_CHARS tells nothing."""

    __slots__ = ("_chars", "_heard", "_tell")

    def __init__(
        self,
        answer: StreamedAnswer,
        request: InferenceRequest,
        account: Account,
        clock: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(answer.stream, request, account, clock)
        self._tell = tell
        self._heard: list[str] = []
        self._chars = 0

    def _pass(self, data: bytes) -> bytes:
        return self._take(self._splitter.feed(data))

    def _take(self, events: list[bytes]) -> bytes:
        for event in events:
            text = text_of(data_of(event))
            if text and self._chars <= HEARD_MAX_CHARS:
                self._heard.append(text)
                self._chars += len(text)
        part = super()._take(events)
        if self.is_whole and self._chars <= HEARD_MAX_CHARS:
            self._tell("".join(self._heard))
        return part
