"""The nouns that every package shares: what a client asks for, what it cost, how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from app import parameters, strict_json
from app.errors import InvalidValue, ModelNotFound, UnsupportedParameter
from app.settings import Parameters


class Route(StrEnum):
    """The worker paths that clients may reach. An allow-list: no other path is ever called for a client."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"
    RERANK = "/v1/rerank"
    SCORE = "/v1/score"


class Band(StrEnum):
    """Priority class, highest first."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"
    BATCH = "batch"


class Outcome(StrEnum):
    """How a request ended. Every request ends in exactly one."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens as the worker counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


# Fields that steer the engine itself. vLLM acts on them for whoever sends them: another tenant's cache, another
# worker's memory, a template that runs on the server. A client that sends one is told so.
REFUSED_FIELDS = frozenset(
    {
        "prompt_embeds",
        "chat_template",
        "kv_transfer_params",
        "ec_transfer_params",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "vllm_xargs",
    }
)
# Fields that are the gateway's to set; ordinary clients send them without harm in mind, so they are left out.
OWNED_FIELDS = frozenset({"cache_salt", "priority", "request_id", "session_id"})

_SERVICE_TIERS = {"priority": Band.PRIORITY, "default": Band.DEFAULT, "auto": Band.DEFAULT, "flex": Band.FLEX}
_STREAMING_ROUTES = frozenset({Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES})
_USAGE_OPTION_ROUTES = frozenset({Route.CHAT, Route.COMPLETIONS})

_RULES = {
    Route.CHAT: parameters.CHAT,
    Route.COMPLETIONS: parameters.COMPLETION,
    Route.RESPONSES: parameters.RESPONSES,
    Route.MESSAGES: parameters.MESSAGES,
}
_DEFAULT_LIMITS = Parameters()

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, kw_only=True)
class InferenceRequest:
    """One request for a model.

    `fields` holds the body's top-level values as the client's own bytes: they are re-framed for the worker, never
    re-encoded, so what a client means is what the worker reads. `arrived` is monotonic time in seconds.
    `resolved_model` is the catalogue's name, empty until it is resolved: unlike `model` it is safe as a metric label.
    """

    id: str
    route: Route
    model: str
    stream: bool
    band: Band
    fields: dict[str, msgspec.Raw]
    prompt_bytes: int
    client_wants_usage: bool
    arrived: float
    resolved_model: str = ""
    trace_headers: tuple[tuple[bytes, bytes], ...] = ()

    @classmethod
    def parse(
        cls, body: bytes, *, request_id: str, route: Route, arrived: float, limits: Parameters = _DEFAULT_LIMITS
    ) -> InferenceRequest:
        """The request in `body`. Raises InvalidJson, InvalidValue, UnsupportedParameter or ModelNotFound.

        The whole body is read, strictly; what the worker gets are still the client's own bytes.
        """
        fields, values = strict_json.read_object(body)
        refused = REFUSED_FIELDS.intersection(fields)
        if refused:
            name = min(refused)
            raise UnsupportedParameter(f"The parameter {name!r} is not accepted here.", param=name)
        parameters.check(values, _RULES.get(route, parameters.OTHER), limits)
        stream = route in _STREAMING_ROUTES and bool(values.get("stream"))
        return cls(
            id=request_id,
            route=route,
            model=_model(values),
            stream=stream,
            band=_band(values),
            fields=fields,
            prompt_bytes=len(body),
            client_wants_usage=stream and _wants_usage(values),
            arrived=arrived,
        )

    @property
    def hides_usage(self) -> bool:
        """Whether usage is asked of the worker for the gateway's own count, and its chunk kept from the client."""
        return self.stream and self.route in _USAGE_OPTION_ROUTES and not self.client_wants_usage

    def body_for(self, served_model: str) -> bytes:
        """The body that a worker gets: the client's fields, its own name for the model, and usage always asked for."""
        fields: dict[str, Any] = {name: raw for name, raw in self.fields.items() if name not in OWNED_FIELDS}
        fields["model"] = served_model
        if self.hides_usage:
            # continuous_usage_stats without include_usage does nothing in vLLM; it must not start to.
            fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": False}
        return _encode(fields)


def _model(values: Mapping[str, Any]) -> str:
    model = values.get("model")
    if model is None:
        raise InvalidValue("you must provide a model parameter", param="model")
    if not model:
        raise ModelNotFound("The model '' does not exist or you do not have access to it.", param="model")
    return str(model)


def _wants_usage(values: Mapping[str, Any]) -> bool:
    options = values.get("stream_options")
    if options is None:
        return False
    wanted = options.get("include_usage", False) if type(options) is dict else options
    if wanted is not None and type(wanted) is not bool:
        raise InvalidValue("stream_options is expected to be an object of flags.", param="stream_options")
    return bool(wanted)


def _band(values: Mapping[str, Any]) -> Band:
    tier = values.get("service_tier")
    try:
        return _SERVICE_TIERS["auto" if tier is None else tier]
    except (KeyError, TypeError):
        raise InvalidValue("Invalid value for 'service_tier'.", param="service_tier") from None
