"""`sluice worker` becomes vLLM: what that is given, and what it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

KEY = "a-key-of-this-test"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home whose vLLM only says what it was started with."""
    python = tmp_path / "envs/worker-cpu/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "arguments: $*"\necho "key: $VLLM_API_KEY"\n')
    python.chmod(0o755)
    return tmp_path


def run_worker(home: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app", "worker", "/models/m", "--served-model", "m:v", "--port", "9000"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), **environment}
    given = ["--engine", "cpu", "--home", str(home), *options]
    return subprocess.run(
        [*command, *given], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_key_is_in_its_environment_only(home: Path) -> None:
    file = home / "key"
    file.write_text(KEY + "\n")
    done = run_worker(home, "--api-key-file", str(file))
    assert done.returncode == 0, done.stderr
    arguments, key = done.stdout.splitlines()
    assert key == f"key: {KEY}"
    assert KEY not in arguments
    assert "--served-model-name m:v" in arguments


def test_without_a_file_there_is_no_key(home: Path) -> None:
    assert run_worker(home).stdout.splitlines()[1] == "key: "


def test_a_file_that_is_not_there_is_one_line(home: Path) -> None:
    done = run_worker(home, "--api-key-file", "/nowhere/key")
    assert (done.returncode, done.stderr) == (2, "error: /nowhere/key: No such file or directory\n")


def test_a_machine_without_libnuma_is_one_line(home: Path) -> None:
    """The loader itself says that it cannot: before any other place it looks where the environment says."""
    (home / "libnuma.so.1").write_bytes(b"no library")
    done = run_worker(home, LD_LIBRARY_PATH=str(home))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: vLLM's CPU build needs libnuma.so.1: `apt-get install libnuma1`")
    assert done.stderr.count("\n") == 1
