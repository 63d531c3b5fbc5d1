"""What a recipe is, as data, and how several make one chain. Imports nothing heavy, reads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from app.errors import ConfigurationError, LaunchError

MIXTURES = ("mixtral",)
EVERYWHERE = ("cpu", "cuda")


class Kind(StrEnum):
    """What a recipe does to a model; nothing can follow a quantization."""

    COPY = "copy"
    PRUNE = "prune"
    MIXTURE = "mixture of experts"
    HEAL = "heal"
    QUANTIZE = "quantize"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One knob of a recipe; a value given for it has the type of its default."""

    name: str
    default: Any
    meaning: str


@dataclass(frozen=True, slots=True)
class Serving:
    """Which builds of vLLM serve the result, and why the others do not: the engine's own words where it has any."""

    engines: tuple[str, ...] = EVERYWHERE
    reason: str = ""

    @property
    def gpu_only(self) -> bool:
        return "cpu" not in self.engines


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to change a model.

    `function` names a function `module:name` that takes a `app.recipes.work.Work` and this recipe's parameters,
    changes the work's model, and returns what it measured and decided, for the manifest. `quantization` is the scheme
    of the weights it makes, None where they stay as they are. `fits` are transformers' model types that it takes, none
    for all; `makes` is the model type of its result, None for the same. `memory` and `size` are the peak of resident
    memory and the size of the result, in multiples of the base's weights in bfloat16. `serving_mixture` holds where a
    mixture of experts is served differently.
    """

    name: str
    summary: str
    function: str
    kind: Kind
    memory: float
    size: float = 1.0
    quantization: str | None = None
    fits: tuple[str, ...] = ()
    makes: str | None = None
    calibrates: bool = False
    needs_accelerator: bool = False
    serving: Serving = Serving()
    serving_mixture: Serving | None = None
    parameters: tuple[Parameter, ...] = ()

    def named(self, name: str, summary: str, **defaults: Any) -> Recipe:
        """The same recipe under another name, with other defaults."""
        changed = tuple(replace(one, default=defaults.get(one.name, one.default)) for one in self.parameters)
        return replace(self, name=name, summary=summary, parameters=changed)

    def with_defaults(self, given: Mapping[str, str]) -> dict[str, Any]:
        """All parameters, the given ones read as JSON or as text. Raises ConfigurationError for an unknown one."""
        _require_known(given, self.name, [parameter.name for parameter in self.parameters])
        return {parameter.name: _value(parameter, given.get(parameter.name)) for parameter in self.parameters}


@dataclass(frozen=True, slots=True)
class Chain:
    """Recipes that are applied one after the other: `depth26+w8a8`. `name` is what was asked for, perhaps an alias."""

    name: str
    recipes: tuple[Recipe, ...]

    @classmethod
    def of(cls, name: str, recipes: tuple[Recipe, ...]) -> Chain:
        """Raises ConfigurationError for recipes that cannot follow each other."""
        names = [recipe.name for recipe in recipes]
        for twice in (one for one in names if names.count(one) > 1):
            raise ConfigurationError(f"recipe {name!r} has {twice!r} twice")
        if len(recipes) > 1 and any(recipe.kind is Kind.COPY for recipe in recipes):
            raise ConfigurationError(f"recipe {name!r}: {names[0]!r} makes a whole variant and goes with no other")
        for recipe in recipes[:-1]:
            if recipe.kind is Kind.QUANTIZE:
                raise ConfigurationError(f"recipe {name!r}: nothing can follow {recipe.name!r}, which quantizes")
        if recipes[0].kind is Kind.HEAL:
            raise ConfigurationError(f"recipe {name!r}: there is nothing to heal before {recipes[0].name!r}")
        return cls(name, recipes)

    @property
    def expression(self) -> str:
        """The names of the recipes, without aliases."""
        return "+".join(recipe.name for recipe in self.recipes)

    @property
    def quantization(self) -> str | None:
        return self.recipes[-1].quantization

    @property
    def reshapes(self) -> bool:
        """Whether the result may have another architecture or other dimensions than the base."""
        return any(recipe.kind in {Kind.PRUNE, Kind.MIXTURE} for recipe in self.recipes)

    @property
    def calibrates(self) -> bool:
        return any(recipe.calibrates for recipe in self.recipes)

    @property
    def needs_accelerator(self) -> bool:
        return any(recipe.needs_accelerator for recipe in self.recipes)

    @property
    def memory(self) -> float:
        """The peak of resident memory, in multiples of the base's weights: that of the greediest step."""
        peak, size = 0.0, 1.0
        for recipe in self.recipes:
            peak, size = max(peak, recipe.memory * max(size, 1.0)), size * recipe.size
        return peak

    @property
    def size(self) -> float:
        size = 1.0
        for recipe in self.recipes:
            size *= recipe.size
        return size

    def serving(self, model_type: str | None = None) -> Serving:
        """Which engines serve the result of this chain, from a base of `model_type`."""
        for recipe in self.recipes:
            model_type = recipe.makes or model_type
        mixture = model_type in MIXTURES
        limits = [
            recipe.serving_mixture if mixture and recipe.serving_mixture else recipe.serving for recipe in self.recipes
        ]
        engines = tuple(engine for engine in EVERYWHERE if all(engine in limit.engines for limit in limits))
        return Serving(engines, "; ".join(dict.fromkeys(limit.reason for limit in limits if limit.reason)))

    def require_fit(self, model_type: str) -> None:
        """Raises LaunchError where a recipe does not take the architecture that the ones before it leave."""
        for recipe in self.recipes:
            if recipe.fits and model_type not in recipe.fits:
                raise LaunchError(
                    f"recipe {recipe.name!r} does not fit the architecture {model_type!r}; "
                    f"it fits: {', '.join(recipe.fits)}"
                )
            model_type = recipe.makes or model_type

    def with_defaults(self, given: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Parameters by recipe; a given one goes to every recipe that has it.

        Raises ConfigurationError for one that none has, or with a value of another type.
        """
        _require_known(given, self.name, [one.name for recipe in self.recipes for one in recipe.parameters])
        return {
            recipe.name: recipe.with_defaults(
                {one.name: given[one.name] for one in recipe.parameters if one.name in given}
            )
            for recipe in self.recipes
        }


def _require_known(given: Mapping[str, str], name: str, known: list[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        has = ", ".join(dict.fromkeys(known)) or "none"
        raise ConfigurationError(f"recipe {name!r} has no parameter {unknown[0]!r}; it has: {has}")


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
