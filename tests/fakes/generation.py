"""What the fake model says: a function of the request alone, so that a test knows every byte of the answer.

- With a `nonce` (an unknown extra field, as vLLM accepts) the answer is ` <nonce>-0 <nonce>-1 …`, one token each, so
  that a lost, doubled or foreign token is visible.
- Otherwise it is the last user message word by word, then the end token; with `ignore_eos` or `min_tokens` the message
  is repeated until the limit is reached.
- Structured output and tool calls are a small valid example of the schema.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from tests.fakes.parsing import Job, json_schema
from tests.fakes.vocabulary import END_OF_TEXT, pieces

DEFAULT_NONCE_TOKENS = 16
MULTIBYTE = (" é", " 漢字", " 🙂")


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token and what becomes visible with it.

    `shows` is text (`text`, less than `piece` when a stop string is cut off), name or arguments of a tool call, or
    nothing: the end token, a held-back stop string, the markup around a tool call. A token that shows nothing has no
    chunk of its own, so chunks are not tokens.
    """

    piece: str
    text: str = ""
    shows: str = "text"


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer: its tokens, its text or tool call, and why it ended. A call cut short is no call, but text."""

    index: int
    prompt: int
    tokens: tuple[Token, ...]
    text: str
    finish_reason: str
    stop_reason: str | None = None
    tool_call: ToolCall | None = None


END = Token(END_OF_TEXT, shows="nothing")


def generate(job: Job, *, multibyte: bool = False) -> list[Choice]:
    """All choices of a request in the order of their index. `multibyte` puts non-ASCII characters in front."""
    call = _tool_call(job)
    if call is not None:
        return [_tool_choice(job, index, call) for index in range(job.sequences)]
    return [_text_choice(job, index, MULTIBYTE if multibyte else ()) for index in range(job.sequences)]


def _text_choice(job: Job, index: int, before: Iterable[str]) -> Choice:
    prompt = index // job.n
    words = [*before, *_words(job, prompt, index % job.n)]
    endless = job.body.get("ignore_eos") or (job.body.get("min_tokens") or 0) > len(words)
    if endless:
        words = list(islice(cycle(words or [" x"]), job.max_tokens))
    elif len(words) < job.max_tokens:
        return _stopped(job, index, prompt, [*(Token(word, word) for word in words), END], "stop")
    tokens = [Token(word, word) for word in words[: job.max_tokens]]
    return _stopped(job, index, prompt, tokens, "length")


def _words(job: Job, prompt: int, rotation: int) -> list[str]:
    nonce = job.body.get("nonce")
    if nonce is not None:
        asked = job.body.get("max_tokens") or job.body.get("max_completion_tokens") or DEFAULT_NONCE_TOKENS
        return [f" {nonce}-{position}" for position in range(min(int(asked), job.max_tokens))]
    allowed = (job.body.get("structured_outputs") or {}).get("choice")
    if allowed:
        return pieces(allowed[0])
    wanted = job.body.get("response_format") or {}
    schema = json_schema(job.body)
    if schema is not None:
        return pieces(json.dumps(example(schema), ensure_ascii=False))
    if wanted.get("type") == "json_object":
        return pieces(json.dumps({"answer": job.user_text}, ensure_ascii=False))
    text = "".join(job.prompts[prompt]).strip() if job.kind == "completion" else job.user_text
    words = pieces(text)
    return words[rotation % len(words) :] + words[: rotation % len(words)] if words else []


def _stopped(job: Job, index: int, prompt: int, tokens: list[Token], reason: str) -> Choice:
    """Cut at the first stop string, which is not part of the text; the tokens up to it are counted."""
    stops = job.body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    text = "".join(token.text for token in tokens)
    found = min(((text.find(stop), stop) for stop in stops if stop in text), default=None)
    if found is None:
        return Choice(index, prompt, tuple(tokens), text, reason)
    at, stop = found
    kept: list[Token] = []
    seen = 0
    for token in tokens:
        visible = token.text[: max(0, at - seen)]
        kept.append(Token(token.piece, visible, "text" if visible else "nothing"))
        seen += len(token.text)
        if seen >= at + len(stop):
            break
    return Choice(index, prompt, tuple(kept), text[:at], "stop", stop)


def _tool_call(job: Job) -> ToolCall | None:
    tools = job.body.get("tools") or []
    choice = job.body.get("tool_choice", "auto" if tools else "none")
    if isinstance(choice, dict):
        named = choice.get("function", {}).get("name")
        tools = [tool for tool in tools if tool["function"]["name"] == named]
    elif choice == "auto":
        # The fake model calls a tool when the user names it.
        tools = [tool for tool in tools if tool["function"]["name"] in job.user_text]
    elif choice != "required":
        return None
    if not tools:
        return None
    function = tools[0]["function"]
    return ToolCall(function["name"], json.dumps(example(function.get("parameters") or {}), ensure_ascii=False))


def _tool_choice(job: Job, index: int, call: ToolCall) -> Choice:
    """A call in Hermes' markup, of which a stream shows the name and the arguments."""
    *before, last = pieces(f'<tool_call>\n{{"name": "{call.name}", "arguments":')
    tokens = [*(Token(piece, shows="nothing") for piece in before), Token(last, call.name, "name")]
    tokens += [Token(piece, piece, "arguments") for piece in pieces(call.arguments)]
    tokens += [*(Token(piece, shows="nothing") for piece in pieces("}\n</tool_call>")), END]
    if len(tokens) > job.max_tokens:
        kept = tuple(tokens[: job.max_tokens])
        return Choice(index, index // job.n, kept, "".join(token.piece for token in kept), "length")
    reason = "stop" if isinstance(job.body.get("tool_choice"), dict) else "tool_calls"
    return Choice(index, index // job.n, tuple(tokens), "", reason, tool_call=call)


def example(schema: Mapping[str, Any]) -> Any:
    """A small value that obeys a JSON schema (types, enum, const, required, maxLength, minItems; not `$ref`)."""
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: example(part) for name, part in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [example(schema.get("items") or {"type": "string"}) for _ in range(max(1, schema.get("minItems", 1)))]
    if kind == "string":
        return "Paris"[: schema.get("maxLength", 5)]
    simple: dict[str, Any] = {"integer": schema.get("minimum", 7), "number": 0.5, "boolean": True}
    return simple.get(kind)


def logprob(piece: str, rank: int = 0) -> float:
    """A made-up log probability: stable for a piece, falling with its rank."""
    return -0.01 - (zlib.crc32(piece.encode("utf-8", "surrogatepass")) % 1000) / 1000 - 2.0 * rank
