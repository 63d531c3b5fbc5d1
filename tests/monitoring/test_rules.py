"""The shipped rules and configuration, as Prometheus' own tool reads them, and the dashboards' files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tests.monitoring.conftest import Binaries
from tests.monitoring.panels import dashboards

DEPLOYED = Path(__file__).parents[2] / "deploy" / "prometheus"


def promtool(binaries: Binaries, *arguments: str) -> None:
    done = subprocess.run([binaries.promtool, *arguments], cwd=DEPLOYED, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_sound(binaries: Binaries) -> None:
    promtool(binaries, "check", "rules", "rules.yml", "alerts.yml")


def test_every_alert_fires_when_it_must_and_only_then(binaries: Binaries) -> None:
    promtool(binaries, "test", "rules", "tests/alerts.yml")


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [
        case
        for test in yaml.safe_load((DEPLOYED / "tests/alerts.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for rule in (
        rule for group in yaml.safe_load((DEPLOYED / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ):
        assert rule["annotations"].keys() >= {"summary", "runbook"}
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert any(case["exp_alerts"] for case in cases if case["alertname"] == rule["alert"]), rule["alert"]


def test_the_configuration_is_sound(binaries: Binaries, tmp_path: Path) -> None:
    """As shipped, but for the secret's file, which a deployment brings."""
    config = (DEPLOYED / "prometheus.yml").read_text()
    secret = tmp_path / "key"
    secret.write_text("a key")
    for name in ("rules.yml", "alerts.yml"):
        (tmp_path / name).symlink_to(DEPLOYED / name)
    file = tmp_path / "prometheus.yml"
    file.write_text(config.replace("/run/secrets/sluice_admin_key", str(secret)))
    promtool(binaries, "check", "config", str(file))


def test_the_dashboards_are_what_their_code_says() -> None:
    builder = DEPLOYED.parent / "grafana/build.py"
    done = subprocess.run([sys.executable, builder, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_tenants_share_is_measured_against_its_weight(binaries: Binaries, tmp_path: Path) -> None:
    """Weights 3 and 1, served 3 and 2 of 5: the one gets 60 % where 75 % are its due, the other 40 % where 25 % are.

    Two replicas say the same of the weights; who is not served, or shares a series with others, counts for nothing.
    """
    (target,) = next(
        panel.targets for panel in dashboards()["queue"][1] if panel.title == "Share of the tokens against weight"
    )
    tokens = {"shop": 3, "lab": 2, "idle": 0, "other": 9}
    weights = {"shop": 3, "lab": 1, "idle": 5}
    series = [(f'sluice_tenant_tokens_total{{tenant="{name}"}}', f"0+{more}x20") for name, more in tokens.items()]
    series += [
        (f'sluice_tenant_weight{{tenant="{name}", instance="{replica}"}}', f"{weight}x20")
        for name, weight in weights.items()
        for replica in ("a", "b")
    ]
    expected = {"shop": 0.8, "lab": 1.6, "idle": 0.0}
    case = {
        "expr": f"round({target.query(300)}, 0.001)",
        "eval_time": "15m",
        "exp_samples": [{"labels": f'{{tenant="{name}"}}', "value": value} for name, value in expected.items()],
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": [case],
    }
    file = tmp_path / "share.yml"
    file.write_text(yaml.safe_dump({"tests": [test]}))
    promtool(binaries, "test", "rules", str(file))


def test_every_panel_says_what_it_means_to_be_empty() -> None:
    panels = [panel for _, panels in dashboards().values() for panel in panels if panel.targets]
    assert panels
    assert [panel.title for panel in panels if not panel.quiet] == []
