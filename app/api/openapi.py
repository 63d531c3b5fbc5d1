"""The OpenAPI document: FastAPI's own, plus the inference routes that it does not see."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api import schemas
from app.api.access import Access, Rules
from app.inference import Route

REF = "#/components/schemas/{model}"

# route → summary, request, answer (None where the shape is the worker's alone), streams
_INFERENCE: dict[Route, tuple[str, type[BaseModel], type[BaseModel] | None, bool]] = {
    Route.CHAT: ("Chat completion", schemas.ChatRequest, schemas.ChatCompletion, True),
    Route.COMPLETIONS: ("Text completion", schemas.CompletionRequest, schemas.Completion, True),
    Route.RESPONSES: ("OpenAI Responses", schemas.ResponsesRequest, None, True),
    Route.MESSAGES: ("Anthropic Messages", schemas.MessagesRequest, None, True),
    Route.EMBEDDINGS: ("Embeddings", schemas.EmbeddingsRequest, None, False),
    Route.RERANK: ("Rerank documents", schemas.RerankRequest, None, False),
    Route.SCORE: ("Score pairs", schemas.ScoreRequest, None, False),
    Route.TOKENIZE: ("Text to token ids", schemas.TokenizeRequest, None, False),
    Route.DETOKENIZE: ("Token ids to text", schemas.DetokenizeRequest, None, False),
}

_SECURITY = "key"
_GUARDED = {
    "401": "No API key, none that opens anything here, or one that was revoked while the request waited",
    "404": "There is no such thing here, for this key",
    "429": "More than the tenant may use, or too many wrong keys; see `retry-after`",
    "503": "A part of the service is out of reach; see `retry-after`",
}
_ADMINS = {"403": "The key is good, and not for this"}
_ERRORS = {
    **_GUARDED,
    "400": "The request cannot be served as it stands",
    "404": "No such model, or the model does not offer this route",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "502": "The worker broke before its first byte and no other took over",
    "503": "Overloaded, or no worker is ready; see `retry-after`",
    "504": "The worker did not begin to answer in time",
}


def document(app: FastAPI, rules: Rules) -> dict[str, Any]:
    """The OpenAPI document of the whole gateway, with who may ask for what; built once."""
    if app.openapi_schema is None:
        built = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _drop_framework_errors(built)
        _add_inference(built)
        _add_security(built, rules)
        app.openapi_schema = built
    return app.openapi_schema


def _drop_framework_errors(built: dict[str, Any]) -> None:
    """FastAPI promises a 422 of its own shape wherever it validates; here it is answered as a 400 in OpenAI's."""
    for path in built["paths"].values():
        for operation in path.values():
            if operation["responses"].pop("422", None) is not None:
                operation["responses"].update({status: _error(_ERRORS[status]) for status in ("400", "404")})
    for shape in ("HTTPValidationError", "ValidationError"):
        built.get("components", {}).get("schemas", {}).pop(shape, None)


def _add_inference(built: dict[str, Any]) -> None:
    shapes = {shape for _, request, answer, _ in _INFERENCE.values() for shape in (request, answer) if shape}
    _, definitions = models_json_schema(
        [(shape, "validation") for shape in sorted(shapes | {schemas.ErrorBody}, key=lambda shape: shape.__name__)],
        ref_template=REF,
    )
    built.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
    for route, (summary, request, answer, streams) in _INFERENCE.items():
        built["paths"][route.value] = {"post": _operation(route, summary, request, answer, streams)}


def _add_security(built: dict[str, Any], rules: Rules) -> None:
    """What the guard asks for and answers, before any route does."""
    built["components"]["securitySchemes"] = {
        _SECURITY: {"type": "http", "scheme": "bearer", "description": "An API key, where keys are asked for"}
    }
    for path, operations in built["paths"].items():
        access = rules.of(path)
        errors = {} if access is Access.PROBE else {**_GUARDED, **(_ADMINS if access is Access.ADMIN else {})}
        for operation in operations.values():
            operation["security"] = [] if access is Access.PROBE else [{_SECURITY: []}]
            for status, text in errors.items():
                operation["responses"].setdefault(status, _error(text))


def _operation(
    route: Route, summary: str, request: type[BaseModel], answer: type[BaseModel] | None, streams: bool
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer) if answer else {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "tags": ["inference"],
        "summary": summary,
        "operationId": route.name.lower(),
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {
            "200": {"description": "The worker's answer, unchanged", "content": content},
            **{status: _error(text) for status, text in _ERRORS.items()},
        },
    }


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ref(schemas.ErrorBody)}}}


def _ref(shape: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=shape.__name__)}
