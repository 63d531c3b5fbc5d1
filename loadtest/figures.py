"""The figures that are measured, in the order in which they are reported."""

from enum import Enum


class Figure(Enum):
    """One row of the results: what it is, its unit, the digits worth printing."""

    CPU_REQUEST_1K = ("CPU per request, 1 KB prompt", "µs", 0)
    CPU_REQUEST_32K = ("CPU per request, 32 KB prompt", "µs", 0)
    CPU_REQUEST_1M = ("CPU per request, 1 MB prompt", "µs", 0)
    CPU_CHUNK = ("CPU per streamed chunk, streams staggered", "µs", 1)
    CPU_CHUNK_IN_STEP = ("CPU per streamed chunk, streams in step", "µs", 1)
    CPU_CHUNK_BRIEF = ("CPU per streamed chunk, brief slow streams", "µs", 1)
    RATE_1K = ("requests/s, 1 KB prompt, 32 connections", "1/s", 0)
    BUSY_1K = ("target's CPU meanwhile", "% of a core", 0)
    ADDED_TTFT_P50 = ("added TTFT p50 at 200 requests/s", "ms", 2)
    ADDED_TTFT_P99 = ("added TTFT p99 at 200 requests/s", "ms", 2)
    DIRECT_TTFT_P50 = ("TTFT p50 of that load straight to the worker", "ms", 2)
    DIRECT_TTFT_P99 = ("TTFT p99 of that load straight to the worker", "ms", 2)
    ADDED_CHUNK_P50 = ("added inter-token delay p50 at 6,000 chunks/s", "ms", 2)
    ADDED_CHUNK_P99 = ("added inter-token delay p99 at 6,000 chunks/s", "ms", 2)
    DIRECT_CHUNK_P50 = ("delay p50 of those chunks straight from the worker", "ms", 2)
    DIRECT_CHUNK_P99 = ("delay p99 of those chunks straight from the worker", "ms", 2)
    PSS = ("memory (PSS) when ready", "MiB", 0)
    IDLE_STREAM = ("memory per idle stream", "KiB", 1)

    def __init__(self, label: str, unit: str, digits: int) -> None:
        self.label = label
        self.unit = unit
        self.digits = digits


TARGET_RATIOS = {
    ("naive", Figure.CPU_REQUEST_1K): 0.20,
    ("naive", Figure.CPU_CHUNK): 0.30,
    ("naive", Figure.CPU_CHUNK_IN_STEP): 0.30,
    ("vllm-router", Figure.CPU_REQUEST_1K): 1.0,
    ("vllm-router", Figure.CPU_REQUEST_32K): 1.5,
    ("vllm-router", Figure.CPU_REQUEST_1M): 1.5,
    ("vllm-router", Figure.CPU_CHUNK): 1.0,
    ("vllm-router", Figure.CPU_CHUNK_IN_STEP): 1.0,
}
"""What Sluice may cost at most, as a part of what a peer costs in the same run."""

TARGET_VALUES = {
    Figure.ADDED_TTFT_P50: 1.5,
    Figure.ADDED_TTFT_P99: 10.0,
    Figure.ADDED_CHUNK_P99: 5.0,
    Figure.IDLE_STREAM: 40.0,
}
"""What Sluice may show at most, in the figure's unit."""
