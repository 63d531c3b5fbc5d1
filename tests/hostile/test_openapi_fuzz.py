"""Requests made from the gateway's own OpenAPI document: no 5xx, and every answer as the document says."""

from __future__ import annotations

import os
import re
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.hostile.conftest import Fortress

EXAMPLES = int(os.environ.get("SLUICE_FUZZ_EXAMPLES", "100"))
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/tokenize"]
# What is no header is for raw sockets to send: see framing.py, and test_keys.py for keys.
CONFIG = {"generation": {"with-security-parameters": False}}
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", list(GenerationMode))
async def test_a_route_answers_as_documented(fortress: Fortress, path: str, mode: GenerationMode) -> None:
    url = fortress.gateway.url
    document = (await fortress.gateway.http.get("/openapi.json")).json()
    schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict(CONFIG))
    strategy = schema[path]["POST"].as_strategy(generation_mode=mode)
    bodies: list[schemathesis.Case[Any]] = []

    @settings(
        max_examples=max(EXAMPLES // 10, 5),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        bodies.append(data.draw(strategy))

    collect()
    for case in bodies:
        answer = await fortress.gateway.http.request(**_sent(case, url))
        if answer.status_code != 405:
            case.validate_response(_response(answer), checks=CHECKS)
        assert not re.search('Traceback|File "', answer.text)
    await fortress.holds()


def _sent(case: schemathesis.Case[Any], url: str) -> dict[str, Any]:
    """The request as httpx takes it."""
    given = case.as_transport_kwargs(base_url=url)
    content = given.get("data")
    if given.get("json") is not None or "json" in given:
        return {"method": given["method"], "url": given["url"], "json": given["json"], "headers": given["headers"]}
    return {"method": given["method"], "url": given["url"], "content": content, "headers": given["headers"]}


def _response(answer: httpx.Response) -> schemathesis.Response:
    return schemathesis.Response.from_httpx(answer, verify=True)
