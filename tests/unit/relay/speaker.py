"""A model that says one fixed thing, and a detokenizer that treats it as vLLM's does: the reference for resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

PROMPT = (7, 8, 9)
PROMPT_TEXT = "the secret system prompt"
SPECIAL = b""
"""A token that is no text, like a mark of the chat template."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a request matters to the speaker; `chunks` are the numbers of tokens in successive chunks, repeated."""

    prompt: Sequence[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    chunks: tuple[int, ...] = (1,)
    is_chat: bool = True
    shows_ids: bool = True


class Speaker:
    """Says `tokens`, each some bytes of UTF-8, as a continuation of the prompt or of the prompt and its own tokens.

    Token ids are 1,000 plus the position, so that a gap or a repetition could not go unnoticed.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens

    def events(self, asked: Asked, identity: str = "one") -> Iterator[bytes]:
        """The stream of an answer, one event each."""
        kind = "chat.completion.chunk" if asked.is_chat else "text_completion"
        head: Json = {"id": identity, "object": kind, "created": len(identity), "model": f"m-{identity}"}
        prompt = list(asked.prompt) if asked.shows_ids else None
        if asked.is_chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield _event({**head, "choices": [role], "prompt_token_ids": prompt, "prompt_text": None})
            prompt = None
        said = 0
        for ids, text, finish in self._chunks(asked):
            said += len(ids)
            end: Json = {"finish_reason": finish, "stop_reason": None}
            if asked.is_chat:
                if not text and not finish and not asked.shows_ids:
                    continue
                end = end if finish else {"finish_reason": None}
                choice: Json = {"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, **end}
            else:
                choice = {"index": 0, "text": text, "logprobs": None, **end, "prompt_token_ids": prompt}
                prompt = None
            yield _event({**head, "choices": [{**choice, "token_ids": ids if asked.shows_ids else None}]})
        counts = {"prompt_tokens": len(asked.prompt), "total_tokens": len(asked.prompt) + said}
        yield _event({**head, "choices": [], "usage": {**counts, "completion_tokens": said}})
        yield b"data: [DONE]\n\n"

    def _chunks(self, asked: Asked) -> Iterator[tuple[list[int], str, str | None]]:
        """(token ids, text, finish reason) of each chunk."""
        steps = list(self._steps(asked))
        at, sizes = 0, iter(asked.chunks * len(steps))
        while at < len(steps):
            part = steps[at : at + next(sizes)]
            at += len(part)
            yield [token for token, _, _ in part], "".join(text for _, text, _ in part), part[-1][2]

    def _steps(self, asked: Asked) -> Iterator[tuple[int, str, str | None]]:
        """One token after another: its id, the text that it sets free, and why it is the last.

        As in vLLM 0.32: text comes when the bytes so far are whole characters, less what is held back for stop strings.
        A prompt that ends inside a character is told once more, whole, with the first text.
        """
        before = len(asked.prompt) - len(PROMPT)
        assert list(asked.prompt) == [*PROMPT, *range(1000, 1000 + before)]
        text, pending = "", b""
        if before and not _is_whole(b"".join(self._tokens[:before])):
            text, pending = PROMPT_TEXT, b"".join(self._tokens[:before])
        held = max(map(len, asked.stop), default=1) - 1
        sent = 0
        for number, token in enumerate(self._tokens[before:], start=1):
            pending += token
            if _is_whole(pending):
                text, pending = text + pending.decode(), b""
            found = min(((text.find(stop), stop) for stop in asked.stop if stop in text), default=None)
            last = before + number == len(self._tokens)
            finish = "stop" if found or last else "length" if number == asked.max_tokens else None
            until = found[0] if found else len(text) if finish else max(sent, len(text) - held)
            yield 1000 + before + number - 1, text[sent:until], finish
            sent = until
            if finish:
                return


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _event(payload: Json) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
