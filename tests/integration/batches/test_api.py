"""Files and batches as clients see them: the official client, real HTTP, OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from tests.fakes.worker import FakeWorker
from tests.integration.batches.house import CHAT, FAST, Client, check_whole, jsonl, line, lines, seen_by
from tests.integration.gateway.running import GatewayProcess, model, until

LIMITS = {"lines": 40, "line_bytes": 2000, "file_bytes": 100_000, "range_lines": 8, "batches_per_tenant": 4}


class House:
    """A gateway that trusts the tenant's header, one worker that generates, one that embeds."""

    def __init__(self, gateway: GatewayProcess, worker: FakeWorker, kept: Path) -> None:
        self.gateway = gateway
        self.worker = worker
        self.kept = kept
        self.client: Client

    def files(self) -> list[Path]:
        """Of uploads, finished or not."""
        places = (self.kept / "objects" / "files", self.kept / "unfinished")
        return [path for place in places for path in place.rglob("*") if path.is_file()]

    @asynccontextmanager
    async def tenant(self, name: str) -> AsyncIterator[Client]:
        async with Client(self.gateway, name) as client:
            yield client


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    kept = tmp_path_factory.mktemp("kept")
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(FakeWorker("m"))
        embed = await stack.enter_async_context(FakeWorker("embed", task="embed"))
        gateway = await stack.enter_async_context(
            GatewayProcess(
                tmp_path_factory.mktemp("gateway"),
                [model("m", worker), model("embed", embed)],
                batches={"directory": str(kept), **LIMITS, **FAST},
                admission={"trust_tenant_header": True},
                tenants=[{"name": "embedder", "models": ["embed"]}],
            )
        )
        await gateway.ready(worker, embed)
        house = House(gateway, worker, kept)
        house.client = await stack.enter_async_context(Client(gateway))
        yield house


@pytest_asyncio.fixture(loop_scope="session")
async def house(_house: House) -> AsyncIterator[House]:
    await _house.gateway.ready(_house.worker)
    yield _house
    _house.worker.heal()
    await _house.gateway.idle()


pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_batch_from_upload_to_results(house: House) -> None:
    requests = lines(20)
    batch = await house.client.create(jsonl(requests), metadata={"run": "7"})
    assert batch.status in ("validating", "in_progress", "finalizing", "completed")
    done = await house.client.follow(batch)
    assert done.status == "completed"
    assert done.errors is None
    assert done.error_file_id is None
    assert done.metadata == {"run": "7"}
    assert done.model == "m"
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (20, 20, 0)
    records = await house.client.records(done.output_file_id)
    assert [record["custom_id"] for record in records] == [request["custom_id"] for request in requests]
    assert all(record["response"]["status_code"] == 200 and record["error"] is None for record in records)
    assert records[3]["response"]["body"]["choices"][0]["message"]["content"] == "c3"
    assert done.usage is not None
    assert done.usage.output_tokens == sum(r["response"]["body"]["usage"]["completion_tokens"] for r in records)
    stamps = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert stamps == sorted(stamp for stamp in stamps if stamp is not None)
    output = await house.client.api.files.retrieve(done.output_file_id or "")
    assert (output.purpose, output.status) == ("batch_output", "processed")
    assert len((await house.client.api.files.content(output.id)).content) == output.bytes


async def test_embeddings_and_completions(house: House) -> None:
    embeddings = [
        {"custom_id": f"e{i}", "method": "POST", "url": "/v1/embeddings", "body": {"model": "embed", "input": "x"}}
        for i in range(3)
    ]
    done = await house.client.run(jsonl(embeddings), endpoint="/v1/embeddings")
    records = await house.client.records(done.output_file_id)
    assert [record["response"]["body"]["object"] for record in records] == ["list"] * 3
    completions = [
        {"custom_id": f"t{i}", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}
        for i in range(3)
    ]
    done = await house.client.run(jsonl(completions), endpoint="/v1/completions")
    assert len(await house.client.records(done.output_file_id)) == 3


async def test_a_line_that_cannot_be_served_has_its_own_error(house: House) -> None:
    requests = [line("good"), line("hot", temperature=99), line("flow", stream=True), line("odd", prompt_embeds="x")]
    done = await house.client.run(jsonl(requests))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 3)
    output = await house.client.records(done.output_file_id)
    errors = await house.client.records(done.error_file_id)
    check_whole(requests, output, errors)
    assert {record["response"]["status_code"] for record in errors} == {400}
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"


async def test_what_editors_leave_is_read_over(house: House) -> None:
    text = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(line(f"c{i}")).encode() for i in range(3))
    text = text.replace(b"\r\n", b"\r\n\r\n  \r\n", 1)
    done = await house.client.run(text)
    assert [record["custom_id"] for record in await house.client.records(done.output_file_id)] == ["c0", "c1", "c2"]


def _with(number: int, text: bytes) -> bytes:
    """Twenty good lines, but this one."""
    good = [json.dumps(request).encode() for request in lines(20)]
    good[number - 1] = text
    return b"\n".join(good)


BAD_INPUT: list[tuple[str, bytes, str, int | None]] = [
    ("no line", b"", "empty_file", None),
    ("blank lines only", b"\n \r\n\n", "empty_file", None),
    ("one line too many", jsonl(lines(41)), "too_many_lines", 41),
    ("a line too long", _with(17, json.dumps(line("x", pad="y" * 2000)).encode()), "line_too_long", 17),
    ("no JSON", _with(17, b'{"custom_id": '), "invalid_json_line", 17),
    ("no object", _with(17, b"[1]"), "invalid_request", 17),
    ("not UTF-8", _with(17, b'{"custom_id": "\xff"}'), "invalid_json_line", 17),
    ("no custom_id", _with(2, b'{"method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}'),
     "invalid_request", 2),
    ("empty custom_id", _with(2, json.dumps(line("")).encode()), "invalid_custom_id", 2),
    ("custom_id twice", _with(17, json.dumps(line("c3")).encode()), "duplicate_custom_id", 17),
    ("another url", _with(17, json.dumps(line("x", url="/v1/completions")).encode()), "mismatched_url", 17),
    ("an address", _with(17, json.dumps(line("x", url="http://evil/v1/chat/completions")).encode()),
     "mismatched_url", 17),
    ("an operator's path", _with(1, json.dumps(line("x", url="/admin/queue")).encode()), "mismatched_url", 1),
    ("GET", _with(17, json.dumps({**line("x"), "method": "GET"}).encode()), "invalid_method", 17),
    ("no body", _with(17, b'{"custom_id":"x","method":"POST","url":"/v1/chat/completions"}'), "invalid_request", 17),
    ("no model", _with(17, b'{"custom_id":"x","method":"POST","url":"/v1/chat/completions","body":{}}'),
     "invalid_request", 17),
    ("an unknown model", jsonl(lines(3, model="none")), "model_not_found", 1),
    ("two models", _with(17, json.dumps(line("x", model="embed")).encode()), "mismatched_model", 17),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "number"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT])
async def test_bad_input_fails_whole_and_names_the_line(
    house: House, text: bytes, code: str, number: int | None
) -> None:
    before = house.worker.counts.seen
    done = await house.client.run(text)
    assert done.status == "failed"
    assert done.failed_at is not None
    assert done.errors is not None
    assert done.errors.data is not None
    assert [(fault.code, fault.line) for fault in done.errors.data] == [(code, number)]
    assert house.worker.counts.seen == before
    assert done.output_file_id is None


@pytest.mark.parametrize("name", ["m", "m:v"])
async def test_a_model_of_others_is_none_at_all(house: House, name: str) -> None:
    """In the same words as for a model that nobody has: which exist is not this tenant's to know."""
    before = house.worker.counts.seen
    async with house.tenant("embedder") as client:
        foreign = await client.run(jsonl(lines(3, model=name)))
        unknown = await client.run(jsonl(lines(3, model="none")))
        mixed = await client.run(jsonl([line("a", model="embed"), line("b", model=name)]))
    for done in (foreign, unknown, mixed):
        assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert told(foreign) == told(unknown)
    assert told(foreign) == [
        ("model_not_found", "The model does not exist or you do not have access to it.", "body.model", 1)
    ]
    assert [fault[0] for fault in told(mixed)] == ["mismatched_model"]
    assert house.worker.counts.seen == before


async def test_a_model_that_is_taken_from_a_tenant_costs_the_lines_to_come(tmp_path: Path) -> None:
    requests = lines(4, x_fault="hang_before")
    async with FakeWorker("m") as worker:
        gateway = GatewayProcess(
            tmp_path,
            [model("m", worker, max_concurrency=1)],
            batches={"directory": str(tmp_path / "kept"), **FAST},
            admission={"trust_tenant_header": True},
        )
        async with gateway, Client(gateway, "someone") as client:
            await gateway.ready(worker)
            batch = await client.create(jsonl(requests))
            await worker.wait_for(open=1)
            gateway.configure(tenants=[{"name": "someone", "models": ["other"]}])
            assert (await gateway.http.post("/admin/reload")).status_code == 200
            worker.heal(for_good=True)
            done = await client.follow(batch)
            output, errors = await client.records(done.output_file_id), await client.records(done.error_file_id)
    assert done.status == "completed"
    check_whole(requests, output, errors)
    assert len(output) == 1
    for record in errors:
        response = record["response"]
        error = response["body"]["error"]
        assert (response["status_code"], error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["type"] == "invalid_request_error"


def told(batch: Batch) -> list[tuple[str | None, str | None, str | None, int | None]]:
    assert batch.errors is not None
    return [(fault.code, fault.message, fault.param, fault.line) for fault in batch.errors.data or []]


async def test_every_bad_line_is_named(house: House) -> None:
    bad = [json.dumps({**line(f"c{i}"), "method": "GET"}).encode() for i in range(3)]
    done = await house.client.run(b"\n".join(bad))
    assert done.errors is not None
    assert [fault.line for fault in done.errors.data or []] == [1, 2, 3]


CREATE = {"input_file_id": "", "endpoint": CHAT, "completion_window": "24h"}


@pytest.mark.parametrize(
    ("changed", "status", "param"),
    [
        ({"input_file_id": "file-" + "0" * 44}, 404, "id"),
        ({"input_file_id": "../../etc/passwd"}, 404, "id"),
        ({"input_file_id": 7}, 400, "input_file_id"),
        ({"endpoint": "/admin/queue"}, 400, "endpoint"),
        ({"endpoint": "/v1/files"}, 400, "endpoint"),
        ({"completion_window": "1y"}, 400, "completion_window"),
        ({"completion_window": "0h"}, 400, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata.k"),
        ({"metadata": {str(i): "v" for i in range(17)}}, 400, "metadata"),
        ({"metadata": {"k": 1}}, 400, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
    ],
)
async def test_bad_creations(house: House, changed: dict[str, Any], status: int, param: str) -> None:
    file = await house.client.upload(jsonl(lines(1)))
    body = {**CREATE, "input_file_id": file.id, **changed}
    answer = await house.gateway.http.post("/v1/batches", json=body)
    told = answer.json()["error"]
    assert (answer.status_code, told["param"], told["type"]) == (status, param, "invalid_request_error")


async def test_results_cannot_be_input(house: House) -> None:
    done = await house.client.run(jsonl(lines(1)))
    with pytest.raises(openai.BadRequestError) as refused:
        await house.client.api.batches.create(
            input_file_id=done.output_file_id or "", endpoint=CHAT, completion_window="24h"
        )
    assert refused.value.param == "input_file_id"


async def test_one_key_makes_one_batch(house: House) -> None:
    file = await house.client.upload(jsonl(lines(1)))
    body, key = {**CREATE, "input_file_id": file.id}, {"idempotency-key": "once"}
    first, again = [await house.gateway.http.post("/v1/batches", json=body, headers=key) for _ in range(2)]
    assert first.json()["id"] == again.json()["id"]
    await house.client.follow(await house.client.api.batches.retrieve(first.json()["id"]))
    other = await house.gateway.http.post("/v1/batches", json={**body, "metadata": {"a": "b"}}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_mismatch")


# uploads


def _form(*parts: bytes) -> tuple[bytes, dict[str, str]]:
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"
    return body, {"content-type": "multipart/form-data; boundary=b"}


def _field(name: str, value: str) -> bytes:
    return f'content-disposition: form-data; name="{name}"\r\n\r\n{value}'.encode()


def _file(content: bytes = b"{}\n", name: str = "f") -> bytes:
    return f'content-disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode() + content


PURPOSE = _field("purpose", "batch")
BAD_UPLOADS: dict[str, tuple[list[bytes], int]] = {
    "no file": ([PURPOSE], 400),
    "no purpose": ([_file()], 400),
    "another purpose": ([_field("purpose", "fine-tune"), _file()], 400),
    "a purpose that only batches have": ([_field("purpose", "batch_output"), _file()], 400),
    "the file as a field": ([PURPOSE, _field("file", "{}")], 400),
    "two files": ([PURPOSE, _file(), _file()], 400),
    "a field without end": ([PURPOSE, _field("x", "y" * 10_000), _file()], 400),
    "too many parts": ([PURPOSE, _file(), *[_field("x", "y")] * 1500], 400),
    "one byte too large": ([PURPOSE, _file(b"x" * 100_001)], 413),
    "an hour less": ([PURPOSE, _field("expires_after[anchor]", "created_at"),
                      _field("expires_after[seconds]", "3599"), _file()], 400),
    "another anchor": ([PURPOSE, _field("expires_after[anchor]", "now"), _file()], 400),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "status"), BAD_UPLOADS.values(), ids=list(BAD_UPLOADS))
async def test_bad_uploads_are_told_and_leave_nothing(house: House, parts: list[bytes], status: int) -> None:
    before = house.files()
    body, headers = _form(*parts)
    answer = await house.gateway.http.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert house.files() == before


async def test_a_hundred_thousand_parts_are_not_read(house: House) -> None:
    body, headers = _form(*[_field("x", "y")] * 100_000)
    answer = await house.gateway.http.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 413


async def test_an_upload_without_a_declared_length_is_bounded(house: House) -> None:
    body, headers = _form(PURPOSE, _file(b"x" * 400_000))

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    before = house.files()
    answer = await house.gateway.http.post("/v1/files", content=pieces(), headers=headers)
    assert answer.status_code == 413
    assert house.files() == before


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", "text/plain"])
async def test_only_forms_are_uploads(house: House, content_type: str) -> None:
    answer = await house.gateway.http.post("/v1/files", content=b"{}", headers={"content-type": content_type})
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "C:\\x\\passwd", "a/../passwd", "x" * 3000, "pass\x01\x7fwd", ".."]
)
async def test_a_file_name_is_a_label_only(house: House, name: str) -> None:
    file = await house.client.upload(b"{}\n", name)
    assert not set("/\\\x01\x7f") & set(file.filename)
    assert 0 < len(file.filename) <= 255
    assert not list(house.kept.rglob("*passwd*"))
    await house.client.api.files.delete(file.id)


# lists


async def test_lists_have_pages(house: House) -> None:
    async with house.tenant("pages") as client:
        await check_pages(client)


async def check_pages(client: Client) -> None:
    files = [await client.upload(jsonl(lines(1))) for _ in range(5)]
    newest_first = [file.id for file in reversed(files)]
    page = await client.api.files.list(limit=2)
    assert [file.id for file in page.data] == newest_first[:2]
    assert page.has_more
    assert [file.id async for file in client.api.files.list(limit=2)] == newest_first
    assert [file.id async for file in client.api.files.list(limit=2, order="asc")] == newest_first[::-1]
    assert not (await client.api.files.list(purpose="batch_output")).data
    batches = [
        await client.follow(
            await client.api.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        )
        for file in files[:3]
    ]
    assert [batch.id async for batch in client.api.batches.list(limit=1)] == [b.id for b in reversed(batches)]
    assert [batch.id for batch in (await client.api.batches.list(after=batches[1].id)).data] == [batches[0].id]


# tenants


async def test_what_another_tenant_has_does_not_exist(house: House) -> None:
    async with house.tenant("mine") as mine, house.tenant("other") as other:
        await check_isolation(house, mine, other)


async def check_isolation(house: House, mine: Client, other: Client) -> None:
    done = await mine.run(jsonl(lines(2)))
    things = {
        "file": [("GET", ""), ("GET", "/content"), ("DELETE", "")],
        "batch": [("GET", ""), ("POST", "/cancel")],
    }
    ids = {"file": [done.input_file_id, done.output_file_id or ""], "batch": [done.id]}
    for thing, verbs in things.items():
        path = "/v1/files" if thing == "file" else "/v1/batches"
        for object_id in ids[thing]:
            unknown = object_id[:-1] + ("0" if object_id[-1] != "0" else "1")
            for method, rest in verbs:
                told = [
                    await house.gateway.http.request(
                        method, f"{path}/{asked}{rest}", headers={"x-sluice-tenant": "other"}
                    )
                    for asked in (object_id, unknown)
                ]
                assert [answer.status_code for answer in told] == [404, 404]
                texts = [answer.text.replace(object_id, "ID").replace(unknown, "ID") for answer in told]
                assert texts[0] == texts[1]
    assert not (await other.api.files.list()).data
    assert not (await other.api.batches.list()).data
    with pytest.raises(openai.NotFoundError):
        await other.api.batches.create(input_file_id=done.input_file_id, endpoint=CHAT, completion_window="24h")
    assert await mine.records(done.output_file_id)


async def test_a_tenant_has_so_many_unfinished_batches(house: House) -> None:
    async with house.tenant("many") as client:
        await check_many(house, client)


async def check_many(house: House, client: Client) -> None:
    house.worker.hold()
    batches = [await client.create(jsonl(lines(1))) for _ in range(LIMITS["batches_per_tenant"])]
    with pytest.raises(openai.RateLimitError):
        await client.create(jsonl(lines(1)))
    house.worker.resume()
    for batch in batches:
        assert (await client.follow(batch)).status == "completed"


# the end of things


async def test_a_cancelled_batch_keeps_what_was_finished(house: House) -> None:
    # Every third answer never comes: some lines are finished, and some on their way.
    stuck: dict[str, Any] = {"metadata": {"x_fault": "hang_before"}}
    requests = [line(f"c{i}", **(stuck if i % 3 == 0 else {})) for i in range(30)]
    batch = await house.client.create(jsonl(requests))
    await house.client.reaches(batch, "in_progress", completed=5)
    cancelling = await house.client.api.batches.cancel(batch.id)
    assert cancelling.status in ("cancelling", "cancelled")
    done = await house.client.follow(cancelling)
    dispatched = house.worker.counts.seen
    assert done.status == "cancelled"
    assert done.cancelled_at is not None
    assert done.request_counts is not None
    assert done.request_counts.total == 30
    records = await house.client.records(done.output_file_id)
    assert len(records) == done.request_counts.completed >= 5
    assert {int(record["custom_id"][1:]) % 3 for record in records} == {1, 2}
    assert (await house.client.api.batches.cancel(batch.id)).status == "cancelled"
    await house.gateway.idle()
    assert house.worker.counts.seen == dispatched


async def test_what_has_ended_cannot_be_cancelled(house: House) -> None:
    done = await house.client.run(jsonl(lines(1)))
    with pytest.raises(openai.ConflictError):
        await house.client.api.batches.cancel(done.id)


async def test_an_expired_batch_says_which_lines_were_not_run(house: House) -> None:
    requests = lines(30)
    house.worker.hold()
    batch = await house.client.create(jsonl(requests), window="1s")
    done = await house.client.follow(batch)
    house.worker.resume()
    assert done.status == "expired"
    assert done.expired_at is not None
    output = await house.client.records(done.output_file_id)
    errors = await house.client.records(done.error_file_id)
    check_whole(requests, output, errors)
    assert {record["error"]["code"] for record in errors} == {"batch_expired"}
    assert done.request_counts is not None
    assert done.request_counts.failed == len(errors) == 30


async def test_the_input_of_a_running_batch_stays(house: House) -> None:
    house.worker.hold()
    batch = await house.client.create(jsonl(lines(2)))
    with pytest.raises(openai.ConflictError):
        await house.client.api.files.delete(batch.input_file_id)
    house.worker.resume()
    await house.client.follow(batch)
    assert (await house.client.api.files.delete(batch.input_file_id)).deleted
    with pytest.raises(openai.NotFoundError):
        await house.client.api.files.content(batch.input_file_id)


async def test_broken_answers_are_tried_again(house: House) -> None:
    requests = lines(10)
    house.worker.inject("fast_500")
    batch = await house.client.create(jsonl(requests))
    await until(_asked_any_failed(house), "a refusal")
    house.worker.heal()
    done = await house.client.follow(batch, 60)
    output, errors = await house.client.records(done.output_file_id), await house.client.records(done.error_file_id)
    check_whole(requests, output, errors)
    assert output


def _asked_any_failed(house: House) -> Any:
    before = house.worker.counts.finished

    async def has() -> bool:
        return house.worker.counts.finished > before

    return has


async def test_a_client_that_leaves_a_download_is_forgotten(house: House) -> None:
    file = await house.client.upload(b"x" * 90_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", house.gateway.port)
    writer.write(f"GET /v1/files/{file.id}/content HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    assert (await house.client.api.files.content(file.id)).content == b"x" * 90_000
    assert "internal error" not in house.gateway.process.output


async def test_lines_take_the_batch_band(house: House) -> None:
    await house.client.run(jsonl(lines(3)))
    scrape = await house.gateway.scrape()
    assert scrape.sum("sluice_requests_total", band="batch", outcome="completed") >= 3
    assert scrape.sum("sluice_batch_lines_ended_total", outcome="completed") >= 3
    assert "c1" in seen_by(house.worker)
