"""A manifest knows the weights that it is about."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app import settings
from app.catalogue import Catalogue
from app.errors import ConfigurationError
from app.launcher.checkpoints import read_checkpoint, share_weights
from app.manifest import MANIFEST_FILE, Manifest

SIZE = 3_000_000
WEIGHTS = "model.safetensors"


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    return made(tmp_path / "w8a8", os.urandom(SIZE))


def made(directory: Path, weights: bytes) -> Path:
    """A directory as a recipe leaves it."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / WEIGHTS).write_bytes(weights)
    manifest = Manifest(
        model="m", variant=directory.name, base="b", recipe="w8a8", weights_bytes=SIZE, parameters_count=1,
        weights=Manifest.weigh(directory),
    )  # fmt: skip
    manifest.write(directory)
    return directory


def configured(directory: Path) -> tuple[settings.Model, ...]:
    return (
        settings.Model(
            name="m",
            variants=(
                settings.Variant(
                    name="w8a8",
                    manifest=directory / MANIFEST_FILE,
                    workers=(settings.Worker(url="http://127.0.0.1:9001"),),
                ),
            ),
        ),
    )


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_weights_that_match_are_served(variant: Path) -> None:
    assert read_checkpoint(variant, "m").variant == "w8a8"
    assert Catalogue.of(configured(variant)).resolve("m:w8a8")


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other_of_the_same_shape(path: Path) -> None:
    overwrite(path, 200_000, os.urandom(SIZE - 200_000))


def other_header(path: Path) -> None:
    overwrite(path, 8, b"{}")


def one_more(path: Path) -> None:
    path.with_name("another.safetensors").write_bytes(b"more")


def renamed(path: Path) -> None:
    path.rename(path.with_name("another.safetensors"))


@pytest.mark.parametrize("change", [shorter, other_of_the_same_shape, other_header, one_more, renamed])
def test_other_weights_than_the_manifests_are_refused_by_gateway_and_launcher(variant: Path, change: object) -> None:
    assert callable(change)
    change(variant / WEIGHTS)
    with pytest.raises(ConfigurationError, match="does not match the weights beside it"):
        Catalogue.of(configured(variant))
    with pytest.raises(ConfigurationError, match="does not match the weights beside it"):
        read_checkpoint(variant, "m")


def test_a_manifest_alone_is_enough_for_a_gateway(variant: Path) -> None:
    (variant / WEIGHTS).unlink()
    assert Catalogue.of(configured(variant)).resolve("m:w8a8")


def test_a_manifest_of_an_older_release_names_no_weights_and_is_not_checked(variant: Path) -> None:
    path = variant / MANIFEST_FILE
    old = json.loads(path.read_text())
    for name in ("weights", "findings"):
        del old[name]
    path.write_text(json.dumps(old))
    shorter(variant / WEIGHTS)
    assert Catalogue.of(configured(variant)).resolve("m:w8a8")


def test_variants_of_equal_weights_keep_them_once(variant: Path) -> None:
    weights = (variant / WEIGHTS).read_bytes()
    twin, other = made(variant.with_name("top1"), weights), made(variant.with_name("other"), os.urandom(SIZE))
    share_weights(twin, variant.parent)
    share_weights(other, variant.parent)
    assert (twin / WEIGHTS).samefile(variant / WEIGHTS)
    assert not (other / WEIGHTS).samefile(variant / WEIGHTS)
    assert sorted(path.name for path in twin.iterdir()) == ["config.json", WEIGHTS, MANIFEST_FILE]


def test_weights_that_only_look_equal_are_kept_apart(variant: Path) -> None:
    """A fingerprint reads samples; a link needs every byte."""
    weights = bytearray((variant / WEIGHTS).read_bytes())
    weights[225_000] ^= 1  # between two samples
    twin = made(variant.with_name("twin"), bytes(weights))
    assert Manifest.weigh(twin) == Manifest.weigh(variant)
    share_weights(twin, variant.parent)
    assert not (twin / WEIGHTS).samefile(variant / WEIGHTS)
