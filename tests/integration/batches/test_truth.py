"""Row L9, small: every line one record, while worker, gateways and Valkey are killed and put to sleep."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.batch_truth import TruthPlan, figures, measure

PLAN = TruthPlan(lines=2_000, every_s=(1.0, 3.0), pause_s=(0.5, 3.0), hits=5, limit_s=100.0)


@pytest.mark.slow
async def test_every_line_has_one_record_whatever_is_hit(tmp_path: Path) -> None:
    truth = await measure(PLAN, tmp_path)
    told = figures(truth, PLAN)
    print(told)
    assert truth.wrong == [], told
    assert (truth.records, truth.ids, truth.failed) == (PLAN.lines, PLAN.lines, 0), told
    assert truth.hits.total() >= PLAN.hits - 2, told
    # Each hit may cost what was in flight, and what was finished but not yet stored; that is not few among so few.
    assert truth.twice <= truth.hits.total() * 4 * 16, told
