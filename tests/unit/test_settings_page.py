"""deploy/settings.md says what the settings say, all of it."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator

from app.settings import Settings
from tests.processes import ROOT

WRITER = runpy.run_path(str(ROOT / "deploy/settings.py"))
page: Callable[[], str] = WRITER["page"]
places: Callable[[type[Settings]], Iterator[tuple[str, type]]] = WRITER["places"]


def test_the_page_is_what_the_settings_say() -> None:
    """`make settings` writes it."""
    assert WRITER["PAGE"].read_text(encoding="utf-8") == page()


def test_every_setting_has_a_meaning_and_every_link_a_target() -> None:
    written = page()
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    assert [row for row in rows if row.split("|")[-2].strip() == ""] == []
    headings = re.findall(r"(?m)^## (.*)$", written)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\(#([^)]*)\)", written)) == anchors


def test_every_part_has_its_place() -> None:
    named = {path for heading in re.findall(r"(?m)^## (.*)$", page()) for path in re.findall("`([^`]+)`", heading)}
    assert named == {path for path, _ in places(Settings) if path}
