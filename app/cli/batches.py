"""`sluice batch`: files of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from app.cli.options import require_extra

BATCH_EXAMPLES = """
\b
Examples:
  sluice batch run requests.jsonl --output results.jsonl
  sluice batch run requests.jsonl --output results.jsonl --model smollm2:w8a8 --base-url http://gateway:8000/v1
"""


@click.group()
def batch() -> None:
    """Run many requests from a file, in the capacity that others leave over."""


@batch.command("run", epilog=BATCH_EXAMPLES)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Where the results go.")
@click.option("--base-url", envvar="OPENAI_BASE_URL", default="http://127.0.0.1:8000/v1", show_default=True)
@click.option("--api-key", envvar="OPENAI_API_KEY", default="none", help="[default: $OPENAI_API_KEY]")
@click.option("--model", help="Ask all lines of this model, whatever they say.")
@click.option("--window", default="24h", show_default=True, help="Time after which what is left is given up.")
def batch_run(source: Path, **given: Any) -> None:
    """Upload INPUT (OpenAI's batch format, JSON Lines), follow the batch, download the results.

    The same command goes on after Ctrl-C. Exit code 1 if any line failed; those are in OUTPUT's name with `.errors`.
    """
    with require_extra("up"):
        from rich.console import Console

        from app.batches.client import Order, run
    run(Order(source=source, **given), Console(stderr=True))
