"""The command lines: what vLLM is told on which machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app.launcher.machine import Machine
from app.launcher.processes import (
    DEFAULT_KV_CACHE_BYTES,
    ENGINE_BYTES,
    Engine,
    WorkerOptions,
    gateway,
    valkey,
    worker,
    worker_arguments,
    worker_environment,
    worker_memory,
)
from app.settings import Listen

PYTHON = Path("/env/bin/python")
OPTIONS = WorkerOptions(checkpoint="org/model", served_model="m:w8a8", port=9001)
OLD = Machine((0, 1), 2**34, frozenset({"avx2"}))
NEW = Machine((0, 1), 2**34, frozenset({"avx2", "avx512_bf16"}))


def flags(options: WorkerOptions, engine: Engine = Engine.CPU, machine: Machine = OLD) -> dict[str, str]:
    """Each flag with the value after it, empty for a switch."""
    arguments = worker_arguments(PYTHON, options, engine, machine)
    following = [*arguments[1:], ""]
    return {
        flag: "" if value.startswith("--") else value
        for flag, value in zip(arguments, following, strict=True)
        if flag.startswith("--")
    }


@pytest.mark.parametrize(("machine", "dtype"), [(OLD, "float32"), (NEW, "bfloat16")])
def test_a_cpu_worker(machine: Machine, dtype: str) -> None:
    told = flags(OPTIONS, machine=machine)
    assert told["--dtype"] == dtype
    assert told["--kv-cache-memory-bytes"] == "134217728"
    assert told["--max-model-len"] == "2048"
    assert told["--max-num-seqs"] == "8"
    assert told["--model"] == "org/model"
    assert told["--served-model-name"] == "m:w8a8"
    assert {"--enforce-eager", "--enable-prompt-tokens-details", "--enable-auto-tool-choice"} <= set(told)


def test_a_cuda_worker_chooses_its_own_precision_and_cache() -> None:
    told = flags(replace(OPTIONS, gpu_memory_share=0.45), Engine.CUDA)
    assert told["--gpu-memory-utilization"] == "0.45"
    assert not {"--dtype", "--enforce-eager", "--block-size", "--kv-cache-memory-bytes"} & set(told)


def test_a_cache_of_a_given_size_is_that_size_on_both() -> None:
    sized = replace(OPTIONS, kv_cache_bytes=7)
    assert flags(sized)["--kv-cache-memory-bytes"] == "7"
    assert flags(sized, Engine.CUDA)["--kv-cache-memory-bytes"] == "7"


def test_extra_arguments_come_last() -> None:
    arguments = worker_arguments(PYTHON, replace(OPTIONS, extra=("--seed", "1")), Engine.CPU, OLD)
    assert arguments[-2:] == ("--seed", "1")


def test_the_environment_of_a_cpu_worker(tmp_path: Path) -> None:
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    tcmalloc = tmp_path / "libtcmalloc_minimal.so.4"
    tcmalloc.touch()
    options = replace(OPTIONS, checkpoint=str(tmp_path), cores=(0, 2))
    ours = {"VLLM_CPU_KVCACHE_SPACE": "4", "LD_PRELOAD": "mine.so", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/h"}
    machine = replace(OLD, tcmalloc=tcmalloc)
    environment = worker_environment(tmp_path / "bin" / "python", options, Engine.CPU, machine, ours)
    assert environment["LD_PRELOAD"] == f"{tcmalloc}:{openmp}:mine.so"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,2"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PYTHONDONTWRITEBYTECODE"] == ""
    assert environment["HOME"] == "/h"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


def test_nothing_is_preloaded_that_is_not_there() -> None:
    environment = worker_environment(PYTHON, OPTIONS, Engine.CPU, OLD, {})
    assert not {"LD_PRELOAD", "HF_HUB_OFFLINE", "VLLM_CPU_OMP_THREADS_BIND"} & set(environment)


def test_a_worker_is_named_after_its_variant() -> None:
    assert worker(PYTHON, OPTIONS, Engine.CPU, OLD, {}, Path("log")).name == "worker m:w8a8"


def test_memory_counts_weights_as_wide_as_they_are_computed_with() -> None:
    assert worker_memory(100, None, OLD) == ENGINE_BYTES + 200 + DEFAULT_KV_CACHE_BYTES
    assert worker_memory(100, 1, NEW) == ENGINE_BYTES + 100 + 1


def test_valkey_keeps_nothing_and_evicts_nothing(tmp_path: Path) -> None:
    arguments = " ".join(valkey(Path("/v"), tmp_path / "s", tmp_path / "log", {}).arguments)
    for wanted in ("--maxmemory-policy noeviction", "--appendonly no", "--port 0", f"--unixsocket {tmp_path}/s"):
        assert wanted in arguments


def test_the_gateway_is_told_its_address_in_full(tmp_path: Path) -> None:
    listen = Listen(host="::1", port=9000, processes=2)
    spec = gateway(PYTHON, tmp_path / "c.yaml", listen, tmp_path / "app", tmp_path / "log", {"PYTHONPATH": "/x"})
    assert spec.arguments[-6:] == ("--host", "::1", "--port", "9000", "--processes", "2")
    assert spec.environment["PYTHONPATH"] == f"{tmp_path}:/x"
