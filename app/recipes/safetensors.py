"""Facts about a checkpoint on disk, read without loading a weight.

Layout of a .safetensors file: an 8-byte little-endian length, that many bytes of JSON (tensor name to dtype, shape
and offsets), then the data. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import LaunchError

HEADER_MAX_BYTES = 100_000_000  # the format's own limit
# What quantization adds beside the weights is not a parameter of the model.
AUXILIARY = ("_scale", "_zero_point", "_shape", "_g_idx", ".scales", ".qzeros")
# compressed-tensors' pack-quantized format holds INT4 weights by eight in an int32.
PACKED = ".weight_packed"
NUMBERS_IN_A_PACK = 8
EXPERT = ".experts."


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """`quantization` is the method named in config.json, None for plain weights; `context_length` in tokens."""

    weights_bytes: int
    parameters_count: int
    quantization: str | None
    context_length: int | None


def read_facts(directory: Path) -> CheckpointFacts:
    """Raises LaunchError when `directory` is not a checkpoint with safetensors weights."""
    config = read_config(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise LaunchError(f"{directory}: no .safetensors weights")
    return CheckpointFacts(
        weights_bytes=sum(file.stat().st_size for file in files),
        parameters_count=sum(_count(file) for file in files),
        quantization=quantization_method(config),
        context_length=_context_length(config),
    )


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


def quantization_method(config: dict[str, Any]) -> str | None:
    """What config.json calls its weights: compressed-tensors, gptq, awq, fp8, …"""
    quantization = config.get("quantization_config")
    return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else None


def _context_length(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    length = config.get("max_position_embeddings") or (isinstance(text, dict) and text.get("max_position_embeddings"))
    return length if isinstance(length, int) and length > 0 else None


def _count(file: Path) -> int:
    return sum(size for _, size in _sizes(file))


def _sizes(file: Path) -> list[tuple[str, int]]:
    """Names of the parameters, and how many numbers each has."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > HEADER_MAX_BYTES:
            raise LaunchError(f"{file}: not a safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise LaunchError(f"{file}: not a safetensors file") from None
    tensors = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    return [(name, _numbers(name, entry["shape"])) for name, entry in tensors if not name.endswith(AUXILIARY)]


def _numbers(name: str, shape: list[int]) -> int:
    return math.prod(shape) * (NUMBERS_IN_A_PACK if name.endswith(PACKED) else 1)


def activated_share(directory: Path) -> float:
    """The share of a checkpoint's parameters that one token passes: 1 unless experts are chosen for it.

    Experts are told by their tensors' names, how many of them are chosen by config.json. Raises LaunchError when
    `directory` is not a checkpoint.
    """
    config = read_config(directory)
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    chosen = config.get("num_experts_per_tok")
    if not (isinstance(experts, int) and isinstance(chosen, int) and 0 < chosen < experts):
        return 1.0
    sizes = [(EXPERT in name, size) for file in sorted(directory.glob("*.safetensors")) for name, size in _sizes(file)]
    total, routed = sum(size for _, size in sizes), sum(size for is_expert, size in sizes if is_expert)
    return 1.0 - routed / total * (1.0 - chosen / experts) if total else 1.0
