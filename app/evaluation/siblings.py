"""The variants of one model on this machine, and whether their manifests are true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.card import Card
from app.errors import ConfigurationError
from app.launcher.checkpoints import DENSE
from app.launcher.home import Home
from app.manifest import MANIFEST_FILE, Manifest
from app.recipes.safetensors import read_facts


@dataclass(frozen=True, slots=True)
class Sibling:
    """One variant: its checkpoint's directory, and the manifest in there."""

    directory: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.variant

    @property
    def public_name(self) -> str:
        return f"{self.manifest.model}:{self.manifest.variant}"

    @property
    def is_dense(self) -> bool:
        return self.name == DENSE

    def with_card(self, card: Card) -> Sibling:
        """Writes the card beside the weights, in place of an earlier one."""
        manifest = self.manifest.model_copy(update={"card": card})
        manifest.write(self.directory)
        return replace(self, manifest=manifest)


def find_siblings(home: Home, model: str, wanted: Sequence[str]) -> list[Sibling]:
    """The variants called `wanted` (none: all), the dense one first; `model` is a public name or a directory of them.

    Raises ConfigurationError when one is missing, when there is no dense one to compare with, or when a manifest does
    not belong to the weights beside it.
    """
    root = Path(model) if Path(model).is_dir() else home.model(model)
    directories = sorted(
        path.parent for path in root.glob(f"*/{MANIFEST_FILE}") if not path.parent.name.startswith(".")
    )
    if not directories:
        raise ConfigurationError(f"{model}: no variants with a manifest in {root}; `sluice compress` makes some")
    found = {sibling.name: sibling for sibling in map(_read, directories)}
    if DENSE not in found:
        raise ConfigurationError(f"{root}: no variant {DENSE!r} there to compare with; the recipe {DENSE!r} makes it")
    if missing := [name for name in wanted if name not in found]:
        raise ConfigurationError(f"{root}: no variant {missing[0]!r}; there are: {', '.join(sorted(found))}")
    chosen = [found[DENSE], *(found[name] for name in wanted or sorted(found) if name != DENSE)]
    for sibling in chosen:
        require_true(sibling, chosen[0])
    return chosen


def _read(directory: Path) -> Sibling:
    return Sibling(directory, Manifest.read(directory))


def require_true(sibling: Sibling, dense: Sibling) -> None:
    """Raises ConfigurationError for a manifest of another model, or of other weights."""
    path = sibling.directory / MANIFEST_FILE
    if sibling.manifest.model != dense.manifest.model:
        raise ConfigurationError(f"{path}: of the model {sibling.manifest.model!r}, not of {dense.manifest.model!r}")
    sibling.manifest.require_weights(sibling.directory)
    actual = read_facts(sibling.directory).weights_bytes
    if actual != sibling.manifest.weights_bytes:
        raise ConfigurationError(
            f"{path} does not match its weights: it says {sibling.manifest.weights_bytes} bytes, there are {actual}"
        )
