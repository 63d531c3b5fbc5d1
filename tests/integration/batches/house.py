"""Batches through a real gateway process, asked with the official client."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, Self

import openai
from openai.types import Batch, FileObject

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.running import GatewayProcess, until

CHAT: Final = "/v1/chat/completions"
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
# OpenAI's graph: what may be seen after what.
AFTER: dict[str, frozenset[str]] = {
    "validating": frozenset({"in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"}),
    "in_progress": frozenset({"finalizing", "completed", "expired", "cancelling", "cancelled"}),
    "finalizing": frozenset({"completed", "expired"}),
    "cancelling": frozenset({"cancelled"}),
}
FAST = {"tick_s": 0.05, "commit_interval_s": 0.02, "lease_s": 2}


def line(custom_id: str, *, model: str = "m", url: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": custom_id}], "max_tokens": 4, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def lines(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [line(f"c{number}", **fields) for number in range(count)]


def jsonl(requests: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


class Client:
    """The official client of one gateway, and the steps that tests repeat."""

    def __init__(self, gateway: GatewayProcess, tenant: str = "") -> None:
        headers = {"x-sluice-tenant": tenant} if tenant else {}
        self.api = openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0, default_headers=headers
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.api.close()

    async def upload(self, data: bytes, name: str = "input.jsonl") -> FileObject:
        return await self.api.files.create(file=(name, data), purpose="batch")

    async def create(self, data: bytes, *, window: str = "24h", endpoint: Any = CHAT, **more: Any) -> Batch:
        file = await self.upload(data)
        asked: Any = window
        return await self.api.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=asked, **more)

    async def follow(self, batch: Batch, timeout_s: float = 60.0) -> Batch:
        """The batch at its end. Every poll must show a state that may follow on the one before, and growing counts."""
        latest = batch

        async def has_ended() -> bool:
            nonlocal latest
            before, latest = latest, await self.api.batches.retrieve(batch.id)
            check_step(before, latest)
            return latest.status in FINAL

        await until(has_ended, f"the end of {batch.id}", timeout_s)
        return latest

    async def run(self, data: bytes, **more: Any) -> Batch:
        return await self.follow(await self.create(data, **more))

    async def reaches(self, batch: Batch, status: str, completed: int = 0, timeout_s: float = 60.0) -> None:
        async def is_there() -> bool:
            now = await self.api.batches.retrieve(batch.id)
            assert now.request_counts is not None
            return now.status == status and now.request_counts.completed >= completed

        await until(is_there, f"{batch.id} {status} with {completed}", timeout_s)

    async def records(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of a file; none without a file."""
        if file_id is None:
            return []
        return [json.loads(text) for text in (await self.api.files.content(file_id)).text.splitlines()]


def check_step(before: Batch, after: Batch) -> None:
    """I19: no step back."""
    old, new = before.request_counts, after.request_counts
    assert old is not None
    assert new is not None
    assert new.completed >= old.completed
    assert new.failed >= old.failed
    assert new.completed + new.failed <= new.total or new.total == 0
    assert after.status == before.status or after.status in AFTER[before.status], (before.status, after.status)


def check_whole(requests: Sequence[dict[str, Any]], output: list[dict[str, Any]], errors: list[dict[str, Any]]) -> None:
    """I18: every custom_id has one record, in one file."""
    told = Counter(record["custom_id"] for record in (*output, *errors))
    assert told == Counter(request["custom_id"] for request in requests)


def seen_by(worker: FakeWorker) -> list[str]:
    """The lines that a worker was asked, by custom_id (which `line` makes the prompt)."""
    return [_prompt(received.body) for received in worker.requests if _is_line(received.body)]


def answered_by(worker: FakeWorker) -> list[str]:
    """The lines that it answered whole."""
    answered = [received for received in worker.requests if received.outcome == "finished"]
    return [_prompt(received.body) for received in answered if _is_line(received.body)]


def _is_line(body: dict[str, Any]) -> bool:
    """Canaries are asked as well."""
    return "messages" in body and _prompt(body).startswith("c")


def _prompt(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])
