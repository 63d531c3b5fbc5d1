"""Two tenants and one real vLLM: by its own counters, neither ever hits what the other put into the prefix cache."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx
import pytest
import pytest_asyncio

from tests.contract.real_worker import RealWorker, started_worker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, Scrape, issue_keys

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.asyncio(loop_scope="session")]

PROMPT = "What does nobody but the tenants of this test ask, again and again, word for word? " * 8
BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Shared:
    """A gateway with keys of two tenants, in front of one worker."""

    gateway: GatewayProcess
    worker: RealWorker
    keys: dict[str, str]

    async def hits(self, tenant: str, **fields: object) -> float:
        """Prompt tokens that the engine found in its cache for one question of `tenant`."""
        before = await self.counted()
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        body = chat(PROMPT, model="smollm2", max_tokens=1, **fields)
        answer = await self.gateway.http.post(CHAT, json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return await self.counted() - before

    async def counted(self) -> float:
        async with httpx.AsyncClient(base_url=self.worker.url, timeout=30) as worker:
            return Scrape((await worker.get("/metrics")).text).sum("vllm:prefix_cache_hits_total")


@pytest.fixture(scope="module")
def worker() -> Iterator[RealWorker]:
    with started_worker("smollm2:dense") as starting:
        yield starting.proven()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(worker: RealWorker, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shared]:
    directory = tmp_path_factory.mktemp("tenants")
    file = directory / "keys.yaml"
    keys = await issue_keys(file, "one", "two", secret="a secret")
    models = [{"name": "smollm2", "variants": [{"name": "dense", "workers": [{"url": worker.url}]}]}]
    auth = {"enabled": True, "key_files": [str(file)], "secret": "a secret"}
    async with GatewayProcess(directory, models, key=keys["one"], auth=auth) as gateway:
        await gateway.ready(worker, timeout_s=120)
        yield Shared(gateway, worker, keys)


async def test_s18_tenants_share_no_prefix_and_each_finds_its_own(shared: Shared) -> None:
    assert [await shared.hits("one"), await shared.hits("two")] == [0, 0]
    again = [await shared.hits("one"), await shared.hits("two")]
    assert again[0] == again[1] >= BLOCK_TOKENS


async def test_s18_a_clients_salt_leads_to_nobody_elses_cache(shared: Shared) -> None:
    await shared.hits("one")
    assert [await shared.hits("one", cache_salt="x"), await shared.hits("two", cache_salt="x")] == [0, 0]
    assert await shared.hits("one", cache_salt="x") >= BLOCK_TOKENS
