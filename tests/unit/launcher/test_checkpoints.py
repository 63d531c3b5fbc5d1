"""What `--model` means, and what a directory of weights says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigurationError, LaunchError
from app.launcher.checkpoints import (
    BUNDLED_BASE,
    Base,
    find_made,
    find_root,
    guess_weights_bytes,
    read_checkpoint,
    resolve_base,
)
from app.launcher.home import Home
from app.manifest import Manifest


def write_checkpoint(directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(b"12345")
    return directory


def write_manifest(directory: Path, **fields: Any) -> None:
    known = {"model": "m", "variant": "w8a8", "base": "org/m", "recipe": "w8a8", "weights_bytes": 5}
    Manifest(**{**known, "parameters_count": 1, **fields}).write(directory)


def test_no_model_is_the_bundled_one() -> None:
    assert resolve_base(None, None) == resolve_base("smollm2", None) == Base("smollm2")
    assert resolve_base(None, "mine").model == "mine"


def test_a_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base("org/Model-1B", None) == Base("model-1b", hub_id="org/Model-1B")
    write_checkpoint(tmp_path / "org" / "Model-1B")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("org/Model-1B", None).path == tmp_path / "org" / "Model-1B"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("./nowhere", "no such checkpoint"),
        ("/no/where/at/all", "no such checkpoint"),
        ("word", "no such checkpoint"),
        ("{tmp}", "no config.json"),
        ("{tmp}/notes.txt", "neither a checkpoint directory nor a .gguf file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(given: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(LaunchError, match=message):
        resolve_base(given.format(tmp=tmp_path), None)


def test_a_name_that_clients_could_not_ask_for_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--name"):
        resolve_base(None, "a:b")


def test_a_manifest_names_model_and_variant(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "out", quantization_config={"quant_method": "compressed-tensors"})
    write_manifest(directory, quantization="w8a8")
    assert resolve_base(str(directory), None).model == "m"
    found = read_checkpoint(directory, "m")
    assert (found.public_name, found.quantization, found.weights_bytes) == ("m:w8a8", "w8a8", 5)


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({}, "dense"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": None}, "dense"),
    ],
)
def test_without_a_manifest_the_config_tells_the_variant(tmp_path: Path, config: Any, variant: str) -> None:
    found = read_checkpoint(write_checkpoint(tmp_path / "c", max_position_embeddings=512, **config), "m")
    assert found.variant == variant
    assert found.context_length == 512


def test_a_directory_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path / "c") / "model.safetensors").unlink()
    with pytest.raises(LaunchError, match="no weights"):
        read_checkpoint(tmp_path / "c", "m")


def test_what_was_made_is_found_again_and_belongs_to_its_base(tmp_path: Path) -> None:
    home, base = Home(tmp_path), Base("m", hub_id="org/m")
    assert find_made(home, base, "w8a8") is None
    write_manifest(write_checkpoint(home.checkpoint("m", "w8a8")))
    assert find_made(home, base, "w8a8") == read_checkpoint(home.checkpoint("m", "w8a8"), "m")
    with pytest.raises(LaunchError, match="choose another --name"):
        find_made(home, Base("m", hub_id="another/m"), "w8a8")


def test_the_root_of_a_base(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert find_root(home, Base("smollm2")) is None
    assert find_root(home, Base("m", hub_id="org/m")) is None
    local = write_checkpoint(tmp_path / "local")
    root = find_root(home, Base("m", path=local))
    assert root is not None
    assert root.directory == local
    write_manifest(write_checkpoint(home.checkpoint("m", "base")), variant="dense", recipe="dense")
    downloaded = find_root(home, Base("m", hub_id="org/m"))
    assert downloaded is not None
    assert downloaded.variant == "dense"


@pytest.mark.parametrize(
    ("hub_id", "expected"),
    [("Qwen/Qwen2.5-0.5B-Instruct", 1_000_000_000), ("a/b-135M", 270_000_000), ("a/mystery", 0), ("a/v2-base", 0)],
)
def test_a_size_is_guessed_from_a_hub_id(hub_id: str, expected: int) -> None:
    assert guess_weights_bytes(Base("m", hub_id=hub_id)) == expected


def test_sizes_of_other_bases(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"1234")
    assert guess_weights_bytes(Base("m", path=tmp_path / "m.gguf")) == 16
    assert guess_weights_bytes(Base("m", path=write_checkpoint(tmp_path / "c"))) == 5
    assert guess_weights_bytes(Base("smollm2")) > 10**8
    assert Base("smollm2").label == BUNDLED_BASE
