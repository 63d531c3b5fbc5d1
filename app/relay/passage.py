"""The short way: of chunks that differ in their text only, one is read, and the others pass as they came."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)":"([^"\\\x00-\x1f]+)"')
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]+')


@dataclass(frozen=True, slots=True)
class Way:
    """Where what passes goes: the chunk to `write`, the time on `clock` to `token`, and what they raise to `failed`."""

    write: Callable[[bytes], None]
    token: Callable[[float], None]
    failed: Callable[[Exception], None]
    clock: Callable[[], float]


class Passage:
    """What one stream's chunks have in common, and where those go that have it.

    The text is a JSON string without escapes that is not empty. Another such string in its place makes an event of the
    same shape, so that what was found out about the one holds for the other: it carries a token and nothing else.
    (Whether the bytes of that string are UTF-8 is nobody's concern here: it is relayed and counted either way.)

    One small object and one function, because both are cold for every chunk: between two chunks of a stream lie those
    of all the others.
    """

    __slots__ = ("_clock", "_failed", "_head", "_tail", "_token", "_write")

    def __init__(self, head: bytes, tail: bytes, way: Way) -> None:
        self._head = head
        self._tail = tail
        self._write, self._token, self._failed, self._clock = way.write, way.token, way.failed, way.clock

    @classmethod
    def like(cls, event: bytes, way: Way) -> Self | None:
        """That of chunks like `event`, which is whole and carries a token; None where no such text is found in it."""
        found = _TEXT.search(event)
        return None if found is None else cls(event[: found.start(1)], event[found.end(1) :] + b"\r\n", way)

    def take(self, chunk: bytes) -> bool:
        """Pass `chunk` on if it is exactly one chunk of HTTP/1.1 (RFC 9112, section 7.1), and in it one event alike."""
        begin = chunk.find(b"\r\n") + 2
        if (
            chunk.startswith(self._head, begin)
            and chunk.endswith(self._tail)
            and chunk.startswith(b"%x\r\n" % (len(chunk) - begin - 2))
            and _PLAIN.fullmatch(chunk, begin + len(self._head), len(chunk) - len(self._tail)) is not None
        ):
            try:
                self._token(self._clock())
                self._write(chunk)
            except Exception as error:  # noqa: BLE001 - a callback of the worker's connection, which has no part in it
                self._failed(error)
            return True
        return False
