"""llm-compressor, told our samples and our progress."""

from __future__ import annotations

from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.core import active_session
from torch.utils.data import DataLoader

from app.recipes.work import Samples, Work, observed


def apply(work: Work, modifiers: list[Any], doing: str, samples: Samples | None = None) -> None:
    """Runs the modifiers over the model one after the other, block by block where they want samples."""
    work.report(doing, 0, None)
    reached = 0

    def tell(block: int, _source: torch.Tensor, _target: torch.Tensor) -> None:
        nonlocal reached
        if block + 1 != reached:
            reached = block + 1
            work.report(doing, reached, len(work.blocks))

    loader = None
    if samples:
        rows = [{"input_ids": sample, "attention_mask": sample.new_ones(sample.shape)} for sample in samples]
        loader = DataLoader(rows, batch_size=None)
    # Its session is the process's and remembers the modifiers of a run before.
    active_session().reset()
    with observed(work.blocks, tell):
        oneshot(model=work.model, recipe=modifiers, dataset=loader)
