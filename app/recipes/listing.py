"""The catalogue as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from app.recipes.book import ALIASES, RECIPES, SHOWN_CHAINS, find_recipe
from app.recipes.recipe import Chain, Recipe


def tables() -> Iterator[Table]:
    """The recipes and chains, then their parameters."""
    table = Table("Recipe", "What it does", "Needs", "Served by", title="Recipes; join several with +", show_lines=True)
    for chain in (*(Chain(recipe.name, (recipe,)) for recipe in RECIPES), *map(find_recipe, SHOWN_CHAINS)):
        table.add_row(chain.name, _summary(chain), _needs(chain), _served_by(chain))
    yield table
    table = Table("Recipe", "--parameter", "Meaning", title="Parameters and their defaults")
    for recipe in RECIPES:
        for parameter in recipe.parameters:
            table.add_row(recipe.name, f"{parameter.name}={parameter.default}", parameter.meaning)
        table.add_section()
    yield table


def _summary(chain: Chain) -> str:
    if len(chain.recipes) == 1:
        return chain.recipes[0].summary
    return f"{ALIASES[chain.name]} under a shorter name." if chain.name in ALIASES else "An example of a chain."


def _needs(chain: Chain) -> str:
    needs = ["a calibration text"] if chain.calibrates else []
    needs += ["an accelerator"] if chain.needs_accelerator else []
    needs.append(f"memory: {chain.memory:g} x the weights")
    needs += [f"one of: {', '.join(fits)}" for fits in _fits(chain.recipes)]
    return "\n".join(needs)


def _fits(recipes: tuple[Recipe, ...]) -> list[tuple[str, ...]]:
    return [recipes[0].fits] if recipes[0].fits else []


def _served_by(chain: Chain) -> str:
    serving = chain.serving()
    engines = "GPU only" if serving.gpu_only else ", ".join(serving.engines)
    return f"{engines}: {serving.reason}" if serving.reason else engines
