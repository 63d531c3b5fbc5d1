"""Request bodies read and refused as vLLM 0.32 reads and refuses them. Pure: no clock, no I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from tests.fakes.vocabulary import Vocabulary, chat_pieces, pieces

Body = Mapping[str, Any]
MAX_LOGPROBS = 20

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
_INTEGERS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "seed", "top_logprobs")
_REQUIRED = {"chat": "messages", "completion": "prompt", "responses": "input", "messages": "messages"}
_NUMERAL = re.compile(r"-?\d+")
_JSON_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")


class Refusal(Exception):
    """An answer other than 200, as a JSON body."""

    def __init__(self, status: int, body: Body, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.headers = headers


def refusal(status: int, message: str, kind: str, param: str | None = None) -> Refusal:
    """A refusal with the error object of vLLM: message, type, param, integer code."""
    return Refusal(status, {"error": {"message": message, "type": kind, "param": param, "code": status}})


def bad_request(message: str, parameter: str | None = None, value: object = None) -> Refusal:
    """A parameter that the engine refuses; the parameter and its value follow the message in brackets."""
    facts = [f"parameter={parameter}"] if parameter else []
    facts += [f"value={value}"] if value is not None else []
    text = f"{message} ({', '.join(facts)})" if facts else message
    return refusal(HTTPStatus.BAD_REQUEST, text, "BadRequestError", parameter)


def detail(status: HTTPStatus, headers: tuple[tuple[str, str], ...] = ()) -> Refusal:
    """FastAPI's own shape, which vLLM keeps for unknown routes and wrong methods."""
    return Refusal(status, {"detail": status.phrase}, headers)


def _invalid(kind: str, where: str, message: str, value: object, context: Body | None = None) -> Refusal:
    """A pydantic validation error in vLLM's wording."""
    error: dict[str, object] = {"type": kind, "loc": where, "msg": message, "input": _summary(value)}
    if context:
        error["ctx"] = dict(context)
    return _invalid_many(where, [error])


def _invalid_many(where: str | None, errors: Sequence[object]) -> Refusal:
    label = "error" if len(errors) == 1 else "errors"
    text = "\n".join([f"{len(errors)} validation {label}:", *(f"  {error}" for error in errors)])
    return refusal(HTTPStatus.BAD_REQUEST, text, HTTPStatus.BAD_REQUEST.phrase, where)


def missing(body: Body | None, *names: str) -> Refusal:
    """The refusal of a body that lacks required fields (one of several alternatives: all are named)."""
    places = [f"body.{name}" for name in names]
    facts = {"msg": "Field required", "input": _summary(body)}
    return _invalid_many(places[0], [{"type": "missing", "loc": place, **facts} for place in places])


def _summary(value: object) -> str:
    if isinstance(value, str):
        return value[:200] + "...[truncated]" if len(value) > 200 else value
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    return str(value)


@dataclass(frozen=True, slots=True)
class Job:
    """A request the engine takes. `prompts` are token pieces, one tuple per prompt; `max_tokens` is already bounded."""

    kind: str
    body: Body
    model: str
    prompts: tuple[tuple[str, ...], ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    user_text: str
    max_tokens: int
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool

    @property
    def sequences(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


def read_json(raw: bytes, content_type: str | None) -> Body:
    """The body as an object. Raises Refusal."""
    if (content_type or "").partition(";")[0].strip().lower() != "application/json":
        raise _invalid_many(None, ["Unsupported Media Type: Only 'application/json' is allowed"])
    if not raw:
        raise _invalid("missing", "body", "Field required", None)
    try:
        body = json.loads(raw)
    except json.JSONDecodeError as error:
        raise _invalid("json_invalid", f"body.{error.pos}", "JSON decode error", {}, {"error": error.msg}) from None
    except ValueError as error:
        raise bad_request(f"There was an error parsing the body: {error}") from None
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise _invalid("model_attributes_type", "body", message, body)
    return body


def parse_job(kind: str, body: Body, default_model: str, max_model_len: int, vocabulary: Vocabulary) -> Job:
    """Read the body of an inference route; `kind` is chat, completion, responses or messages. Raises Refusal."""
    _check_types(kind, body)
    body = _coerced(body)
    _check_structure(body)
    _check_sampling(body)
    if kind == "completion":
        prompts = _completion_prompts(body["prompt"], vocabulary)
        user_text = "".join(prompts[0]).strip()
    else:
        turns = _turns(kind, body, default_model)
        prompts = (tuple(chat_pieces(turns)),)
        user_text = next((text for role, text in reversed(turns) if role == "user"), turns[-1][1])
    options = body.get("stream_options") or {}
    stream = bool(body.get("stream", False))
    return Job(
        kind=kind,
        body=body,
        model=body.get("model") or default_model,
        prompts=prompts,
        prompt_ids=tuple(tuple(vocabulary.encode(prompt)) for prompt in prompts),
        user_text=user_text,
        max_tokens=_max_tokens(kind, body, prompts, max_model_len),
        n=int(body.get("n") or 1),
        stream=stream,
        include_usage=stream and bool(options.get("include_usage")),
        continuous_usage=stream and bool(options.get("include_usage") and options.get("continuous_usage_stats")),
    )


def _check_types(kind: str, body: Body) -> None:
    required = _REQUIRED[kind]
    if required not in body:
        raise missing(body, required)
    if required == "messages" and not isinstance(body["messages"], list):
        raise _invalid("list_type", "body.messages", "Input should be a valid list", body["messages"])
    if kind == "messages" and body.get("max_tokens") is None:
        raise missing(body, "max_tokens")
    for name in _FLOATS:
        _check_number(name, body.get(name), whole=False)
    for name in _INTEGERS:
        _check_number(name, body.get(name), whole=True)
    if not isinstance(body.get("stream", False), bool | int | None):
        message = "Input should be a valid boolean, unable to interpret input"
        raise _invalid("bool_parsing", "body.stream", message, body["stream"])


def _coerced(body: Body) -> Body:
    """Numbers given as text become numbers, as pydantic has it."""
    numbers = {name: float(body[name]) for name in _FLOATS if isinstance(body.get(name), str)}
    wholes = {name: int(body[name]) for name in _INTEGERS if isinstance(body.get(name), str | float)}
    return {**body, **numbers, **wholes}


def _check_number(name: str, value: object, *, whole: bool) -> None:
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and not whole):
        return
    kind, article = ("int", "integer") if whole else ("float", "number")
    if isinstance(value, float):
        if not value.is_integer():
            message = "Input should be a valid integer, got a number with a fractional part"
            raise _invalid("int_from_float", f"body.{name}", message, value)
        return
    if isinstance(value, str):
        if _NUMERAL.fullmatch(value):
            return
        message = f"Input should be a valid {article}, unable to parse string as {'an' if whole else 'a'} {article}"
        raise _invalid(f"{kind}_parsing", f"body.{name}", message, value)
    raise _invalid(f"{kind}_type", f"body.{name}", f"Input should be a valid {article}", value)


def _check_sampling(body: Body) -> None:
    temperature = body.get("temperature")
    if temperature is not None and temperature < 0:
        raise bad_request(
            f"temperature must be non-negative, got {float(temperature)}.", "temperature", float(temperature)
        )
    top_p = body.get("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {float(top_p)}.", "top_p", float(top_p))
    for name in ("presence_penalty", "frequency_penalty"):
        if body.get(name) is not None and not -2 <= body[name] <= 2:
            raise bad_request(f"{name} must be in [-2, 2], got {float(body[name])}.")
    count = body.get("n")
    if count is not None and count < 1:
        raise bad_request(f"n must be at least 1, got {count}.")
    if temperature == 0 and (count or 1) > 1:
        raise bad_request(f"n must be 1 when using greedy sampling, got {count}.")
    least, most = body.get("min_tokens"), body.get("max_tokens")
    if least is not None and most is not None and 0 < most < least:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={most}, got {least}.")
    if "" in (body.get("stop") or ()):
        raise bad_request("stop cannot contain an empty string.")


def check_engine(job: Job) -> None:
    """What only the engine refuses, after a stream has already been opened with status 200. Raises Refusal."""
    asked = job.body.get("top_logprobs" if job.kind == "chat" else "logprobs") or 0
    if asked > MAX_LOGPROBS:
        message = f"Requested sample logprobs of {asked}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise bad_request(message, "logprobs", asked)
    kind = (json_schema(job.body) or {}).get("type")
    if kind is not None and kind not in _JSON_TYPES:
        raise bad_request(f"Grammar error: Invalid type: {kind}")


def _check_structure(body: Body) -> None:
    if body.get("stream_options") and not body.get("stream"):
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    _check_tools(body)
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema" and not wanted.get("json_schema"):
        message = "When response_format type is 'json_schema', the 'json_schema' field must be provided."
        raise bad_request(message, "response_format")


def _check_tools(body: Body) -> None:
    if body.get("tools") == []:
        message = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
        raise bad_request(message, "tools")
    choice = body.get("tool_choice")
    if choice in (None, "none"):
        return
    tools = body.get("tools")
    if not tools:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, dict):
        names = [tool.get("function", {}).get("name") for tool in tools]
        if choice.get("function", {}).get("name") not in names:
            message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
            raise bad_request(message, "tool_choice")


def json_schema(body: Body) -> Body | None:
    """The JSON schema the answer must obey, if the request has one."""
    wanted = body.get("response_format") or {}
    return (wanted.get("json_schema") or {}).get("schema") if wanted.get("type") == "json_schema" else None


def _turns(kind: str, body: Body, model: str) -> list[tuple[str, str]]:
    """(role, text) of every message, whatever the route calls them."""
    if kind == "responses":
        messages = body["input"]
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    else:
        messages = body["messages"]
    if not messages:
        raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _invalid("dict_type", f"body.messages.{at}", "Input should be a valid dictionary", message)
    system = body.get("system") if kind == "messages" else None
    turns = [("system", _text(system, model))] if system else []
    return turns + [(str(message.get("role", "user")), _text(message.get("content"), model)) for message in messages]


def _text(content: object, model: str) -> str:
    if not isinstance(content, list):
        return str(content or "")
    if any(part.get("type", "").startswith(("image", "input_image", "video", "audio")) for part in content):
        raise bad_request(f"{model} is not a multimodal model")
    return "".join(str(part.get("text", "")) for part in content)


def _completion_prompts(prompt: object, vocabulary: Vocabulary) -> tuple[tuple[str, ...], ...]:
    """A prompt is text, token ids, or a list of either."""
    if isinstance(prompt, str) and prompt:
        return (tuple(pieces(prompt)),)
    if isinstance(prompt, list) and prompt and all(isinstance(part, int) for part in prompt):
        return (tuple(vocabulary.decode(prompt)),)
    if isinstance(prompt, list) and prompt:
        return tuple(_completion_prompts(part, vocabulary)[0] for part in prompt)
    if prompt == []:
        raise bad_request("You must pass at least one prompt")
    raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")


def _max_tokens(kind: str, body: Body, prompts: Sequence[Sequence[str]], max_model_len: int) -> int:
    """Tokens the answer may have, with vLLM's refusals of prompts and limits beyond the context."""
    longest = max(len(prompt) for prompt in prompts)
    if longest > max_model_len:
        # Text is tokenized only up to the first token too many; token ids are counted.
        given = isinstance(body.get("prompt"), list) and not isinstance(body["prompt"][0], str)
        count, qualifier = (longest, "") if given else (max_model_len + 1, "at least ")
        raise bad_request(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"{qualifier}{count} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
            count,
        )
    asked = body.get("max_completion_tokens")
    asked = body.get("max_output_tokens") if asked is None else asked
    asked = body.get("max_tokens") if asked is None else asked
    room = max_model_len - longest
    if asked is None:
        return min(16, room) if kind == "completion" else room
    if asked > max_model_len:
        message = f"max_tokens={asked} cannot be greater than max_model_len={max_model_len}."
        raise bad_request(f"{message} Please request fewer output tokens.", "max_tokens", asked)
    if asked < 1 and not (kind == "completion" and body.get("echo")):
        raise bad_request(f"max_tokens must be at least 1, got {asked}.", "max_tokens", asked)
    return min(int(asked), room)
