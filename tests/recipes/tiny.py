"""Runs inside the recipes environment: makes every variant of a tiny random Llama and prints what came of each.

`python -m tests.recipes.tiny DIRECTORY`; one JSON object a line on standard output: {"name": …, facts …}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.errors import SluiceError
from app.manifest import Manifest
from app.recipes.book import find_recipe
from app.recipes.clustering import balanced, directions
from app.recipes.heads import head_importance
from app.recipes.making import Order, make_variant
from app.recipes.refit import refitted
from app.recipes.work import divergence
from tests.recipes.names import BLOCKS, CHANNELS, RECIPES

WIDTH = 64
SMALL = {"samples": "4", "tokens": "64", "drop": "1", "steps": "6", "learning_rate": "0.002", "probes": "2",
         "share": "0.5"}  # fmt: skip
PROBE = torch.arange(1, 49)[None]


def main(root: Path) -> None:
    # The libraries print to standard output here and there.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for facts in checks(root):
        print(json.dumps(facts), file=output, flush=True)


def checks(root: Path) -> Iterator[dict[str, Any]]:
    base = tiny_llama(root / "dense")
    for name in RECIPES:
        yield {"name": name, **made(name, base, root / name)}
    yield {"name": "partitioned", **made("moe4", base, root / "partitioned", mlps="partitioned")}
    yield {"name": "groups", **made("heads", base, root / "groups", unit="groups")}
    yield {"name": "unfitted", **made("heads", base, root / "unfitted", refit="false")}
    yield {"name": "again", **made("moe4", base, root / "again")}
    yield {"name": "w4a16-awq", "refused": refused("w4a16-awq", base, root / "awq")}
    yield {"name": "quantized", "refused": refused("depth", root / "w8a8", root / "twice")}
    yield {"name": "misfit", "refused": refused("moe4", root / "moe4", root / "misfit")}
    yield {"name": "deep", "refused": refused("depth26", base, root / "deep")}
    yield {"name": "huge", "refused": refused("w8a8", huge(root / "huge"), root / "no-room")}
    yield {"name": "long", "refused": refused("depth", base, root / "long", short_text(root), tokens="6000")}
    yield {"name": "odd", "refused": refused("heads", base, root / "odd", share="0.75")}
    yield {"name": "clusters", **clusters()}
    yield {"name": "refit", **refit()}
    yield {"name": "importance", **importance()}


def tiny_llama(directory: Path) -> Path:
    """Random weights; large ones, so that blocks, channels and tokens differ."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=CHANNELS, num_hidden_layers=BLOCKS,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def short_text(root: Path) -> Path:
    """Long enough to be read, too short for a long sample."""
    path = root / "text.txt"
    path.write_text("Five thousand letters. " * 218)
    return path


def made(name: str, base: Path, output: Path, **given: str) -> dict[str, Any]:
    reported = make(name, base, output, given)
    manifest = Manifest.read(output)
    manifest.require_weights(output)
    facts: dict[str, Any] = {"manifest": manifest.model_dump(mode="json"), "reported": reported}
    facts["config"] = json.loads((output / "config.json").read_text())
    if not manifest.quantization:
        facts |= compared(base, output)
    return facts


def make(name: str, base: Path, output: Path, given: dict[str, str], text: Path | None = None) -> dict[str, Any]:
    """What it reported last of each thing that it did: (completed, total)."""
    chain = find_recipe(name)
    known = {parameter.name for recipe in chain.recipes for parameter in recipe.parameters}
    parameters = chain.with_defaults({key: text for key, text in {**SMALL, **given}.items() if key in known})
    output.mkdir()
    order = Order(chain, parameters, str(base), "tiny", output, "tiny", name, text)
    reported: dict[str, Any] = {}
    make_variant(order, lambda doing, completed, total: reported.update({doing: (completed, total)}))
    return reported


def refused(name: str, base: Path, output: Path, text: Path | None = None, **given: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        try:
            make(name, base, output, given, text)
        except SluiceError as error:
            return str(error)
    return ""


def compared(base: Path, output: Path) -> dict[str, Any]:
    """How far the variant's answers are from the base's, and what its blocks have in common with the base's."""
    dense, variant = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, output))
    with torch.inference_mode():
        wanted, got = dense(input_ids=PROBE).logits, variant(input_ids=PROBE).logits
    queries = [block.self_attn.q_proj.weight for block in dense.model.layers]
    same = [
        next(
            (number for number, other in enumerate(queries) if torch.equal(other, block.self_attn.q_proj.weight)), None
        )
        for block in variant.model.layers
    ]
    return {"distance": float((wanted - got).abs().max()), "divergence": float(divergence(wanted, got)), "blocks": same}


def huge(directory: Path) -> Path:
    """A checkpoint whose headers tell of a million million weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1_000_000, 1_000_000], "data_offsets": [0, 0]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return directory


def clusters() -> dict[str, Any]:
    """Points around three directions, of very different lengths."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.eye(3, 8)
    labels = torch.arange(300) % 3
    points = (centres[labels] + 0.1 * torch.randn(300, 8, generator=generator)) * torch.rand(
        300, 1, generator=generator
    )
    found = directions(points, 3, seed=0)
    groups = (points @ found.T).argmax(dim=1)
    return {
        "pure": all(len(set(groups[labels == label].tolist())) == 1 for label in range(3)),
        "distinct": len({int(groups[labels == label][0]) for label in range(3)}),
        "repeats": bool(torch.equal(found, directions(points, 3, seed=0))),
        "of_one_point": directions(torch.ones(5, 4), 3, seed=0).isfinite().all().item(),
        "sizes": [len(group) for group in balanced(points[:200], 4, seed=0)],
    }


def refit() -> dict[str, Any]:
    """Channels that depend on each other: what is kept can stand in for what is cut."""
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(2000, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    down = torch.randn(16, 32, generator=generator)
    kept = torch.arange(16)
    wanted = activations @ down.T
    cut = activations[:, kept] @ down[:, kept].T
    fitted = activations[:, kept] @ refitted(down, activations.T @ activations / 2000, kept).T
    return {"cut": float((wanted - cut).norm()), "fitted": float((wanted - fitted).norm())}


def importance() -> dict[str, Any]:
    """Of heads, as it follows from the products of their activations, and as it is by running each alone."""
    generator = torch.Generator().manual_seed(3)
    activations = torch.randn(500, 8, generator=generator) @ torch.randn(8, 24, generator=generator)
    weight = torch.randn(16, 24, generator=generator)
    parts = [activations[:, start : start + 8] @ weight[:, start : start + 8].T for start in (0, 8, 16)]
    return {
        "found": head_importance(weight, activations.T @ activations / 500, 8),
        "run": [float((part * part).sum(dim=1).mean()) for part in parts],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
