"""Which vLLM is there to run, and for what: the CPU build of our own environment, or an ordinary installation."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from app.errors import LaunchError
from app.launcher.environments import WORKER_CPU
from app.launcher.home import Home
from app.launcher.machine import Machine, require_libnuma
from app.launcher.processes import Engine


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An interpreter that has vLLM, and the kind of flags it takes. `is_ours` where `sluice up` installs it."""

    engine: Engine
    python: Path
    is_ours: bool


def choose_engine(wanted: Engine | None, home: Home, machine: Machine) -> EngineChoice:
    """CUDA where there is an NVIDIA GPU and an ordinary vLLM, else the CPU build. Raises LaunchError.

    An ordinary vLLM is used for the CPU only where ours is not installed: vLLM's own CPU image carries one.
    """
    installed = find_vllm()
    if wanted is Engine.CUDA or (wanted is None and machine.has_nvidia and installed):
        if not installed:
            raise LaunchError("--engine cuda needs an installed vLLM: `pip install vllm` on the machine with the GPU")
        return EngineChoice(Engine.CUDA, installed, is_ours=False)
    ours = home.environment(WORKER_CPU.name) / "bin" / "python"
    if installed and not ours.exists():
        return EngineChoice(Engine.CPU, installed, is_ours=False)
    return EngineChoice(Engine.CPU, ours, is_ours=True)


def find_vllm() -> Path | None:
    """The interpreter of an ordinary vLLM: this one, or the one beside the `vllm` command on PATH."""
    if importlib.util.find_spec("vllm"):
        return Path(sys.executable)
    command = shutil.which("vllm")
    if not command:
        return None
    python = Path(command).resolve().with_name("python3")
    return python if python.exists() else None


def require_installed(choice: EngineChoice, machine: Machine) -> EngineChoice:
    """The same choice. Raises LaunchError when its interpreter, or what that needs of the machine, is not there."""
    if choice.engine is Engine.CPU:
        require_libnuma(machine)
    if not choice.python.exists():
        raise LaunchError(f"no vLLM here: `sluice up --prepare-only` installs one at {choice.python.parents[1]}")
    return choice
