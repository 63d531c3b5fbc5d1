"""The OpenAPI document is valid, and its shapes are those that really go over the wire."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from app.inference import Route
from tests.integration.gateway.asking import CHAT, COMPLETIONS, chat
from tests.integration.gateway.running import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="session")

JSON = "application/json"


async def document(gateway: GatewayProcess) -> dict[str, Any]:
    described: dict[str, Any] = (await gateway.http.get("/openapi.json")).json()
    return described


def validator(described: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """A validator of one schema of the document, with the document's other schemas in reach."""
    return Draft202012Validator({**schema, "components": described["components"]})


async def test_it_is_valid(gateway: GatewayProcess) -> None:
    described = await document(gateway)
    validate(described)
    assert described["openapi"].startswith("3.1")


async def test_every_route_is_described(gateway: GatewayProcess) -> None:
    described = await document(gateway)
    operators = {
        "/health",
        "/healthz",
        "/readyz",
        "/metrics",
        "/admin/queue",
        "/admin/limits",
        "/admin/tenants",
        "/admin/reload",
    }
    operators |= {"/admin/keys", "/admin/keys/{key_id}", "/admin/keys/{key_id}/rotate"}
    files = {"/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"}
    batches = {"/v1/batches", "/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel"}
    assert set(described["paths"]) == {*Route, *operators, *files, *batches, "/v1/models", "/v1/models/{name}"}
    ids = [operation["operationId"] for path in described["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


async def test_it_promises_no_shape_of_the_frameworks_errors(gateway: GatewayProcess) -> None:
    described = await document(gateway)
    assert "HTTPValidationError" not in described["components"]["schemas"]
    for path in described["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]


async def test_every_route_says_who_may_ask_and_how_it_refuses(gateway: GatewayProcess) -> None:
    described = await document(gateway)
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    probes = set()
    for path, operations in described["paths"].items():
        for operation in operations.values():
            if operation["security"] == []:
                probes.add(path)
                continue
            assert operation["security"] == [{"key": []}]
            refusals = {"401", "404", "429", "503"} | ({"403"} if path.startswith(("/admin/", "/metrics")) else set())
            assert refusals <= set(operation["responses"])
            for status in refusals:
                schema = operation["responses"][status]["content"][JSON]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    assert probes == {"/health", "/healthz", "/readyz"}


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, chat(logprobs=True, temperature=0)), (COMPLETIONS, {"model": "m", "prompt": "one two", "max_tokens": 4})],
)
async def test_requests_answers_and_errors_obey_it(gateway: GatewayProcess, path: str, body: dict[str, Any]) -> None:
    described = await document(gateway)
    operation = described["paths"][path]["post"]
    validator(described, operation["requestBody"]["content"][JSON]["schema"]).validate(body)
    answer = await gateway.http.post(path, json=body)
    validator(described, operation["responses"]["200"]["content"][JSON]["schema"]).validate(answer.json())
    assert "text/event-stream" in operation["responses"]["200"]["content"]
    failed = await gateway.http.post(path, json={**body, "model": "nobody"})
    validator(described, operation["responses"]["404"]["content"][JSON]["schema"]).validate(failed.json())


async def test_the_models_obey_it(gateway: GatewayProcess) -> None:
    described = await document(gateway)
    for path, asked in [("/v1/models", "/v1/models"), ("/v1/models/{name}", "/v1/models/m:v")]:
        responses = described["paths"][path]["get"]["responses"]
        schema = validator(described, responses["200"]["content"][JSON]["schema"])
        schema.validate((await gateway.http.get(asked)).json())


async def test_a_request_without_its_required_field_does_not_obey_it(gateway: GatewayProcess) -> None:
    described = await document(gateway)
    schema = described["paths"][CHAT]["post"]["requestBody"]["content"][JSON]["schema"]
    assert not validator(described, schema).is_valid({"model": "m"})
    assert not validator(described, schema).is_valid({"messages": chat()["messages"]})


async def test_the_documentation_page_loads(gateway: GatewayProcess) -> None:
    page = await gateway.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text
