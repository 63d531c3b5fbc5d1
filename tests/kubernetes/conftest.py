"""The chart, rendered by the real Helm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy/helm/sluice"
EXAMPLES = CHART / "examples"
RELEASE, NAMESPACE = "sluice", "serving"
LEAST = {"redis": {"url": "redis://valkey:6379/0"}}

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Helm:
    """Helm's program and a place for values."""

    program: Path
    scratch: Path

    def run(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        arguments = [str(self.program), command, *options]
        return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)

    def try_template(self, values: Mapping[str, Any] | Path) -> subprocess.CompletedProcess[str]:
        file = values if isinstance(values, Path) else self._written(values)
        return self.run("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", str(file))

    def template(self, values: Mapping[str, Any] | Path) -> Sequence[Object]:
        """All objects of the rendered chart."""
        done = self.try_template(values)
        assert done.returncode == 0, done.stderr
        return [found for found in yaml.safe_load_all(done.stdout) if found]

    def _written(self, values: Mapping[str, Any]) -> Path:
        file = self.scratch / "values.yaml"
        file.write_text(yaml.safe_dump(dict(values)))
        return file


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    program = Path(sys.executable).with_name("helm")
    if not program.exists():
        pytest.skip("no wheel of Helm for this machine")
    return Helm(program, tmp_path)


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def pods(objects: Sequence[Object]) -> list[Object]:
    """The pod specifications of all Deployments."""
    return [found["spec"]["template"]["spec"] for found in of_kind(objects, "Deployment")]
