"""Fewer bits, by llm-compressor's modifiers. What they write is compressed-tensors' format, which vLLM reads."""

from __future__ import annotations

import re
from typing import Any

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from app.recipes.choice import group_size
from app.recipes.oneshot import apply
from app.recipes.work import Samples, Work

# llm-compressor's presets: int8, one scale per channel, activations int8 per token; and float8 the same way.
W8A8 = "W8A8"
FP8 = "FP8_DYNAMIC"
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def w8a8(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Round to nearest, in seconds and without calibration data."""
    apply(work, [QuantizationModifier(targets="Linear", scheme=W8A8, ignore=parameters["ignore"])], "rounding to INT8")
    return {}


def w8a8_gptq(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """SmoothQuant (https://arxiv.org/abs/2211.10438), then GPTQ (https://arxiv.org/abs/2210.17323)."""
    modifiers = [
        SmoothQuantModifier(smoothing_strength=parameters["smoothing"], ignore=parameters["ignore"]),
        GPTQModifier(targets="Linear", scheme=W8A8, ignore=parameters["ignore"]),
    ]
    apply(work, modifiers, "quantizing to INT8", _samples(work, parameters))
    return {}


def w4a16(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    group = group_for(work, parameters["group"], parameters["ignore"])
    modifier = GPTQModifier(config_groups={"group_0": int4(["Linear"], group)}, ignore=parameters["ignore"])
    apply(work, [modifier], "quantizing to INT4", _samples(work, parameters))
    return {"group": group}


def w4a16_awq(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """AWQ (https://arxiv.org/abs/2306.00978). Its cache of activations pins memory, which needs an accelerator."""
    from llmcompressor.modifiers.transform.awq import AWQModifier

    group = group_for(work, parameters["group"], parameters["ignore"])
    ignore = parameters["ignore"]
    modifiers = [
        AWQModifier(ignore=ignore),
        QuantizationModifier(config_groups={"group_0": int4(["Linear"], group)}, ignore=ignore),
    ]
    apply(work, modifiers, "quantizing to INT4", _samples(work, parameters))
    return {"group": group}


def fp8(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    apply(work, [QuantizationModifier(targets="Linear", scheme=FP8, ignore=parameters["ignore"])], "rounding to FP8")
    return {}


def fp8_kv(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """FP8 weights, and one scale each for the keys and the values of a block."""
    ignore = parameters["ignore"]
    modifier = QuantizationModifier(targets="Linear", scheme=FP8, kv_cache_scheme=FP8_CACHE, ignore=ignore)
    apply(work, [modifier], "measuring the KV cache", _samples(work, parameters))
    return {}


def int4(targets: list[str], group: int) -> dict[str, Any]:
    """The scheme of INT4 weights with one scale for each `group` of them, as compressed-tensors spells it."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {"targets": targets, "weights": weights}


def group_for(work: Work, wanted: int, ignore: list[str]) -> int:
    """The group size that fits all quantized layers. Raises LaunchError."""
    names = {name for name in ignore if not name.startswith("re:")}
    patterns = [re.compile(name.removeprefix("re:")) for name in ignore if name.startswith("re:")]
    columns = [
        module.in_features
        for name, module in work.model.named_modules()
        if type(module).__name__ == "Linear"
        and not names & {name, name.rpartition(".")[2]}
        and not any(pattern.match(name) for pattern in patterns)
    ]
    return group_size(columns, wanted)


def _samples(work: Work, parameters: dict[str, Any]) -> Samples:
    return work.samples(parameters["samples"], parameters["tokens"])
