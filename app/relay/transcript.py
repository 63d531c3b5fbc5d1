"""What a client has got of one stream, as tokens and as text, and the seam at which another worker can go on. Pure.

Text lags behind tokens. A character may take several tokens, and while stop strings are asked for vLLM (0.32,
`v1/engine/detokenizer.py`) holds back one character less than the longest of them. So the tokens of the chunks and the
text of the chunks never quite belong together, and a worker that were given all delivered tokens as its prompt would
begin in the middle of a character: vLLM then sends the text of the *whole prompt* again (seen with 0.32 and a
byte-level tokenizer). The seam is therefore put where tokens and text are known to agree, and what lies beyond it is
generated again and compared with what the client already has.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from app.errors import WorkerLost

TAIL_MAX_CHARS = 16_384


def diverged() -> WorkerLost:
    """The error for a worker that generates another text than the one that the client has the beginning of."""
    return WorkerLost("The worker was lost, and no other one went on with the same answer.")


class Seam(NamedTuple):
    """So many generated tokens say exactly so many characters."""

    tokens: int
    chars: int


class Transcript:
    """The tokens and the text of one stream. `objection` says why it cannot be resumed any more; empty while it can.

    `held_chars` is what a worker holds back for stop strings; `max_tokens` bounds prompt and answer together, four
    bytes each. Positions in the text count characters from the start of the answer.
    """

    def __init__(self, held_chars: int, max_tokens: int) -> None:
        self.prompt = array("I")
        self.tokens = array("I")
        self.objection = ""
        self._held = held_chars
        self._max_tokens = max_tokens
        self._said = 0
        self._shown = 0
        self._marks: deque[Seam] = deque()
        self._seam = Seam(0, 0)
        self._tail = ""  # what the client has, from `_tail_start` on

    @property
    def seam(self) -> Seam:
        """The last place where another worker can go on; no text beyond it but `has_tail` is with the client."""
        return self._seam

    @property
    def has_tail(self) -> bool:
        """Whether the client has text beyond the seam, which has to be generated again, the same."""
        return self._shown > self._seam.chars

    @property
    def lags(self) -> bool:
        """Whether the worker that goes on has not yet caught up with what the client has."""
        return self._said < self._shown

    def begin(self, prompt: Sequence[int]) -> None:
        """Note the prompt. A later one is that of a continuation, and no news."""
        if not self.prompt and not self.objection:
            self.prompt.extend(prompt)
            self._check_size()

    def add(self, tokens: Sequence[int], text: str) -> str:
        """Note one chunk; returns what of its text the client does not have yet.

        Raises WorkerLost where it is another text than the client's.
        """
        start, self._said = self._said, self._said + len(text)
        fresh = text if start >= self._shown else self._beyond_tail(start, text)
        self._shown += len(fresh)
        if not self.objection:
            self.tokens.extend(tokens)
            self._tail += fresh
            # One token that brought text: it completed a character, so no token before it waits for another.
            # Of several at once the last may wait.
            if text and len(tokens) == 1:
                self._marks.append(Seam(len(self.tokens), self._said + self._held))
            self._advance()
            self._check_size()
        return fresh

    def close(self, objection: str) -> None:
        """From now on the stream cannot be resumed; what was kept for it is forgotten, less what is still compared."""
        if not self.objection:
            self.objection = objection
            self.tokens = array("I")
            self.prompt = array("I")
            self._marks.clear()

    def rewind(self) -> None:
        """Back to the seam: the next chunk is that of a worker which was given the tokens up to there."""
        del self.tokens[self._seam.tokens :]
        self._said = self._seam.chars
        self._marks.clear()

    @property
    def _tail_start(self) -> int:
        return max(0, self._seam.chars - self._held)

    def _beyond_tail(self, start: int, text: str) -> str:
        known = self._tail[start - self._tail_start :]
        common = min(len(known), len(text))
        if text[:common] != known[:common]:
            raise diverged()
        return text[common:]

    def _advance(self) -> None:
        before = self._tail_start
        while self._marks and self._marks[0].chars <= self._shown:
            self._seam = self._marks.popleft()
        if self._tail_start > before:
            self._tail = self._tail[self._tail_start - before :]

    def _check_size(self) -> None:
        if len(self.prompt) + len(self.tokens) > self._max_tokens:
            self.close("too long")
        elif len(self._tail) > TAIL_MAX_CHARS:
            self.close("too much text at once")
