"""SECURITY.md shows what is tested."""

from __future__ import annotations

from tests.hostile.table import BEGIN, END, SECURITY, table


def test_the_table_is_the_one_that_the_cases_make() -> None:
    shown = SECURITY.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == table()
