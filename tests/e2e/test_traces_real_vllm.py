"""A real vLLM's own spans join the gateway's trace, at the attempt."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.real_worker import started_worker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.collector import Collector, Span
from tests.integration.gateway.running import GatewayProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.asyncio(loop_scope="session")]


async def test_the_engines_spans_are_below_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector:
        # vLLM speaks gRPC otherwise.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "vllm")
        with started_worker("smollm2:dense", extra=("--otlp-traces-endpoint", collector.url)) as starting:
            monkeypatch.undo()
            worker = await asyncio.to_thread(starting.proven)
            models = [{"name": "smollm2", "variants": [{"name": "dense", "workers": [{"url": worker.url}]}]}]
            tracing = {"endpoint": collector.url, "export_interval_s": 0.1}
            async with GatewayProcess(tmp_path, models, tracing=tracing) as gateway:
                await gateway.ready(worker, timeout_s=120)
                body = chat(model="smollm2", max_tokens=8, stream=True)
                answer = await gateway.http.post(CHAT, json=body, timeout=120)
                assert answer.status_code == 200
                trace = await collector.trace(answer.headers["x-request-id"])
                attempt = trace.one("attempt")

                def joined() -> list[Span]:
                    return [span for span in collector.of(attempt.trace_id).below(attempt) if span.service == "vllm"]

                await collector.wait_for(lambda: bool(joined()), timeout_s=60)
                (engine,) = joined()
    assert engine.name == "llm_request"
    assert attempt.began_ns <= engine.began_ns <= engine.ended_ns
    told = trace.server.facts
    assert engine.facts["gen_ai.usage.prompt_tokens"] == told["gen_ai.usage.input_tokens"]
    assert engine.facts["gen_ai.usage.completion_tokens"] == told["gen_ai.usage.output_tokens"]
    assert engine.facts["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.time_to_first_token"]
