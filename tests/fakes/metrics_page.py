"""The /metrics page: vLLM 0.32's names and labels, with the numbers that the fake engine really has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_LONG_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
_FINISHED = ("stop", "length", "abort", "error", "repetition")


@dataclass
class Histogram:
    """Upper bounds and the observations under each, not yet cumulated."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        place = next((at for at, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterable[str]:
        cumulated = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            cumulated += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {float(cumulated)}'
        yield f"{name}_count{{{labels}}} {float(cumulated)}"
        yield f"{name}_sum{{{labels}}} {self.total}"


@dataclass
class Statistics:
    """What the fake engine has done since it started."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_FINISHED, 0))
    histograms: Mapping[str, Histogram] = field(
        default_factory=lambda: {
            "time_to_first_token_seconds": Histogram(_SECONDS),
            "inter_token_latency_seconds": Histogram(_SECONDS),
            "request_time_per_output_token_seconds": Histogram(_SECONDS),
            "e2e_request_latency_seconds": Histogram(_LONG_SECONDS),
            "request_queue_time_seconds": Histogram(_LONG_SECONDS),
            "request_prompt_tokens": Histogram(_TOKENS),
            "request_generation_tokens": Histogram(_TOKENS),
        }
    )

    def account(
        self, prompt_tokens: int, generated: int, reasons: Iterable[str], queued: float, ttft: float, whole: float
    ) -> None:
        """Count one finished request: its tokens, why its choices ended, and its times in seconds."""
        self.prompt_tokens += prompt_tokens
        for reason in reasons:
            self.finished["length" if reason == "length" else "stop"] += 1
        self.histograms["request_queue_time_seconds"].observe(queued)
        self.histograms["time_to_first_token_seconds"].observe(ttft)
        self.histograms["e2e_request_latency_seconds"].observe(whole)
        self.histograms["request_prompt_tokens"].observe(prompt_tokens)
        self.histograms["request_generation_tokens"].observe(generated)


@dataclass(frozen=True, slots=True)
class Readings:
    """The engine's state at this moment."""

    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    prefix_queries: float
    prefix_hits: float
    block_size: int
    blocks: int


def render(model: str, readings: Readings, statistics: Statistics) -> bytes:
    """The page in Prometheus' text format."""
    labels = f'engine="0",model_name="{model}"'
    lines: list[str] = []
    for name, value in _gauges(readings).items():
        lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{labels}}} {float(value)}"]
    for name, value in _counters(readings, statistics).items():
        lines += [f"# TYPE vllm:{name}_total counter", f"vllm:{name}_total{{{labels}}} {float(value)}"]
    lines.append("# TYPE vllm:request_success_total counter")
    for reason, count in statistics.finished.items():
        parts = f'engine="0",finished_reason="{reason}",model_name="{model}"'
        lines.append(f"vllm:request_success_total{{{parts}}} {float(count)}")
    for name, histogram in statistics.histograms.items():
        lines += [f"# TYPE vllm:{name} histogram", *histogram.lines(f"vllm:{name}", labels)]
    cache = f'block_size="{readings.block_size}",engine="0",num_gpu_blocks="{readings.blocks}"'
    lines += ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{{{cache}}} 1.0"]
    return ("\n".join(lines) + "\n").encode()


def _gauges(readings: Readings) -> dict[str, float]:
    return {
        "num_requests_running": readings.running,
        "num_requests_waiting": readings.waiting,
        "kv_cache_usage_perc": readings.kv_usage,
    }


def _counters(readings: Readings, statistics: Statistics) -> dict[str, float]:
    return {
        "prefix_cache_queries": readings.prefix_queries,
        "prefix_cache_hits": readings.prefix_hits,
        "num_preemptions": readings.preemptions,
        "prompt_tokens": statistics.prompt_tokens,
        "generation_tokens": statistics.generation_tokens,
    }
