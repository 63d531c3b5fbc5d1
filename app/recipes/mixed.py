"""Bits by block: the blocks whose rounding hurts most keep eight, the others get four."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llmcompressor.modifiers.gptq import GPTQModifier

from app.recipes.choice import most
from app.recipes.oneshot import apply
from app.recipes.quantize import group_for, int4
from app.recipes.work import Samples, Work, divergence

INT8 = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}


def quantize(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Whole blocks share a scheme, because engines fuse the projections of one."""
    group = group_for(work, parameters["group"], parameters["ignore"])
    samples = work.samples(parameters["samples"], parameters["tokens"])
    sensitivity = measure(work, samples[: parameters["probes"]], group)
    sensitive = most(sensitivity, math.ceil(parameters["sensitive"] * len(sensitivity)))
    groups = {"group_0": int4(_targets([b for b in range(len(sensitivity)) if b not in sensitive]), group)}
    if sensitive:
        groups["group_1"] = {"targets": _targets(sensitive), **INT8}
    apply(work, [GPTQModifier(config_groups=groups, ignore=parameters["ignore"])], "quantizing by block", samples)
    return {"group": group, "eight_bits": sensitive, "sensitivity": [round(value, 6) for value in sensitivity]}


def measure(work: Work, samples: Samples, group: int) -> list[float]:
    """For each block KL(model || model with that block rounded to INT4), in nats per token."""
    with torch.inference_mode():
        wanted = [work.model(input_ids=sample, use_cache=False).logits for sample in samples]
        found = []
        for number, block in enumerate(work.blocks):
            work.report("measuring the sensitivity of each block", number, len(work.blocks))
            with _rounded(block, group):
                logits = (work.model(input_ids=sample, use_cache=False).logits for sample in samples)
                found.append(float(sum(divergence(a, b) for a, b in zip(wanted, logits, strict=True))) / len(samples))
    return found


def round_to_int4(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Symmetric round to nearest with one scale for each `group` of neighbours in a row."""
    parts = weight.unflatten(-1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7.5
    return ((parts / scale).round().clamp(-8, 7) * scale).flatten(-2)


@contextmanager
def _rounded(block: Any, group: int) -> Iterator[None]:
    linears = [module for module in block.modules() if type(module).__name__ == "Linear"]
    kept = [linear.weight.data for linear in linears]
    try:
        for linear in linears:
            linear.weight.data = round_to_int4(linear.weight.data, group)
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight


def _targets(blocks: list[int]) -> list[str]:
    numbers = "|".join(map(str, blocks))
    return [rf"re:.*layers\.({numbers})\.(self_attn|mlp)\..*_proj$"]
