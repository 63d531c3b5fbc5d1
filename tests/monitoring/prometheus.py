"""A real Prometheus with the shipped rules, as a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.monitoring.conftest import Binaries
from tests.ports import free_port
from tests.processes import Process

DEPLOYED = Path(__file__).parents[2] / "deploy/prometheus"


class Prometheus:
    """Scrapes `targets` (`host:port` by the name of a shipped job) and evaluates every `interval_s`.

    `admin_key` is shown to the job that a shipped configuration has a key for: the gateway's.
    """

    def __init__(
        self,
        binaries: Binaries,
        directory: Path,
        targets: dict[str, list[str]],
        *,
        admin_key: str,
        interval_s: int = 1,
    ) -> None:
        port = free_port()
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30)
        jobs = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())["scrape_configs"]
        config = {
            "global": {"scrape_interval": f"{interval_s}s", "evaluation_interval": f"{interval_s}s"},
            "rule_files": [str(DEPLOYED / name) for name in ("rules.yml", "alerts.yml")],
            "scrape_configs": [
                _local(job, targets[job["job_name"]], admin_key) for job in jobs if job["job_name"] in targets
            ],
        }
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        place = (f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{port}")
        self.process = Process([str(binaries.prometheus), f"--config.file={file}", *place])

    async def ask(self, path: str, **parameters: str) -> Any:
        answer = (await self.http.get(path, params=parameters)).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def query(self, expr: str) -> list[Any]:
        found: list[Any] = (await self.ask("/query", query=expr))["result"]
        return found

    async def query_range(self, expr: str, start: float, end: float, step_s: float) -> list[Any]:
        """Series with their labels and (time, value) pairs; times in seconds since the epoch."""
        times = {"start": f"{start}", "end": f"{end}", "step": f"{step_s}"}
        found: list[Any] = (await self.ask("/query_range", query=expr, **times))["result"]
        return found

    async def families(self) -> set[str]:
        """Names of all families that any target exports, with samples or without."""
        return {entry["metric"] for entry in await self.ask("/targets/metadata")}


def _local(job: dict[str, Any], targets: list[str], admin_key: str) -> dict[str, Any]:
    """The shipped job, but for where it finds its targets and its key."""
    kept = {name: value for name, value in job.items() if not name.endswith("_sd_configs")}
    if "authorization" in kept:
        kept["authorization"] = {"credentials": admin_key}
    return {**kept, "static_configs": [{"targets": targets}]}
