"""What vLLM 0.32 refuses before the engine sees it, in its order and wording. Pure."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from tests.fakes.refusals import Body, Refusal, bad_request, invalid, invalid_many, missing, refusal

MAX_SEQUENCES = 16_384

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
_INTEGERS = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "min_tokens",
    "n",
    "seed",
    "top_k",
    "top_logprobs",
)
_LISTS = ("tools", "messages")
_OBJECTS = ("stream_options", "response_format", "structured_outputs")
_REQUIRED = {"chat": "messages", "completion": "prompt", "responses": "input", "messages": "messages"}
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_NUMERAL = re.compile(r"-?\d+(\.\d+)?")
# pydantic names the first alternative of a message's union in its errors.
_MESSAGE = "ChatCompletionDeveloperMessageParam"


def validated(kind: str, body: Body) -> Body:
    """The body with numbers that were given as text made numbers, as pydantic does. Raises Refusal."""
    _check_fields(kind, body)
    _check_messages(kind, body)
    numbers: dict[str, Any] = {name: float(body[name]) for name in _FLOATS if isinstance(body.get(name), str)}
    numbers |= {name: int(float(body[name])) for name in _INTEGERS if isinstance(body.get(name), str | float)}
    coerced = {**body, **numbers}
    _check_structure(coerced)
    _check_tools(coerced)
    _check_sampling(coerced)
    return coerced


def _check_fields(kind: str, body: Body) -> None:
    required = _REQUIRED[kind]
    if required not in body:
        raise missing(body, required)
    if kind == "messages" and body.get("max_tokens") is None:
        raise missing(body, "max_tokens")
    if kind == "messages" and body["max_tokens"] in (0, "0"):
        message = "Value error, max_tokens must be positive"
        cause = {"error": ValueError("max_tokens must be positive")}
        raise invalid("value_error", "body.max_tokens", message, body["max_tokens"], cause)
    for name in _LISTS:
        if body.get(name) is not None and not isinstance(body[name], list):
            raise invalid("list_type", f"body.{name}", "Input should be a valid list", body[name])
    for name in _OBJECTS:
        if body.get(name) is not None and not isinstance(body[name], dict):
            message = "Input should be a valid dictionary or object to extract fields from"
            raise invalid("model_attributes_type", f"body.{name}", message, body[name])
    if not isinstance(body.get("model"), str | None):
        raise invalid("string_type", "body.model", "Input should be a valid string", body["model"])
    for name in (*_FLOATS, *_INTEGERS):
        _check_number(name, body.get(name), whole=name in _INTEGERS)
    if not isinstance(body.get("stream"), bool | int | None):
        message = "Input should be a valid boolean, unable to interpret input"
        raise invalid("bool_parsing", "body.stream", message, body["stream"])
    _check_stop(body.get("stop"))


def _check_number(name: str, value: object, *, whole: bool) -> None:
    kind, article = ("int", "an integer") if whole else ("float", "a number")
    noun, where = article.split()[1], f"body.{name}"
    if isinstance(value, str) and not _NUMERAL.fullmatch(value):
        message = f"Input should be a valid {noun}, unable to parse string as {article}"
        raise invalid(f"{kind}_parsing", where, message, value)
    if isinstance(value, float) and whole and not value.is_integer():
        message = "Input should be a valid integer, got a number with a fractional part"
        raise invalid("int_from_float", where, message, value)
    if not isinstance(value, str | float | int | None):
        raise invalid(f"{kind}_type", where, f"Input should be a valid {noun}", value)


def _check_stop(stop: object) -> None:
    if isinstance(stop, str | list | None):
        return
    kinds = {"string_type": "Input should be a valid string", "list_type": "Input should be a valid list"}
    errors = [{"type": kind, "loc": "body.stop", "msg": text, "input": str(stop)} for kind, text in kinds.items()]
    raise invalid_many("body.stop", errors)


def _check_messages(kind: str, body: Body) -> None:
    """Shape of chat messages. vLLM lists one error for each alternative of the union; here is the first of them."""
    if kind == "chat" and body["messages"] is None:
        raise bad_request("'NoneType' object is not iterable")
    for at, message in enumerate(body.get("messages") or [] if kind in ("chat", "messages") else []):
        where = f"messages.{at}.{_MESSAGE}"
        if not isinstance(message, dict):
            raise invalid("dict_type", f"body.{where}", "Input should be a valid dictionary", message)
        if "role" not in message:
            raise invalid("missing", f"body.{where}.role", "Field required", message)
        if "content" in message and message["content"] is None and message["role"] in ("user", "system", "developer"):
            raise invalid("string_type", f"body.{where}.content", "Input should be a valid string", None)


def _check_structure(body: Body) -> None:
    if body.get("stream_options") and not body.get("stream"):
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    if body.get("prompt_logprobs") is not None and body.get("stream"):
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if body.get("cache_salt") == "":
        raise bad_request("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
    if body.get("chat_template"):
        message = "Chat template is passed with request, but --trust-request-chat-template is not set."
        raise bad_request(f"{message} Refused request with untrusted chat template.")
    if body.get("suffix"):
        raise bad_request_without_facts("suffix is only supported for models with FIM completion rendering", "suffix")
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema" and not wanted.get("json_schema"):
        message = "When response_format type is 'json_schema', the 'json_schema' field must be provided."
        raise bad_request(message, "response_format")
    if wanted and wanted.get("type") not in _FORMATS:
        message = "Input should be 'text', 'json_object' or 'json_schema'"
        raise invalid("literal_error", "body.response_format.type", message, wanted.get("type"))


def bad_request_without_facts(message: str, parameter: str) -> Refusal:
    """A parameter that is refused without being named in the message."""
    return refusal(HTTPStatus.BAD_REQUEST, message, "BadRequestError", parameter)


def _check_tools(body: Body) -> None:
    if body.get("tools") == []:
        message = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
        raise bad_request(message, "tools")
    choice, tools = body.get("tool_choice"), body.get("tools")
    if choice in (None, "none"):
        return
    if not tools:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, dict):
        names = [tool.get("function", {}).get("name") for tool in tools]
        if choice.get("function", {}).get("name") not in names:
            message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
            raise bad_request(message, "tool_choice")


def _check_sampling(body: Body) -> None:
    temperature = body.get("temperature")
    _check_count(body.get("n"), greedy=temperature == 0)
    if temperature is not None and not 0 <= temperature <= 2:
        rule = "non-negative" if temperature < 0 else "in [0, 2]"
        value = float(temperature)
        raise bad_request(f"temperature must be {rule}, got {value}.", "temperature", value)
    top_p, top_k = body.get("top_p"), body.get("top_k")
    if top_p is not None and not 0 < top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {float(top_p)}.", "top_p", float(top_p))
    if top_k is not None and top_k < -1:
        raise bad_request(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    for name in ("presence_penalty", "frequency_penalty"):
        if body.get(name) is not None and not -2 <= body[name] <= 2:
            raise bad_request(f"{name} must be in [-2, 2], got {float(body[name])}.")
    least, most = body.get("min_tokens"), body.get("max_tokens")
    if least is not None and most is not None and 0 < most < least:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={most}, got {least}.")
    stop = body.get("stop")
    if stop == "" or (isinstance(stop, list) and "" in stop):
        raise bad_request("stop cannot contain an empty string.")


def _check_count(count: int | None, *, greedy: bool) -> None:
    if count is None:
        return
    if count < 1:
        raise bad_request(f"n must be at least 1, got {count}.")
    if count > MAX_SEQUENCES:
        message = f"n must be at most {MAX_SEQUENCES}, got {count}."
        raise bad_request(f"{message} To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable.")
    if greedy and count > 1:
        raise bad_request(f"n must be 1 when using greedy sampling, got {count}.")
