"""The whole way of a variant: made of a tiny model, measured, served by real vLLM beside its sibling, given work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from app.launcher.home import Home
from app.manifest import Manifest
from tests.contract.real_worker import RealWorker, started_worker
from tests.integration.gateway.asking import COMPLETIONS
from tests.integration.gateway.running import GatewayProcess
from tests.processes import ROOT, Process

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

MODEL = "tiny"
VARIANTS = {"dense": "dense", "small": "depth+w8a8"}
DONE_S = 300.0
BASE = """
import sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from tests.recipes.tiny import tiny_llama
place = tiny_llama(Path(sys.argv[1]))
LlamaForCausalLM(LlamaConfig(
    vocab_size=257, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05,
    bos_token_id=None, eos_token_id=0,
)).bfloat16().save_pretrained(place)
"""


@pytest.fixture(scope="module")
def home() -> Home:
    home = Home.at(None, os.environ)
    if not (home.environment("recipes") / "bin" / "python").exists():
        pytest.skip(f"no recipes environment in {home.root}; `make test` prepares it")
    return home


def sluice(home: Home, *arguments: str) -> None:
    with Process([sys.executable, "-m", "app", *arguments, "--home", str(home.root)], dict(os.environ)) as process:
        assert process.wait(DONE_S) == 0, process.output


@pytest.fixture(scope="module")
def made(home: Home, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the variants, with their cards."""
    root = tmp_path_factory.mktemp("tiny")
    base = root / "base" / "tiny"
    base.parent.mkdir()
    python = home.environment("recipes") / "bin" / "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([python, "-c", BASE, str(base)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    places = {name: root / "made" / name for name in VARIANTS}
    for name, recipe in VARIANTS.items():
        parameters = ("--parameter", "drop=1", "--parameter", "samples=4", "--parameter", "tokens=128")
        chosen = parameters if recipe != "dense" else ()
        names = ("--name", MODEL, "--variant", name)
        sluice(home, "compress", str(base), "--recipe", recipe, "--output", str(places[name]), *names, *chosen)
    # Text alone: the tasks and the speed of a model of noise say nothing, and cost two more starts of a worker.
    sluice(home, "evaluate", str(root / "made"), "--only", "quality", "--items", "0")
    return places


@pytest.fixture(scope="module")
def workers(made: dict[str, Path]) -> Iterator[dict[str, RealWorker]]:
    """Both start side by side, on one core each."""
    with ExitStack() as stack:
        starting = {
            name: stack.enter_context(started_worker(f"{MODEL}:{name}", checkpoint=place, core=core))
            for core, (name, place) in enumerate(made.items())
        }
        yield {name: worker.proven() for name, worker in starting.items()}


async def test_a_variant_is_made_measured_and_given_traffic(
    made: dict[str, Path], workers: dict[str, RealWorker], tmp_path: Path
) -> None:
    dense, small = (Manifest.read(place).card for place in made.values())
    assert dense is not None
    assert small is not None
    assert small.size_bytes < dense.size_bytes
    assert (dense.relative_quality or 0.0) > (small.relative_quality or 0.0) > 0
    # What the cards do not say, since no speed was measured.
    costs = {"dense": 1.0, "small": 0.5}
    variants = [
        {"name": name, "manifest": str(made[name] / "sluice.json"), "cost": costs[name], "workers": [{"url": one.url}]}
        for name, one in workers.items()
    ]
    async with GatewayProcess(tmp_path, [{"name": MODEL, "policy": "quality", "variants": variants}]) as gateway:
        await gateway.ready(*workers.values(), timeout_s=120)
        card = (await gateway.http.get(f"/v1/models/{MODEL}:small")).json()
        assert card["card"]["quality"]["relative"]["value"] == small.relative_quality
        assert await served_by(gateway) == ("dense", "quality")
        assert await served_by(gateway, "economy") == ("small", "economy")
        assert await served_by(gateway, model=f"{MODEL}:small") == ("small", "pinned")


async def served_by(gateway: GatewayProcess, policy: str = "", model: str = MODEL) -> tuple[str, str]:
    """The variant that answers, and why; the worker's own name for itself is in the answer."""
    body = {"model": model, "prompt": "One two three", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    headers = {"x-sluice-policy": policy} if policy else {}
    answer = await gateway.http.post(COMPLETIONS, json=body, headers=headers, timeout=120)
    assert answer.status_code == httpx.codes.OK, answer.text
    variant, reason = answer.headers["x-sluice-variant"], answer.headers["x-sluice-variant-reason"]
    assert answer.json()["model"] == f"{MODEL}:{variant}"
    assert answer.json()["usage"]["completion_tokens"] == 4
    return variant, reason
