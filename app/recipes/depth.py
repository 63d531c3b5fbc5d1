"""Fewer blocks. Block influence is ShortGPT's: https://arxiv.org/abs/2403.03853, equation 1."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from app.recipes.choice import blocks_to_keep
from app.recipes.work import Work, observed


def prune(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Drops the least influential blocks; what is left is the same architecture with another depth."""
    influence = measure(work, parameters["samples"], parameters["tokens"])
    kept = blocks_to_keep(influence, parameters["keep"], parameters["drop"])
    keep_blocks(work.model, kept)
    return {
        "influence": [round(value, 5) for value in influence],
        "dropped": [block for block in range(len(influence)) if block not in kept],
    }


def measure(work: Work, samples: int, tokens: int) -> list[float]:
    """1 - cos(what a block takes, what it gives), averaged over tokens, for each block."""
    sums = [0.0] * len(work.blocks)
    count = [0] * len(work.blocks)

    def add(block: int, source: torch.Tensor, target: torch.Tensor) -> None:
        sums[block] += float((1 - cosine_similarity(source, target, dim=-1)).sum())
        count[block] += len(source)

    with observed(work.blocks, add):
        work.run(work.samples(samples, tokens), "measuring the influence of each block")
    return [total / number for total, number in zip(sums, count, strict=True)]


def keep_blocks(model: Any, kept: list[int]) -> None:
    """Leaves the blocks `kept`, numbered anew: caches and kinds of attention go by these numbers."""
    model.model.layers = torch.nn.ModuleList([model.model.layers[block] for block in kept])
    for number, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = number
    config = model.config
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if kinds:
        config.layer_types = [kinds[block] for block in kept]
