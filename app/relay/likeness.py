"""What the chunks of one stream have in common: those that differ in their text only need not be read. Pure."""

from __future__ import annotations

import re
from typing import Self

_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)":"([^"\\\x00-\x1f]+)"')
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]+')


class Likeness:
    """An event that carries a token, but for its text.

    The text is a JSON string without escapes that is not empty. Another such string in its place makes an event of the
    same shape, so that what was found out about the one holds for the other: it carries a token and nothing else.
    (Whether the bytes of that string are UTF-8 is nobody's concern here: it is relayed and counted either way.)
    """

    __slots__ = ("_head", "_tail")

    def __init__(self, head: bytes, tail: bytes) -> None:
        self._head = head
        self._tail = tail

    @classmethod
    def of(cls, event: bytes) -> Self | None:
        """That of `event`, which is whole; None where no such text is found in it."""
        found = _TEXT.search(event)
        return None if found is None else cls(event[: found.start(1)], event[found.end(1) :] + b"\r\n")

    def has(self, chunk: bytes) -> bool:
        """Whether `chunk` is exactly one chunk of HTTP/1.1 (RFC 9112, section 7.1), and in it one event like this."""
        begin = chunk.find(b"\r\n") + 2
        return (
            chunk.startswith(self._head, begin)
            and chunk.endswith(self._tail)
            and chunk.startswith(b"%x\r\n" % (len(chunk) - begin - 2))
            and _PLAIN.fullmatch(chunk, begin + len(self._head), len(chunk) - len(self._tail)) is not None
        )
