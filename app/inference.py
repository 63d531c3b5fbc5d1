"""The nouns that every package shares: what a client asks for, what it cost, how it ended."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from app import parameters, strict_json
from app.errors import InvalidValue, ModelNotFound, UnsupportedParameter
from app.preference import FIELD, NO_PREFERENCE, Preference, preference_of
from app.settings import Parameters
from app.tenant import ANONYMOUS, Tenant
from app.tenant import Band as Band  # as much a noun of requests


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


class Outcome(StrEnum):
    """How a request ended. Every request ends in exactly one."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    FAILED = "failed"
    CANCELLED = "cancelled"
    CLIENT_STALLED = "client_stalled"
    """The client read nothing for too long and was disconnected."""


class TokenUsage(msgspec.Struct, frozen=True):
    """Tokens as the worker counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens of a request that ended before the worker told its usage, as far as they are known; None: not known."""

    prompt_tokens: int | None
    completion_tokens: int | None


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
_TOKEN_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_STREAMING_ROUTES = frozenset({Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES})
_USAGE_OPTION_ROUTES = frozenset({Route.CHAT, Route.COMPLETIONS})
# Where a bound on new tokens is said, and what silence means: for text completions 16 in OpenAI's API and in vLLM, for
# others all the context. Messages must always name one.
_BOUND_FIELDS = {
    Route.CHAT: ("max_completion_tokens", parameters.TOKENS_MAX),
    Route.COMPLETIONS: ("max_tokens", 16),
    Route.RESPONSES: ("max_output_tokens", parameters.TOKENS_MAX),
}
# What the engine's prompt is made of, in the order in which chat templates write it: tools before the conversation.
_PROMPT_FIELDS: dict[Route, tuple[str, ...]] = {
    Route.CHAT: ("tools", "documents", "messages"),
    Route.COMPLETIONS: ("prompt",),
    Route.RESPONSES: ("instructions", "tools", "input"),
    Route.MESSAGES: ("tools", "system", "messages"),
}

_RULES = {
    Route.CHAT: parameters.CHAT,
    Route.COMPLETIONS: parameters.COMPLETION,
    Route.RESPONSES: parameters.RESPONSES,
    Route.MESSAGES: parameters.MESSAGES,
}
_DEFAULT_LIMITS = Parameters()

_encode = msgspec.json.Encoder().encode


def cache_salt(secret: bytes, tenant: str) -> str:
    """What keeps the prefix cache of `tenant` apart from all others': 32 hex digits, the same on every gateway.

    HMAC-SHA-256, so that nobody without the secret can compute another tenant's. vLLM mixes it into the hash of a
    prompt's first block, and so into that of every block after it.
    """
    return hmac.digest(secret, tenant.encode(), "sha256").hex()[:32]


def narrowed_salt(tenant_salt: str, client_salt: str) -> str:
    """A part of the tenant's own cache, for those who send `client_salt`: it never leads to another tenant's."""
    return cache_salt(tenant_salt.encode(), client_salt)


QueueListener = Callable[[int, int, float], None]
"""Is told of a request that waits: its position among its tenant's, how many those are, expected wait in seconds."""
Preempted = Callable[[], None]
"""Is told, once, that the slot of a request is wanted by a better one: it is to be given back now. Must not wait."""


@dataclass(slots=True, kw_only=True)
class InferenceRequest:
    """One request for a model.

    `fields` holds the body's top-level values as the client's own bytes: they are re-framed for the worker, never
    re-encoded, so what a client means is what the worker reads. `arrived` is monotonic time in seconds.
    `deadline` is when the client stops waiting for a first byte, monotonic too. `max_tokens` is what it asked for at
    most, for each of its `choices` (0 on routes that generate nothing). `resolved_model` is the catalogue's name, empty
    until it is resolved: a label for metrics, unlike `model`.
    `cache_salt` is the tenant's, or one within it where the client sent a salt of its own (see `narrowed_salt`).
    `id` is the gateway's own, never used before; `client_id` what the client calls the request, for logs only.
    `preference` is what it asks of the choice among variants, `user` whom the client serves with it, if it says so.
    `trace_headers` say of which trace the client sent it, `batch_id` of which batch it is a line.
    `on_wait` is told, now and then, how long the queue is while it waits; it is set for a client that
    `wants_queue_events`. `on_preempt` is set where the request may be taken off its worker for one of a better band.
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
    max_tokens: int | None = None
    choices: int = 1
    tenant: Tenant = ANONYMOUS
    deadline: float = float("inf")
    cache_salt: str = ""
    trace_headers: tuple[tuple[bytes, bytes], ...] = ()
    client_id: str = ""
    preference: Preference = NO_PREFERENCE
    user: str = ""
    batch_id: str = ""
    wants_queue_events: bool = False
    on_wait: QueueListener | None = None
    on_preempt: Preempted | None = None

    @classmethod
    def parse(
        cls,
        body: bytes,
        *,
        request_id: str,
        route: Route,
        arrived: float,
        limits: Parameters = _DEFAULT_LIMITS,
        tenant: Tenant = ANONYMOUS,
    ) -> InferenceRequest:
        """The request of `tenant` in `body`. Raises InvalidJson, InvalidValue, UnsupportedParameter or ModelNotFound.

        The whole body is read, strictly; what the worker gets are still the client's own bytes.
        """
        fields, values = strict_json.read_object(body)
        refused = REFUSED_FIELDS.intersection(fields)
        if refused and not tenant.engine_fields:
            name = min(refused)
            raise UnsupportedParameter(f"The parameter {name!r} is not accepted here.", param=name)
        parameters.check(values, _RULES.get(route, parameters.OTHER), limits)
        max_tokens = _max_tokens(values)
        if tenant.max_tokens is not None:
            max_tokens = _bounded(fields, values, route, tenant.max_tokens)
        stream = route in _STREAMING_ROUTES and bool(values.get("stream"))
        preference = NO_PREFERENCE
        if FIELD in fields:
            preference = preference_of(values[FIELD])
            del fields[FIELD]
        return cls(
            id=request_id,
            route=route,
            model=_model(values),
            stream=stream,
            band=_band(values).within(tenant.ceiling),
            fields=fields,
            prompt_bytes=len(body),
            client_wants_usage=stream and _wants_usage(values),
            arrived=arrived,
            max_tokens=max_tokens,
            choices=_choices(values) if route in _STREAMING_ROUTES else 0,
            tenant=tenant,
            cache_salt=_cache_salt(values, tenant),
            preference=preference,
            user=values.get("user") or "",
        )

    @classmethod
    def unread(cls, *, request_id: str, route: Route, arrived: float, tenant: Tenant) -> InferenceRequest:
        """Stands for a request that could not be read: it asks for nothing, and has an end like any other."""
        return cls(
            id=request_id,
            route=route,
            model="",
            stream=False,
            band=Band.DEFAULT,
            fields={},
            prompt_bytes=0,
            client_wants_usage=False,
            arrived=arrived,
            tenant=tenant,
        )

    @property
    def max_output(self) -> int | None:
        """The most tokens that all its choices together may have, None where it does not say."""
        if not self.choices:
            return 0
        return None if self.max_tokens is None else self.max_tokens * self.choices

    @property
    def hides_usage(self) -> bool:
        """Whether usage is asked of the worker for the gateway's own count, and its chunk kept from the client."""
        return self.stream and self.route in _USAGE_OPTION_ROUTES and not self.client_wants_usage

    @property
    def weighs_tokens(self) -> bool:
        """Whether its answer can be asked for with log-probabilities that the client does not want."""
        if self.choices != 1 or self.route not in _USAGE_OPTION_ROUTES:
            return False
        return self.route is Route.CHAT or "logprobs" not in self.fields

    def prompt_start(self, limit: int) -> bytes:
        """The first `limit` bytes of what the engine's prompt is made of, as the client wrote them.

        JSON and all: a client that sends a conversation again, one turn longer, writes its beginning the same way.
        Empty for routes whose prompts no engine caches.
        """
        parts = []
        for name in _PROMPT_FIELDS.get(self.route, ()):
            raw = self.fields.get(name)
            if raw is not None and limit > 0:
                parts.append(memoryview(raw)[:limit])
                limit -= len(parts[-1])
        return b"".join(parts)

    def body_for(self, served_model: str) -> bytes:
        """What a worker gets: the client's fields, its own name for the model, usage asked for, the tenant's salt."""
        fields: dict[str, Any] = {name: raw for name, raw in self.fields.items() if name not in OWNED_FIELDS}
        fields["model"] = served_model
        if self.cache_salt:
            fields["cache_salt"] = self.cache_salt
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


def _choices(values: Mapping[str, Any]) -> int:
    """How many answers are generated: `n` for each prompt of a text completion."""
    wanted, prompts = values.get("n"), values.get("prompt")
    each = wanted if type(wanted) is int and wanted > 0 else 1
    return each * len(prompts) if isinstance(prompts, list) and prompts and type(prompts[0]) is not int else each


def _max_tokens(values: Mapping[str, Any]) -> int | None:
    """A hint for the order of the queue."""
    for name in _TOKEN_FIELDS:
        value = values.get(name)
        if type(value) is int:
            return max(1, value)
    return None


def _bounded(fields: dict[str, msgspec.Raw], values: Mapping[str, Any], route: Route, most: int) -> int | None:
    """The new tokens asked for, `most` of them at most; who names no number gets `most`. Raises InvalidValue."""
    for name in _TOKEN_FIELDS:
        value = values.get(name)
        if type(value) is int and value > most:
            raise InvalidValue(f"{name} is at most {most} here.", param=name)
    asked = _max_tokens(values)
    if asked is None and route in _BOUND_FIELDS:
        name, default = _BOUND_FIELDS[route]
        asked = min(default, most)
        fields[name] = msgspec.Raw(b"%d" % asked)
    return asked


def _cache_salt(values: Mapping[str, Any], tenant: Tenant) -> str:
    salt = values.get("cache_salt")
    if salt is None:
        return tenant.cache_salt
    if type(salt) is not str:
        raise InvalidValue("Invalid value for 'cache_salt': expected text.", param="cache_salt")
    return narrowed_salt(tenant.cache_salt, salt)
