"""What the fake model says: a function of the request alone, so that a test knows every byte of the answer.

- With a `nonce` (an unknown extra field, as vLLM accepts) the answer is ` <nonce>-0 <nonce>-1 …`, one token each, so
  that a lost, doubled or foreign token is visible.
- Otherwise it is the last user message word by word, then the end token; with `ignore_eos` or `min_tokens` the message
  is repeated until the limit is reached.
- A completion of token ids goes on with the answer that they end in: a prompt and the first k tokens of what it was
  answered with are answered with the rest. (Given as text, a prompt is never taken for that.)
- Structured output and tool calls are a small valid example of the schema.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
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
    if job.kind == "completion" and not isinstance(job.body["prompt"][0], str):
        words = _rest(job.prompts[prompt])
    elif job.kind == "completion":
        words = pieces("".join(job.prompts[prompt]).strip())
    else:
        words = pieces(job.user_text)
    return words[rotation % len(words) :] + words[: rotation % len(words)] if words else []


def _rest(prompt: Sequence[str]) -> list[str]:
    """What is left of the answer that begins inside `prompt`: all of it where none has begun."""
    opening = ["<|im_start|>", "assistant", "\n"]
    for at in range(len(prompt) - len(opening), -1, -1):
        if list(prompt[at : at + len(opening)]) == opening:
            return pieces(_last_user_text(prompt[:at]))[len(prompt) - at - len(opening) :]
    whole = next(size for size in range(1, len(prompt) + 1) if prompt[size:] == prompt[: len(prompt) - size])
    return pieces("".join(prompt[:whole]).strip())[len(prompt) - whole :]


def _last_user_text(prompt: Sequence[str]) -> str:
    begin = max(at for at in range(len(prompt)) if list(prompt[at : at + 2]) == ["<|im_start|>", "user"])
    return "".join(prompt[begin + 3 : prompt.index(END_OF_TEXT, begin)])


def _stopped(job: Job, index: int, prompt: int, tokens: list[Token], reason: str) -> Choice:
    """Cut at the first stop string, which is not part of the text; the tokens up to it are counted."""
    stops = job.body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    text = "".join(token.text for token in tokens)
    found = min(((text.find(stop), stop) for stop in stops if stop in text), default=None)
    held = max(map(len, stops), default=1) - 1
    if found is None:
        return Choice(index, prompt, _held_back(tokens, len(text), held), text, reason)
    at, stop = found
    seen = [*accumulate(len(token.text) for token in tokens)]
    kept = 1 + next(number for number, end in enumerate(seen) if end >= at + len(stop))
    return Choice(index, prompt, _held_back(tokens[:kept], at, held), text[:at], "stop", stop)


def _held_back(tokens: Sequence[Token], until: int, held: int) -> tuple[Token, ...]:
    """What each token sets free of the text up to `until`: all but `held` characters, which may begin a stop string."""
    text = "".join(token.text for token in tokens)
    shown, seen, out = 0, 0, list[Token]()
    for number, token in enumerate(tokens, start=1):
        seen += len(token.text)
        end = until if number == len(tokens) else max(shown, min(until, seen - held))
        out.append(Token(token.piece, text[shown:end], "text" if end > shown else "nothing"))
        shown = end
    return tuple(out)


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
