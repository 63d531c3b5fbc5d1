"""What the chart makes of its values: objects that the API takes, pods that keep to the house's rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.settings import Settings, load_settings
from tests.kubernetes.conftest import CHART, EXAMPLES, LEAST, NAMESPACE, Helm, of_kind, pods

DEPLOYED = CHART.parents[1]
CUSTOM = {"ScaledObject", "PodMonitor", "PrometheusRule"}
VALUES: dict[str, Mapping[str, Any] | Path] = {
    "least": LEAST,
    "cpu": EXAMPLES / "cpu.yaml",
    "gpu": EXAMPLES / "gpu.yaml",
    "sentinel": EXAMPLES / "sentinel.yaml",
    "cluster": EXAMPLES / "cluster.yaml",
    "no policy, no autoscaling": {
        **LEAST,
        "networkPolicy": {"enabled": False},
        "gateway": {"autoscaling": {"enabled": False}},
    },
}
every = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())


@every
def test_the_chart_is_clean(helm: Helm, values: Mapping[str, Any] | Path, tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(values.read_text() if isinstance(values, Path) else yaml.safe_dump(dict(values)))
    done = helm.run("lint", str(CHART), "--strict", "--values", str(file))
    assert done.returncode == 0, done.stdout


@every
def test_the_api_knows_every_field(helm: Helm, values: Mapping[str, Any] | Path) -> None:
    known = [found for found in helm.template(values) if found["kind"] not in CUSTOM]
    assert len(known) >= 4
    for found in known:
        kubernetes_validate.validate(found, "1.37", strict=True)


def test_a_misspelt_field_is_found(helm: Helm) -> None:
    """The validator does look."""
    (service,) = of_kind(helm.template(LEAST), "Service")
    broken = {**service, "spec": {**service["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


@every
def test_pods_may_do_nothing_they_need_not(helm: Helm, values: Mapping[str, Any] | Path) -> None:
    for pod in pods(helm.template(values)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
            assert ":latest" not in container["image"]


@every
def test_every_volume_that_is_mounted_is_there(helm: Helm, values: Mapping[str, Any] | Path) -> None:
    for pod in pods(helm.template(values)):
        there = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == there


def gateway_settings(objects: Any, directory: Path) -> Settings:
    """The configuration that the chart writes, read by the gateway itself."""
    (config,) = (found for found in of_kind(objects, "ConfigMap") if "sluice.yaml" in found["data"])
    file = directory / "sluice.yaml"
    file.write_text(config["data"]["sluice.yaml"])
    return load_settings(file)


def test_the_pod_outlives_the_drain(helm: Helm, tmp_path: Path) -> None:
    objects = helm.template(LEAST)
    settings = gateway_settings(objects, tmp_path)
    (pod,) = pods(objects)
    drain_s = settings.drain_notice_s + settings.drain_queue_s + settings.drain_timeout_s
    assert pod["terminationGracePeriodSeconds"] > drain_s


def test_workers_leave_in_the_order_that_loses_nothing(helm: Helm) -> None:
    """First unknown to DNS, then told to finish, and only then killed."""
    for deployment in of_kind(helm.template(EXAMPLES / "gpu.yaml"), "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        if container["name"] != "vllm":
            continue
        noticed = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        (finish,) = (arg.partition("=")[2] for arg in container["args"] if arg.startswith("--shutdown-timeout="))
        assert pod["terminationGracePeriodSeconds"] > noticed + int(finish)


def test_each_variant_has_workers_that_the_gateway_finds(
    helm: Helm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_REDIS__URL", "rediss://somewhere:6380/0")  # as the pod has it, from the Secret
    objects = helm.template(EXAMPLES / "gpu.yaml")
    settings = gateway_settings(objects, tmp_path)
    services = {found["metadata"]["name"]: found for found in of_kind(objects, "Service")}
    deployments = {found["metadata"]["name"]: found for found in of_kind(objects, "Deployment")}
    variants = [(model, variant) for model in settings.models for variant in model.variants]
    assert len(variants) == 3
    for model, variant in variants:
        (worker,) = variant.workers
        assert worker.dns is not None
        name, namespace = worker.dns.split(".")[:2]
        assert namespace == NAMESPACE
        assert services[name]["spec"]["clusterIP"] == "None"
        labels = deployments[name]["spec"]["template"]["metadata"]["labels"]
        assert services[name]["spec"]["selector"].items() <= labels.items()
        arguments = deployments[name]["spec"]["template"]["spec"]["containers"][0]["args"]
        assert f"--served-model-name={model.name}:{variant.name}" in arguments


def test_only_gateways_reach_workers(helm: Helm) -> None:
    objects = helm.template(EXAMPLES / "cpu.yaml")
    labels = {
        found["spec"]["template"]["spec"]["containers"][0]["name"]: found["spec"]["template"]["metadata"]["labels"]
        for found in of_kind(objects, "Deployment")
    }
    policies = {found["metadata"]["name"]: found["spec"] for found in of_kind(objects, "NetworkPolicy")}
    workers, gateway = policies["sluice-workers"], policies["sluice-gateway"]
    assert workers["podSelector"]["matchLabels"].items() <= labels["vllm"].items()
    (rule,) = workers["ingress"]
    selected = [peer["podSelector"]["matchLabels"] for peer in rule["from"] if "podSelector" in peer]
    assert [chosen.items() <= labels["gateway"].items() for chosen in selected] == [True]
    assert [chosen.items() <= labels["vllm"].items() for chosen in selected] == [False]
    assert [peer["port"] for rule in workers["egress"] for peer in rule["ports"]] == [53, 53]
    assert {"port": 6379, "protocol": "TCP"} in gateway["egress"][-1]["ports"]


def redis_volume(objects: Any) -> Mapping[str, str]:
    """The files that the gateway finds beside its configuration: path to Secret."""
    (gateway,) = (pod for pod in pods(objects) if pod["containers"][0]["name"] == "gateway")
    found = [volume["projected"]["sources"] for volume in gateway["volumes"] if volume["name"] == "redis"]
    return {
        f"/etc/sluice/redis/{item['path']}": source["secret"]["name"]
        for sources in found
        for source in sources
        for item in source["secret"]["items"]
    }


def test_sentinels_are_asked_with_passwords_from_secrets(helm: Helm, tmp_path: Path) -> None:
    objects = helm.template(EXAMPLES / "sentinel.yaml")
    redis = gateway_settings(objects, tmp_path).redis
    assert redis is not None
    assert redis.sentinel is not None
    assert (redis.sentinel.master, len(redis.sentinel.nodes), redis.username) == ("sluice", 3, "sluice")
    assert redis.is_tls
    assert redis.tls is not None
    assert redis_volume(objects) == {
        str(redis.tls.ca_file): "sluice-redis",
        str(redis.password_file): "sluice-redis",
        str(redis.sentinel.password_file): "valkey-sentinel",
    }
    assert ports_to_redis(objects) == {26379, 6379}


def test_a_cluster_is_reached_in_tls_that_any_authority_vouches_for(helm: Helm, tmp_path: Path) -> None:
    objects = helm.template(EXAMPLES / "cluster.yaml")
    redis = gateway_settings(objects, tmp_path).redis
    assert redis is not None
    assert redis.cluster == ("valkey-cluster:6379",)
    assert redis.is_tls
    assert redis_volume(objects) == {str(redis.password_file): "sluice-redis"}
    assert ports_to_redis(objects) == {6379}
    assert ports_to_redis(helm.template({"redis": {"url": "rediss://h:6380/0"}})) == {6380}


def ports_to_redis(objects: Any) -> set[int]:
    (policy,) = (found for found in of_kind(objects, "NetworkPolicy") if found["metadata"]["name"].endswith("-gateway"))
    return {port["port"] for port in policy["spec"]["egress"][-1]["ports"]}


def test_the_public_service_has_no_admin_port(helm: Helm) -> None:
    (service,) = of_kind(helm.template(LEAST), "Service")
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]


def test_rules_and_dashboards_are_the_shipped_ones(helm: Helm) -> None:
    objects = helm.template(EXAMPLES / "gpu.yaml")
    (rules,) = of_kind(objects, "PrometheusRule")
    shipped = [yaml.safe_load((DEPLOYED / "prometheus" / name).read_text()) for name in ("rules.yml", "alerts.yml")]
    assert rules["spec"]["groups"] == [group for file in shipped for group in file["groups"]]
    (dashboards,) = (
        found for found in of_kind(objects, "ConfigMap") if found["metadata"]["name"].endswith("dashboards")
    )
    files = {file.name: file.read_text() for file in (DEPLOYED / "grafana/dashboards").glob("*.json")}
    assert dashboards["data"] == files


def test_scaling_asks_for_series_that_are_there(helm: Helm) -> None:
    (scaled,) = of_kind(helm.template(EXAMPLES / "gpu.yaml"), "ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    recorded = (DEPLOYED / "prometheus/rules.yml").read_text()
    assert any("sluice_queue_oldest_seconds" in query for query in queries)
    assert any("variant:sluice_slots_used:ratio" in query for query in queries)
    assert "record: variant:sluice_slots_used:ratio" in recorded
    assert scaled["spec"]["scaleTargetRef"]["name"] in {
        found["metadata"]["name"] for found in of_kind(helm.template(EXAMPLES / "gpu.yaml"), "Deployment")
    }


def one(**variant: Any) -> Mapping[str, Any]:
    return {**LEAST, "models": [{"name": "m", "variants": [{"name": "v", "model": "org/m", **variant}]}]}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "redis.url"),
        ({"redis": {"url": "valkey:6379"}}, "redis.url"),
        ({"redis": {**LEAST["redis"], "cluster": ["h:1"]}}, "exactly one"),
        ({"redis": {"sentinel": {"master": "m"}}}, "nodes"),
        ({"redis": {"cluster": ["redis://h:1"]}}, "cluster"),
        ({**LEAST, "gateways": {}}, "gateways"),
        ({**LEAST, "gateway": {"replica": 3}}, "replica"),
        ({**LEAST, "gateway": {"replicas": 0}}, "replicas"),
        ({**LEAST, "gateway": {"image": {"digest": "sha256:1"}}}, "digest"),
        ({**LEAST, "gateway": {"config": {"redis": {"url": "redis://other"}}}}, "config"),
        ({**LEAST, "gateway": {"ingress": {"enabled": True}}}, "host"),
        (one(name="a b"), "name"),
        (one(engine="tpu"), "engine"),
        (one(maxConcurrency="many"), "maxConcurrency"),
        ({**LEAST, "models": [{"name": "m", "variants": []}]}, "variants"),
        ({**LEAST, "models": [{"name": "m", "variants": [{"name": "v"}]}]}, "model"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Helm, values: Mapping[str, Any], named: str) -> None:
    done = helm.try_template(values)
    assert done.returncode != 0
    assert named in done.stderr


def test_a_variant_may_have_workers_of_its_own(helm: Helm, tmp_path: Path) -> None:
    variants = [{"name": "v", "workers": [{"url": "http://leader:8000", "max_concurrency": 512}]}]
    objects = helm.template({**LEAST, "models": [{"name": "m", "variants": variants}]})
    assert [found["metadata"]["name"] for found in of_kind(objects, "Deployment")] == ["sluice"]
    assert not of_kind(objects, "PersistentVolumeClaim")
    (worker,) = gateway_settings(objects, tmp_path).models[0].variants[0].workers
    assert (worker.url, worker.max_concurrency) == ("http://leader:8000", 512)


def test_names_that_look_alike_stay_apart(helm: Helm) -> None:
    variants = [{"name": name, "model": "org/m"} for name in ("v.1", "v-1", "V-1")]
    objects = helm.template({**LEAST, "models": [{"name": "m", "variants": variants}]})
    names = [found["metadata"]["name"] for found in of_kind(objects, "Deployment")]
    assert len(set(names)) == len(names) == 4
    assert all(len(name) <= 63 for name in names)
