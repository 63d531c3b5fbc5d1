"""Bases and results of recipes: loaded and written through transformers. Runs in the recipes environment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from app.errors import LaunchError
from app.recipes.progress import Report
from app.recipes.safetensors import quantization_method, read_config

GGUF = ".gguf"


@contextmanager
def as_checkpoint(base: str, report: Report) -> Iterator[str]:
    """The base as a directory or a hub id; a .gguf file is dequantized into a directory that lives for the block.

    llm-compressor goes back to where a model was loaded from until the result is written, and reads a config there.
    """
    if Path(base).suffix != GGUF:
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory:
        dequantize(Path(base), Path(directory), report)
        yield directory


def load(base: str, report: Report) -> tuple[Any, Any]:
    """(model, tokenizer) from a directory or a hub id; weights in float32, on the CPU.

    Raises LaunchError when the base is quantized already.
    """
    path = Path(base)
    if path.is_dir() and (method := quantization_method(read_config(path))):
        raise LaunchError(f"{path.name} is quantized already ({method}); recipes start from plain weights")
    report("reading the tokenizer", 0, None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    report("reading the weights", 0, None)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tokenizer


def save(model: Any, tokenizer: Any, output: Path, report: Report, **how: Any) -> None:
    """Writes bfloat16 safetensors, config, generation config, tokenizer and chat template to `output`."""
    report("writing the checkpoint", 0, None)
    model.to(torch.bfloat16).save_pretrained(output, **how)
    tokenizer.save_pretrained(output)


def dequantize(path: Path, output: Path, report: Report) -> None:
    """A .gguf file as a checkpoint of plain weights: what quantization rounded away stays away."""
    report("reading the tokenizer", 0, None)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    report("dequantizing the weights", 0, None)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    _mend(tokenizer, model.config)
    save(model, tokenizer, output, report)


def _mend(tokenizer: Any, config: Any) -> None:
    """The conversion leaves defaults of its class in the tokenizer where the file itself says otherwise."""
    if isinstance(config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    # Right for WordPiece only; it would take the blanks before punctuation out of what was generated.
    tokenizer.clean_up_tokenization_spaces = False
