"""Each variant that `make variants` makes, loaded by a real vLLM and asked once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.launcher import processes
from app.launcher.home import Home
from app.launcher.machine import inspect_machine
from app.manifest import Manifest
from tests.ports import free_port
from tests.processes import Process

# Minutes each on a busy machine, and most of them are not made by `make test`.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

MODEL = "smollm2"
VARIANTS = ("w4a16", "depth26", "depth26-healed", "depth26+w8a8", "moe4", "moe4-top1", "moe4-keep2")
NEEDS_AVX512 = ("w4a16",)
START_TIMEOUT_S = 800.0
TOKENS = 8


@pytest.fixture(params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    directory = Home.at(None, os.environ).checkpoint(MODEL, request.param)
    if not directory.exists():
        pytest.skip(f"{MODEL}:{request.param} is not made: run `make variants` once")
    if request.param in NEEDS_AVX512 and "avx512f" not in inspect_machine().cpu_flags:
        pytest.skip("this CPU has no AVX-512, and vLLM no 4-bit kernel without it")
    return directory


@pytest.fixture
def url(checkpoint: Path, tmp_path: Path) -> Iterator[str]:
    """A vLLM worker that serves the checkpoint."""
    python = Home.at(None, os.environ).environment("worker-cpu") / "bin" / "python"
    options = processes.WorkerOptions(str(checkpoint), MODEL, free_port(), max_num_seqs=1, max_model_len=512)
    spec = processes.worker(
        python, options, processes.Engine.CPU, inspect_machine(), os.environ, tmp_path / "worker.log"
    )
    with Process(spec.arguments, spec.environment) as process:
        process.wait_for_line("Application startup complete", START_TIMEOUT_S)
        yield f"http://127.0.0.1:{options.port}"


def test_it_loads_and_answers(checkpoint: Path, url: str) -> None:
    Manifest.read(checkpoint).require_weights(checkpoint)
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": MODEL, "messages": [question], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    print(f"{checkpoint.name}: {text!r}")
    assert answer.json()["usage"]["completion_tokens"] == TOKENS
    assert text.strip()
