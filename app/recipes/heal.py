"""A short distillation of a pruned model from the one that it was made from."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from app.recipes.checkpoint import load_model
from app.recipes.work import Samples, Work, divergence

WARM_UP = 0.1
CLIP = 1.0


def distil(work: Work, parameters: dict[str, Any]) -> dict[str, Any]:
    """Trains everything but the embeddings on the teacher's next-token distributions; each sample is seen once."""
    torch.manual_seed(parameters["seed"])
    steps, batch = parameters["steps"], parameters["batch"]
    samples = work.samples(steps * batch, parameters["tokens"])
    random.Random(parameters["seed"]).shuffle(samples)  # noqa: S311 - an order, nothing secret
    teacher = load_model(work.checkpoint, work.report).eval()
    student = work.model.train()
    trained = _trained(student)
    optimizer = torch.optim.AdamW(trained, lr=parameters["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        work.report("distilling from the base", step, steps)
        for group in optimizer.param_groups:
            group["lr"] = parameters["learning_rate"] * rate(step, steps)
        losses.append(_learn(teacher, student, optimizer, trained, _batch(samples, step, batch)))
    student.eval().requires_grad_(requires_grad=True)
    return {"divergence": [round(loss, 4) for loss in losses]}


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step`: up along a line, then down along a cosine."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _trained(model: Any) -> list[torch.nn.Parameter]:
    model.requires_grad_(requires_grad=False)
    model.model.layers.requires_grad_(requires_grad=True)
    model.model.norm.requires_grad_(requires_grad=True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _batch(samples: Samples, step: int, size: int) -> torch.Tensor:
    """The step's samples, one below the other; a text too short for all steps starts again."""
    return torch.cat([samples[(step * size + index) % len(samples)] for index in range(size)])


def _learn(teacher: Any, student: Any, optimizer: Any, trained: list[torch.nn.Parameter], batch: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = teacher(input_ids=batch, use_cache=False).logits
    loss = divergence(wanted, student(input_ids=batch, use_cache=False).logits)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    optimizer.step()
    return float(loss)
