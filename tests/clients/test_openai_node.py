"""The official `openai` npm package against the gateway: chat, streams, batches, by the script `conversation.mjs`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.clients.conversations import Served
from tests.processes import one_at_a_time

pytestmark = pytest.mark.asyncio(loop_scope="session")

HERE = Path(__file__).parent
PINNED = ("package.json", "package-lock.json")
SCRIPT = "conversation.mjs"
MODES = ("chat", "stream", "usage", "models", "missing", "broken", "batch", "wrong", "cancelled")
INSTALL_TIMEOUT_S = 300
TALK_TIMEOUT_S = 300
OUT_OF_REACH = re.compile(r"ENOTFOUND|EAI_AGAIN|ETIMEDOUT|ECONNREFUSED|ECONNRESET|ERR_SOCKET_TIMEOUT|E5\d\d")


@pytest.fixture(scope="session")
def script(pytestconfig: pytest.Config) -> Path:
    """The script beside its installed packages: installed once for each lock file, outside of the working tree."""
    npm = shutil.which("npm")
    if npm is None and shutil.which("node") is None:
        pytest.skip("needs Node.js 20 or newer with npm, and neither `node` nor `npm` is on the PATH")
    assert npm is not None, "`node` is on the PATH and `npm` is not"
    pinned = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in PINNED)).hexdigest()
    place = pytestconfig.cache.mkdir(f"npm-{pinned[:16]}")
    with one_at_a_time(place.name):
        if not (place / "installed").exists():
            _install(npm, place)
            (place / "installed").touch()
        shutil.copy(HERE / SCRIPT, place)
    return place / SCRIPT


def _install(npm: str, place: Path) -> None:
    """Skips where no registry answers. Raises subprocess.CalledProcessError for any other trouble."""
    for name in PINNED:
        shutil.copy(HERE / name, place)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    try:
        subprocess.run(command, cwd=place, check=True, timeout=INSTALL_TIMEOUT_S, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the npm registry has not given its packages within {INSTALL_TIMEOUT_S} s")
    except subprocess.CalledProcessError as error:
        if OUT_OF_REACH.search(error.stderr):
            pytest.skip(f"the npm registry is out of reach: {error.stderr[-200:]}")
        raise


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def told(script: Path, served: Served) -> dict[str, dict[str, Any]]:
    """What each conversation brought, by its mode. One process has them all: it takes longer to start than to talk."""
    process = await asyncio.create_subprocess_exec(
        "node",
        script.name,
        served.url,
        served.model,
        *MODES,
        cwd=script.parent,
        env={**os.environ, "OPENAI_API_KEY": served.key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        lines, complaints = await asyncio.wait_for(process.communicate(), TALK_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, complaints.decode()
    await served.released()  # the last one leaves its stream open
    return dict(zip(MODES, map(json.loads, lines.splitlines()), strict=True))


Told = dict[str, dict[str, Any]]


async def test_chat(told: Told) -> None:
    chat = told["chat"]
    assert (chat["content"], chat["finish"]) == ("What is the capital of France?", "stop")
    assert chat["usage"]["total_tokens"] == chat["usage"]["prompt_tokens"] + chat["usage"]["completion_tokens"]
    assert chat["request_id"]


async def test_stream(told: Told) -> None:
    stream = told["stream"]
    assert (stream["content"], stream["finish"]) == ("What is the capital of France?", "stop")
    assert stream["usage"] is None


async def test_stream_with_usage(told: Told) -> None:
    stream = told["usage"]
    assert stream["content"] == "What is the capital of France?"
    assert stream["usage"]["completion_tokens"] == stream["chunks"] - 2  # less the role's and the usage's own


async def test_models(told: Told, served: Served) -> None:
    assert {served.model, served.variant} <= set(told["models"]["ids"])


async def test_a_wrong_model(told: Told) -> None:
    assert told["missing"]["error"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "type": "invalid_request_error",
        "param": "model",
    }


async def test_a_broken_stream_throws(told: Told) -> None:
    error = told["broken"]["error"]
    assert (error["name"], error["code"], error["type"]) == ("APIError", "worker_lost", "server_error")


async def test_a_stream_that_is_left_is_aborted(told: Told) -> None:
    assert told["cancelled"] == {"aborted": True}


async def test_a_batch_from_upload_to_results(told: Told) -> None:
    batch = told["batch"]
    made = batch["made"]
    assert (made["object"], made["status"], made["metadata"]) == ("batch", "completed", {"run": "7"})
    assert made["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert {record["custom_id"]: record["response"]["status_code"] for record in batch["output"]} == {
        "c0": 200,
        "c2": 200,
    }
    answer = batch["output"][0]["response"]["body"]["choices"][0]["message"]["content"]
    assert answer == "What is the capital of France?"
    (error,) = batch["errors"]
    assert (error["custom_id"], error["response"]["status_code"]) == ("c1", 400)
    assert made["id"] in batch["listed"]
    assert batch["deleted"] is True


async def test_a_batch_of_no_file(told: Told) -> None:
    error = told["wrong"]["error"]
    assert (error["name"], error["status"]) == ("NotFoundError", 404)
