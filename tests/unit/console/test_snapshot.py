"""A snapshot, made of its parts."""

from __future__ import annotations

from typing import Any

import msgspec

from app.admission.fairness import MOVED, RANK, Flow, Overview
from app.batches.batch import Batch, Created, Progress
from app.catalogue import Catalogue
from app.console.board import Record
from app.console.history import step_at
from app.console.queue import queue_view
from app.console.snapshot import ROWS_SHOWN, Parts, Snapshot, snapshot
from app.inference import Outcome
from app.settings import Model
from app.telemetry.refusals import Count, Kind
from app.telemetry.tally import Tally
from app.tenant import Band
from app.workers.vllm_metrics import EngineLoad
from app.workers.worker import Worker, proven, refused

NOW = 1_000_000.0
CATALOGUE = Catalogue.of(
    (
        Model.model_validate(
            {
                "name": "m",
                "variants": [
                    {
                        "name": "dense",
                        "workers": [
                            {"url": "http://a:1", "max_concurrency": 8},
                            {"url": "http://b:1", "max_concurrency": 8},
                        ],
                    },
                    {"name": "w8a8", "quantization": "int8", "workers": [{"url": "http://c:1"}]},
                ],
            }
        ),
    )
)


def workers() -> list[Worker]:
    made = [Worker(address, variant) for variant in CATALOGUE.variants for address in variant.workers]
    ready, lost, _ = made
    ready.condition, lost.condition = proven(ready.condition), refused(lost.condition, "nothing listens")
    ready.load = EngineLoad(running=3, waiting=1, kv_usage=0.25)
    ready.context_length = 2048
    return made


def overview(**given: Any) -> Overview:
    flows = [
        Flow(RANK[Band.DEFAULT], "r", ("b:1", "a:1"), "t", 3, 2_000_000),
        Flow(RANK[Band.FLEX], "r", ("b:1", "a:1"), "u", 2, 9_000_000),
        Flow(MOVED, "r", ("b:1", "a:1"), "t", 1, 100_000),
    ]
    return Overview(**{"flows": flows, "drains": [("r", 500_000.0, 4)], "slots": [("a:1", 5, 8)], **given})


def record(**given: Any) -> Record:
    return Record(**{"in_flight": 2, "steps": {}, "refusals": [], **given})


def shown(**given: Any) -> Snapshot:
    parts: dict[str, Any] = {
        "at": NOW,
        "started": NOW - 60,
        "status": "ready",
        "degraded": False,
        "guarded": True,
        "models": CATALOGUE.models,
        "workers": workers(),
        "queue": queue_view(overview()),
        "batches": None,
        "records": [record()],
    }
    return snapshot(Parts(**{**parts, **given}))


def test_workers_have_their_state_their_slots_and_what_their_engine_says() -> None:
    ready, lost, unproven = shown().workers
    assert (ready.id, ready.variant, ready.state, ready.reason) == ("a:1", "m:dense", "ready", "")
    assert (ready.slots_held, ready.slots, ready.slots_most) == (5, 8, 8)
    assert (ready.running, ready.waiting, ready.kv_usage) == (3, 1, 0.25)
    assert (lost.state, lost.reason, lost.slots, lost.running) == ("lost", "nothing listens", 0, None)
    assert unproven.state == "unproven"


def test_variants_have_their_pool_and_the_pace_of_the_last_minute() -> None:
    last = step_at(NOW) - 1
    (model,) = shown(records=[record(steps={last: {"m:w8a8": Tally(100, 4, {9: 4})}})]).models
    dense, w8a8 = model.variants
    assert (dense.public_name, dense.ready, dense.workers, dense.context_length) == ("m:dense", 1, 2, 2048)
    assert (w8a8.quantization, w8a8.ready, w8a8.context_length) == ("int8", 0, None)
    assert (dense.pace.tokens_per_s, w8a8.pace.tokens_per_s) == (0, 20)
    assert w8a8.pace.ttft_p50_s is not None


def test_the_step_that_is_not_over_is_not_shown() -> None:
    now = step_at(NOW)
    paces = shown(records=[record(steps={now: {"m:dense": Tally(5, 1)}})]).traffic.paces
    assert paces == [None] * len(paces)


def test_the_queue_is_by_tenant_and_band_the_longest_wait_first() -> None:
    queue = shown().queue
    assert queue is not None
    seen = [(flow["tenant"], flow["band"], flow["depth"], flow["oldest_s"]) for flow in queue["flows"]]
    assert seen == [("u", "flex", 2, 9.0), ("t", "default", 3, 2.0), ("t", "moved", 1, 0.1)]
    (route,) = queue["routes"]
    assert (route["workers"], route["depth"], route["drain_per_s"]) == (["a:1", "b:1"], 6, 2.0)
    assert (route["expected_wait_s"]["default"], route["expected_wait_s"]["flex"]) == (2.0, 3.0)


def test_a_queue_that_cannot_be_seen_is_none_and_everything_else_is_there() -> None:
    seen = shown(queue=None)
    assert (seen.queue, seen.queue_left_out) == (None, 0)
    assert [worker.state for worker in seen.workers] == ["ready", "lost", "unproven"]


def test_a_long_queue_is_cut_and_says_so() -> None:
    flows = [Flow(RANK[Band.DEFAULT], "r", ("a:1",), f"t{n}", 1, n) for n in range(ROWS_SHOWN + 7)]
    seen = shown(queue=queue_view(overview(flows=flows)))
    assert seen.queue is not None
    assert (len(seen.queue["flows"]), seen.queue_left_out) == (ROWS_SHOWN, 7)
    assert seen.queue["flows"][0]["tenant"] == f"t{ROWS_SHOWN + 6}"


def test_processes_are_counted_and_their_refusals_added_up() -> None:
    kind = Kind(Outcome.REJECTED, "overloaded", "m", "t", Band.DEFAULT)
    other = Kind(Outcome.EXPIRED, "queue_timeout", "m", "t", Band.FLEX)
    records = [
        record(refusals=[(kind, Count(2, NOW - 9, NOW - 3))]),
        record(refusals=[(other, Count(1, NOW - 1, NOW - 1)), (kind, Count(5, NOW - 20, NOW - 8))]),
    ]
    seen = shown(records=records)
    assert (seen.processes, seen.in_flight) == (2, 4)
    rows = [
        (row.code, row.outcome, row.band, row.count, row.first_at - NOW, row.last_at - NOW) for row in seen.refusals
    ]
    assert rows == [
        ("queue_timeout", "expired", "flex", 1, -1, -1),
        ("overloaded", "rejected", "default", 7, -20, -3),
    ]


def test_batches_have_their_progress() -> None:
    created = Created(
        at=5,
        id="batch_1",
        tenant="t",
        endpoint="/v1/chat/completions",
        input_file_id="file_1",
        completion_window="24h",
        expires_at=86405,
        metadata={"note": "never shown"},
        outputs_kept_s=60,
    )
    (row,) = shown(batches=[(Batch(created), Progress(completed=3, failed=1))]).batches or []
    assert (row.id, row.tenant, row.status, row.total) == ("batch_1", "t", "validating", 0)
    assert (row.completed, row.failed, row.expires_at) == (3, 1, 86405)
    assert b"never shown" not in msgspec.json.encode(row)


def test_it_is_json() -> None:
    decoded = msgspec.json.decode(msgspec.json.encode(shown()))
    assert decoded["workers"][0]["kv_usage"] == 0.25
