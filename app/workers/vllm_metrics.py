"""What vLLM's own `/metrics` says about its engine: pure parsing, tolerant of garbage.

Names as vLLM 0.32 exports them, labels `model_name` and `engine`; values of several engines (data parallel) add up.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
GENERATED = "vllm:generation_tokens_total"
PREEMPTIONS = "vllm:num_preemptions_total"
CACHE_CONFIG = "vllm:cache_config_info"

_KV_BLOCKS = re.compile(r'[{,]num_gpu_blocks="(\d{1,12})"')
_BLOCK_SIZE = re.compile(r'[{,]block_size="(\d{1,6})"')


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Requests in the engine and waiting inside it, and the used share (0..1) of its fullest KV cache.

    `generated` are the tokens it generated since it started: as long as they grow, it works. `kv_tokens` is the
    capacity of all its KV caches, 0 when it does not tell. `preemptions` are the requests that it has thrown out of a
    full cache so far. `at` is when this was read, monotonic seconds.
    """

    running: int
    waiting: int
    kv_usage: float
    kv_tokens: int = 0
    generated: float = 0.0
    preemptions: float = 0.0
    at: float = 0.0


def parse_engine_load(text: str, at: float = 0.0) -> EngineLoad | None:
    """The load in a Prometheus text exposition read `at` that time; None when it does not say how many requests run."""
    found: dict[str, list[float]] = {RUNNING: [], WAITING: [], KV_USAGE: [], GENERATED: [], PREEMPTIONS: []}
    kv_tokens = 0
    for line in text.splitlines():
        name, brace, rest = line.partition("{")
        if name == CACHE_CONFIG:
            kv_tokens += _kv_tokens(line)
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
        preemptions=sum(found[PREEMPTIONS]),
        at=at,
        kv_tokens=kv_tokens,
    )


def _kv_tokens(line: str) -> int:
    blocks, size = _KV_BLOCKS.search(line), _BLOCK_SIZE.search(line)
    return int(blocks[1]) * int(size[1]) if blocks and size else 0


def _value(text: str) -> float | None:
    try:
        value = float(text.split()[0])
    except (ValueError, IndexError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
