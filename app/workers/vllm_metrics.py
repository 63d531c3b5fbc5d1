"""What vLLM's own `/metrics` says about its engine: pure parsing, tolerant of garbage.

Names as vLLM 0.32 exports them, labels `model_name` and `engine`; values of several engines (data parallel) add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
GENERATED = "vllm:generation_tokens_total"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Requests in the engine and waiting inside it, and the used share (0..1) of its fullest KV cache.

    `generated` are the tokens it generated since it started: as long as they grow, it works.
    """

    running: int
    waiting: int
    kv_usage: float
    generated: float = 0.0


def parse_engine_load(text: str) -> EngineLoad | None:
    """The load in a Prometheus text exposition; None when it does not say how many requests run."""
    found: dict[str, list[float]] = {RUNNING: [], WAITING: [], KV_USAGE: [], GENERATED: []}
    for line in text.splitlines():
        name, brace, rest = line.partition("{")
        if brace and name in found:
            value = _value(rest.rpartition("}")[2])
            if value is not None:
                found[name].append(value)
    if not found[RUNNING]:
        return None
    return EngineLoad(
        running=int(sum(found[RUNNING])),
        waiting=int(sum(found[WAITING])),
        kv_usage=min(max(found[KV_USAGE], default=0.0), 1.0),
        generated=sum(found[GENERATED]),
    )


def _value(text: str) -> float | None:
    try:
        value = float(text.split()[0])
    except (ValueError, IndexError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
