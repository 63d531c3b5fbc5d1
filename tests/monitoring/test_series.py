"""Every series that a panel, a rule or an alert names exists: a real Prometheus scrapes a gateway at work."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
import yaml

from tests.integration.gateway.running import until
from tests.monitoring.conftest import Binaries
from tests.monitoring.panels import Panel, dashboards
from tests.monitoring.prometheus import DEPLOYED, Prometheus
from tests.monitoring.scene import staged

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPAN_S = 12.0
RATE_S = 30
FAMILY = re.compile(r"\b(?:sluice|vllm|redis)[a-zA-Z0-9_:]*")
QUOTED = re.compile(r"\"[^\"]*\"")
RECORDED = re.compile(r"\b[a-z]+:sluice[a-zA-Z0-9_]*:\w+|\bsluice:\w+:\w+")
PANELS = [panel for _, panels in dashboards().values() for panel in panels if panel.targets]


def rules() -> list[dict[str, Any]]:
    files = [DEPLOYED / name for name in ("rules.yml", "alerts.yml")]
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prometheus(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    """One that sees everything happen that a dashboard can show, in a hurry."""
    async with staged(binaries, tmp_path_factory.mktemp("scraped")) as scene:
        playing = asyncio.create_task(scene.play(SPAN_S))
        yield scene.prometheus
        playing.cancel()
        with suppress(asyncio.CancelledError):
            await playing


async def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    """Within the time that the fixture's scene takes, and a little: no panel has to be believed unseen."""
    empty = list(PANELS)

    async def is_shown(panel: Panel) -> bool:
        return any([await prometheus.query(target.query(RATE_S)) for target in panel.targets])

    async def all_are_shown() -> bool:
        empty[:] = [panel for panel in empty if not await is_shown(panel)]
        return not empty

    with suppress(TimeoutError):
        await until(all_are_shown, "every panel has shown something", 240)
    assert [panel.title for panel in empty] == []


async def test_every_query_names_series_that_exist(prometheus: Prometheus) -> None:
    families, recorded = await prometheus.families(), {rule.get("record") for rule in rules()}
    for panel in PANELS:
        for target in panel.targets:
            _exist(target.query(RATE_S), families, recorded)


async def test_every_rule_names_series_that_exist(prometheus: Prometheus) -> None:
    families, recorded = await prometheus.families(), {rule.get("record") for rule in rules()}
    for rule in rules():
        _exist(rule["expr"], families, recorded)
    state = {
        rule["name"]: rule["health"] for group in (await prometheus.ask("/rules"))["groups"] for rule in group["rules"]
    }
    assert set(state.values()) == {"ok"}, state


def _exist(query: str, families: set[str], recorded: set[str | None]) -> None:
    names = set(RECORDED.findall(query))
    assert names <= recorded
    for name in set(FAMILY.findall(QUOTED.sub("", RECORDED.sub("", query)))):
        base = re.sub(r"_(?:bucket|sum|count|total)$", "", name)
        assert {name, base} & families, name
