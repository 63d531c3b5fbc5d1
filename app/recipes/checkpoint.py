"""Bases and results of recipes: loaded and written through transformers. Runs in the recipes environment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from app.recipes.hub import fetch
from app.recipes.progress import Report

GGUF = ".gguf"


@contextmanager
def as_checkpoint(base: str, report: Report) -> Iterator[Path]:
    """The base as a directory: a hub repository in the hub's cache, a .gguf file dequantized for as long as the block.

    llm-compressor goes back to where a model was loaded from until the result is written, and reads a config there.
    """
    path = Path(base)
    if not path.exists():
        path = fetch(base, report)
    if path.suffix != GGUF:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory:
        dequantize(path, Path(directory), report)
        yield Path(directory)


def load_model(checkpoint: Path, report: Report) -> Any:
    """The model in a directory; weights in float32, on the CPU."""
    report("reading the weights", 0, None)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def load_tokenizer(checkpoint: Path, report: Report) -> Any:
    report("reading the tokenizer", 0, None)
    return AutoTokenizer.from_pretrained(checkpoint)


def save(model: Any, tokenizer: Any, output: Path, report: Report, *, reshaped: bool = False, **how: Any) -> None:
    """Writes bfloat16 safetensors, config, generation config, tokenizer and chat template to `output`.

    Where the model is `reshaped`, the config is the model's own: llm-compressor writes that of the checkpoint which the
    model was loaded from, with its number of blocks and heads, unless it cannot tell which one that was.
    """
    report("writing the checkpoint", 0, None)
    if reshaped:
        model.config.name_or_path = ""
    model.to(torch.bfloat16).save_pretrained(output, **how)
    tokenizer.save_pretrained(output)
    # llm-compressor's own record of itself; ours is the manifest.
    (output / "recipe.yaml").unlink(missing_ok=True)


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
