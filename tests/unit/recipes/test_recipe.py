"""The catalogue of recipes, and what a checkpoint on disk says of itself."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigurationError, LaunchError
from app.recipes.progress import reporter
from app.recipes.recipe import RECIPES, Parameter, Recipe, find_recipe
from app.recipes.safetensors import read_facts
from app.settings import VARIANT_NAME


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_each_recipe_has_a_module_and_names_a_variant(recipe: Recipe) -> None:
    assert importlib.util.find_spec(recipe.module)
    assert VARIANT_NAME.match(recipe.name)
    assert recipe.engines


def test_names_are_unique() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="no recipe 'nope'; there are: dense, w8a8"):
        find_recipe("nope")


TUNABLE = Recipe(
    "tunable",
    "",
    "app.recipes.dense",
    ("cpu",),
    parameters=(
        Parameter("ignore", ["lm_head"], ""),
        Parameter("layers", 4, ""),
        Parameter("ratio", 0.5, ""),
        Parameter("scheme", "W8A8", ""),
        Parameter("heal", False, ""),
    ),
)


def test_parameters_have_defaults_and_take_the_type_of_their_default() -> None:
    given = {"layers": "8", "ratio": "0.25", "scheme": "8", "ignore": '["a", "b"]', "heal": "true"}
    expected = {"layers": 8, "ratio": 0.25, "scheme": "8", "ignore": ["a", "b"], "heal": True}
    assert TUNABLE.with_defaults(given) == expected
    assert TUNABLE.with_defaults({})["layers"] == 4
    assert TUNABLE.with_defaults({"ratio": "1"})["ratio"] == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nope": "1"}, "no parameter 'nope'; it has: ignore, layers"),
        ({"layers": "many"}, "'layers' takes a value of type int"),
        ({"layers": "true"}, "'layers' takes a value of type int"),
        ({"heal": "1"}, "'heal' takes a value of type bool"),
        ({"ignore": "lm_head"}, "'ignore' takes a value of type list"),
    ],
)
def test_wrong_parameters_are_one_clear_error(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TUNABLE.with_defaults(given)


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, Any] = {name: {"dtype": "I8", "shape": shape} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"data")


def test_facts_are_read_from_the_headers(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 512, "quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "a.safetensors", {"q.weight": [4, 8], "q.weight_scale": [4, 1]})
    write_safetensors(tmp_path / "b.safetensors", {"norm.weight": [8], "empty": []})
    facts = read_facts(tmp_path)
    assert facts.parameters_count == 4 * 8 + 8 + 1
    assert facts.weights_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert (facts.quantization, facts.context_length) == ("compressed-tensors", 512)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no config.json"),
        ({"config.json": b"{"}, "not JSON"),
        ({"config.json": b"[]"}, "an object is expected"),
        ({"config.json": b"{}"}, "no .safetensors weights"),
        ({"config.json": b"{}", "a.safetensors": b"\xff" * 64}, "not a safetensors file"),
        ({"config.json": b"{}", "a.safetensors": b"\x04" + b"\0" * 7 + b"nope"}, "not a safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_one_clear_error(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LaunchError, match=message):
        read_facts(tmp_path)


def test_progress_is_one_object_per_line() -> None:
    stream = io.StringIO()
    reporter(stream)("quantizing", 1, 2)
    assert json.loads(stream.getvalue()) == {"doing": "quantizing", "completed": 1, "total": 2}
