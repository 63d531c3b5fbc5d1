"""`sluice evaluate` with its real parts: torch in the recipes environment, vLLM, lm-evaluation-harness.

The arithmetic of divergences is held against the definition in plain Python; the same seed against itself on a tiny
random Llama; all of it together on the dense variant of the default model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from app.card import Card
from app.evaluation.offline import BUNDLED
from app.launcher.environments import HARNESS
from app.launcher.home import Home
from app.manifest import Manifest
from tests.processes import ROOT, Process

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

DONE_S = 1700.0
POSITIONS, VOCABULARY = 5, 7

SUMS = """
import json, sys, torch
from app.recipes.divergence import sums
dense, variant, following = json.loads(sys.argv[1])
print(json.dumps(sums(torch.tensor(dense), torch.tensor(variant), torch.tensor(following))))
"""
TINY = """
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
source, dense, noisy = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
torch.manual_seed(1)
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
model = LlamaForCausalLM(config)
for place, noise in ((dense, 0.0), (noisy, 0.02)):
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
"""


@pytest.fixture(scope="module")
def home() -> Home:
    home = Home.at(None, os.environ)
    if (
        not (home.environment("recipes") / "bin" / "python").exists()
        or not home.checkpoint("smollm2", "dense").exists()
    ):
        pytest.skip(f"no recipes environment with smollm2:dense in {home.root}; `make test` prepares it")
    return home


def in_recipes(home: Home, code: str, *arguments: str) -> str:
    """Standard output of `code` in the recipes environment."""
    python = home.environment("recipes") / "bin" / "python"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([python, "-c", code, *arguments], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probabilities(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def test_divergences_are_those_of_the_definition(home: Home) -> None:
    random = Random(5)  # noqa: S311
    dense, variant = ([[random.gauss(0, 2) for _ in range(VOCABULARY)] for _ in range(POSITIONS)] for _ in range(2))
    dense[2] = variant[2]
    following = [random.randrange(VOCABULARY) for _ in range(POSITIONS)]
    found = json.loads(in_recipes(home, SUMS, json.dumps([dense, variant, following])))

    pairs = [(probabilities(p), probabilities(q)) for p, q in zip(dense, variant, strict=True)]
    middles = [[(a + b) / 2 for a, b in zip(p, q, strict=True)] for p, q in pairs]
    js = sum((divergence(p, m) + divergence(q, m)) / 2 for (p, q), m in zip(pairs, middles, strict=True))
    assert found["tokens"] == POSITIONS
    assert found["kl"] == pytest.approx(sum(divergence(p, q) for p, q in pairs), rel=1e-5)
    assert found["js"] == pytest.approx(js, rel=1e-5)
    assert found["agreeing"] == sum(p.index(max(p)) == q.index(max(q)) for p, q in pairs)
    assert found["nll"] == pytest.approx(-sum(math.log(q[at]) for (_, q), at in zip(pairs, following, strict=True)))
    assert found["dense_nll"] == pytest.approx(
        -sum(math.log(p[at]) for (p, _), at in zip(pairs, following, strict=True))
    )


def evaluated(home: Home, model: str, *options: str) -> str:
    command = [sys.executable, "-m", "app", "evaluate", model, "--home", str(home.root), *options]
    with Process(command, dict(os.environ)) as process:
        assert process.wait(DONE_S) == 0, process.output
        return process.output


def card_in(directory: Path) -> Card:
    card = Manifest.read(directory).card
    assert card is not None
    return card


def test_the_same_seed_gives_the_same_quality_of_a_tiny_model(home: Home, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("dense", "noisy")}
    in_recipes(home, TINY, str(home.checkpoint("smollm2", "dense")), *map(str, places.values()))
    for name, place in places.items():
        size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        Manifest(
            model="tiny", variant=name, base="random", recipe="none", weights_bytes=size, parameters_count=1
        ).write(place)  # fmt: skip
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(BUNDLED.read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    found = []
    for _ in range(2):
        evaluated(home, str(tmp_path), "--only", "quality", "--items", "0", "--texts", str(texts))
        found.append(card_in(places["noisy"]).quality)
    first, again = found
    assert first is not None
    assert first == again
    assert first.kl_nats_per_token.low > 0
    assert 0 < first.relative.value < 1


def test_a_real_worker_gets_a_card(home: Home, tmp_path: Path) -> None:
    """The variant is linked into a directory of its own: the shared home keeps its manifests."""
    if not (home.environment(HARNESS.name) / "bin" / "python").exists():
        pytest.skip(f"no lm-evaluation-harness in {home.root}; `sluice evaluate` installs it there")
    source, place = home.checkpoint("smollm2", "dense"), tmp_path / "dense"
    shutil.copytree(source, place, copy_function=os.link)
    (place / "sluice.json").unlink()
    Manifest.read(source).write(place)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The sea is deep and blue."}\n', encoding="utf-8")
    evaluated(home, str(tmp_path), "--engine", "cpu", "--items", "2", "--texts", str(texts), "--output", str(tmp_path))
    card = card_in(place)
    assert card.reason is None
    assert card.relative_quality == 1.0
    assert card.quality is not None
    assert set(card.quality.tasks) == {"knowledge", "retrieval", "arithmetic"}
    assert [speed.streams for speed in card.speed] == [1, 8]
    assert all(speed.ttft_p50_s > 0 and speed.itl_p50_s > 0 for speed in card.speed)
    assert card.memory_bytes is not None
    assert card.memory_bytes > 500_000_000
    assert "`dense`" in (tmp_path / "variants.md").read_text(encoding="utf-8")
