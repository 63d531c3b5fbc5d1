"""`python -m app.recipes RECIPE --base BASE --output DIR …`: makes one variant, inside the recipes environment.

Standard output carries progress (see `app.recipes.progress`), standard error whatever the libraries say.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from app.errors import SluiceError
from app.recipes.book import find_recipe
from app.recipes.progress import Report, reporter


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    # The libraries print to standard output here and there; only our lines belong on the real one.
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        _make(options, reporter(progress))
    except SluiceError as error:
        print(json.dumps({"error": str(error)}), file=progress, flush=True)
        return 1
    return 0


def _make(options: argparse.Namespace, report: Report) -> None:
    report("loading the libraries", 0, None)
    from app.recipes.making import Order, make_variant

    chain = find_recipe(options.recipe)
    given = json.loads(options.parameters)
    order = Order(
        chain=chain,
        parameters={name: values | given.get(name, {}) for name, values in chain.with_defaults({}).items()},
        base=options.base,
        base_name=options.base_name or Path(options.base).name,
        output=options.output,
        model=options.model,
        variant=options.variant,
        calibration=options.calibration,
    )
    make_variant(order, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.recipes")
    parser.add_argument("recipe")
    parser.add_argument("--base", required=True, help="a directory, a .gguf file or a hub id")
    parser.add_argument("--base-name", help="what the manifest calls the base")
    parser.add_argument("--output", required=True, type=Path, help="an existing, empty directory")
    parser.add_argument("--model", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--parameters", default="{}", help="JSON object: recipe name to its parameters")
    parser.add_argument("--calibration", type=Path, help="a text file")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
