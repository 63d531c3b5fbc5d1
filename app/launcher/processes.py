"""How each process is started: argument list, environment, log. The one place that spells vLLM's flags. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.launcher.environments import KEEP_BYTECODE
from app.launcher.machine import Machine
from app.settings import Listen

VLLM_MODULE = "vllm.entrypoints.openai.api_server"
DEFAULT_MAX_MODEL_LEN = 2048
DEFAULT_MAX_NUM_SEQS = 8
DEFAULT_KV_CACHE_BYTES = 128 * 1024 * 1024

WORKER_DRAIN_S = 20
WORKER_STOP_S = 30.0
GATEWAY_STOP_S = 40.0
VALKEY_STOP_S = 5.0
VALKEY_MEMORY = "256mb"

# The gateway keeps idle connections for seconds; vLLM's own 5 s would close them under its hands.
KEEP_ALIVE_S = 75
# Three Python processes with vLLM imported take this much before any weight or cache (measured: 2.5 GB with a
# 135M model in float32 and 128 MiB of cache).
ENGINE_BYTES = 2_000_000_000


class Engine(StrEnum):
    """Which build of vLLM the flags are for."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to start: `environment` is all of its environment, `stop_s` its time to end after SIGTERM."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    environment: Mapping[str, str]
    stop_s: float


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """One vLLM worker. What is None or empty is left to vLLM.

    `cores` are ids; `kv_cache_bytes` is the whole cache; `max_model_len` counts tokens; `gpu_memory_share` is the part
    of a GPU's memory that this worker may take.
    """

    checkpoint: str
    served_model: str
    port: int
    host: str = "127.0.0.1"
    max_model_len: int | None = DEFAULT_MAX_MODEL_LEN
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    kv_cache_bytes: int | None = None
    cores: tuple[int, ...] = ()
    gpu_memory_share: float = 0.9
    extra: tuple[str, ...] = ()


def worker_arguments(python: Path, options: WorkerOptions, engine: Engine, machine: Machine) -> tuple[str, ...]:
    """The argument list of a vLLM worker.

    The module is started rather than the `vllm` command: the CPU wheel has another distribution name, which that
    command does not find.
    """
    arguments = [
        str(python), "-m", VLLM_MODULE,
        "--model", options.checkpoint,
        "--served-model-name", options.served_model,
        "--host", options.host,
        "--port", str(options.port),
        "--max-num-seqs", str(options.max_num_seqs),
        "--enable-prompt-tokens-details",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--shutdown-timeout", str(WORKER_DRAIN_S),
        "--disable-access-log-for-endpoints", "/health,/metrics,/v1/models",
    ]  # fmt: skip
    if options.max_model_len:
        arguments += ["--max-model-len", str(options.max_model_len)]
    arguments += _cpu_arguments(options, machine) if engine is Engine.CPU else _cuda_arguments(options)
    return (*arguments, *options.extra)


def _cpu_arguments(options: WorkerOptions, machine: Machine) -> list[str]:
    """Eager, because compiling costs a minute of start-up and gains a tenth; small blocks, so that prefixes are reused.

    Without bfloat16 instructions half precision multiplies its prefill time by five (AVX2), with them it is a
    third faster than float32 (measured on one machine each).
    """
    return [
        "--dtype", "bfloat16" if machine.computes_bfloat16 else "float32",
        "--enforce-eager",
        "--block-size", "32",
        "--kv-cache-memory-bytes", str(options.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES),
    ]  # fmt: skip


def _cuda_arguments(options: WorkerOptions) -> list[str]:
    """vLLM sizes its cache by the GPU's memory unless told a number."""
    if options.kv_cache_bytes:
        return ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    return ["--gpu-memory-utilization", f"{options.gpu_memory_share:.2f}"]


def worker_environment(
    python: Path, options: WorkerOptions, engine: Engine, machine: Machine, environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a vLLM worker: `environ`, without what would contradict the flags, and our additions."""
    # This legacy variable counts whole GiB and overrides the exact number of bytes.
    kept = {name: value for name, value in environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    kept |= KEEP_BYTECODE | {"VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S)}
    if Path(options.checkpoint).exists():
        kept["HF_HUB_OFFLINE"] = "1"
    if engine is Engine.CPU:
        if options.cores:
            kept["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, options.cores))
        if preload := _preload(python, machine, environ):
            kept["LD_PRELOAD"] = preload
    return kept


def _preload(python: Path, machine: Machine, environ: Mapping[str, str]) -> str:
    """Intel's OpenMP (comes with the wheel) and tcmalloc where the machine has it: prefill is a sixth faster."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    chosen = [path for path in (machine.tcmalloc, openmp) if path and path.exists()]
    return ":".join([*map(str, chosen), *filter(None, [environ.get("LD_PRELOAD")])])


def worker_memory(weights_bytes: int, kv_cache_bytes: int | None, machine: Machine) -> int:
    """Bytes of memory that a CPU worker takes: weights are stored in two bytes and widened to four without bfloat16."""
    widening = 1 if machine.computes_bfloat16 else 2
    return ENGINE_BYTES + widening * weights_bytes + (kv_cache_bytes or DEFAULT_KV_CACHE_BYTES)


def valkey(server: Path, socket: Path, log: Path, environ: Mapping[str, str]) -> ProcessSpec:
    """A Valkey on a Unix socket that only this user may open; nothing of it outlives the process.

    What the ledger holds is worth nothing after a restart, and must never be evicted while it runs.
    """
    arguments = (
        str(server), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700",
        "--save", "", "--appendonly", "no", "--dir", str(socket.parent),
        "--maxmemory", VALKEY_MEMORY, "--maxmemory-policy", "noeviction",
    )  # fmt: skip
    return ProcessSpec("valkey", arguments, log, dict(environ), VALKEY_STOP_S)


def worker_name(served_model: str) -> str:
    """What the process of a worker is called."""
    return f"worker {served_model}"


def worker(
    python: Path, options: WorkerOptions, engine: Engine, machine: Machine, environ: Mapping[str, str], log: Path
) -> ProcessSpec:
    """A vLLM worker under supervision, named after the variant that it serves."""
    return ProcessSpec(
        worker_name(options.served_model),
        worker_arguments(python, options, engine, machine),
        log,
        worker_environment(python, options, engine, machine, environ),
        WORKER_STOP_S,
    )


def gateway(
    python: Path, config: Path, listen: Listen, package: Path, log: Path, environ: Mapping[str, str]
) -> ProcessSpec:
    """The gateway; PYTHONPATH names the directory that holds the `app` package, so that `-m app` means this one.

    The address is spelt out, because in the gateway the environment would override the file once more.
    """
    arguments = (
        str(python), "-m", "app", "gateway", "--config", str(config),
        "--host", listen.host, "--port", str(listen.port), "--processes", str(listen.processes),
    )  # fmt: skip
    path = ":".join(filter(None, [str(package.parent), environ.get("PYTHONPATH")]))
    return ProcessSpec("gateway", arguments, log, {**environ, "PYTHONPATH": path}, GATEWAY_STOP_S)
