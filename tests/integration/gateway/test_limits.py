"""Tenants' limits as clients meet them: exact over two gateways, told in OpenAI's headers, settled by what was used."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.admission.fleet import Dump
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model, until
from tests.processes import Valkey

pytestmark = pytest.mark.asyncio(loop_scope="session")

HAMMERED = 20
# Those whose spending is read have one test each: a minute may be over between two of them.
TENANTS: dict[str, dict[str, int]] = {
    "hammered": {"requests_per_min": HAMMERED},
    "metered": {"requests_per_min": 1000, "tokens_per_min": 100_000},
    "leaver": {"requests_per_min": 1000, "tokens_per_min": 100_000},
    "failing": {"requests_per_min": 1000, "tokens_per_min": 100_000},
    "bad": {"requests_per_min": 1000, "tokens_per_min": 100_000},
    "watched": {"requests_per_min": 1000, "tokens_per_min": 100_000},
    "choosy": {"tokens_per_min": 100_000},
    "small": {"tokens_per_min": 50},
    "daily": {"tokens_per_day": 100},
    "single": {"concurrent": 1},
    "embedding": {"tokens_per_min": 1000, "requests_per_min": 5},
}
TOTAL = re.compile(r'"total_tokens": ?(\d+)')
DURATION = re.compile(r"(\d+h)?(\d+m)?\d+(\.\d+)?m?s")


class Limited:
    """Two gateways on one ledger, in front of one worker that generates and one that embeds."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.worker = FakeWorker("m")
        self.embed = FakeWorker("embed", task="embed")
        self.gateways: list[GatewayProcess] = []

    def ask(self, tenant: str, at: int = 0, path: str = CHAT, **fields: Any) -> asyncio.Task[httpx.Response]:
        body = chat(model="m", **fields) if path == CHAT else fields
        headers = {"x-sluice-tenant": tenant}
        return asyncio.create_task(self.gateways[at].http.post(path, json=body, headers=headers))

    async def stands_at(self, tenant: str, limit: str, used: int) -> None:
        """Wait until the tenant has nothing running and has used so much."""

        async def is_settled() -> bool:
            dump = Dump(self.url)
            return not dump.live.get(tenant) and dump.spent.get(f"{limit}:{tenant}", {}).get("sum", 0) == used

        await until(is_settled, f"{tenant} has used {used} of {limit}: {Dump(self.url).spent}")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def limited(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Limited]:
    with Valkey(tmp_path_factory.mktemp("limits")) as server:
        house = Limited(server.url)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(house.worker)
            await stack.enter_async_context(house.embed)
            for _ in range(2):
                gateway = GatewayProcess(
                    tmp_path_factory.mktemp("gateway"),
                    [model("m", house.worker), model("embed", house.embed)],
                    redis={"url": server.url},
                    tenants=[{"name": name, "limits": limits} for name, limits in TENANTS.items()],
                    admission={"replicas": 2, "trust_tenant_header": True},
                )
                house.gateways.append(await stack.enter_async_context(gateway))
            for gateway in house.gateways:
                await gateway.ready(house.worker, house.embed)
            yield house


async def test_two_gateways_together_let_pass_exactly_the_limit(limited: Limited) -> None:
    asked = [limited.ask("hammered", at=number % 2, max_tokens=1) for number in range(2 * HAMMERED)]
    answers = await asyncio.gather(*asked)
    passed = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert (len(passed), len(refused)) == (HAMMERED, HAMMERED)
    left = sorted(int(answer.headers["x-ratelimit-remaining-requests"]) for answer in passed)
    assert left == list(range(HAMMERED))
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == str(HAMMERED)
        assert DURATION.fullmatch(answer.headers["x-ratelimit-reset-requests"])
        assert "x-ratelimit-limit-tokens" not in answer.headers
    for answer in refused:
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
        assert error["message"].startswith("Rate limit reached on requests per min: Limit 20, Used 20, Requested 1.")
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    scrapes = [await gateway.scrape() for gateway in limited.gateways]
    limit = {"limit": "requests_per_min"}
    assert sum(scrape.sum("sluice_limit_rejections_total", **limit) for scrape in scrapes) == HAMMERED


async def test_a_whole_answer_is_settled_with_its_usage(limited: Limited) -> None:
    answer = await limited.ask("metered", max_tokens=7)
    usage = answer.json()["usage"]
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000 - 7
    before = usage["total_tokens"]
    await limited.stands_at("metered", "tokens_per_min", before)
    streamed = await limited.ask("metered", at=1, max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert streamed.status_code == 200
    await limited.stands_at("metered", "tokens_per_min", before + int(TOTAL.findall(streamed.text)[-1]))
    await limited.stands_at("metered", "requests_per_min", 2)


async def test_every_choice_is_reserved(limited: Limited) -> None:
    answer = await limited.ask("choosy", max_tokens=1000, n=3)
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 97_000
    await limited.stands_at("choosy", "tokens_per_min", answer.json()["usage"]["total_tokens"])


async def test_a_stream_that_is_left_costs_what_it_was_sent(limited: Limited) -> None:
    body = chat(model="m", max_tokens=500, stream=True, x_fault="hang_after:4")
    headers = {"x-sluice-tenant": "leaver"}
    async with limited.gateways[0].http.stream("POST", CHAT, json=body, headers=headers) as answer:
        async for line in answer.aiter_lines():
            if '"content":' in line and '"content":""' not in line:
                break
        assert Dump(limited.url).spent["tokens_per_min:leaver"]["sum"] > 500

    async def is_settled() -> bool:
        dump = Dump(limited.url)
        cost = dump.spent["tokens_per_min:leaver"]["sum"]
        # Its prompt as estimated, one token for each of at most three chunks of content.
        return not dump.live.get("leaver") and len(str(body)) // 8 < cost < len(str(body))

    await until(is_settled, "settled")
    limited.worker.heal()


async def test_what_failed_before_its_first_byte_costs_nothing(limited: Limited) -> None:
    answer = await limited.ask("failing", max_tokens=5, x_fault="html200")
    assert answer.status_code == 502
    assert answer.headers["x-ratelimit-limit-requests"] == "1000"
    await limited.stands_at("failing", "requests_per_min", 0)


async def test_a_bad_request_is_a_request(limited: Limited) -> None:
    answer = await limited.ask("bad", max_tokens=50_000)
    assert answer.status_code == 400
    await limited.stands_at("bad", "requests_per_min", 1)
    await limited.stands_at("bad", "tokens_per_min", 0)


async def test_an_embedding_reserves_no_output(limited: Limited) -> None:
    answer = await limited.ask("embedding", path="/v1/embeddings", model="embed", input="one two three")
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 900
    await limited.stands_at("embedding", "tokens_per_min", answer.json()["usage"]["prompt_tokens"])


async def test_what_is_too_large_for_a_limit_is_not_tried_again(limited: Limited) -> None:
    answer = await limited.ask("small", max_tokens=51)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
    assert "Limit 50, Requested 51" in answer.json()["error"]["message"]
    assert (await limited.ask("small", max_tokens=20)).status_code == 200


async def test_the_official_client_sees_a_rate_limit_error(limited: Limited) -> None:
    client = openai.AsyncOpenAI(
        base_url=limited.gateways[0].url + "/v1", api_key="-", default_headers={"x-sluice-tenant": "daily"}
    )
    async with client:
        ask = client.chat.completions.with_raw_response.create
        first = await ask(model="m", messages=[{"role": "user", "content": "a"}], max_tokens=30)
        assert DURATION.fullmatch(first.headers["x-ratelimit-reset-tokens"])
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(model="m", messages=[{"role": "user", "content": "a"}], max_tokens=99)
        assert refused.value.code == "insufficient_quota"


async def test_one_at_a_time_and_the_next_when_it_has_ended(limited: Limited) -> None:
    limited.worker.hold()
    first = limited.ask("single", max_tokens=1)
    await limited.worker.wait_for(open=1)
    assert (await limited.ask("single", at=1, max_tokens=1)).status_code == 429
    view = (await limited.gateways[1].operators.get("/admin/limits")).json()
    (row,) = [row for row in view["tenants"] if row["tenant"] == "single"]
    assert row == {"tenant": "single", "concurrent": 1, "concurrent_most": 1, "limits": []}
    limited.worker.resume()
    assert (await first).status_code == 200

    async def is_free() -> bool:
        return "single" not in Dump(limited.url).live

    await until(is_free, "nothing runs")
    assert (await limited.ask("single", at=1, max_tokens=1)).status_code == 200


async def test_who_has_no_limits_is_told_of_none(limited: Limited) -> None:
    answer = await limited.ask("free", max_tokens=1)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_operators_see_every_window(limited: Limited) -> None:
    await limited.ask("watched", max_tokens=1)
    view = (await limited.gateways[0].operators.get("/admin/limits")).json()
    assert {row["tenant"] for row in view["tenants"]} == set(TENANTS)
    (row,) = [row for row in view["tenants"] if row["tenant"] == "watched"]
    shown = {limit["limit"]: limit for limit in row["limits"]}
    assert shown["tokens_per_min"]["most"] == 100_000
    assert shown["requests_per_min"]["used"] == 1
    assert 0 < shown["requests_per_min"]["reset_s"] <= 61
