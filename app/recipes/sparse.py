"""Zeroes in the weights. No engine of today stores or computes them differently: what this makes is for study."""

from __future__ import annotations

from typing import Any

from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

from app.errors import LaunchError
from app.recipes.oneshot import apply
from app.recipes.work import Work

METHODS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def prune(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """SparseGPT (https://arxiv.org/abs/2301.00774) or Wanda (https://arxiv.org/abs/2306.11695)."""
    method = METHODS.get(parameters["method"])
    if method is None:
        raise LaunchError(f"method is one of {', '.join(METHODS)}, not {parameters['method']!r}")
    modifier = method(
        sparsity=parameters["sparsity"],
        mask_structure=parameters["structure"],
        targets=["Linear"],
        ignore=[*parameters["ignore"], "re:.*lm_head"],
    )
    samples = work.samples(parameters["samples"], parameters["tokens"])
    apply(work, [modifier], "zeroing weights", samples)
    weights = [module.weight for block in work.blocks for module in block.modules() if hasattr(module, "in_features")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {"zeros": round(zeros / sum(weight.numel() for weight in weights), 4), "served_as": "dense"}
