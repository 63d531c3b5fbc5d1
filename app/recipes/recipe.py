"""The catalogue of recipes, as data: what each does, what it takes, who can serve the result. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Parameter:
    """One knob of a recipe; a value given for it has the type of its default."""

    name: str
    default: Any
    meaning: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to make a variant.

    `module` has a function `make(base, output, parameters, report)`: `base` is a path or a hub id as text, `output` an
    empty directory, `report` tells how far it is (`app.recipes.progress.Report`); it raises LaunchError.
    `quantization` is the scheme of the weights it writes, None for plain ones. `engines` are the builds of vLLM that
    have kernels for the result.
    """

    name: str
    summary: str
    module: str
    engines: tuple[str, ...]
    quantization: str | None = None
    parameters: tuple[Parameter, ...] = ()

    def with_defaults(self, given: Mapping[str, str]) -> dict[str, Any]:
        """All parameters, the given ones read as JSON or as text. Raises ConfigurationError for an unknown one."""
        known = {parameter.name: parameter for parameter in self.parameters}
        if unknown := sorted(set(given) - set(known)):
            has = ", ".join(known) or "none"
            raise ConfigurationError(f"recipe {self.name!r} has no parameter {unknown[0]!r}; it has: {has}")
        return {name: _value(known[name], given.get(name)) for name in known}


def _value(parameter: Parameter, text: str | None) -> Any:
    if text is None:
        return parameter.default
    if isinstance(parameter.default, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    kind = type(parameter.default)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigurationError(f"parameter {parameter.name!r} takes a value of type {kind.__name__}, not {text!r}")
    return value


RECIPES = (
    Recipe(
        name="dense",
        summary="The base itself as bfloat16 safetensors: a GGUF file is dequantized, a hub repository downloaded.",
        module="app.recipes.dense",
        engines=("cpu", "cuda"),
    ),
    Recipe(
        name="w8a8",
        summary="INT8 weights, one scale per channel, round to nearest; activations INT8 per token. Needs no data.",
        module="app.recipes.w8a8",
        engines=("cpu", "cuda"),
        quantization="w8a8",
        parameters=(Parameter("ignore", ["lm_head"], "layers that stay as they are, names or re:EXPRESSION"),),
    ),
)


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ConfigurationError that lists the known ones."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise ConfigurationError(f"no recipe {name!r}; there are: {', '.join(recipe.name for recipe in RECIPES)}")
