"""What the fields of a request may say: one table for each kind of request, read top to bottom. Pure.

The worker judges its own parameters; this is for those that have cost engines their lives, that two readers could
understand differently, or that ask for more than a caller should get. Types are exact: no number given as text, no
`true` for 1, no 1.0 for 1. A field that no table names passes. Ranges are OpenAI's and vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app import structured
from app.errors import InvalidValue, UnsupportedParameter
from app.media import check_media
from app.settings import Parameters

Check = Callable[[Any, str], None]
Rules = Mapping[str, Check]

TOKENS_MAX = 2**31 - 1
CONTROL = re.compile("[\x00-\x1f\x7f]")
ROLES = frozenset({"developer", "system", "user", "assistant", "tool", "function"})


def _wrong(where: str, expected: str) -> InvalidValue:
    return InvalidValue(f"Invalid value for {where!r}: expected {expected}.", param=where)


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number from `least` to `most`."""

    least: int
    most: int = TOKENS_MAX

    def __call__(self, value: Any, where: str) -> None:
        if type(value) is not int or not self.least <= value <= self.most:
            raise _wrong(where, f"an integer from {self.least} to {self.most}")


@dataclass(frozen=True, slots=True)
class Number:
    """A number from `least` to `most`; `least` itself only when it is `included`."""

    least: float
    most: float
    included: bool = True

    def __call__(self, value: Any, where: str) -> None:
        is_number = type(value) is float or type(value) is int
        if not is_number or not self.least <= value <= self.most or (value == self.least and not self.included):
            raise _wrong(where, f"a number {'from' if self.included else 'above'} {self.least:g} to {self.most:g}")


@dataclass(frozen=True, slots=True)
class Items:
    """A list of at most `most`, each as `each` says; with `or_one`, or a single one of them."""

    each: Check
    most: int
    or_one: bool = False

    def __call__(self, value: Any, where: str) -> None:
        if type(value) is not list:
            if not self.or_one:
                raise _wrong(where, "a list")
            self.each(value, where)
            return
        if len(value) > self.most:
            raise _wrong(where, f"at most {self.most} items")
        for at, item in enumerate(value):
            self.each(item, f"{where}[{at}]")


def flag(value: Any, where: str) -> None:
    if type(value) is not bool:
        raise _wrong(where, "true or false")


def whole(value: Any, where: str) -> None:
    if type(value) is not int:
        raise _wrong(where, "an integer")


def text(value: Any, where: str) -> None:
    if type(value) is not str:
        raise _wrong(where, "text")


def plain(value: Any, where: str) -> None:
    """Text that may stand in a log or a label: no control characters."""
    if type(value) is not str or CONTROL.search(value):
        raise _wrong(where, "text without control characters")


def metadata(value: Any, where: str) -> None:
    if type(value) is not dict:
        raise _wrong(where, "an object")
    for key in value:
        plain(key, where)


def biases(value: Any, where: str) -> None:
    """Token id, as text, to -100..100."""
    if type(value) is not dict or len(value) > 1024:
        raise _wrong(where, "an object of at most 1024 token ids")
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 8):
            raise _wrong(where, "token ids as keys")
        _BIAS(bias, f"{where}.{token}")


def template_arguments(value: Any, where: str) -> None:
    """Arguments of the chat template; two of them would replace it or leave it out."""
    if type(value) is not dict:
        raise _wrong(where, "an object")
    for name in ("chat_template", "tokenize"):
        if name in value:
            raise UnsupportedParameter(f"{name!r} is not accepted here.", param=f"{where}.{name}")


def repetition(value: Any, where: str) -> None:
    """Patterns that the engine looks for behind each token, in the loop that serves everyone."""
    if type(value) is not dict:
        raise _wrong(where, "an object")
    for name, number in value.items():
        Integer(0, 256)(number, f"{where}.{name}")


def foreground(value: Any, where: str) -> None:
    """Work that goes on without its client would hold a worker and no slot."""
    if value is not False:
        raise UnsupportedParameter("Responses in the background are not offered here.", param=where)


def stateless(value: Any, where: str) -> None:
    """A worker keeps the responses of all its callers in one place, and each worker its own."""
    raise UnsupportedParameter("Responses are not kept here; send the conversation again.", param=where)


_BIAS = Number(-100, 100)

_GENERATION: Rules = {
    "model": plain,
    "user": plain,
    "safety_identifier": plain,
    "metadata": metadata,
    "stream": flag,
    "max_tokens": Integer(1),
    "max_completion_tokens": Integer(1),
    "max_output_tokens": Integer(1),
    "min_tokens": Integer(0),
    "thinking_token_budget": whole,
    "truncate_prompt_tokens": Integer(-1),
    "temperature": Number(0, 2),
    "top_p": Number(0, 1, included=False),
    "top_k": Integer(-1),
    "min_p": Number(0, 1),
    "presence_penalty": Number(-2, 2),
    "frequency_penalty": Number(-2, 2),
    "repetition_penalty": Number(0, 100, included=False),
    "length_penalty": Number(-100, 100),
    "seed": whole,
    "logit_bias": biases,
    "prompt_logprobs": Integer(0, 20),
    "top_logprobs": Integer(0, 20),
    "stop": Items(text, 64, or_one=True),
    "stop_sequences": Items(text, 64),
    "stop_token_ids": Items(Integer(0), 256),
    "logprob_token_ids": Items(Integer(0), 128),
    "allowed_token_ids": Items(Integer(0), 65_536),
    "bad_words": Items(text, 256),
    "repetition_detection": repetition,
    "ignore_eos": flag,
    "use_beam_search": flag,
    "skip_special_tokens": flag,
    "include_stop_str_in_output": flag,
    "chat_template_kwargs": template_arguments,
}
CHAT: Rules = {**_GENERATION, "logprobs": flag}
COMPLETION: Rules = {**_GENERATION, "logprobs": Integer(0, 20), "max_tokens": Integer(0), "echo": flag}
RESPONSES: Rules = {**_GENERATION, "background": foreground, "previous_response_id": stateless}
MESSAGES: Rules = _GENERATION
OTHER: Rules = {
    "model": plain,
    "user": plain,
    "dimensions": Integer(1),
    "top_n": Integer(0),
    "truncate_prompt_tokens": Integer(-1),
    "chat_template_kwargs": template_arguments,
}


_SHAPING = structured.FIELDS | {"tool_choice"}


def check(values: Mapping[str, Any], rules: Rules, limits: Parameters) -> None:
    """Refuse a request for what its fields say. Raises InvalidValue or UnsupportedParameter, `param` a JSON path."""
    for name, value in values.items():
        rule = rules.get(name)
        if rule is not None and value is not None:
            rule(value, name)
    _check_counts(values, rules, limits)
    if rules is not OTHER:
        _check_generation(values, rules)
        if not _SHAPING.isdisjoint(values):
            _check_tools(values, limits)
            structured.check_requested(values, limits.structured)
    messages = values.get("messages")
    if messages is not None:
        _check_messages(messages, is_chat=rules is CHAT)
    for name, value in values.items():
        # What is scored or ranked may be one object; elsewhere objects hold schemas, which may speak of images.
        if (type(value) is list and name != "tools") or (type(value) is dict and rules is OTHER):
            check_media(value, name, limits.media)


def _check_counts(values: Mapping[str, Any], rules: Rules, limits: Parameters) -> None:
    count = values.get("n")
    if count is not None:
        Integer(1, limits.choices)(count, "n")
    if rules is COMPLETION:
        _check_prompts("prompt", values.get("prompt"), limits.prompts)
    if rules is OTHER:
        for name in ("input", "documents", "text_1", "text_2", "data_1", "data_2", "queries", "items"):
            _check_prompts(name, values.get(name), limits.inputs)
    messages = values.get("messages")
    if type(messages) is list and len(messages) > limits.messages:
        raise _wrong("messages", f"at most {limits.messages} messages")


def _check_prompts(name: str, value: Any, most: int) -> None:
    """Bound the prompts of a list; one of numbers is a single prompt of token ids."""
    if type(value) is list and len(value) > most and not set(map(type, value)) <= {int}:
        raise _wrong(name, f"at most {most} items")


def _check_generation(values: Mapping[str, Any], rules: Rules) -> None:
    """What two fields say together."""
    most = values.get("max_completion_tokens") or values.get("max_output_tokens") or values.get("max_tokens")
    if most is None and values.get("max_tokens") == 0:
        most = 0
    if values.get("max_tokens") == 0 and not values.get("echo"):
        raise _wrong("max_tokens", "at least 1, or echo")
    least = values.get("min_tokens")
    if least and (most is None or least > most):
        raise _wrong("min_tokens", "no more than max_tokens, which must be given with it")
    if values.get("stream_options") is not None and not values.get("stream") and rules in (CHAT, COMPLETION):
        raise InvalidValue("stream_options can only be given with stream.", param="stream_options")


def _check_tools(values: Mapping[str, Any], limits: Parameters) -> None:
    tools, choice = values.get("tools"), values.get("tool_choice")
    if type(tools) is list and len(tools) > limits.tools:
        raise _wrong("tools", f"at most {limits.tools} tools")
    if type(choice) is not dict:
        return
    named = _tool_name(choice)
    if named is not None and named not in [_tool_name(tool) for tool in tools or ()]:
        raise InvalidValue("tool_choice names a tool that is not in tools.", param="tool_choice")


def _tool_name(tool: Any) -> Any:
    """The name in a tool or in a choice of one, as Chat Completions, Responses and Messages write it."""
    if type(tool) is not dict:
        return None
    function = tool.get("function")
    return function.get("name") if type(function) is dict else tool.get("name")


def _check_messages(messages: Any, *, is_chat: bool) -> None:
    if type(messages) is not list:
        raise _wrong("messages", "a list")
    calls: set[Any] = set()
    for at, message in enumerate(messages):
        if type(message) is not dict:
            raise _wrong(f"messages[{at}]", "an object")
        role = message.get("role")
        if type(role) is not str or role not in ROLES:
            raise _wrong(f"messages[{at}].role", f"one of {', '.join(sorted(ROLES))}")
        if type(message.get("content")) is not str:
            _check_content(message, role, at)
        if is_chat and not _CALLING.isdisjoint(message):
            _check_calls(message, calls, at)


_CALLING = frozenset({"tool_calls", "tool_call_id"})


def _check_content(message: Mapping[str, Any], role: str, at: int) -> None:
    if "content" not in message:
        return
    content = message["content"]
    if content is None and role in ("assistant", "function"):
        return
    if type(content) is not str and type(content) is not list:
        raise _wrong(f"messages[{at}].content", "text or a list of parts")


def _check_calls(message: Mapping[str, Any], calls: set[Any], at: int) -> None:
    """Keep the ids of tool calls in `calls`, and refuse the result of a call that was never made."""
    made = message.get("tool_calls")
    for call in made if type(made) is list else ():
        if type(call) is dict and type(call.get("id")) is str:
            calls.add(call["id"])
    answered = message.get("tool_call_id")
    if answered is not None and message["role"] == "tool" and (type(answered) is not str or answered not in calls):
        raise _wrong(f"messages[{at}].tool_call_id", "the id of a tool call in an earlier message")
