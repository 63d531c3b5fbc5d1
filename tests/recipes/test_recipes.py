"""Every recipe, once, on a tiny random Llama: what each promises holds, and its manifest tells the truth."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app.launcher.home import Home
from app.recipes.book import find_recipe
from app.recipes.calibration import read_calibration
from tests.recipes.names import BLOCKS, CHANNELS, RECIPES

# They need the recipes environment, which `make test` prepares.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
Facts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What `tests.recipes.tiny` printed, by name; all in one process, because its imports take longer than its work."""
    python = Home.at(None, os.environ).environment("recipes") / "bin" / "python"
    assert python.exists(), f"no recipes environment at {python}: run `make up` once"
    command = [str(python), "-m", "tests.recipes.tiny", str(tmp_path_factory.mktemp("tiny"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return {record.pop("name"): record for record in map(json.loads, run.stdout.splitlines())}


@pytest.fixture(scope="module")
def calibration_sha256() -> str:
    return read_calibration(None).sha256


@pytest.mark.parametrize("name", RECIPES)
def test_the_manifest_says_how_it_was_made(facts: Facts, calibration_sha256: str, name: str) -> None:
    manifest, chain = facts[name]["manifest"], find_recipe(name)
    assert (manifest["variant"], manifest["recipe"], manifest["base"]) == (name, chain.expression, "tiny")
    assert manifest["quantization"] == chain.quantization
    assert manifest["calibration_sha256"] == (calibration_sha256 if chain.calibrates else None)
    assert manifest["libraries"]["llmcompressor"]
    assert sum(file["size_bytes"] for file in manifest["weights"].values()) == manifest["weights_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "doing"),
    [("w4a16", "quantizing to INT4"), ("mixed", "quantizing by block"), ("sparse", "zeroing weights")],
)
def test_progress_goes_block_by_block(facts: Facts, name: str, doing: str) -> None:
    assert facts[name]["reported"][doing] == [BLOCKS, BLOCKS]


@pytest.mark.parametrize("name", ["moe4", "moe4-keep2", "moe4-top1"])
def test_copied_experts_answer_exactly_as_the_dense_model(facts: Facts, name: str) -> None:
    """Up to float32's rounding, on logits of a size of about ten."""
    assert facts[name]["distance"] < 1e-3
    assert facts[name]["config"]["model_type"] == "mixtral"


def test_the_router_is_used(facts: Facts) -> None:
    for shares in facts["moe4"]["manifest"]["findings"]["first_choices"]:
        assert sum(shares) == pytest.approx(1, abs=0.01)
        assert sum(share > 0.02 for share in shares) >= 2


def test_experts_are_cut_and_tiers_are_told_in_the_config(facts: Facts) -> None:
    whole, half, one = (facts[name]["config"] for name in ("moe4", "moe4-keep2", "moe4-top1"))
    assert [config["num_local_experts"] for config in (whole, half, one)] == [4, 2, 4]
    assert [config["num_experts_per_tok"] for config in (whole, half, one)] == [2, 2, 1]
    assert facts["moe4-keep2"]["manifest"]["weights_bytes"] < 0.7 * facts["moe4"]["manifest"]["weights_bytes"]
    assert facts["moe4-top1"]["manifest"]["weights"] == facts["moe4"]["manifest"]["weights"]


def test_the_same_seed_gives_the_same_weights(facts: Facts) -> None:
    assert facts["again"]["manifest"]["weights"] == facts["moe4"]["manifest"]["weights"]


def test_parted_experts_are_smaller_and_near_the_dense_model(facts: Facts) -> None:
    assert facts["partitioned"]["config"]["intermediate_size"] == CHANNELS // 4
    assert 0 < facts["partitioned"]["divergence"] < 10


def test_depth_drops_one_block_and_keeps_the_first_and_the_last(facts: Facts) -> None:
    blocks = facts["depth"]["blocks"]
    findings = facts["depth"]["manifest"]["findings"]
    assert (blocks[0], blocks[-1], len(blocks)) == (0, BLOCKS - 1, BLOCKS - 1)
    assert set(range(BLOCKS)) - set(blocks) == set(findings["dropped"])
    inner = findings["influence"][1:-1]
    assert findings["dropped"] == [1 + inner.index(min(inner))]


def test_healing_comes_nearer_to_the_dense_model(facts: Facts) -> None:
    losses = facts["depth+heal"]["manifest"]["findings"]["heal"]["divergence"]
    assert max(losses[-2:]) < losses[0]


def test_width_is_uniform_and_a_multiple(facts: Facts) -> None:
    assert facts["width"]["config"]["intermediate_size"] == CHANNELS // 2
    assert len(facts["width"]["manifest"]["findings"]["importance_lost"]) == BLOCKS
    assert facts["refit"]["fitted"] < 0.1 * facts["refit"]["cut"]


def test_query_heads_go_evenly_and_the_config_tells_their_size(facts: Facts) -> None:
    config, findings = facts["heads"]["config"], facts["heads"]["manifest"]["findings"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (findings["heads"], findings["of"]) == (4, 8)
    assert [[head // 4 for head in kept] for kept in findings["kept"]] == [[0, 0, 1, 1]] * BLOCKS
    assert all(0 < share < 0.5 for share in findings["importance_lost"])
    assert facts["unfitted"]["manifest"]["findings"] == findings
    assert facts["unfitted"]["divergence"] != facts["heads"]["divergence"] > 0


def test_whole_groups_take_their_keys_and_values_with_them(facts: Facts) -> None:
    config = facts["groups"]["config"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 1, 8)
    for kept in facts["groups"]["manifest"]["findings"]["kept"]:
        assert kept in ([0, 1, 2, 3], [4, 5, 6, 7])


def test_the_importance_of_a_head_is_what_it_adds_to_the_output(facts: Facts) -> None:
    assert facts["importance"]["found"] == pytest.approx(facts["importance"]["run"], rel=1e-4)


def test_heads_and_channels_go_together(facts: Facts) -> None:
    config = facts["heads+width"]["config"]
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, CHANNELS // 2)


@pytest.mark.parametrize("name", ["sparse", "sparse24"])
def test_half_of_the_weights_are_zeros_and_the_manifest_says_what_that_is_worth(facts: Facts, name: str) -> None:
    findings = facts[name]["manifest"]["findings"]
    assert findings["zeros"] == pytest.approx(0.5, abs=0.02)
    assert findings["served_as"] == "dense"
    assert "quantization_config" not in facts[name]["config"]


@pytest.mark.parametrize(
    ("name", "bits", "kind"),
    [("w8a8", 8, "int"), ("w8a8-gptq", 8, "int"), ("w4a16", 4, "int"), ("fp8", 8, "float"), ("depth+w8a8", 8, "int")],
)
def test_quantized_weights_have_the_format_that_they_claim(facts: Facts, name: str, bits: int, kind: str) -> None:
    config = facts[name]["config"]["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (config["quant_method"], weights["num_bits"], weights["type"]) == ("compressed-tensors", bits, kind)
    assert facts[name]["manifest"]["weights_bytes"] < facts["depth+heal"]["manifest"]["weights_bytes"]


def test_what_is_quantized_after_pruning_has_the_shape_of_what_was_pruned(facts: Facts) -> None:
    assert facts["depth+w8a8"]["config"]["num_hidden_layers"] == BLOCKS - 1
    assert facts["moe4+w8a8"]["config"]["model_type"] == "mixtral"
    assert facts["w8a8"]["config"]["num_hidden_layers"] == BLOCKS


def test_the_cache_gets_scales(facts: Facts) -> None:
    assert facts["fp8-kv"]["config"]["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


def test_the_sensitive_blocks_get_eight_bits(facts: Facts) -> None:
    findings = facts["mixed"]["manifest"]["findings"]
    assert findings["eight_bits"] == [findings["sensitivity"].index(max(findings["sensitivity"]))]
    groups = facts["mixed"]["config"]["quantization_config"]["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in groups) == [4, 8]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quantized", "w8a8 is quantized already (compressed-tensors)"),
        ("misfit", "recipe 'moe4' does not fit the architecture 'mixtral'; it fits: llama, mistral"),
        ("deep", f"a model of {BLOCKS} blocks cannot be pruned to 26"),
        ("huge", "not enough memory: recipe 'w8a8' needs about"),
        ("odd", "a llama of width 64 cannot have 6 heads, only a number that divides it"),
        ("long", "one sample alone needs 6000"),
    ],
)
def test_what_cannot_be_made_is_one_clear_error(facts: Facts, name: str, message: str) -> None:
    assert message in facts[name]["refused"]


def test_awq_without_an_accelerator_is_refused_with_the_reason(facts: Facts) -> None:
    if not facts["w4a16-awq"]["refused"]:
        pytest.skip("this machine has an accelerator")
    assert "needs an accelerator and this machine has none" in facts["w4a16-awq"]["refused"]


def test_directions_find_clusters_whatever_their_lengths(facts: Facts) -> None:
    found = facts["clusters"]
    assert (found["pure"], found["distinct"], found["repeats"], found["of_one_point"]) == (True, 3, True, True)
    assert found["sizes"] == [50] * 4
