"""How a variant was made and what was measured of it: `sluice.json`, beside its weights.

Recipes write it in an environment with few of the gateway's libraries: nothing here may import more than pydantic.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.card import Card
from app.errors import ConfigurationError

MANIFEST_FILE = "sluice.json"
WEIGHTS = "*.safetensors"
# A fingerprint reads a weights file's beginning, which names its tensors, and so many blocks spread over the rest:
# a megabyte of any file. Other weights of the same shape differ in each block.
FINGERPRINT_HEAD_BYTES = 128 * 1024
FINGERPRINT_BLOCK_BYTES = 16 * 1024
FINGERPRINT_BLOCKS = 64


class WeightsFile(BaseModel):
    """What a manifest knows of one file of weights: its size, and a digest of samples of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int = Field(ge=0)
    fingerprint: str

    @classmethod
    def of(cls, path: Path) -> WeightsFile:
        """Raises OSError."""
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_HEAD_BYTES))
            for block in range(FINGERPRINT_BLOCKS):
                file.seek(max(0, size - FINGERPRINT_BLOCK_BYTES) * block // (FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
        return cls(size_bytes=size, fingerprint=digest.hexdigest())


class Manifest(BaseModel):
    """How a variant was made, written as `sluice.json` beside its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="public name of the model")
    variant: str
    base: str = Field(description="what the recipe started from: a package, a hub id or a path's last part")
    recipe: str = Field(description="one recipe, or several joined by +")
    parameters: dict[str, Any] = Field(default_factory=dict, description="the recipe's, or by recipe if it is several")
    findings: dict[str, Any] = Field(default_factory=dict, description="what the recipe measured and decided")
    libraries: dict[str, str] = Field(default_factory=dict, description="distribution name to version")
    weights_bytes: int = Field(ge=0)
    weights: dict[str, WeightsFile] = Field(default_factory=dict, description="by file name; none are not checked")
    parameters_count: int = Field(ge=0)
    quantization: str | None = None
    context_length: int | None = Field(None, ge=1, description="tokens")
    calibration_sha256: str | None = Field(None, description="of the calibration text, where the recipe read any")
    card: Card | None = Field(None, description="what `sluice evaluate` measured")

    @staticmethod
    def weigh(directory: Path) -> dict[str, WeightsFile]:
        """The weights in `directory`, by file name. Raises OSError."""
        return {path.name: WeightsFile.of(path) for path in sorted(directory.glob(WEIGHTS))}

    def require_weights(self, directory: Path) -> None:
        """Raises ConfigurationError where the weights in `directory` are not the ones that this manifest is about.

        A gateway may have the manifest alone: where there are no weights at all there is nothing to check.
        """
        try:
            found = self.weigh(directory) if self.weights else {}
        except OSError as error:
            raise ConfigurationError(f"{directory}: {error.strerror or error}") from None
        if found and found != self.weights:
            names = sorted(name for name in {*found, *self.weights} if found.get(name) != self.weights.get(name))
            raise ConfigurationError(
                f"{directory / MANIFEST_FILE} does not match the weights beside it ({', '.join(names)}): "
                "make the variant again"
            )

    def write(self, directory: Path) -> None:
        """Replaces what is there at once: a reader sees the old manifest or the new one."""
        beside = directory / f".{MANIFEST_FILE}.{os.getpid()}"
        beside.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        beside.replace(directory / MANIFEST_FILE)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in `directory`. Raises ConfigurationError when it is missing or does not fit the schema."""
        path = directory / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror or error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigurationError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    @classmethod
    def read_checked(cls, directory: Path) -> Manifest:
        """The manifest in `directory`, which is about the weights there. Raises ConfigurationError."""
        manifest = cls.read(directory)
        manifest.require_weights(directory)
        return manifest
