"""Several variants behind one name: policies, canaries, other names, other models, and steps down under pressure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.manifest import Manifest
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import renamed, unstamped
from tests.integration.gateway.running import GatewayProcess, until
from tests.unit.cards import card, quality

pytestmark = pytest.mark.asyncio(loop_scope="session")

PERCENT = 30
FACTS: dict[str, dict[str, Any]] = {
    "dense": {"quality": 1.0, "cost": 1.0},
    "small": {"quality": 0.8, "cost": 0.3},
    "bad": {},
    "large": {"quality": 1.0},
}
SURE, UNSURE = " ".join(["blue"] * 8), " ".join(["sun"] * 8)
"""What the fake model answers with a margin above 0.7 and below 0.35; half of it alone tells."""
CASCADE = {"small": "small", "large": "large", "measure": "margin", "threshold": 0.45, "hold_tokens": 4}


class Variants:
    """`m` has a dense variant with one slot and a small one, `tried` a canary, `gated` a variant that fails its gate,
    `stair` a cascade, and `spare` stands in for `m`. The tenant `eager` consents to lesser variants.
    """

    def __init__(self) -> None:
        self.dense = FakeWorker("m:dense")
        self.small = FakeWorker("m:small")
        self.stable = FakeWorker("tried:dense")
        self.canary = FakeWorker("tried:small")
        self.gated = FakeWorker("gated:dense")
        self.bad = FakeWorker("gated:bad")
        self.low = FakeWorker("stair:small")
        self.high = FakeWorker("stair:large")
        self.spare = FakeWorker("spare:dense")
        self.gateway: GatewayProcess

    @property
    def workers(self) -> tuple[FakeWorker, ...]:
        tried = self.stable, self.canary, self.gated, self.bad
        return (self.dense, self.small, *tried, self.low, self.high, self.spare)

    def models(self, directory: Path) -> list[dict[str, Any]]:
        listed: dict[str, dict[str, Any]] = {}
        for worker in self.workers:
            name, _, variant = worker.model.partition(":")
            entry = {"name": variant, "workers": [{"url": worker.url}], **FACTS[variant]}
            listed.setdefault(name, {"name": name, "policy": "quality", "variants": []})["variants"].append(entry)
        m, tried, gated = listed["m"], listed["tried"], listed["gated"]
        m["variants"][0]["workers"][0]["max_concurrency"] = 1
        aliases = [
            "plain",
            {"name": "tiny", "variant": "small"},
            {"name": "old", "deprecated": "2026-01-01", "sunset": "2099-01-01"},
            {"name": "gone", "sunset": "2026-01-01T00:00:00Z"},
        ]
        m |= {"ttft_target_s": 0.3, "calm_s": 0.5, "aliases": aliases, "fallbacks": ["spare"]}
        listed["stair"]["cascade"] = CASCADE
        tried["shadow"] = {"variant": "small", "percent": 100}
        listed["stair"]["variants"][1]["workers"][0]["max_concurrency"] = 1
        tried["canary"] = {"variant": "small", "percent": PERCENT}
        made: dict[str, Any] = {"model": "gated", "variant": "bad", "base": "b", "recipe": "r", "weights_bytes": 1}
        Manifest(**made, parameters_count=1, card=card(quality(0.1))).write(directory)
        gated["variants"][1]["manifest"] = str(directory / "sluice.json")
        return list(listed.values())

    async def ask(
        self,
        model: str,
        tenant: str = "strict",
        headers: dict[str, str] | None = None,
        text: str = "hello",
        **fields: Any,
    ) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        sent = {"x-sluice-tenant": tenant, **(headers or {})}
        return await self.gateway.http.post("/v1/chat/completions", json=body, headers=sent)

    async def served(self, model: str, tenant: str = "strict", **asked: Any) -> tuple[str, str]:
        """The variant, and why."""
        answer = await self.ask(model, tenant, **asked)
        assert answer.status_code == 200, answer.text
        return served_by(answer)


def served_by(answer: httpx.Response) -> tuple[str, str]:
    return answer.headers["x-sluice-variant"], answer.headers["x-sluice-variant-reason"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def _variants(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Variants]:
    variants = Variants()
    async with AsyncExitStack() as stack:
        for worker in variants.workers:
            await stack.enter_async_context(worker)
        directory = tmp_path_factory.mktemp("variants")
        variants.gateway = GatewayProcess(
            directory,
            variants.models(directory),
            tenants=[{"name": "eager", "degrade": True}, {"name": "thrifty", "policy": "economy"}, {"name": "stairs"}],
            admission={"trust_tenant_header": True, "queue_timeout_s": 10},
        )
        await stack.enter_async_context(variants.gateway)
        yield variants


@pytest_asyncio.fixture(loop_scope="session")
async def variants(_variants: Variants) -> AsyncIterator[Variants]:
    await _variants.gateway.ready(*_variants.workers)
    yield _variants
    for worker in _variants.workers:
        worker.resume()
    await _variants.gateway.idle()


async def test_policies_of_model_tenant_and_request(variants: Variants) -> None:
    assert await variants.served("m") == ("dense", "quality")
    assert await variants.served("m", "thrifty") == ("small", "economy")
    assert await variants.served("m", headers={"x-sluice-policy": "economy"}) == ("small", "economy")
    assert await variants.served("m", "thrifty", sluice={"policy": "quality"}) == ("dense", "quality")
    assert await variants.served("m", sluice={"policy": "balanced", "lambda": 0.1}) == ("dense", "balanced")
    assert await variants.served("m", sluice={"policy": "balanced", "lambda": 2}) == ("small", "balanced")
    assert await variants.served("m", sluice={"policy": "economy", "quality_floor": 0.9}) == ("dense", "economy")
    assert await variants.served("m:small") == ("small", "pinned")
    assert "sluice" not in variants.small.requests[-2].body
    scrape = await variants.gateway.scrape()
    assert scrape.sum("sluice_variant_choices_total", model="m", variant="small", reason="economy") == 2
    assert scrape.sum("sluice_variant_choices_total", reason="pinned") == 0


@pytest.mark.parametrize(
    ("sluice", "param"),
    [
        ("economy", "sluice"),
        ({"policy": "best"}, "sluice.policy"),
        ({"policy": ["economy"]}, "sluice.policy"),
        ({"lambda": -1}, "sluice.lambda"),
        ({"lambda": True}, "sluice.lambda"),
        ({"quality_floor": 2}, "sluice.quality_floor"),
        ({"ttft_ms": 0}, "sluice.ttft_ms"),
        ({"degrade": 1}, "sluice.degrade"),
        ({"session": "x" * 300}, "sluice.session"),
        ({"polcy": "economy"}, "sluice.polcy"),
    ],
)
async def test_a_preference_that_makes_no_sense(variants: Variants, sluice: Any, param: str) -> None:
    answer = await variants.ask("m", sluice=sluice)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["code"] == "invalid_value"


async def test_headers_that_make_no_sense(variants: Variants) -> None:
    for header in ({"x-sluice-policy": "best"}, {"x-sluice-session": "x" * 300}):
        answer = await variants.ask("m", headers=header)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(header)))


async def test_a_variant_that_fails_its_gate_serves_by_its_name_only(variants: Variants) -> None:
    for policy in ("quality", "economy", "balanced", "any"):
        assert await variants.served("gated", headers={"x-sluice-policy": policy}) == ("dense", "only")
    assert await variants.served("gated:bad") == ("bad", "pinned")


async def test_a_canary_keeps_its_sessions(variants: Variants) -> None:
    sessions = [f"session {at}" for at in range(60)]
    first = [await variants.served("tried", headers={"x-sluice-session": session}) for session in sessions]
    again = [await variants.served("tried", sluice={"session": session}) for session in sessions]
    assert first == again
    assert set(first) == {("dense", "quality"), ("small", "canary")}
    share = first.count(("small", "canary")) / len(first)
    assert abs(share * 100 - PERCENT) < 20  # the sessions are fixed, so is their share
    assert len({await variants.served("tried") for _ in range(5)}) == 1  # without a session, a tenant keeps its side
    assert len({await variants.served("tried", user="ada") for _ in range(5)}) == 1


async def test_other_names(variants: Variants) -> None:
    assert await variants.served("plain") == ("dense", "quality")
    assert await variants.served("plain:small") == ("small", "pinned")
    assert await variants.served("tiny") == ("small", "pinned")
    old = await variants.ask("old")
    assert served_by(old) == ("dense", "quality")
    assert old.headers["x-sluice-model"] == "m"
    assert old.headers["deprecation"] == "@1767225600"
    assert old.headers["sunset"] == "Thu, 01 Jan 2099 00:00:00 GMT"
    assert "deprecation" not in (await variants.ask("m")).headers
    gone = await variants.ask("gone")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_list_of_models_tells_other_names(variants: Variants) -> None:
    listed = {each["id"]: each for each in (await variants.gateway.http.get("/v1/models")).json()["data"]}
    assert listed["m"]["aliases"] == ["plain", "tiny", "old"]
    assert (listed["tiny"]["alias_of"], listed["old"]["alias_of"]) == ("m:small", "m")
    assert listed["old"]["sunset"] == "2099-01-01T00:00:00Z"
    assert "gone" not in listed
    assert (await variants.gateway.http.get("/v1/models/tiny")).json() == listed["tiny"]


async def test_steps_down_rather_than_wait_and_up_again(variants: Variants) -> None:
    before = await variants.gateway.scrape()
    variants.dense.hold()
    held = asyncio.create_task(variants.served("m"))
    await variants.dense.wait_for(open=1)
    patient = asyncio.create_task(variants.served("m"))
    unwilling = asyncio.create_task(variants.served("m", "eager", sluice={"degrade": False}))
    assert await variants.served("m", "eager") == ("small", "pressure")
    assert await variants.served("m", "eager") == ("small", "pressure")
    assert await variants.served("m", "eager", sluice={"quality_floor": 0.7}) == ("small", "pressure")
    assert not patient.done()
    assert not unwilling.done()
    variants.dense.resume()
    assert [await each for each in (held, patient, unwilling)] == [("dense", "quality")] * 3
    assert await variants.served("m", "eager") == ("dense", "quality")

    async def is_up_again() -> bool:
        assert await variants.served("m", "eager") == ("dense", "quality")
        return await steps(variants, "calm") > before.sum("sluice_variant_steps_total", reason="calm")

    await until(is_up_again, "a step up after the calm")
    assert await steps(variants, "pressure") > before.sum("sluice_variant_steps_total", reason="pressure")
    rejected = (await variants.gateway.scrape()).sum("sluice_limit_rejections_total")
    assert rejected == before.sum("sluice_limit_rejections_total")


async def steps(variants: Variants, reason: str) -> float:
    return (await variants.gateway.scrape()).sum("sluice_variant_steps_total", reason=reason, model="m")


async def doubted(variants: Variants, text: str, **fields: Any) -> httpx.Response:
    answer = await variants.ask("stair", "stairs", text=text, headers={"x-sluice-policy": "cascade"}, **fields)
    assert answer.status_code == 200, answer.text
    return answer


def same(answer: httpx.Response) -> bytes:
    """The body, without what differs from one request to the next."""
    return renamed(unstamped(answer.content), answer.headers["x-request-id"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cascade_asks_the_large_variant_where_the_small_one_is_not_sure(
    variants: Variants, stream: bool
) -> None:
    plain = await variants.ask("stair:small", text=SURE, stream=stream)
    before, asked = await variants.gateway.scrape(), variants.high.counts.seen
    sure = await doubted(variants, SURE, stream=stream)
    assert served_by(sure) == ("small", "sure")
    assert variants.low.requests[-1].body["top_logprobs"] == 5
    if stream:
        assert "logprobs" in sure.text
        assert '"logprobs":{' not in sure.text
        assert sure.text.count("blue") == plain.text.count("blue")
        assert sure.text.endswith("data: [DONE]\n\n")
    else:
        assert same(sure) == same(plain)
    unsure = await doubted(variants, UNSURE, stream=stream)
    assert served_by(unsure) == ("large", "unsure")
    assert variants.high.counts.seen == asked + 1
    assert same(unsure) == same(await variants.ask("stair:large", text=UNSURE, stream=stream))
    await variants.low.wait_for(open=0)
    await variants.gateway.idle()
    after = await variants.gateway.scrape()

    def grown(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    assert grown("sluice_variant_choices_total", reason="sure") == 1
    assert grown("sluice_variant_choices_total", reason="unsure") == 1
    assert grown("sluice_tenant_requests_total", tenant="stairs") == 2
    small, large = (grown("sluice_generation_tokens_total", model="stair", variant=name) for name in ("small", "large"))
    assert small >= (13 if stream else 18)  # of a stream that is given up, what had come of it
    assert large == 18  # with the one that asked for the large variant by its name
    assert grown("sluice_tenant_tokens_total", tenant="stairs", direction="output") == small + large - 9


async def test_who_asks_for_logprobs_gets_as_many_as_were_asked_for(variants: Variants) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    for stream in (False, True):
        sure = await doubted(variants, SURE, stream=stream, **asked)
        assert served_by(sure) == ("small", "sure")
        plain = await variants.ask("stair:small", text=SURE, stream=stream, **asked)
        if stream:
            assert sure.text.count('"logprob":') == plain.text.count('"logprob":')
        else:
            assert sure.json()["choices"] == plain.json()["choices"]


async def test_an_unsure_answer_is_kept_where_there_is_no_better_one_in_time(variants: Variants) -> None:
    variants.high.hold()
    held = asyncio.create_task(variants.ask("stair:large"))
    await variants.high.wait_for(open=1)
    answer = await variants.ask(
        "stair", text=UNSURE, headers={"x-sluice-policy": "cascade", "x-sluice-timeout-ms": "2000"}
    )
    assert served_by(answer) == ("small", "kept")
    variants.high.resume()
    await held


async def test_what_cannot_be_weighed_comes_from_the_best_variant(variants: Variants) -> None:
    assert served_by(await doubted(variants, SURE, n=2)) == ("large", "quality")
    answer = await variants.ask("m", headers={"x-sluice-policy": "cascade"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sluice.policy")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_shadow_is_compared_and_never_returned(variants: Variants, stream: bool) -> None:
    before, seen = await variants.gateway.scrape(), variants.canary.counts.seen
    name = "sluice_shadow_requests_total"

    async def shadows(outcome: str) -> float:
        return (await variants.gateway.scrape()).sum(name, outcome=outcome) - before.sum(name, outcome=outcome)

    answer = await variants.ask("tried:dense", "stairs", text=UNSURE, stream=stream, max_tokens=4)
    assert served_by(answer) == ("dense", "pinned")

    async def is_compared() -> bool:
        return await shadows("compared") == 1

    await until(is_compared, "a copy compared")
    copy = variants.canary.requests[-1].body
    assert (copy["messages"], copy["max_tokens"], copy.get("stream")) == (
        [{"role": "user", "content": UNSURE}], 4, None,
    )  # fmt: skip
    after = await variants.gateway.scrape()
    one = {"model": "tried", "variant": "small"}
    assert after.sum("sluice_shadow_agreement_ratio_sum", **one) - before.sum(
        "sluice_shadow_agreement_ratio_sum", **one
    ) == pytest.approx(1.0)
    assert (
        after.sum("sluice_requests_total", **one, band="batch")
        == before.sum("sluice_requests_total", **one, band="batch") + 1
    )
    assert (
        after.sum("sluice_tenant_requests_total", tenant="stairs")
        == before.sum("sluice_tenant_requests_total", tenant="stairs") + 1
    )
    variants.canary.hold()
    for text in ("one", "two"):
        await variants.ask("tried:dense", text=text, stream=stream)
    assert await shadows("dropped") == 1
    variants.canary.resume()
    await until(lambda: _is(shadows, "compared", 2), "the copy that was held")
    assert variants.canary.counts.seen == seen + 2


async def _is(count: Callable[[str], Awaitable[float]], outcome: str, expected: float) -> bool:
    return await count(outcome) == expected


async def test_what_has_no_worker_is_passed_over_and_then_another_model_serves(variants: Variants) -> None:
    variants.dense.crash()

    async def is_lost(worker: FakeWorker = variants.dense) -> bool:
        return await variants.gateway.state_of(worker) == "lost"

    await until(is_lost, "the dense worker is lost")
    assert await variants.served("m") == ("small", "unavailable")
    variants.small.crash()
    await until(lambda: is_lost(variants.small), "the small worker is lost")
    answer = await variants.ask("old")
    assert served_by(answer) == ("dense", "fallback")
    assert (answer.headers["x-sluice-model"], answer.headers["x-sluice-fallback"]) == ("spare", "m")
    assert answer.headers["deprecation"] == "@1767225600"
    assert (await variants.ask("m:dense")).status_code == 503
    await variants.dense.start()
    await variants.small.start()
    await variants.gateway.ready(variants.dense, variants.small)
    assert await variants.served("m") == ("dense", "quality")
