"""The answers of vLLM 0.32's chat and completion routes, key for key and in its order, null extension fields included.

Shapes follow recorded answers (tests/wire). Plain bodies hold every field; chunks hold only what vLLM sets on them, and
the usage chunk holds no nulls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.fakes.generation import Choice, Token, logprob
from tests.fakes.parsing import Job
from tests.fakes.vocabulary import Vocabulary

Json = dict[str, Any]
FINGERPRINT = "vllm-0.32.0-d6fc5c20"
CHUNK_OBJECTS = {"chat": "chat.completion.chunk", "completion": "text_completion"}


@dataclass(frozen=True, slots=True)
class Draft:
    """All that an answer is written from. `cached` is the prefix cache's share of the prompt tokens."""

    job: Job
    choices: Sequence[Choice]
    identity: str
    created: int
    model: str
    cached: int
    block_size: int
    prompt_tokens_details: bool
    vocabulary: Vocabulary

    @property
    def generated(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def wants_ids(self) -> bool:
        return bool(self.job.body.get("return_token_ids"))

    def ids(self, tokens: Sequence[Token]) -> list[int] | None:
        return self.vocabulary.encode(token.piece for token in tokens) if self.wants_ids else None

    def prompt_ids(self, prompt: int = 0) -> list[int] | None:
        return list(self.job.prompt_ids[prompt]) if self.wants_ids else None

    @property
    def created_cache(self) -> int:
        """Prompt tokens newly put into the prefix cache: whole blocks only."""
        return self.job.prompt_tokens // self.block_size * self.block_size - self.cached


def usage(draft: Draft) -> Json:
    """Token counts of a whole answer."""
    prompt, generated = draft.job.prompt_tokens, draft.generated
    details = None
    if draft.prompt_tokens_details:
        created = draft.created_cache if draft.job.kind == "chat" else None
        details = {"cached_tokens": draft.cached, "created_cache_tokens": created, "multimodal_tokens": None}
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": details,
        "completion_tokens_details": None,
    }


def chat_body(draft: Draft) -> Json:
    """A `chat.completion`."""
    return {
        "id": draft.identity,
        "object": "chat.completion",
        "created": draft.created,
        "model": draft.model,
        "choices": [_chat_choice(draft, choice) for choice in draft.choices],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": usage(draft),
        "prompt_logprobs": _prompt_logprobs(draft, draft.job.prompts[0]) if _wants_prompt_logprobs(draft) else None,
        "prompt_token_ids": draft.prompt_ids(),
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _chat_choice(draft: Draft, choice: Choice) -> Json:
    message: Json = {
        "role": "assistant",
        "content": choice.text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    if choice.tool_call is not None:
        function = {"name": choice.tool_call.name, "arguments": choice.tool_call.arguments}
        message["tool_calls"] = [{"id": _tool_id(draft, choice), "type": "function", "function": function}]
    message["reasoning"] = None
    return {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(draft.job, choice.tokens),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": draft.ids(choice.tokens),
        "routed_experts": None,
    }


def _tool_id(draft: Draft, choice: Choice) -> str:
    return f"chatcmpl-tool-{draft.identity[-14:]}{choice.index:02x}"


def chat_logprobs(job: Job, tokens: Sequence[Token]) -> Json | None:
    """Log probabilities of chat tokens with the wanted number of alternatives, the chosen token first."""
    if not job.body.get("logprobs"):
        return None
    ranks = range(int(job.body.get("top_logprobs") or 0))
    return {"content": [_chat_logprob(token.piece, ranks) for token in tokens]}


def _chat_logprob(piece: str, ranks: range) -> Json:
    top = [_ranked(piece, rank) for rank in ranks]
    return {**_ranked(piece, 0), "top_logprobs": top}


def _ranked(piece: str, rank: int) -> Json:
    token = piece if rank == 0 else f"{piece}~{rank}"
    return {"token": token, "logprob": logprob(piece, rank), "bytes": list(token.encode("utf-8", "replace"))}


def completion_body(draft: Draft) -> Json:
    """A `text_completion`."""
    return {
        "id": draft.identity,
        "object": "text_completion",
        "created": draft.created,
        "model": draft.model,
        "choices": [_completion_choice(draft, choice) for choice in draft.choices],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": usage(draft),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _completion_choice(draft: Draft, choice: Choice) -> Json:
    echoed = draft.job.prompts[choice.prompt] if draft.job.body.get("echo") else ()
    tokens = [*(Token(piece, piece) for piece in echoed), *choice.tokens]
    with_logprobs = draft.job.body.get("logprobs") is not None
    return {
        "index": choice.index,
        "text": "".join(echoed) + choice.text,
        "logprobs": completion_logprobs(draft.job, tokens, 0, bool(echoed)),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": draft.ids(choice.tokens),
        "prompt_logprobs": _prompt_logprobs(draft, echoed) if echoed and with_logprobs else None,
        "prompt_token_ids": draft.prompt_ids(choice.prompt),
        "routed_experts": None,
    }


def completion_logprobs(job: Job, tokens: Sequence[Token], offset: int, echoed: bool = False) -> Json | None:
    """Log probabilities in the completion shape; the first token of an echoed prompt has none."""
    if job.body.get("logprobs") is None:
        return None
    offsets = [offset + sum(len(token.piece) for token in tokens[:position]) for position in range(len(tokens))]
    values: list[float | None] = [logprob(token.piece) for token in tokens]
    ranks = range(max(1, int(job.body["logprobs"])))
    tops: list[Json | None] = [
        {ranked["token"]: ranked["logprob"] for ranked in (_ranked(token.piece, rank) for rank in ranks)}
        for token in tokens
    ]
    if echoed and tokens:
        values[0] = tops[0] = None
    return {
        "text_offset": offsets,
        "token_logprobs": values,
        "tokens": [token.piece for token in tokens],
        "top_logprobs": tops,
    }


def _wants_prompt_logprobs(draft: Draft) -> bool:
    return draft.job.body.get("prompt_logprobs") is not None or bool(draft.job.body.get("echo"))


def _prompt_logprobs(draft: Draft, echoed: Sequence[str]) -> list[Json | None]:
    rest = list(zip(draft.vocabulary.encode(echoed), echoed, strict=True))[1:]
    known = [{str(key): {"logprob": logprob(piece), "rank": 1, "decoded_token": piece}} for key, piece in rest]
    return [None, *known]


def chunks(draft: Draft) -> Iterator[tuple[int, Json]]:
    """(step, chunk) of a streamed answer in order: role chunks (chat), one chunk per token, usage; without `[DONE]`.

    Steps count the engine's steps from 1: the role chunks leave together with the first token.
    """
    if draft.job.kind == "chat":
        for choice in draft.choices:
            yield 1, _role_chunk(draft, choice)
    steps = 1
    for position in range(max((len(choice.tokens) for choice in draft.choices), default=0)):
        steps = position + 1
        for choice in draft.choices:
            if position < len(choice.tokens) and _has_chunk(draft, choice, position):
                yield steps, _token_chunk(draft, choice, position)
    if draft.job.include_usage:
        yield steps, _usage_chunk(draft)


def _has_chunk(draft: Draft, choice: Choice, position: int) -> bool:
    """A chat token that shows nothing is sent only as the last, or for its log probability or id."""
    shown = draft.job.kind != "chat" or choice.tokens[position].shows != "nothing"
    return shown or position == len(choice.tokens) - 1 or draft.wants_ids or bool(draft.job.body.get("logprobs"))


def _chunk(draft: Draft, choices: list[Json]) -> Json:
    return {
        "id": draft.identity,
        "object": CHUNK_OBJECTS[draft.job.kind],
        "created": draft.created,
        "model": draft.model,
        "choices": choices,
    }


def _running_usage(draft: Draft, generated: int, prompt: int = 0) -> Json:
    prompt_tokens = len(draft.job.prompts[prompt])
    counts: Json = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + generated,
        "completion_tokens": generated,
    }
    return {**counts, "completion_tokens_details": None} if draft.job.kind == "chat" else counts


def _role_chunk(draft: Draft, choice: Choice) -> Json:
    delta = {"role": "assistant", "content": ""}
    chunk = _chunk(draft, [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])
    if draft.job.continuous_usage:
        chunk["usage"] = _running_usage(draft, 0)
    return {**chunk, "prompt_token_ids": draft.prompt_ids(), "prompt_text": None}


def _token_chunk(draft: Draft, choice: Choice, position: int) -> Json:
    last = position == len(choice.tokens) - 1
    build = _chat_delta if draft.job.kind == "chat" else _completion_delta
    chunk = _chunk(draft, [build(draft, choice, position, last)])
    # The fingerprint marks the last message of a stream: the usage chunk when there is one.
    if last and not draft.job.include_usage:
        chunk["system_fingerprint"] = FINGERPRINT
    if draft.job.continuous_usage:
        chunk["usage"] = _running_usage(draft, position + 1, choice.prompt)
    return chunk


def _chat_delta(draft: Draft, choice: Choice, position: int, last: bool) -> Json:
    token = choice.tokens[position]
    out: Json = {
        "index": choice.index,
        "delta": _delta(draft, choice, token),
        "logprobs": chat_logprobs(draft.job, [token]),
        "finish_reason": choice.finish_reason if last else None,
    }
    if last:
        out["stop_reason"] = choice.stop_reason
    return {**out, "token_ids": draft.ids([token])}


def _delta(draft: Draft, choice: Choice, token: Token) -> Json:
    if token.shows == "text":
        return {"content": token.text}
    if token.shows == "name":
        call: Json = {"id": _tool_id(draft, choice), "type": "function", "index": 0, "function": {"name": token.text}}
        return {"content": None, "tool_calls": [call]}
    if token.shows == "arguments":
        return {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": token.text}}]}
    return {}


def _completion_delta(draft: Draft, choice: Choice, position: int, last: bool) -> Json:
    token = choice.tokens[position]
    echoed = draft.job.prompts[choice.prompt] if position == 0 and draft.job.body.get("echo") else ()
    before = "".join(earlier.piece for earlier in choice.tokens[:position])
    reported = [*(Token(piece, piece) for piece in echoed), token]
    return {
        "index": choice.index,
        "text": "".join(echoed) + token.text,
        "logprobs": completion_logprobs(draft.job, reported, len(before), bool(echoed)),
        "finish_reason": choice.finish_reason if last else None,
        "stop_reason": choice.stop_reason if last else None,
        "prompt_token_ids": _first_ids(draft, choice) if position == 0 else None,
        "token_ids": draft.ids([token]),
    }


def _first_ids(draft: Draft, choice: Choice) -> list[int] | None:
    """An echoed prompt comes with its ids, asked for or not."""
    echoed = bool(draft.job.body.get("echo"))
    return list(draft.job.prompt_ids[choice.prompt]) if echoed or draft.wants_ids else None


def _usage_chunk(draft: Draft) -> Json:
    prompt, generated = draft.job.prompt_tokens, draft.generated
    counts: Json = {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}
    if draft.prompt_tokens_details:
        counts["prompt_tokens_details"] = {"cached_tokens": draft.cached}
        if draft.job.kind == "chat":
            counts["prompt_tokens_details"]["created_cache_tokens"] = draft.created_cache
    return {**_chunk(draft, []), "usage": counts, "system_fingerprint": FINGERPRINT}
