"""Two variants of a real model behind one name: traffic moves between them by policy, under pressure, in a cascade."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.contract.real_worker import RealWorker, started_worker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.asyncio(loop_scope="session")]

MODEL = "smollm2"
FACTS = {"dense": {"quality": 1.0, "cost": 1.0}, "w8a8": {"quality": 0.9, "cost": 0.6}}
SURE_ENOUGH = 50.0
"""Nats; no answer is that unsure, but one that nobody can weigh is."""


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, RealWorker]]:
    with ExitStack() as stack:
        starting = {
            name: stack.enter_context(started_worker(f"{MODEL}:{name}", variant=name, core=core))
            for core, name in enumerate(FACTS)
        }
        yield {name: worker.proven() for name, worker in starting.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(
    workers: dict[str, RealWorker], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayProcess]:
    variants = [
        {"name": name, "workers": [{"url": worker.url, "max_concurrency": 1}], **FACTS[name]}
        for name, worker in workers.items()
    ]
    cascade = {"small": "w8a8", "large": "dense", "threshold": SURE_ENOUGH, "hold_tokens": 4}
    models = [
        {"name": MODEL, "policy": "quality", "ttft_target_s": 1, "variants": variants, "cascade": cascade},
    ]
    tenants = [{"name": "eager", "degrade": True}]
    async with GatewayProcess(
        tmp_path_factory.mktemp("variants"), models, tenants=tenants, admission={"trust_tenant_header": True}
    ) as started:
        await started.ready(*workers.values(), timeout_s=120)
        yield started


async def ask(gateway: GatewayProcess, tenant: str = "strict", policy: str = "", **fields: Any) -> httpx.Response:
    headers = {"x-sluice-tenant": tenant, **({"x-sluice-policy": policy} if policy else {})}
    body = chat("What is the capital of France?", **{"model": MODEL, "max_tokens": 8, "temperature": 0, **fields})
    answer = await gateway.http.post(CHAT, json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def served_by(answer: httpx.Response) -> tuple[str, str]:
    return answer.headers["x-sluice-variant"], answer.headers["x-sluice-variant-reason"]


async def test_policies_move_traffic(gateway: GatewayProcess) -> None:
    for policy, variant in (("quality", "dense"), ("economy", "w8a8")):
        answer = await ask(gateway, policy=policy)
        assert served_by(answer) == (variant, policy)
        assert answer.json()["model"] == f"{MODEL}:{variant}"


async def test_pressure_moves_who_consents(gateway: GatewayProcess, workers: dict[str, RealWorker]) -> None:
    long = asyncio.create_task(ask(gateway, max_tokens=500, ignore_eos=True))

    async def is_busy() -> bool:
        return (await gateway.scrape()).sum("sluice_slots_held", worker=f"127.0.0.1:{workers['dense'].port}") == 1

    while not await is_busy():
        await asyncio.sleep(0.05)
    assert served_by(await ask(gateway, "eager")) == ("w8a8", "pressure")
    assert not long.done()
    assert served_by(await long) == ("dense", "quality")


async def test_a_cascade_weighs_real_answers(gateway: GatewayProcess) -> None:
    for stream in (False, True):
        answer = await ask(gateway, policy="cascade", stream=stream)
        assert served_by(answer) == ("w8a8", "sure")
        assert '"logprobs":{' not in answer.text
        plain = await ask(gateway, model=f"{MODEL}:w8a8", stream=stream)
        assert answer.text.count('"content":"') >= plain.text.count('"content":"') > 0
