from __future__ import annotations

import pytest

from app.card import MeasuredOn, Speed
from app.evaluation.economics import bytes_per_parameter, cost, kv_bytes, sparse_use
from app.manifest import Manifest

SPEEDS = [
    Speed(streams=8, ttft_p50_s=1, itl_p50_s=0.1, tokens_per_s=100),
    Speed(streams=1, ttft_p50_s=0.5, itl_p50_s=0.05, tokens_per_s=20),
]
MACHINE = MeasuredOn(
    cores=2, instruction_set="avx2", engine="cpu", engine_version="1", peak_bytes_per_s=20e9, peak_flops=1e11
)


def test_a_million_tokens_cost_the_hours_they_take() -> None:
    found = cost(SPEEDS, price_per_hour=0.36)
    assert found is not None
    assert found.streams == 8
    assert found.per_million_tokens == pytest.approx(10_000 / 3600 * 0.36)
    assert cost([], 1.0) is None


def test_only_what_a_token_passes_is_counted_as_used() -> None:
    found = sparse_use(SPEEDS, MACHINE, activated=100_000_000, activated_bytes=200e6)
    assert found is not None
    assert found.bandwidth == pytest.approx(200e6 / 0.05 / 20e9)
    assert found.compute == pytest.approx(100 * 2 * 100e6 / 1e11)
    assert sparse_use(SPEEDS, MACHINE.model_copy(update={"peak_flops": None}), 1, 1.0) is None


def test_weights_lie_in_memory_as_the_engine_holds_them() -> None:
    plain = Manifest(model="m", variant="v", base="b", recipe="r", weights_bytes=200, parameters_count=100)
    assert bytes_per_parameter(plain, computes_bfloat16=False) == 4
    assert bytes_per_parameter(plain, computes_bfloat16=True) == 2
    assert bytes_per_parameter(plain.model_copy(update={"quantization": "w8a8", "weights_bytes": 110}), False) == 1.1


def test_a_cache_has_keys_and_values_of_each_layer() -> None:
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    assert kv_bytes(config, tokens=10, width=4) == 2 * 30 * 3 * 64 * 10 * 4
    assert kv_bytes({}, 10, 4) == 0
