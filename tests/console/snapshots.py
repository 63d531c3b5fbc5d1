"""Snapshots made up for the page, as `/admin/live` would send them."""

from __future__ import annotations

from typing import Any

import msgspec

from app.console.history import STEP_S, STEPS_KEPT, Pace, Traffic
from app.console.snapshot import (
    BatchRow,
    CardRow,
    ModelRow,
    RefusalRow,
    Snapshot,
    VariantRow,
    WorkerRow,
)

NOW = 1_800_000_000.0
IDLE = Pace(0.0, 0.0, None, None)
BUSY = Pace(812.4, 6.3, 0.21, 0.74)


def snapshot(**changed: Any) -> Snapshot:
    """A gateway at rest, with nothing in it but what is said."""
    at_rest: dict[str, Any] = {
        "at": NOW,
        "started": NOW - 7200,
        "status": "ready",
        "degraded": False,
        "guarded": True,
        "processes": 1,
        "in_flight": 0,
        "traffic": Traffic(STEP_S, [None] * STEPS_KEPT, IDLE),
        "models": [],
        "workers": [],
        "queue": {"flows": [], "routes": []},
        "queue_left_out": 0,
        "batches": None,
        "refusals": [],
    }
    return Snapshot(**{**at_rest, **changed})


def full(name: str) -> Snapshot:
    """A gateway that has one of everything, each named `name`."""
    flow = {"band": "default", "tenant": name, "workers": [name], "depth": 12, "oldest_s": 3.2}
    route = {"workers": [name], "depth": 12, "drain_per_s": 4.0, "expected_wait_s": {"default": 3.0}}
    card = CardRow(quality=0.97, size_bytes=140_000_000, tokens_per_s=512.0, streams=8, passes=True)
    variant = VariantRow(name, f"{name}:{name}", name, 2048, 1, 1, BUSY, card)
    return snapshot(
        processes=2,
        in_flight=9,
        traffic=Traffic(STEP_S, [None, IDLE, *[BUSY] * (STEPS_KEPT - 2)], BUSY),
        models=[ModelRow(name, [variant])],
        workers=[WorkerRow(name, name, "ejected", name, name, 7, 8, 8, 7, 0, 0.61)],
        queue={"flows": [flow], "routes": [route]},
        batches=[BatchRow(name, name, "in_progress", name, 100, 60, 3, int(NOW) - 90, int(NOW) + 80_000)],
        refusals=[RefusalRow("rejected", name, name, name, "flex", 41, NOW - 90, NOW - 2)],
    )


def sent(*snapshots: Snapshot) -> bytes:
    """What goes over the wire."""
    return b"".join(b"event: snapshot\ndata: %b\n\n" % msgspec.json.encode(snapshot) for snapshot in snapshots)
