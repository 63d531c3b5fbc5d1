"""Request bodies read as vLLM 0.32 reads them. Pure: no clock, no I/O."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tests.fakes.refusals import Body, bad_request, invalid, invalid_many
from tests.fakes.validation import validated
from tests.fakes.vocabulary import Vocabulary, chat_pieces, pieces

MAX_LOGPROBS = 20
_JSON_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")


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
        raise invalid_many(None, ["Unsupported Media Type: Only 'application/json' is allowed"])
    if not raw:
        raise invalid("missing", "body", "Field required", None)
    try:
        body = json.loads(raw)
    except json.JSONDecodeError as error:
        raise invalid("json_invalid", f"body.{error.pos}", "JSON decode error", {}, {"error": error.msg}) from None
    except ValueError as error:
        raise bad_request(f"There was an error parsing the body: {error}") from None
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", "body", message, body)
    return body


def parse_job(kind: str, body: Body, default_model: str, max_model_len: int, vocabulary: Vocabulary) -> Job:
    """Read the body of an inference route; `kind` is chat, completion, responses or messages. Raises Refusal."""
    body = validated(kind, body)
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


def check_engine(job: Job) -> None:
    """What only the engine refuses, after a stream has already been opened with status 200. Raises Refusal."""
    asked = job.body.get("top_logprobs" if job.kind == "chat" else "logprobs") or 0
    if asked > MAX_LOGPROBS:
        message = f"Requested sample logprobs of {asked}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise bad_request(message, "logprobs", asked)
    kind = (json_schema(job.body) or {}).get("type")
    if kind is not None and kind not in _JSON_TYPES:
        raise bad_request(f"Grammar error: Invalid type: {kind}")


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
    if isinstance(prompt, list) and prompt and not any(isinstance(part, int) for part in prompt):
        return tuple(_completion_prompts(part, vocabulary)[0] for part in prompt)
    if prompt == []:
        raise bad_request("You must pass at least one prompt")
    if prompt:
        raise invalid("string_type", "body.prompt", "Input should be a valid string", prompt)
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
    names = ("max_completion_tokens", "max_output_tokens", "max_tokens")
    name = next((name for name in names if body.get(name) is not None), "max_tokens")
    asked, room = body.get(name), max_model_len - longest
    # Anthropic's max_tokens is translated before it is checked.
    name = "max_completion_tokens" if kind == "messages" else name
    if asked is None:
        return min(16, room) if kind == "completion" else room
    if asked > max_model_len:
        message = f"{name}={asked} cannot be greater than max_model_len={max_model_len}."
        raise bad_request(f"{message} Please request fewer output tokens.", name, asked)
    if asked < 1 and not (kind == "completion" and body.get("echo")):
        raise bad_request(f"max_tokens must be at least 1, got {asked}.", "max_tokens", asked)
    return min(int(asked), room)
