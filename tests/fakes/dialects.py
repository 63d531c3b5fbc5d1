"""The answers of vLLM's two other generating routes: OpenAI Responses and Anthropic Messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.fakes.answers import Draft

Json = dict[str, Any]
Event = tuple[int, str, Json]
"""Engine step, event name, payload."""


def responses_body(draft: Draft) -> Json:
    """A completed `response`."""
    choice = draft.choices[0]
    length = choice.finish_reason == "length"
    status = "incomplete" if length else "completed"
    reason = {"reason": "max_output_tokens"} if length else None
    message = _message(draft, choice.text, "completed")
    return _response(draft, status=status, incomplete=reason, output=[message], usage=_responses_usage(draft))


def _response(draft: Draft, status: str, incomplete: Json | None, output: list[Json], usage: Json | None) -> Json:
    body = draft.job.body
    return {
        "id": draft.identity,
        "created_at": draft.created,
        "incomplete_details": incomplete,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": draft.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": float(body.get("temperature", 1.0)),
        "tool_choice": "none",
        "tools": [],
        "top_p": float(body.get("top_p", 1.0)),
        "background": False,
        "max_output_tokens": draft.job.max_tokens,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": usage,
        "user": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _message(draft: Draft, text: str | None, status: str) -> Json:
    content = [] if text is None else [_part(text, None)]
    return {
        "id": _message_id(draft),
        "content": content,
        "role": "assistant",
        "status": status,
        "type": "message",
        "phase": None,
    }


def _message_id(draft: Draft) -> str:
    return f"msg_{draft.identity.rpartition('_')[2]}"


def _part(text: str, logprobs: list[Json] | None) -> Json:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def _responses_usage(draft: Draft) -> Json:
    prompt, generated = draft.job.prompt_tokens, draft.generated
    read = {
        "cached_tokens": draft.cached,
        "cache_write_tokens": draft.created_cache if draft.prompt_tokens_details else 0,
    }
    return {
        "input_tokens": prompt,
        "input_tokens_details": {**read, "input_tokens_per_turn": [], "cached_tokens_per_turn": []},
        "output_tokens": generated,
        "output_tokens_details": {
            "reasoning_tokens": 0,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": prompt + generated,
    }


def responses_events(draft: Draft) -> Iterator[Event]:
    """The named events of a streamed response, numbered, from `response.created` to `response.completed`."""
    for number, (step, name, fields) in enumerate(_responses_steps(draft)):
        yield step, name, dict(sorted({**fields, "sequence_number": number, "type": name}.items()))


def _responses_steps(draft: Draft) -> Iterator[Event]:
    choice, place = draft.choices[0], {"output_index": 0, "item_id": _message_id(draft), "content_index": 0}
    opened = _response(draft, status="in_progress", incomplete=None, output=[], usage=None)
    yield 0, "response.created", {"response": opened}
    yield 0, "response.in_progress", {"response": opened}
    yield 1, "response.output_item.added", {"item": _message(draft, None, "in_progress"), "output_index": 0}
    yield 1, "response.content_part.added", {**place, "part": _part("", [])}
    for step, token in enumerate(choice.tokens, start=1):
        if token.shows == "text" and token.text:
            yield step, "response.output_text.delta", {**place, "delta": token.text, "logprobs": []}
    last = len(choice.tokens)
    yield last, "response.output_text.done", {**place, "text": choice.text, "logprobs": []}
    yield last, "response.content_part.done", {**place, "part": _part(choice.text, None)}
    yield last, "response.output_item.done", {"item": _message(draft, choice.text, "completed"), "output_index": 0}
    yield last, "response.completed", {"response": responses_body(draft)}


def messages_body(draft: Draft) -> Json:
    """An Anthropic `message`."""
    choice = draft.choices[0]
    content: list[Json] = [{"type": "text", "text": choice.text}]
    if choice.tool_call is not None:
        call = {"type": "tool_use", "id": f"chatcmpl-tool-{draft.identity[-16:]}", "name": choice.tool_call.name}
        content = [{**call, "input": json.loads(choice.tool_call.arguments)}]
    return {
        "id": draft.identity,
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": draft.model,
        "stop_reason": _messages_stop(draft),
        "usage": _messages_usage(draft, draft.generated),
    }


def _messages_stop(draft: Draft) -> str:
    choice = draft.choices[0]
    if choice.finish_reason == "length":
        return "max_tokens"
    if choice.tool_call is not None:
        return "tool_use"
    return "stop_sequence" if choice.stop_reason else "end_turn"


def _messages_usage(draft: Draft, generated: int) -> Json:
    prompt = draft.job.prompt_tokens
    if not draft.prompt_tokens_details:
        return {"input_tokens": prompt, "output_tokens": generated}
    return {
        "input_tokens": prompt - draft.cached,
        "output_tokens": generated,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": draft.cached,
    }


def messages_error(body: Mapping[str, Any]) -> Json:
    """vLLM's error object in Anthropic's shape, without param and code."""
    error = body["error"]
    return {"type": "error", "error": {"type": error["type"], "message": error["message"]}}


def messages_events(draft: Draft) -> Iterator[Event]:
    """The named events of a streamed message, from `message_start` to `message_stop`."""
    choice = draft.choices[0]
    # Before the answer the cache's share is not known: the usage counts the whole prompt.
    unknown = {"input_tokens": draft.job.prompt_tokens, "output_tokens": 0}
    start = {**messages_body(draft), "content": [], "stop_reason": None}
    del start["usage"]
    start |= {"stop_sequence": None, "usage": unknown}
    block = {"type": "text", "text": ""}
    yield 1, "message_start", {"type": "message_start", "message": start}
    yield 1, "content_block_start", {"type": "content_block_start", "content_block": block, "index": 0}
    for step, token in enumerate(choice.tokens, start=1):
        if token.shows == "text" and token.text:
            delta = {"type": "text_delta", "text": token.text}
            yield step, "content_block_delta", {"type": "content_block_delta", "delta": delta, "index": 0}
    last = len(choice.tokens)
    stop = {"stop_reason": _messages_stop(draft), "stop_sequence": choice.stop_reason}
    tokens = _messages_usage(draft, draft.generated)
    yield last, "content_block_stop", {"type": "content_block_stop", "index": 0}
    yield last, "message_delta", {"type": "message_delta", "delta": stop, "usage": tokens}
    yield last, "message_stop", {"type": "message_stop"}
