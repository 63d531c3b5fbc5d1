"""The console's page and its live data: who gets them, what they say, and when a viewer is let go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from app.console.console import VIEWERS_MOST
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.conftest import House
from tests.integration.gateway.running import GatewayProcess, issue_keys, model, until
from tests.integration.gateway.watching import DEADLINE_S, LIVE, watching
from tests.processes import Valkey

pytestmark = pytest.mark.asyncio(loop_scope="session")

CONSOLE_CHAT = "/console/chat/completions"
PAGE = ["/console", "/console/console.js", "/console/console.css", "/console/mark.svg"]


async def test_it_shows_workers_and_who_waits(house: House) -> None:
    worker = f"127.0.0.1:{house.narrow.port}"
    house.narrow.hold()
    asked = [asyncio.create_task(house.gateway.http.post(CHAT, json=chat(model="narrow"))) for _ in range(3)]
    await house.gateway.metric("sluice_queue_depth", 2, band="default")
    async with watching(house.gateway.http) as viewer:
        seen = await viewer.snapshot()
    house.narrow.resume()
    await asyncio.gather(*asked)
    (row,) = [row for row in seen["workers"] if row["id"] == worker]
    assert (row["state"], row["variant"], row["slots_held"], row["slots"]) == ("ready", "narrow:v", 1, 1)
    (flow,) = seen["queue"]["flows"]
    assert (flow["tenant"], flow["band"], flow["depth"], flow["workers"]) == ("anonymous", "default", 2, [worker])
    assert flow["oldest_s"] > 0
    assert seen["in_flight"] == 3
    assert {model["name"] for model in seen["models"]} >= {"m", "narrow", "pair"}


async def test_what_was_done_and_refused_is_shown_without_a_word_of_it(house: House) -> None:
    canary = "canary-7d1f"
    answer = await house.gateway.http.post(CHAT, json=chat(model="m", content=canary, stream=True, max_tokens=4))
    assert answer.status_code == 200
    bad = await house.gateway.http.post(CHAT, json={"model": "m", "messages": canary})
    unknown = await house.gateway.http.post(CHAT, json=chat(model="nowhere"))
    assert (bad.status_code, unknown.status_code) == (400, 404)
    async with watching(house.gateway.http) as viewer:

        async def is_counted() -> bool:
            seen.update(await viewer.snapshot())
            return any(pace and pace["tokens_per_s"] > 0 for pace in seen["traffic"]["paces"])

        seen: dict[str, Any] = {}
        await until(is_counted, "tokens in a step")
    assert {"invalid_value", "model_not_found"} <= {row["code"] for row in seen["refusals"]}
    assert canary not in json.dumps(seen)


@pytest.mark.parametrize("path", PAGE)
async def test_the_page_keeps_to_itself(house: House, path: str) -> None:
    answer = await house.gateway.http.get(path)
    assert answer.status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert answer.headers.get_list("cache-control") == ["no-store"]
    assert "set-cookie" not in answer.headers


async def test_the_page_brings_no_code_from_elsewhere_or_inline(house: House) -> None:
    text = (await house.gateway.http.get("/console")).text
    assert "://" not in text
    assert "style=" not in text
    assert text.count("<script") == text.count('<script type="module" src="console/') == 1


@pytest.mark.parametrize(
    "path", ["/console/", "/console/nothing.js", "/console/__init__.py", "/console/..", "/console/x/y"]
)
async def test_there_is_nothing_else(house: House, path: str) -> None:
    assert (await house.gateway.http.get(path)).status_code == 404


class Guarded:
    """A gateway that asks for keys, on two listeners."""

    def __init__(self, gateway: GatewayProcess, keys: dict[str, str], directory: Path) -> None:
        self.gateway = gateway
        self.keys = keys
        self.directory = directory


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    keys = await issue_keys(directory / "keys", "acme", admin="operators")
    keys |= await issue_keys(directory / "leavers", admin="leaver")
    files = [str(directory / name) for name in ("keys", "leavers")]
    settings: dict[str, Any] = {"auth": {"enabled": True, "key_files": files}}
    async with (
        FakeWorker("m") as worker,
        GatewayProcess(
            directory,
            [model("m", worker)],
            admin=True,
            key=keys["acme"],
            admin_key=keys["operators"],
            **settings,
        ) as gateway,
    ):
        await gateway.ready(worker)
        yield Guarded(gateway, keys, directory)


@pytest.mark.parametrize("path", PAGE)
async def test_the_page_needs_no_key_but_the_operators_listener(guarded: Guarded, path: str) -> None:
    nobody = {"authorization": ""}
    assert (await guarded.gateway.operators.get(path, headers=nobody)).status_code == 200
    hidden = await guarded.gateway.http.get(path)
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", LIVE), ("POST", CONSOLE_CHAT)])
async def test_what_it_shows_and_asks_needs_an_operators_key(guarded: Guarded, method: str, path: str) -> None:
    operators = guarded.gateway.operators
    for key, status, code in (
        ("sk-sluice-unknown", 401, "invalid_api_key"),
        ("sk-wrong", 401, "invalid_api_key"),
        (guarded.keys["acme"], 403, "permission_denied"),
    ):
        answer = await operators.request(method, path, json=chat(), headers={"authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    hidden = await guarded.gateway.http.request(
        method, path, json=chat(), headers={"authorization": f"Bearer {guarded.keys['operators']}"}
    )
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")


async def test_an_operators_question_is_an_ordinary_request_of_its_keys_tenant(guarded: Guarded) -> None:
    asked = chat(stream=True, max_tokens=3)
    async with guarded.gateway.operators.stream("POST", CONSOLE_CHAT, json=asked) as answer:
        text = (await answer.aread()).decode()
    assert answer.status_code == 200
    assert (answer.headers["x-sluice-variant"], "x-sluice-queue-ms" in answer.headers) == ("v", True)
    assert text.endswith("data: [DONE]\n\n")
    line = await asyncio.to_thread(guarded.gateway.process.wait_for_line, r'"event": ?"request"')
    assert json.loads(line)["tenant"] == "operators"
    assert (await guarded.gateway.operators.get(CONSOLE_CHAT)).status_code == 405


async def test_each_viewer_leaves_one_line_in_the_audit(guarded: Guarded) -> None:
    async with watching(guarded.gateway.operators) as viewer:
        await viewer.snapshot()

    async def is_written() -> bool:
        return f'"action": "GET {LIVE}", "status": 200' in guarded.gateway.process.output

    await until(is_written, "an audit line")
    assert guarded.keys["operators"] not in guarded.gateway.process.output


async def test_a_key_that_is_revoked_shows_nothing_any_more(guarded: Guarded) -> None:
    async with watching(guarded.gateway.operators, authorization=f"Bearer {guarded.keys['leaver']}") as viewer:
        await viewer.snapshot()
        (guarded.directory / "leavers").write_text("keys: []")
        await viewer.ended()


async def test_viewers_are_bounded_and_who_leaves_makes_room(guarded: Guarded) -> None:
    http = guarded.gateway.operators
    async with AsyncExitStack() as stack:
        viewers = [await stack.enter_async_context(watching(http)) for _ in range(VIEWERS_MOST)]
        for viewer in viewers:
            await viewer.snapshot()
        async with http.stream("GET", LIVE) as refused:
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)

    async def has_room() -> bool:
        async with http.stream("GET", LIVE) as answer:
            return answer.status_code == 200

    await until(has_room, "room for a viewer")


async def test_a_viewer_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with FakeWorker("m") as worker, GatewayProcess(tmp_path, [model("m", worker)]) as gateway:
        await gateway.ready(worker)
        async with watching(gateway.http) as viewer:
            await viewer.snapshot()
            gateway.process.terminate()
            await viewer.ended()
        assert await asyncio.to_thread(gateway.process.wait, DEADLINE_S) == 0


async def test_it_goes_on_without_redis_and_says_so(tmp_path: Path, own_valkey: Valkey) -> None:
    redis = {"url": own_valkey.url}
    async with FakeWorker("m") as worker, GatewayProcess(tmp_path, [model("m", worker)], redis=redis) as gateway:
        await gateway.ready(worker)
        async with watching(gateway.http) as viewer:
            assert not (await viewer.snapshot())["degraded"]
            own_valkey.kill()
            async with asyncio.timeout(DEADLINE_S):
                while not (seen := await viewer.snapshot())["degraded"]:
                    pass
            assert seen["queue"] == {"flows": [], "routes": []}
