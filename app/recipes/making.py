"""One run of a chain of recipes: from a base to a checkpoint with its manifest."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import LaunchError
from app.manifest import Manifest
from app.recipes.calibration import Calibration, read_calibration
from app.recipes.checkpoint import as_checkpoint, dequantize, load_model, load_tokenizer, save
from app.recipes.hub import download
from app.recipes.progress import Report
from app.recipes.recipe import Chain, Kind
from app.recipes.room import require_room
from app.recipes.safetensors import quantization_method, read_config, read_facts
from app.recipes.work import Work

LIBRARIES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "huggingface-hub", "gguf")


@dataclass(frozen=True, slots=True)
class Order:
    """What to make: `base` is a path or a hub id, `output` an empty directory, `parameters` are by recipe."""

    chain: Chain
    parameters: Mapping[str, dict[str, Any]]
    base: str
    base_name: str
    output: Path
    model: str
    variant: str
    calibration: Path | None = None


def make_variant(order: Order, report: Report) -> None:
    """Weights, then their manifest, into the output directory. Raises SluiceError."""
    if order.chain.recipes[0].kind is Kind.COPY:
        _copy(order.base, order.output, report)
        manifest = _manifest(order, None, {})
    else:
        manifest = _manifest(order, *_cook(order, report))
    manifest.write(order.output)


def _copy(base: str, output: Path, report: Report) -> None:
    """A hub repository is downloaded as it is, quantized or not; anything local is read and written in bfloat16."""
    path = Path(base)
    if not path.exists():
        download(base, output, report)
    elif path.is_file():
        dequantize(path, output, report)
    else:
        _require_plain(path)
        save(load_model(path, report), load_tokenizer(path, report), output, report)


def _cook(order: Order, report: Report) -> tuple[Calibration | None, dict[str, Any]]:
    """All that can be refused is refused before the weights are read."""
    chain = order.chain
    if chain.needs_accelerator and not torch.accelerator.is_available():
        raise LaunchError(
            f"recipe {chain.name!r} needs an accelerator and this machine has none: llm-compressor's cache of "
            'activations pins memory ("Cannot access accelerator device when none is available.")'
        )
    calibration = read_calibration(order.calibration)
    with as_checkpoint(order.base, report) as checkpoint:
        chain.require_fit(_require_plain(checkpoint))
        require_room(chain, read_facts(checkpoint), order.output)
        torch.manual_seed(0)
        tokenizer = load_tokenizer(checkpoint, report)
        work = Work(load_model(checkpoint, report), tokenizer, checkpoint, calibration, report)
        findings = {recipe.name: _function(recipe.function)(work, order.parameters[recipe.name])
                    for recipe in chain.recipes}  # fmt: skip
        save(
            work.model,
            work.tokenizer,
            order.output,
            report,
            reshaped=chain.reshapes,
            **({"save_compressed": True} if chain.quantization else {}),
        )
    return calibration if chain.calibrates else None, {name: found for name, found in findings.items() if found}


def _require_plain(checkpoint: Path) -> str:
    """The model type of a checkpoint. Raises LaunchError where it is quantized already."""
    config = read_config(checkpoint)
    if method := quantization_method(config):
        raise LaunchError(f"{checkpoint.name} is quantized already ({method}); recipes start from plain weights")
    return str(config.get("model_type", "unknown"))


def _function(text: str) -> Any:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def _manifest(order: Order, calibration: Calibration | None, findings: Mapping[str, Any]) -> Manifest:
    facts = read_facts(order.output)
    quantization = order.chain.quantization or facts.quantization
    alone = len(order.chain.recipes) == 1
    return Manifest(
        model=order.model,
        # A repository that is quantized as it comes is no dense variant, whatever it was asked for as.
        variant=order.variant if order.chain.quantization else facts.quantization or order.variant,
        base=order.base_name,
        recipe=order.chain.expression,
        parameters=next(iter(order.parameters.values())) if alone else dict(order.parameters),
        findings=next(iter(findings.values()), {}) if alone else dict(findings),
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        weights_bytes=facts.weights_bytes,
        weights=Manifest.weigh(order.output),
        parameters_count=facts.parameters_count,
        quantization=quantization,
        context_length=facts.context_length,
        calibration_sha256=calibration.sha256 if calibration else None,
    )
