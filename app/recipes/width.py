"""Fewer MLP channels, the same number in every block, so that the result is an ordinary checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from app.recipes.choice import most, uniform_width
from app.recipes.work import Work, observed

RIDGE = 0.01


def prune(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Keeps in each block the channels with the highest importance.

    Importance of a channel is the root mean square of its activation times the norm of its column in the output
    projection: how much its absence changes the output on its own (Wanda's measure by channel,
    https://arxiv.org/abs/2306.11695).
    """
    width = work.model.config.intermediate_size
    chosen = uniform_width(width, parameters["share"], parameters["multiple"])
    grams = _grams(work, parameters["samples"], parameters["tokens"])
    lost = []
    for number, (block, gram) in enumerate(zip(work.blocks, grams, strict=True)):
        work.report("pruning channels", number, len(grams))
        importance = gram.diagonal().sqrt() * block.mlp.down_proj.weight.norm(dim=0)
        kept = most(importance.tolist(), chosen)
        lost.append(round(1 - float(importance[kept].sum() / importance.sum()), 4))
        _keep(block.mlp, torch.tensor(kept), gram if parameters["refit"] else None)
    work.model.config.intermediate_size = chosen
    return {"width": chosen, "of": width, "importance_lost": lost}


def _grams(work: Work, samples: int, tokens: int) -> list[torch.Tensor]:
    """For each block the matrix of products of channels' activations, averaged over tokens."""
    grams = [torch.zeros(block.mlp.down_proj.in_features, block.mlp.down_proj.in_features) for block in work.blocks]
    count = 0

    def add(block: int, source: torch.Tensor, _target: torch.Tensor) -> None:
        nonlocal count
        count += len(source) if block == 0 else 0
        grams[block] += source.T @ source

    with observed((block.mlp.down_proj for block in work.blocks), add):
        work.run(work.samples(samples, tokens), "measuring the importance of channels")
    return [gram / count for gram in grams]


def _keep(mlp: Any, kept: torch.Tensor, gram: torch.Tensor | None) -> None:
    down = mlp.down_proj.weight.data
    mlp.gate_proj = _linear(mlp.gate_proj.weight.data[kept])
    mlp.up_proj = _linear(mlp.up_proj.weight.data[kept])
    mlp.down_proj = _linear(down[:, kept] if gram is None else refitted(down, gram, kept))
    mlp.intermediate_size = len(kept)


def refitted(down: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The projection of the channels `kept` whose output is nearest to the one of all channels, by ridge regression.

    `down` has shape (outputs, channels), `gram` (channels, channels); the ridge keeps it near what it was.
    """
    inner = gram[kept][:, kept]
    inner = inner + RIDGE * inner.diagonal().mean() * torch.eye(len(kept))
    missing = torch.ones(len(gram), dtype=torch.bool)
    missing[kept] = False
    moved = torch.linalg.solve(inner, gram[kept][:, missing] @ down[:, missing].T)
    return down[:, kept] + moved.T


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight.contiguous().clone())
    return layer
