"""With a listener of their own, operators' pages are there and nowhere else, and clients' routes are not."""

from __future__ import annotations

import pytest

from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.conftest import House, ShortTempered

pytestmark = pytest.mark.asyncio(loop_scope="session")

OPERATORS = ["/metrics", "/docs", "/openapi.json"]
CLIENTS = ["/v1/models", "/v1/models/m"]
PROBES = ["/health", "/healthz", "/readyz"]


@pytest.mark.parametrize("path", OPERATORS)
async def test_operators_pages_are_on_their_listener_only(short: ShortTempered, path: str) -> None:
    assert (await short.gateway.operators.get(path)).status_code == 200
    hidden = await short.gateway.http.get(path, headers={"host": f"127.0.0.1:{short.gateway.admin_port}"})
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", CLIENTS)
async def test_clients_routes_are_on_the_public_listener_only(short: ShortTempered, path: str) -> None:
    assert (await short.gateway.http.get(path)).status_code == 200
    assert (await short.gateway.operators.get(path)).status_code == 404
    refused = await short.gateway.operators.post(CHAT, json=chat())
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", PROBES)
async def test_probes_are_on_both(short: ShortTempered, path: str) -> None:
    assert (await short.gateway.http.get(path)).status_code == 200
    assert (await short.gateway.operators.get(path)).status_code == 200


@pytest.mark.parametrize("path", [*OPERATORS, *CLIENTS, *PROBES])
async def test_without_it_everything_is_on_one(house: House, path: str) -> None:
    assert (await house.gateway.http.get(path)).status_code == 200
