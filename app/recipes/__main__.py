"""`python -m app.recipes RECIPE --base BASE --output DIR …`: makes one variant, inside the recipes environment.

Standard output carries progress (see `app.recipes.progress`), standard error whatever the libraries say.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from app.catalogue import Manifest
from app.errors import SluiceError
from app.recipes.progress import Report, reporter
from app.recipes.recipe import Recipe, find_recipe
from app.recipes.safetensors import read_facts

LIBRARIES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "huggingface-hub", "gguf")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    # The libraries print to standard output here and there; only our lines belong on the real one.
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        make_variant(options, reporter(progress))
    except SluiceError as error:
        print(json.dumps({"error": str(error)}), file=progress, flush=True)
        return 1
    return 0


def make_variant(options: argparse.Namespace, report: Report) -> None:
    """Weights, then their manifest, into a directory that exists and is empty. Raises SluiceError."""
    recipe = find_recipe(options.recipe)
    parameters: dict[str, Any] = recipe.with_defaults({}) | json.loads(options.parameters)
    report("loading the libraries", 0, None)
    importlib.import_module(recipe.module).make(options.base, options.output, parameters, report)
    _manifest(recipe, parameters, options).write(options.output)


def _manifest(recipe: Recipe, parameters: dict[str, Any], options: argparse.Namespace) -> Manifest:
    facts = read_facts(options.output)
    return Manifest(
        model=options.model,
        # A repository that is quantized as it comes is no dense variant, whatever it was asked for as.
        variant=options.variant if recipe.quantization else facts.quantization or options.variant,
        base=options.base_name or Path(options.base).name,
        recipe=recipe.name,
        parameters=parameters,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        weights_bytes=facts.weights_bytes,
        parameters_count=facts.parameters_count,
        quantization=recipe.quantization or facts.quantization,
        context_length=facts.context_length,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.recipes")
    parser.add_argument("recipe")
    parser.add_argument("--base", required=True, help="a directory, a .gguf file or a hub id")
    parser.add_argument("--base-name", help="what the manifest calls the base")
    parser.add_argument("--output", required=True, type=Path, help="an existing, empty directory")
    parser.add_argument("--model", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--parameters", default="{}", help="JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
