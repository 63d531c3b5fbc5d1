"""The catalogue of recipes, and what a checkpoint on disk says of itself."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigurationError, LaunchError
from app.recipes.book import ALIASES, RECIPES, SHOWN_CHAINS, find_recipe
from app.recipes.progress import reporter
from app.recipes.recipe import Kind, Parameter, Recipe, Serving
from app.recipes.safetensors import read_facts
from app.settings import VARIANT_NAME


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_each_recipe_has_a_function_and_names_a_variant(recipe: Recipe) -> None:
    assert recipe.kind is Kind.COPY or importlib.util.find_spec(recipe.function.partition(":")[0])
    assert VARIANT_NAME.match(recipe.name)
    assert recipe.serving.engines
    assert bool(recipe.calibrates) == ("samples" in recipe.with_defaults({}) or recipe.kind is Kind.HEAL)


def test_names_are_unique() -> None:
    names = [*(recipe.name for recipe in RECIPES), *ALIASES]
    assert len(set(names)) == len(names)


def test_the_chains_that_are_shown_can_be_made() -> None:
    for name in SHOWN_CHAINS:
        assert VARIANT_NAME.match(name)
        find_recipe(name).require_fit("llama")


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"no recipe 'nope'; there are: dense, w8a8.*joined by"):
        find_recipe("depth26+nope")


def test_a_chain_is_its_recipes_in_order_and_an_alias_is_its_chain() -> None:
    assert [recipe.name for recipe in find_recipe("depth26+w8a8").recipes] == ["depth26", "w8a8"]
    alias = find_recipe("depth26-healed+w8a8")
    assert (alias.name, alias.expression) == ("depth26-healed+w8a8", "depth26+heal+w8a8")
    assert (alias.quantization, alias.calibrates) == ("w8a8", True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a8+depth26", "nothing can follow 'w8a8', which quantizes"),
        ("w8a8+w4a16", "nothing can follow 'w8a8', which quantizes"),
        ("dense+w8a8", "'dense' makes a whole variant"),
        ("depth26+depth26", "has 'depth26' twice"),
        ("heal", "nothing to heal before 'heal'"),
        ("depth26+", "no recipe ''"),
    ],
)
def test_recipes_that_cannot_follow_each_other_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_recipe(name)


def test_an_architecture_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(LaunchError, match="'moe4' does not fit the architecture 'qwen2'; it fits: llama, mistral"):
        find_recipe("depth26+moe4").require_fit("qwen2")
    with pytest.raises(LaunchError, match="'keep2' does not fit the architecture 'llama'; it fits: mixtral"):
        find_recipe("keep2").require_fit("llama")
    find_recipe("moe4+keep2").require_fit("llama")
    find_recipe("w8a8").require_fit("anything")


def test_int8_experts_are_for_gpus_only_and_the_engine_says_why() -> None:
    serving = find_recipe("moe4+w8a8").serving()
    assert serving.gpu_only
    assert "No Int8 MoE backend" in serving.reason
    assert find_recipe("w8a8").serving("mixtral").gpu_only
    assert find_recipe("w8a8").serving("llama") == Serving()


def test_room_counts_what_the_steps_before_have_grown() -> None:
    moe, w8a8 = (find_recipe(name) for name in ("moe4", "w8a8"))
    both = find_recipe("moe4+w8a8")
    assert both.memory == max(moe.memory, moe.size * w8a8.memory)
    assert both.size == pytest.approx(moe.size * w8a8.size)


def recipe(**given: Any) -> Recipe:
    return Recipe(name="tunable", summary="", function="", kind=Kind.PRUNE, memory=1.0, **given)


TUNABLE = recipe(
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


def test_a_named_recipe_has_other_defaults() -> None:
    other = TUNABLE.named("other", "", layers=7)
    assert other.with_defaults({})["layers"] == 7
    assert TUNABLE.with_defaults({})["layers"] == 4


def test_in_a_chain_a_parameter_goes_to_every_recipe_that_has_it() -> None:
    chain = find_recipe("depth26+heal+w8a8")
    found = chain.with_defaults({"tokens": "64", "steps": "2"})
    assert [found[name].get("tokens") for name in ("depth26", "heal", "w8a8")] == [64, 64, None]
    assert (found["heal"]["steps"], found["depth26"]["keep"]) == (2, 26)
    with pytest.raises(ConfigurationError, match="recipe 'depth26\\+w8a8' has no parameter 'steps'; it has: keep"):
        find_recipe("depth26+w8a8").with_defaults({"steps": "2"})


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


def test_packed_weights_count_as_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = {"q.weight_packed": [64, 8], "q.weight_scale": [64, 1], "q.weight_shape": [2]}
    write_safetensors(tmp_path / "a.safetensors", names)
    assert read_facts(tmp_path).parameters_count == 64 * 64


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
