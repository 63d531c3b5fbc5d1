"""What tokens cost, and how much of the machine a mixture of experts uses. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.card import Cost, MeasuredOn, SparseUse, Speed
from app.evaluation.resampling import shortened
from app.manifest import Manifest

SECONDS_PER_HOUR = 3600
FLOPS_PER_PARAMETER = 2  # a multiplication and an addition for each weight that a token passes


def cost(speeds: Sequence[Speed], price_per_hour: float) -> Cost | None:
    """Cost of a million generated tokens on a machine that this worker keeps busy; None without throughput."""
    busiest = max(speeds, key=lambda speed: speed.streams, default=None)
    if busiest is None or busiest.tokens_per_s <= 0:
        return None
    per_token = price_per_hour / SECONDS_PER_HOUR / busiest.tokens_per_s
    return Cost(
        per_million_tokens=shortened(per_token * 1e6), machine_price_per_hour=price_per_hour, streams=busiest.streams
    )


def sparse_use(
    speeds: Sequence[Speed], machine: MeasuredOn, activated: int, activated_bytes: float
) -> SparseUse | None:
    """Sparsity-aware use of bandwidth and compute (`app.card.SparseUse` has the formulas and their source).

    `activated_bytes` are read for one token: weights that it passes as they lie in memory, and its KV cache. None where
    the machine's peaks or the speeds are unknown.
    """
    if not (speeds and machine.peak_bytes_per_s and machine.peak_flops):
        return None
    lone, busiest = min(speeds, key=lambda one: one.streams), max(speeds, key=lambda one: one.streams)
    if lone.itl_p50_s <= 0:
        return None
    return SparseUse(
        bandwidth=shortened(activated_bytes / lone.itl_p50_s / machine.peak_bytes_per_s),
        compute=shortened(busiest.tokens_per_s * FLOPS_PER_PARAMETER * activated / machine.peak_flops),
    )


def bytes_per_parameter(manifest: Manifest, computes_bfloat16: bool) -> float:
    """As weights lie in a CPU worker's memory: plain ones in its data type, quantized ones as on disk."""
    if manifest.quantization:
        return manifest.weights_bytes / max(1, manifest.parameters_count)
    return 2.0 if computes_bfloat16 else 4.0


def kv_bytes(config: Mapping[str, Any], tokens: int, width: float) -> float:
    """Keys and values of `tokens` tokens, by config.json; 0 where it does not tell."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    if not (layers and heads):
        return 0.0
    head_size = config.get("head_dim") or config.get("hidden_size", 0) // heads
    return float(2 * layers * config.get("num_key_value_heads", heads) * head_size * tokens * width)
