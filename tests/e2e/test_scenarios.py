"""The load scenarios in their short form: what holds on any machine must hold; how fast it is, is for a quiet one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import Process

LIMIT_S = 800.0


@pytest.mark.parametrize("scenario", ["overload", "fairness", "replicas", "churn"])
def test_no_slot_too_many_nothing_late_nothing_left(scenario: str, tmp_path: Path) -> None:
    written = tmp_path / "results.md"
    argv = [sys.executable, "-m", "loadtest", scenario, "--quick", "--output", str(written)]
    with Process(argv) as running:
        assert running.wait(LIMIT_S) == 0, running.output
    results = written.read_text()
    assert "| leases, tickets, slots and waits left at the end | = 0 | 0 | met |" in results
    assert ("| most requests that an engine held at once | ≤ 8 | 8 | met |" in results) == (scenario != "churn")
