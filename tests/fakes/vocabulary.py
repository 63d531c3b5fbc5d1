"""Words to token ids and back: one word (with the space before it), mark or blank is one token."""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable

_PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s")

END_OF_TEXT = "<|im_end|>"
_DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def pieces(text: str) -> list[str]:
    """Cut text into tokens; joined they are the text again."""
    return _PIECE.findall(text)


def chat_pieces(messages: Iterable[tuple[str, str]]) -> list[str]:
    """Apply a ChatML template to (role, text) pairs: a default system message, and the opening of the answer."""
    turns = list(messages)
    if not turns or turns[0][0] != "system":
        turns.insert(0, ("system", _DEFAULT_SYSTEM))
    out: list[str] = []
    for role, text in turns:
        out += ["<|im_start|>", role, "\n", *pieces(text), END_OF_TEXT, "\n"]
    return [*out, "<|im_start|>", "assistant", "\n"]


class Vocabulary:
    """Ids are a checksum of the piece, so all workers agree; the way back knows the latest 65,536 pieces seen."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._by_id: OrderedDict[int, str] = OrderedDict()

    def encode(self, parts: Iterable[str]) -> list[int]:
        ids = []
        for part in parts:
            token = zlib.crc32(part.encode("utf-8", "surrogatepass")) & 0x7FFFFFFF
            self._by_id[token] = part
            ids.append(token)
        while len(self._by_id) > self._limit:
            self._by_id.popitem(last=False)
        return ids

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Pieces of token ids; an id never seen reads ` t<id>`."""
        return [self._by_id.get(token, f" t{token}") for token in ids]
