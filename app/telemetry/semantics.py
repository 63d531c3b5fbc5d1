"""What spans say of a request, in OpenTelemetry's words for generative AI. Pure.

Names: the semantic conventions' registry of attributes, `gen_ai.*`, `http.*` and `error.type`; they still have the
status Development, so they are written out here. `gen_ai.latency.*` are vLLM's own, so that both can be compared; what
has no name elsewhere is `sluice.*`. Nothing here was written by a client: a model's name is told once it is known.
"""

from __future__ import annotations

from app.inference import InferenceRequest, Route
from app.telemetry.account import Timeline
from app.telemetry.tracing import Ended, Facts

OPERATIONS = {
    Route.CHAT: "chat",
    Route.RESPONSES: "chat",
    Route.MESSAGES: "chat",
    Route.COMPLETIONS: "text_completion",
    Route.EMBEDDINGS: "embeddings",
    Route.RERANK: "rerank",
    Route.SCORE: "score",
    Route.TOKENIZE: "tokenize",
    Route.DETOKENIZE: "detokenize",
}
PROVIDER = "vllm"


def name_of(request: InferenceRequest) -> str:
    """Of a request's span: `{operation} {model}`."""
    return f"{OPERATIONS[request.route]} {request.resolved_model}".rstrip()


def facts_of(end: Ended) -> Facts:
    """The attributes of a request's span."""
    request = end.request
    facts: Facts = {
        "gen_ai.operation.name": OPERATIONS[request.route],
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.stream": request.stream,
        "http.request.method": "POST",
        "http.route": request.route.value,
        "sluice.request_id": request.id,
        "sluice.tenant": request.tenant.name,
        "sluice.band": request.band.value,
        "sluice.outcome": end.outcome.value,
    }
    if end.code:
        facts["sluice.code"] = end.code
    if end.failure:
        facts["error.type"] = end.failure
    if end.status is not None:
        facts["http.response.status_code"] = end.status
    if request.batch_id:
        facts["sluice.batch_id"] = request.batch_id
    if request.max_tokens is not None:
        facts["gen_ai.request.max_tokens"] = request.max_tokens
    if request.choices > 1:
        facts["gen_ai.request.choice.count"] = request.choices
    if request.resolved_model:
        facts["gen_ai.request.model"] = request.model
    if end.variant:
        facts["gen_ai.response.model"] = f"{request.resolved_model}:{end.variant}"
    return facts | _usage(end) | _times(end.timeline, is_stream=request.stream)


def _usage(end: Ended) -> Facts:
    if end.usage is None:
        return {}
    facts: Facts = {
        "gen_ai.usage.input_tokens": end.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": end.usage.completion_tokens,
    }
    if end.usage.cached_tokens:
        facts["gen_ai.usage.cache_read.input_tokens"] = end.usage.cached_tokens
    return facts


def _times(line: Timeline, *, is_stream: bool) -> Facts:
    """Seconds since arrival, and in the queue."""
    facts: Facts = {"gen_ai.latency.time_in_queue": line.waited_s}
    if is_stream and line.first_byte is not None:
        facts["gen_ai.response.time_to_first_chunk"] = line.first_byte - line.arrived
    if line.first_token is not None:
        facts["gen_ai.latency.time_to_first_token"] = line.first_token - line.arrived
    return facts
