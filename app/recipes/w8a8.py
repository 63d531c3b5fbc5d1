"""W8A8-INT8 by round to nearest: symmetric, one scale per output channel, activations scaled per token at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

from app.recipes.checkpoint import as_checkpoint, load, save
from app.recipes.progress import Report

SCHEME = "W8A8"  # llm-compressor's preset: int8, strategy channel; activations int8, dynamic, strategy token


def make(base: str, output: Path, parameters: dict[str, Any], report: Report) -> None:
    """Every linear layer but the ignored ones, in seconds and without calibration data."""
    modifier = QuantizationModifier(targets="Linear", scheme=SCHEME, ignore=parameters["ignore"])
    with as_checkpoint(base, report) as checkpoint:
        model, tokenizer = load(checkpoint, report)
        report("quantizing to INT8", 0, None)
        oneshot(model=model, recipe=modifier)
        save(model, tokenizer, output, report, save_compressed=True)
