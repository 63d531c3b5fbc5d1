"""What docker-compose.yml and the Dockerfile promise, read from what Docker Compose itself makes of them; no engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from app.settings import load_settings
from tests.processes import ROOT

PROGRAMS = Path(sys.executable).parent
PROFILES = {"cpu": [], "gpu": ["--profile", "gpu"], "traces": ["--profile", "traces"]}
WORKERS = {"cpu": "cpu", "gpu": "gpu", "traces": "cpu"}
"""What SLUICE_WORKERS is with each profile."""
UNASKED = {"otel-collector"}
"""Servers whose image holds nothing that could ask how they are."""
ONCE = {"secrets", "recipes"}
"""Services that make something and end."""
PUBLIC = {("gateway", 8000)}
ENDPOINT = "SLUICE_TRACING__ENDPOINT"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|KEY|TOKEN")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

Services = dict[str, dict[str, Any]]


def composed(profile: str, **variables: str) -> dict[str, Any]:
    """The whole configuration, every variable filled in."""
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "SLUICE_WORKERS": WORKERS[profile]}
    command = [str(PROGRAMS / "docker-compose"), *PROFILES[profile], "config", "--format", "json"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environ, **variables}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def services(profile: str) -> Services:
    found: Services = composed(profile)["services"]
    return found


def test_each_profile_has_its_services(services: Services, profile: str) -> None:
    always = {*ONCE, "gateway", "worker", "valkey", "valkey-exporter", "prometheus", "grafana"}
    added = {"cpu": set(), "gpu": {"worker-quantized", "worker-moe"}, "traces": {"otel-collector", "jaeger"}}
    assert set(services) == always | added[profile]


def test_every_image_says_which(services: Services) -> None:
    """By a tag that means one version, and by a digest where the operator gives one."""
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+", service["image"]), name
        assert "latest" not in service["image"]
    digest = "docker.io/valkey/valkey@sha256:" + "0" * 64
    assert composed("cpu", VALKEY_IMAGE=digest)["services"]["valkey"]["image"] == digest


def test_nothing_has_a_way_out_of_its_container(services: Services) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "pid", "ipc", "devices", "userns_mode"} & set(service), name
        assert service.get("network_mode") == ("none" if name in ONCE else None), name
        assert not any("docker.sock" in str(volume) for volume in service.get("volumes", [])), name


def test_nobody_is_root(services: Services) -> None:
    """Our images say who runs in them; of the others the file does."""
    for name, service in services.items():
        if "build" in service:
            stage = DOCKERFILE.partition(f" AS {service['build']['target']}\n")[2].partition("\nFROM ")[0]
            assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", stage, re.MULTILINE), name
            assert "user" not in service, name
        else:
            assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), name


def test_everything_is_bounded(services: Services) -> None:
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0, name
        assert int(limits["memory"]) > 0, name
        assert limits["pids"] > 0, name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        for mount in service.get("tmpfs", []):
            assert "size=" in mount, name
    assert any("retention.size" in option for option in services["prometheus"]["command"])


def test_every_server_has_a_health_check(services: Services) -> None:
    for name, service in services.items():
        if name in ONCE:
            assert service["restart"] == "no"
            continue
        assert service["restart"] == "unless-stopped", name
        assert bool(service.get("healthcheck", {}).get("disable")) == (name in UNASKED), name
        if "healthcheck" not in service:
            stage = DOCKERFILE.partition(f" AS {service['build']['target']}\n")[2].partition("\nFROM ")[0]
            assert "HEALTHCHECK" in stage, name


def test_nothing_starts_before_what_it_needs(services: Services) -> None:
    conditions = {
        name: {needed: terms["condition"] for needed, terms in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    assert conditions["gateway"]["valkey"] == conditions["prometheus"]["gateway"] == "service_healthy"
    for needs in conditions.values():
        for needed, condition in needs.items():
            assert condition == ("service_completed_successfully" if needed in ONCE else "service_healthy")


def test_only_clients_are_let_in(services: Services) -> None:
    """The gateway's port is open to the world; what else is published, is to this machine alone."""
    published = {
        (name, port["target"]): port.get("host_ip", "0.0.0.0")
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    assert {which for which, address in published.items() if address != "127.0.0.1"} == PUBLIC
    assert {name for name, _ in published} - {"jaeger"} == {"gateway", "prometheus", "grafana"}


def test_networks_hold_only_those_who_talk(profile: str) -> None:
    found = composed(profile)
    members = {
        network: {name for name, service in found["services"].items() if network in service.get("networks", {})}
        for network in found["networks"]
    }
    assert members["ledger"] == {"gateway", "valkey", "valkey-exporter"}
    assert members["edge"] == {"gateway"}
    assert found["networks"]["ledger"]["internal"] is found["networks"]["serving"]["internal"] is True
    shared = [network for network, names in members.items() if {"gateway", "prometheus"} <= names]
    assert len(shared) == 1, "each shared network would be one more target"


def test_what_is_mounted_exists_and_is_read_only(services: Services) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert volume["read_only"] is True
                assert Path(volume["source"]).exists(), volume["source"]


def test_state_is_kept_and_secrets_are_files(profile: str) -> None:
    found = composed(profile)
    kept = {
        (name, volume["source"])
        for name, service in found["services"].items()
        for volume in service.get("volumes", [])
        if volume["type"] == "volume" and not volume.get("read_only")
    }
    assert {("recipes", "models"), ("gateway", "batches"), ("valkey", "valkey"), ("prometheus", "prometheus")} <= kept
    assert {name for name, volume in kept if volume.endswith("-secrets")} == {"secrets"}
    for service in found["services"].values():
        for variable in service.get("environment", {}):
            assert not SECRET_NAME.search(variable) or variable.endswith("FILE")


def test_who_sees_which_secret(services: Services) -> None:
    """Each volume of secrets is its part's own."""
    for name, service in services.items():
        mounted = {v["source"] for v in service.get("volumes", []) if v.get("source", "").endswith("-secrets")}
        if name != "secrets":
            part = "worker" if name.startswith("worker") else name
            assert mounted <= {f"{part}-secrets"}, name


def test_gateway_and_prometheus_know_the_same_workers(services: Services, profile: str) -> None:
    settings = load_settings(ROOT / f"deploy/compose/gateway-{WORKERS[profile]}.yaml")
    named = {
        urlsplit(worker.url).netloc
        for model in settings.models
        for variant in model.variants
        for worker in variant.workers
    }
    (group,) = yaml.safe_load((ROOT / f"deploy/prometheus/targets/{WORKERS[profile]}.yml").read_text(encoding="utf-8"))
    assert named == set(group["targets"])
    assert {name.partition(":")[0] for name in named} <= set(services)
    served = {
        variant.workers[0].served_model or f"{m.name}:{variant.name}" for m in settings.models for variant in m.variants
    }
    commands = [service["command"] for name, service in services.items() if name.startswith("worker")]
    assert served == {name for command in commands for name in command if name in served}


def test_spans_find_their_way() -> None:
    """Each address is a service, on a network that both are on, and a port that is listened on."""
    collector = yaml.safe_load((ROOT / "deploy/compose/otel-collector.yaml").read_text(encoding="utf-8"))
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind, names in pipeline.items():
        assert set(names) == set(collector[kind]), kind
    assert pipeline["processors"][0] == "memory_limiter"
    services = composed("traces")["services"]
    limit = int(services["otel-collector"]["deploy"]["resources"]["limits"]["memory"])
    assert collector["processors"]["memory_limiter"]["limit_mib"] * 2**20 < limit
    listening = collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].partition(":")[2]
    readme = (ROOT / "deploy/README.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"SLUICE_TRACING__ENDPOINT=(\S+)", readme)
    for begin, url, port in (
        ("gateway", said, listening),
        ("otel-collector", collector["exporters"]["otlp_http/jaeger"]["endpoint"], "4318"),
    ):
        address = urlsplit(url)
        assert set(services[begin]["networks"]) & set(services[address.hostname or ""]["networks"]), url
        assert address.port == int(port), url


def test_there_are_no_traces_unless_somebody_says_where_to() -> None:
    def endpoint(**variables: str) -> str | None:
        found: str | None = composed("cpu", **variables)["services"]["gateway"]["environment"][ENDPOINT]
        return found

    assert endpoint() is None
    assert endpoint(**{ENDPOINT: "http://elsewhere:4318/v1/traces"}) == "http://elsewhere:4318/v1/traces"


def test_a_gateway_has_the_time_to_drain(services: Services, profile: str) -> None:
    settings = load_settings(ROOT / f"deploy/compose/gateway-{WORKERS[profile]}.yaml")
    grace_s = int(re.fullmatch(r"(\d+)s", services["gateway"]["stop_grace_period"])[1])  # type: ignore[index]
    assert grace_s >= settings.drain_timeout_s + 5
    assert settings.is_guarded


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [PROGRAMS / "hadolint", "--no-color", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """The validation that the tests above rest on does look."""
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text("services: {a: {image: 'a:1.0', helthcheck: {}}}")
    command = [str(PROGRAMS / "docker-compose"), "-f", str(wrong), "config", "-q"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0
