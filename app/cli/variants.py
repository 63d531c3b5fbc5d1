"""`sluice compress` and `sluice evaluate`: variants made and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app.cli.options import home_at, home_option, require_extra
from app.cli.serving import engine_named
from app.errors import ConfigurationError

if TYPE_CHECKING:
    from app.launcher.home import Home
    from app.settings import QualityGate

COMPRESS_EXAMPLES = """
\b
Examples:
  sluice compress --list
  sluice compress smollm2 --recipe w8a8 --output ./smollm2-w8a8
  sluice compress smollm2 --recipe depth+heal+w8a8 --parameter drop=6 --output ./smollm2-small
  sluice compress ORG/MODEL --recipe w4a16 --calibration ./texts.jsonl --output ./model-w4a16
"""
EVALUATE_EXAMPLES = """
\b
Examples:
  sluice evaluate smollm2 --output ./cards                 all its variants; the page is ./cards/variants.md
  sluice evaluate smollm2 --variants w8a8 --only speed     measure speed anew, keep the quality
  sluice evaluate ./made --report --output ./cards         only the page, from cards that are there
"""


@click.command(epilog=COMPRESS_EXAMPLES)
@click.argument("model", required=False)
@click.option("--recipe", "recipe_name", metavar="NAME", help="How, or several joined by +; `--list` shows them.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
              help="Text to measure on: plain, or .jsonl with `text` or `messages`.  [default: ours]")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Directory to write; must not exist or be empty.")
@click.option("--name", help="Public name of the model.  [default: made from MODEL]")
@click.option("--variant", help="Name of the variant.  [default: the recipe's]")
@click.option("--parameter", "--set", "settings", metavar="NAME=VALUE", multiple=True,
              help="A parameter of the recipe. Repeatable.")  # fmt: skip
@click.option("--list", "show", is_flag=True, help="Show the recipes and their parameters.")
@home_option
def compress(home: Path | None, show: bool, **given: Any) -> None:
    """Make a variant of MODEL: a hub id, a checkpoint directory, a .gguf file, or smollm2."""
    if show:
        list_recipes()
        return
    if missing := next((name for name in ("model", "recipe_name", "output") if not given[name]), None):
        wanted = {"model": "MODEL", "recipe_name": "--recipe NAME", "output": "--output DIR"}[missing]
        raise click.UsageError(f"{wanted} is missing.")
    run_recipe(home_at(home), **given)


def list_recipes() -> None:
    with require_extra("up"):
        from rich.console import Console
    from app.recipes.listing import tables

    console = Console()
    for table in tables():
        console.print(table)


def run_recipe(
    home: Home,
    *,
    model: str,
    recipe_name: str,
    output: Path,
    name: str | None,
    variant: str | None,
    settings: tuple[str, ...],
    calibration: Path | None,
) -> None:
    with require_extra("up"):
        from rich.console import Console

        from app.launcher.checkpoints import resolve_base
        from app.launcher.preparation import Order, compress_into
        from app.launcher.progress import Steps
    from app.recipes.book import find_recipe
    from app.recipes.calibration import read_calibration

    recipe = find_recipe(recipe_name)
    parameters = recipe.with_defaults(dict(assignment(text) for text in settings))
    if calibration:
        if not recipe.calibrates:
            raise ConfigurationError(f"--calibration: recipe {recipe.name!r} needs no text")
        read_calibration(calibration)
    order = Order(
        base=resolve_base(model, name),
        recipe=recipe.name,
        variant=variant or recipe.name,
        parameters=parameters,
        calibration=calibration.absolute() if calibration else None,
    )
    compress_into(output.absolute(), order, home, Steps(Console(stderr=True)))
    click.echo(output)


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigurationError(f"--parameter {text}: expected NAME=VALUE")
    return name, value


@click.command(epilog=EVALUATE_EXAMPLES)
@click.argument("model")
@click.option("--variants", metavar="A,B", default="", help="Which to measure, beside dense.  [default: all there are]")
@click.option("--output", type=click.Path(path_type=Path), help="Directory for the page: variants.md, .html, .svg.")
@click.option("--report", is_flag=True, help="Measure nothing: write the page from cards that are there.")
@click.option("--only", type=click.Choice(["quality", "speed"]), help="Measure this anew, keep the rest of each card.")
@click.option("--texts", type=click.Path(path_type=Path), help="Text to compare on (JSON Lines with a `text`).")
@click.option(
    "--items", type=click.IntRange(0, 1000), default=40, show_default=True, help="Of each task; 0 for no tasks."
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of items and resampling.")
@click.option(
    "--price-per-hour", type=click.FloatRange(min=0), default=0.1, show_default=True, help="Of the machine, USD."
)
@click.option("--config", type=click.Path(path_type=Path), help="Configuration whose quality_gate of MODEL applies.")
@click.option("--engine", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@home_option
def evaluate(
    home: Path | None, model: str, variants: str, engine: str, config: Path | None, output: Path | None, **given: Any
) -> None:
    """Measure the variants of MODEL (a name, or a directory of variants) and write their cards into their manifests."""
    with require_extra("up"):
        from rich.console import Console

        from app.evaluation.evaluate import Order
        from app.evaluation.evaluate import evaluate as run_evaluation
        from app.launcher.progress import Steps
    order = Order(
        home=home_at(home), model=model, variants=listed(variants), output=output.absolute() if output else None,
        engine=engine_named(engine), thresholds=quality_gate(config, model), **given,
    )  # fmt: skip
    if page := run_evaluation(order, Steps(Console(stderr=True))):
        click.echo(page)


def quality_gate(config: Path | None, model: str) -> QualityGate:
    """The configured thresholds of `model`. Raises ConfigurationError where it is not configured."""
    from app.settings import QualityGate, load_settings

    if config is None:
        return QualityGate()
    settings = load_settings(config)
    found = next((one.quality_gate for one in settings.models if one.name == model), None)
    if found is None:
        raise ConfigurationError(f"{config}: models: {model!r} is not among them")
    return found


def listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
