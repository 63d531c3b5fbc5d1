"""The whole of docker-compose.yml on a real engine: images built from the Dockerfile, every container started.

`make compose-test` runs it; it needs root, Debian's docker.io and debootstrap, 15 GB of disk and a quarter of an hour.
Everything happens below SLUICE_COMPOSE_DIRECTORY (default: .sluice/compose), which is emptied at the end unless
SLUICE_COMPOSE_KEEP is set: then the next run finds what this one has built.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, InternalServerError, OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.compose import stand_ins
from tests.compose.engine import Engine, Namespace, missing, status_of, until
from tests.compose.mirror import build_options
from tests.compose.test_files import DOCKERFILE, ENDPOINT, ONCE, PROFILES, composed
from tests.processes import ROOT

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]

BUILD_S, START_S, RECOVER_S = 1800.0, 1500, 1200.0
SERVERS = ("valkey", "valkey-exporter", "worker", "gateway", "prometheus", "grafana")
URL, ADMIN_URL, PROMETHEUS_URL = "http://127.0.0.1:8000", "http://127.0.0.1:8001", "http://127.0.0.1:9090"
JAEGER_URL, OTLP_URL = "http://127.0.0.1:16686", "http://otel-collector:4318/v1/traces"
TARGETS = {"worker-cpu": "worker", "recipes": "recipes", "gateway": "gateway"}
LENGTHS = (90, 110, 130, 150)
"""Tokens of the streams of clients that never pause: out of step, so that one of them has much to come whenever the
gateway stops; and so few that they end in the time to drain, on a machine as slow as may be."""
ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Stack:
    """The running containers, and a way to them."""

    engine: Engine
    namespace: Namespace

    def inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.engine.docker("inspect", f"sluice-{service}-1"))
        return found[0]

    def pid(self, service: str) -> int:
        return int(self.inspect(service)["State"]["Pid"])

    def secret(self, name: str) -> str:
        return self.engine.compose("run", "--rm", "--no-deps", "-T", "secrets", name).strip()

    def get(self, url: str, key: str = "") -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return self.namespace.run(httpx.get, url, headers=headers, timeout=60)

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{URL}/v1", api_key=self.secret("client_key"), timeout=300, max_retries=0)

    def serves(self) -> None:
        """Waits until the worker has proven itself with a token."""

        def is_ready() -> bool:
            try:
                return bool(self.get(f"{URL}/readyz").status_code == 200)
            except httpx.HTTPError:
                return False

        until(is_ready, "the gateway has a ready worker", RECOVER_S)

    def answer(self, client: OpenAI, **fields: Any) -> Any:
        create: Callable[..., Any] = client.chat.completions.create
        return self.namespace.run(create, model="smollm2", messages=ASKED, temperature=0, **fields)

    def is_back(self, service: str, before: str) -> bool:
        """Whether it was started anew, by the engine, and is well."""
        state = self.inspect(service)["State"]
        return bool(state["StartedAt"] != before and state["Health"]["Status"] == "healthy")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    if reason := missing():
        pytest.skip(reason)
    place = Path(os.environ.get("SLUICE_COMPOSE_DIRECTORY") or ROOT / ".sluice" / "compose").absolute()
    place.mkdir(parents=True, exist_ok=True)
    yield place
    if not os.environ.get("SLUICE_COMPOSE_KEEP"):
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def images() -> stand_ins.Images:
    """What is asked for, by what for."""
    found = {name: service["image"] for name, service in composed("traces")["services"].items()}
    arguments = dict(re.findall(r"^ARG (\w+)_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE))
    return found | {name.lower(): image for name, image in arguments.items()}


@pytest.fixture(scope="module")
def built(directory: Path, images: stand_ins.Images) -> None:
    """All images, in the machine's network."""
    engine = Engine(directory, None)
    with _engine_or_skip(engine), build_options(directory) as options:
        stand_ins.make(directory / "roots", engine, images)
        for target, service in TARGETS.items():
            tag = ["--target", target, "-t", images[service]]
            engine.docker("build", "--network", "host", *options, *tag, ".", timeout_s=BUILD_S)


@pytest.fixture(scope="module")
def stack(directory: Path, built: None) -> Iterator[Stack]:
    with Namespace(f"sluice-{os.getpid()}") as namespace:
        engine = Engine(directory, namespace.name)
        with engine.running():
            try:
                start(engine)
                yield Stack(engine, namespace)
            except RuntimeError:
                print(engine.compose("logs", "--tail", "30"))
                raise
            finally:
                engine.compose(*PROFILES["traces"], "down", "--volumes", "--timeout", "5", timeout_s=300)


def start(engine: Engine, profile: str = "cpu", **variables: str) -> None:
    waiting = ("--detach", "--wait", "--wait-timeout", str(START_S))
    command = (*PROFILES[profile], "up", "--no-build", "--pull", "never", *waiting)
    engine.compose(*command, timeout_s=START_S + 60, **variables)


@contextmanager
def _engine_or_skip(engine: Engine) -> Iterator[None]:
    """An engine that does not come up is this machine's refusal, not our failure."""
    running = engine.running()
    try:
        running.__enter__()
    except (RuntimeError, TimeoutError) as error:
        pytest.skip(f"no engine can start here: {str(error)[-300:]}")
    try:
        yield
    finally:
        running.__exit__(None, None, None)


def test_everything_is_well_and_came_in_order(stack: Stack) -> None:
    states = {service: stack.inspect(service)["State"] for service in (*SERVERS, *ONCE)}
    assert {states[service]["Health"]["Status"] for service in SERVERS} == {"healthy"}
    assert {states[service]["ExitCode"] for service in ONCE} == {0}
    began = {service: state["StartedAt"] for service, state in states.items()}
    assert states["secrets"]["FinishedAt"] < began["valkey"] < began["gateway"] < began["prometheus"] < began["grafana"]
    assert states["recipes"]["FinishedAt"] < began["worker"]


def test_containers_are_confined(stack: Stack) -> None:
    """The kernel's own word: not root, no capability and no way to one, system calls filtered, a read-only root."""
    for service in SERVERS:
        pid = stack.pid(service)
        status = status_of(pid)
        assert "0" not in status["Uid"].split(), service
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}, service
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), service
        mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text(encoding="utf-8").splitlines()]
        assert [mount[3].split(",")[0] for mount in mounts if mount[1] == "/"] == ["ro"], service


def test_only_the_gateway_is_open(stack: Stack) -> None:
    published = {
        (service, port, binding["HostIp"])
        for service in SERVERS
        for port, bindings in (stack.inspect(service)["HostConfig"]["PortBindings"] or {}).items()
        for binding in bindings
    }
    assert {one for one in published if one[2] != "127.0.0.1"} == {("gateway", "8000/tcp", "0.0.0.0")}
    assert stack.get(f"{URL}/v1/models").status_code == 401
    assert stack.get(f"{URL}/metrics").status_code == 404
    assert stack.get(f"{ADMIN_URL}/metrics", stack.secret("client_key")).status_code == 403


def test_no_secret_is_in_an_environment_or_a_command(stack: Stack) -> None:
    secrets = [stack.secret(name) for name in ("client_key", "admin_key", "grafana_password")]
    files = ("valkey_password", "worker_key")
    read = [stack.engine.compose("exec", "-T", "gateway", "cat", f"/run/secrets/{name}").strip() for name in files]
    shown = "".join(json.dumps(stack.inspect(service)) for service in SERVERS)
    shown += "".join(Path(f"/proc/{stack.pid(service)}/cmdline").read_text(encoding="utf-8") for service in SERVERS)
    assert not [secret for secret in (*secrets, *read) if secret in shown]


def test_a_client_gets_an_answer(stack: Stack) -> None:
    stack.serves()
    client = stack.client()
    answer = stack.answer(client, max_tokens=16)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 1
    chunks = stack.namespace.run(lambda: list(stack_stream(client, max_tokens=8)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def stack_stream(client: OpenAI, **fields: Any) -> Any:
    create: Callable[..., Any] = client.chat.completions.create
    return create(model="smollm2:w8a8", messages=ASKED, temperature=0, stream=True, **fields)


def test_prometheus_reaches_everything(stack: Stack) -> None:
    def targets() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = stack.get(f"{PROMETHEUS_URL}/api/v1/targets").json()["data"]["activeTargets"]
        return found

    until(lambda: {target["health"] for target in targets()} == {"up"}, "all targets are up", 120)
    assert sorted(target["labels"]["job"] for target in targets()) == ["sluice", "valkey", "vllm"]

    def is_seen(series: str) -> bool:
        answer = stack.namespace.run(
            httpx.get, f"{PROMETHEUS_URL}/api/v1/query", params={"query": series}, timeout=60
        ).json()
        return bool(answer["data"]["result"])

    for series in ("sluice_requests_total", "vllm:num_requests_running", "redis_up == 1"):
        until(lambda wanted=series: is_seen(wanted), f"{series} is there", 120)  # type: ignore[misc]


def test_valkey_denies_the_gateway_nothing(stack: Stack) -> None:
    scrape = stack.get(f"{ADMIN_URL}/metrics", stack.secret("admin_key"))
    assert re.search(r"(?m)^sluice_admission_degraded\b.* 0\.0$", scrape.text)
    logs = stack.engine.compose("logs", "gateway")
    assert "out of reach" not in logs
    assert "cannot be read" not in logs


def test_a_killed_worker_comes_back_and_serves(stack: Stack) -> None:
    began = stack.inspect("worker")["State"]["StartedAt"]
    os.kill(stack.pid("worker"), signal.SIGKILL)
    until(lambda: stack.is_back("worker", began), "the worker is back", RECOVER_S)
    stack.serves()
    assert stack.answer(stack.client(), max_tokens=4).choices[0].message.content


def test_a_killed_valkey_keeps_keys_and_batches(stack: Stack) -> None:
    client = stack.client()
    made = stack.engine.compose(
        "exec", "-T", "gateway", "sluice", "keys", "create", "--tenant", "acme", "--config", "/etc/sluice/gateway.yaml"
    ).strip()
    lines = "\n".join(
        json.dumps(
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "smollm2", "messages": ASKED, "max_tokens": 4},
            }
        )
        for number in range(4)
    ).encode()
    file = stack.namespace.run(client.files.create, file=("lines.jsonl", lines), purpose="batch")
    batch = stack.namespace.run(
        client.batches.create, input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    began = stack.inspect("valkey")["State"]["StartedAt"]
    os.kill(stack.pid("valkey"), signal.SIGKILL)
    until(lambda: stack.is_back("valkey", began), "Valkey is back", RECOVER_S)

    def found() -> Any:
        return stack.namespace.run(client.batches.retrieve, batch.id)

    until(lambda: found().status == "completed", "the batch is completed", RECOVER_S)
    records = stack.namespace.run(client.files.content, found().output_file_id or "").text.splitlines()
    assert [json.loads(record)["custom_id"] for record in records] == ["0", "1", "2", "3"]
    assert {json.loads(record)["response"]["status_code"] for record in records} == {200}
    assert stack.get(f"{URL}/v1/models", made).status_code == 200


def test_stop_lets_streams_end(stack: Stack) -> None:
    """F37: SIGTERM to the container's first process, while clients ask without a pause. Whatever was let in goes on to
    its end, nobody else is let in, and the exit code is 0."""
    stack.serves()
    client, under_way = stack.client(), threading.Barrier(len(LENGTHS) + 1)

    def ask_until_refused(tokens: int) -> list[tuple[int, str]]:
        """The length of each stream, and how it ended."""
        ends: list[tuple[int, str]] = []
        fields = {"max_tokens": tokens, "stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
        while True:
            try:
                chunks = stack_stream(client, **fields)
            except (APIConnectionError, InternalServerError):
                return ends
            count, end = 0, ""
            for number, chunk in enumerate(chunks):
                if number == 0 and not ends:
                    under_way.wait(300)
                count = chunk.usage.completion_tokens if chunk.usage else count
                for choice in chunk.choices:
                    end = choice.finish_reason or end
            ends.append((count, end))

    with ThreadPoolExecutor(len(LENGTHS)) as threads:
        asking = [threads.submit(stack.namespace.run, ask_until_refused, tokens) for tokens in LENGTHS]
        under_way.wait(300)
        began = stack.inspect("gateway")["State"]["StartedAt"]
        stack.engine.compose("stop", "gateway")
        streams = [asked.result(300) for asked in asking]
    assert [set(ends) for ends in streams] == [{(tokens, "length")} for tokens in LENGTHS]
    assert stack.inspect("gateway")["State"]["ExitCode"] == 0
    # What clients see, and when, tells nothing on a machine whose workers take all of it.
    logged = stack.engine.compose("logs", "--no-log-prefix", "--since", began, "gateway").splitlines()
    told = [json.loads(line) for line in logged if '"requests"' in line]
    assert [line["event"] for line in told] == ["draining"]
    assert 1 <= told[0]["requests"] <= len(LENGTHS)


def test_a_second_start_keeps_the_secrets(stack: Stack) -> None:
    before = [stack.secret(name) for name in ("client_key", "admin_key")]
    start(stack.engine)
    assert [stack.secret(name) for name in ("client_key", "admin_key")] == before
    stack.serves()
    assert stack.answer(stack.client(), max_tokens=2).choices[0].message.content


def test_spans_come_by_the_collector_to_jaeger(stack: Stack) -> None:
    """The way alone: what stands in for both does not read the collector's configuration."""
    start(stack.engine, "traces", **{ENDPOINT: OTLP_URL})
    stack.serves()
    assert stack.answer(stack.client(), max_tokens=4).choices[0].message.content

    def spans() -> set[str]:
        bodies = [base64.b64decode(line) for line in stack.get(JAEGER_URL).content.splitlines()]
        found = [ExportTraceServiceRequest.FromString(unpacked(body)) for body in bodies]
        scopes = [scope for one in found for resource in one.resource_spans for scope in resource.scope_spans]
        return {span.name for scope in scopes for span in scope.spans}

    until(lambda: spans() >= {"chat smollm2", "queue", "attempt"}, "the spans of a request are there", 120)


def unpacked(body: bytes) -> bytes:
    return gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
