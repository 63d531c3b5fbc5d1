"""Projections whose inputs are cut: what stays of them is fitted to stand in for what is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from app.recipes.work import Work, observed

RIDGE = 0.01


def grams(work: Work, projections: Sequence[Any], samples: int, tokens: int, doing: str) -> list[torch.Tensor]:
    """For each projection the matrix of products of its inputs, averaged over tokens; shape (inputs, inputs)."""
    sums = [torch.zeros(layer.in_features, layer.in_features) for layer in projections]
    count = 0

    def add(number: int, source: torch.Tensor, _target: torch.Tensor) -> None:
        nonlocal count
        count += len(source) if number == 0 else 0
        sums[number] += source.T @ source

    with observed(projections, add):
        work.run(work.samples(samples, tokens), doing)
    return [gram / count for gram in sums]


def refitted(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The projection of the inputs `kept` whose output is nearest to the one of all inputs, by ridge regression.

    `weight` has shape (outputs, inputs), `gram` (inputs, inputs); the ridge keeps it near what it was.
    """
    inner = gram[kept][:, kept]
    inner = inner + RIDGE * inner.diagonal().mean() * torch.eye(len(kept))
    missing = torch.ones(len(gram), dtype=torch.bool)
    missing[kept] = False
    moved = torch.linalg.solve(inner, gram[kept][:, missing] @ weight[:, missing].T)
    return weight[:, kept] + moved.T


def with_outputs(layer: Any, kept: torch.Tensor) -> torch.nn.Linear:
    """A linear layer with the outputs `kept` alone."""
    return _linear(layer.weight.data[kept], None if layer.bias is None else layer.bias.data[kept])


def with_inputs(layer: Any, kept: torch.Tensor, gram: torch.Tensor | None) -> torch.nn.Linear:
    """A linear layer with the inputs `kept` alone, refitted where there is a `gram` of its inputs."""
    weight = layer.weight.data
    weight = weight[:, kept] if gram is None else refitted(weight, gram, kept)
    return _linear(weight, None if layer.bias is None else layer.bias.data)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = torch.nn.Parameter(weight.contiguous().clone())
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.clone())
    return layer
