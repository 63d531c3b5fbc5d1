"""Shapes on the wire, as the OpenAPI document shows them.

The inference routes do not validate with these: the worker is the judge of what it accepts, and fields that are not
listed here pass through to it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.card import PublicCard


class Open(BaseModel):
    """A shape that other fields may extend."""

    model_config = ConfigDict(extra="allow")


class ModelObject(BaseModel):
    """A model, or one variant of it. `max_model_len` in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sluice"
    parent: str | None = Field(None, description="the model that a variant belongs to")
    variant: str | None = None
    alias_of: str | None = Field(None, description="the model or variant that this is another name of")
    aliases: list[str] | None = None
    deprecated: datetime | None = None
    sunset: datetime | None = Field(None, description="from then on this name is not found")
    variants: list[str] | None = Field(None, description="the names that pin one variant of this model")
    quantization: str | None = None
    max_model_len: int | None = None
    card: PublicCard | None = Field(None, description="what was measured of a variant: cost, quality, speed")
    ready: bool = Field(description="whether at least one worker can serve it now")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorObject(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "permission_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


class Usage(Open):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StreamOptions(Open):
    include_usage: bool = False


class Inference(Open):
    """What every inference route reads."""

    model: str = Field(description="a model (`smollm2`) or one variant of it (`smollm2:w8a8`)", examples=["smollm2"])


class Generation(Inference):
    stream: bool = False
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default", "priority", "flex"] = "auto"


class Message(Open):
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Generation):
    """Any field of OpenAI's chat completions and of vLLM's sampling parameters is passed to the worker."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None


class ChatChoice(Open):
    index: int
    message: Message
    finish_reason: str | None


class ChatCompletion(Open):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class CompletionRequest(Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None
    temperature: float | None = None
    logprobs: int | None = None
    echo: bool | None = None


class CompletionChoice(Open):
    index: int
    text: str
    finish_reason: str | None


class Completion(Open):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class EmbeddingsRequest(Inference):
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"


class ResponsesRequest(Generation):
    input: str | list[dict[str, Any]]
    max_output_tokens: int | None = None


class MessagesRequest(Generation):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int


class TokenizeRequest(Inference):
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeRequest(Inference):
    tokens: list[int]


class RerankRequest(Inference):
    query: str
    documents: list[str]


class ScoreRequest(Inference):
    pass
