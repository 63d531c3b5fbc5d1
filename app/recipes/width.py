"""Fewer MLP channels, the same number in every block, so that the result is an ordinary checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from app.recipes.choice import most, uniform_width
from app.recipes.refit import grams, with_inputs, with_outputs
from app.recipes.work import Work


def prune(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Keeps in each block the channels with the highest importance.

    Importance of a channel is the root mean square of its activation times the norm of its column in the output
    projection: how much its absence changes the output on its own (Wanda's measure by channel,
    https://arxiv.org/abs/2306.11695).
    """
    width = work.model.config.intermediate_size
    chosen = uniform_width(width, parameters["share"], parameters["multiple"])
    outputs = [block.mlp.down_proj for block in work.blocks]
    products = grams(work, outputs, parameters["samples"], parameters["tokens"], "measuring the importance of channels")
    lost = []
    for number, (block, gram) in enumerate(zip(work.blocks, products, strict=True)):
        work.report("pruning channels", number, len(products))
        importance = gram.diagonal().sqrt() * block.mlp.down_proj.weight.data.norm(dim=0)
        kept = most(importance.tolist(), chosen)
        lost.append(round(1 - float(importance[kept].sum() / importance.sum()), 4))
        _keep(block.mlp, torch.tensor(kept), gram if parameters["refit"] else None)
    work.model.config.intermediate_size = chosen
    return {"width": chosen, "of": width, "importance_lost": lost}


def _keep(mlp: Any, kept: torch.Tensor, gram: torch.Tensor | None) -> None:
    mlp.gate_proj = with_outputs(mlp.gate_proj, kept)
    mlp.up_proj = with_outputs(mlp.up_proj, kept)
    mlp.down_proj = with_inputs(mlp.down_proj, kept, gram)
    mlp.intermediate_size = len(kept)
