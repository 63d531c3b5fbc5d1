"""`sluice evaluate`: the variants of a model, one after the other, each to its card; then the page of all of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from app.card import Card, MeasuredOn, Quality, SparseUse, Speed, TaskName, Uncertainty, gate
from app.errors import ConfigurationError, LaunchError
from app.evaluation import economics, harness, offline
from app.evaluation.calibration import Answered, calibrate
from app.evaluation.document import document
from app.evaluation.endpoint import Answer, Client, Endpoint
from app.evaluation.page import Row, figures, page
from app.evaluation.quality import Graded, TextSums, quality
from app.evaluation.radar import radar
from app.evaluation.resampling import shortened
from app.evaluation.siblings import Sibling, find_siblings
from app.evaluation.tasks import TASKS, Item, items, plain, prompts
from app.evaluation.worker import Quiet, engine_version, started
from app.launcher.checkpoints import Base
from app.launcher.engines import EngineChoice, choose_engine, require_installed
from app.launcher.environments import HARNESS, RECIPES, Environment, Installer
from app.launcher.home import Home, locked, make_directory
from app.launcher.machine import Machine, inspect_machine, require_memory
from app.launcher.network import free_port
from app.launcher.preparation import Work, Workshop
from app.launcher.processes import (
    DEFAULT_MAX_MODEL_LEN,
    Engine,
    ProcessSpec,
    WorkerOptions,
    worker,
    worker_memory,
)
from app.launcher.progress import Step, Steps
from app.recipes.safetensors import activated_share, read_config
from app.settings import QualityGate

PAGE, DOCUMENT, PICTURE = "variants.md", "variants.html", "variants.svg"
STREAMS = (1, 8)
PROMPTS_PER_STREAM = 3
GENERATED_TOKENS = 64
WARM_UP_TOKENS = 4
CONTEXT_TOKENS = 112  # in the KV cache while a stream is measured: its prompt, and half of what is generated
QUALITY_PARTS = ("quality", "uncertainty", "seed", "text_sha256")
SPEED_PARTS = ("speed", "memory_bytes", "cost", "sparse_use", "machine")

Part = Literal["quality", "speed"]


@dataclass(frozen=True, slots=True)
class Order:
    """The command line of `sluice evaluate`. `only` measures one part anew, and keeps the other of an earlier card."""

    home: Home
    model: str
    variants: tuple[str, ...] = ()
    output: Path | None = None
    report: bool = False
    only: Part | None = None
    texts: Path | None = None
    items: int = 40
    seed: int = 1
    price_per_hour: float = 0.1
    engine: Engine | None = None
    thresholds: QualityGate = field(default_factory=QualityGate)

    @property
    def tasks(self) -> dict[TaskName, list[Item]]:
        return {task: items(task, self.items, self.seed) for task in TASKS} if self.items else {}

    @property
    def needs_worker(self) -> bool:
        """Text is compared without one, tasks and speed are not."""
        return self.wants("speed") or self.items > 0

    def wants(self, part: Part) -> bool:
        return self.only in {None, part}

    def measures(self, sibling: Sibling) -> bool:
        """Quality is held against the dense sibling's own answers; speed needs nobody beside."""
        return self.only != "speed" or not self.variants or sibling.name in self.variants


@dataclass(frozen=True, slots=True)
class Heard:
    """What a worker answered to the tasks: by task whether it was right, and its words with their alternatives."""

    right: Mapping[TaskName, Sequence[bool]]
    answers: Mapping[TaskName, Sequence[Answer]]


@dataclass(frozen=True, slots=True)
class Run:
    """What one worker gave; empty, with a `reason`, where it could not be run."""

    heard: Heard = field(default_factory=lambda: Heard({}, {}))
    speed: tuple[Speed, ...] = ()
    memory_bytes: int | None = None
    machine: MeasuredOn | None = None
    reason: str | None = None


def evaluate(order: Order, steps: Steps) -> Path | None:
    """The page that was written, if one was asked for. Raises SluiceError; cards that were written before stay."""
    siblings = find_siblings(order.home, order.model, order.variants)
    if not order.report:
        with locked(make_directory(order.home.root) / "evaluate.lock", wait_s=0):
            measured = {sibling.name: sibling for sibling in Evaluation(order, steps, siblings).cards()}
        siblings = [measured.get(sibling.name, sibling) for sibling in siblings]
    return write_page(order.output, siblings) if order.output else None


def write_page(directory: Path, siblings: Sequence[Sibling]) -> Path:
    """`variants.md` with its picture, and the same for a browser, from the cards as they are.

    Raises ConfigurationError when there are none.
    """
    rows = [Row(one.name, one.manifest.recipe, card) for one in siblings if (card := one.manifest.card)]
    if not rows or rows[0].variant != siblings[0].name:
        raise ConfigurationError(f"{siblings[0].public_name} has no card yet: `sluice evaluate` without --report first")
    make_directory(directory)
    picture, text = radar(figures(rows)), page(siblings[0].manifest.model, rows, PICTURE)
    (directory / PICTURE).write_text(picture, encoding="utf-8")
    (directory / PAGE).write_text(text, encoding="utf-8")
    (directory / DOCUMENT).write_text(document(text, PICTURE, picture), encoding="utf-8")
    return directory / PAGE


class Evaluation:
    """One run over several siblings, the dense one first: the others' answers are held against its.

    Where it is speed alone of variants that were named, only these are run.
    """

    def __init__(self, order: Order, steps: Steps, siblings: Sequence[Sibling]) -> None:
        self._order = order
        self._steps = steps
        self._siblings = [sibling for sibling in siblings if order.measures(sibling)]
        self._text = offline.Text.at(order.texts)
        self._machine = inspect_machine()
        self._choice = choose_engine(order.engine, order.home, self._machine)
        self._has_experts = any(activated_share(sibling.directory) < 1 for sibling in siblings)
        self._peaks: tuple[float, float] | None = None

    def cards(self) -> list[Sibling]:
        """The siblings with their cards, each written as soon as it is known."""
        self._steps.expect(len(self._siblings) * self._order.needs_worker + self._order.wants("quality"))
        self._install()
        texts = self._texts()
        dense_heard: Heard | None = None
        done: list[Sibling] = []
        for sibling in self._siblings:
            run = self._run(sibling)
            dense_heard = dense_heard or run.heard
            done.append(sibling.with_card(self._card(sibling, run, texts.get(sibling.name), dense_heard)))
        return done

    def _install(self) -> None:
        """The environments that are missing, after what is asked of them is known to be possible."""
        wanted: list[Environment] = []
        if self._order.needs_worker:
            require_installed(self._choice, self._machine)
        if self._order.wants("quality") or self._has_experts:
            wanted.append(RECIPES)
        if self._order.wants("quality") and self._order.items:
            wanted.append(HARNESS)
        with locked(make_directory(self._order.home.root) / "lock"):
            installer = Installer.of_this_machine()
            workshop = Workshop(self._order.home, installer)
            absent = tuple(one for one in wanted if not installer.is_current(self._order.home, one))
            self._steps.expect(len(absent))
            workshop.require_disk(Work(absent, False, ()), Base(self._siblings[0].manifest.model))
            workshop.install(absent, self._steps)

    def _texts(self) -> Mapping[str, list[TextSums] | str]:
        if not self._order.wants("quality"):
            return {}
        with self._steps.step(f"Comparing {len(self._siblings)} variants on the same text") as step:
            return offline.divergences(self._order.home, self._siblings, self._text, step)

    def _run(self, sibling: Sibling) -> Run:
        """What cannot be served is part of the result, with the engine's reason."""
        if not self._order.needs_worker:
            return Run()
        with self._steps.step(f"Measuring {sibling.public_name}") as step:
            try:
                return self._measured(sibling, step)
            except LaunchError as error:
                self._steps.say(f"{sibling.public_name} cannot be measured: {error}")
                return Run(reason=str(error))

    def _measured(self, sibling: Sibling, step: Step) -> Run:
        order, endpoint = self._order, Endpoint(f"http://127.0.0.1:{(port := free_port())}/v1", sibling.public_name)
        self._require_memory(sibling)
        step.note("starting a worker")
        with started(self._worker(sibling, port), endpoint) as running:
            version = engine_version(endpoint)
            heard = self._heard(endpoint, step) if order.wants("quality") and order.items else Heard({}, {})
            quiet = Quiet(running, len(self._machine.cores))
            speed = asyncio.run(speeds(endpoint, order.seed, step)) if order.wants("speed") else ()
            others = quiet.taken_by_others() if order.wants("speed") else None
            memory = running.memory_bytes() if order.wants("speed") else None
        return Run(heard, speed, memory, self._measured_on(version, others, step))

    def _heard(self, endpoint: Endpoint, step: Step) -> Heard:
        tasks, home = self._order.tasks, self._order.home
        step.note("tasks by lm-evaluation-harness")
        python = home.environment(HARNESS.name) / "bin" / "python"
        right = harness.run(python, endpoint, tasks, self._order.seed, home.logs / "evaluate-harness.log")
        return Heard(right, asyncio.run(answers(endpoint, tasks, step)))

    def _worker(self, sibling: Sibling, port: int) -> ProcessSpec:
        length = min(DEFAULT_MAX_MODEL_LEN, sibling.manifest.context_length or DEFAULT_MAX_MODEL_LEN)
        options = WorkerOptions(
            str(sibling.directory), sibling.public_name, port, max_model_len=length, max_num_seqs=max(STREAMS)
        )
        log = self._order.home.logs / f"evaluate-{sibling.name}.log"
        return worker(self._choice.python, options, self._choice.engine, self._machine, os.environ, log)

    def _require_memory(self, sibling: Sibling) -> None:
        if self._choice.engine is Engine.CPU:
            need = worker_memory(sibling.manifest.weights_bytes, None, self._machine)
            require_memory(self._machine, need, f"a vLLM worker for {sibling.public_name}")

    def _measured_on(self, version: str, others: float | None, step: Step) -> MeasuredOn:
        bandwidth, flops = self._known_peaks(step) or (None, None)
        return MeasuredOn(
            cores=len(self._machine.cores),
            instruction_set=instruction_set(self._machine, self._choice),
            engine=str(self._choice.engine),
            engine_version=version,
            peak_bytes_per_s=bandwidth,
            peak_flops=flops,
            taken_by_others=shortened(others) if others is not None else None,
        )

    def _known_peaks(self, step: Step) -> tuple[float, float] | None:
        """Measured once, and only where a mixture of experts is among the variants: nothing else is held against it."""
        if (
            self._peaks is None
            and self._has_experts
            and self._choice.engine is Engine.CPU
            and self._order.wants("speed")
        ):
            step.note("the machine's peaks")
            self._peaks = offline.peaks(self._order.home, step)
        return self._peaks

    def _card(self, sibling: Sibling, run: Run, texts: list[TextSums] | str | None, dense: Heard) -> Card:
        order, old = self._order, sibling.manifest.card
        share = activated_share(sibling.directory)
        activated = round(sibling.manifest.parameters_count * share)
        reasons = [reason for reason in (texts if isinstance(texts, str) else None, run.reason) if reason]
        parts = Card(
            size_bytes=sibling.manifest.weights_bytes,
            activated_parameters=activated,
            memory_bytes=run.memory_bytes,
            speed=run.speed,
            cost=economics.cost(run.speed, order.price_per_hour),
            sparse_use=self._sparse_use(sibling, run, activated, share) if share < 1 else None,
            machine=run.machine,
            quality=judged(texts, run.heard, dense, order.seed) if isinstance(texts, list) else None,
            uncertainty=doubts(run.heard, dense) if not sibling.is_dense else (),
            seed=order.seed,
            text_sha256=self._text.sha256,
            reason="; ".join(reasons) or None,
        )
        merged = parts if order.only is None or old is None else merge(old, parts, order.only)
        return merged.model_copy(update={"gate": gate(merged, order.thresholds)})

    def _sparse_use(self, sibling: Sibling, run: Run, activated: int, share: float) -> SparseUse | None:
        if run.machine is None:
            return None
        width = economics.bytes_per_parameter(sibling.manifest, self._machine.computes_bfloat16)
        read = activated * width + economics.kv_bytes(read_config(sibling.directory), CONTEXT_TOKENS, width)
        return economics.sparse_use(run.speed, run.machine, activated, read)


def judged(texts: list[TextSums], own: Heard, dense: Heard, seed: int) -> Quality:
    """Tasks count where both have answered them."""
    graded = {
        task: [
            Graded(right, dense_right) for right, dense_right in zip(own.right[task], dense.right[task], strict=True)
        ]
        for task in own.right
        if task in dense.right
    }
    return quality(texts, graded, seed)


def doubts(own: Heard, dense: Heard) -> tuple[Uncertainty, ...]:
    """The tables of a cascade from this variant to the dense one; none where either was not asked."""
    answered = [
        Answered(answer.alternatives, right, dense_right, plain(answer.text) == plain(theirs.text))
        for task in own.right
        if task in dense.right
        for answer, right, theirs, dense_right in zip(
            own.answers[task], own.right[task], dense.answers[task], dense.right[task], strict=True
        )
    ]
    return calibrate(answered) if answered else ()


def merge(old: Card, new: Card, only: Part) -> Card:
    """The part that was measured anew, and the other as it was. Pure."""
    kept = QUALITY_PARTS if only == "speed" else SPEED_PARTS
    return new.model_copy(update={part: getattr(old, part) for part in kept})


async def answers(
    endpoint: Endpoint, tasks: Mapping[TaskName, Sequence[Item]], step: Step
) -> dict[TaskName, list[Answer]]:
    """The same items once more with log-probabilities, which the harness does not keep."""
    found: dict[TaskName, list[Answer]] = {}
    async with Client.of(endpoint) as client:
        for task, asked in tasks.items():
            step.note(f"certainty of answers: {task}")
            found[task] = await client.answers(asked, partial(step.reached, total=len(asked)))
    return found


async def speeds(endpoint: Endpoint, seed: int, step: Step) -> tuple[Speed, ...]:
    """At 1 and at 8 streams, after a warm-up."""
    found = []
    async with Client.of(endpoint) as client:
        await client.speed(max(STREAMS), prompts(max(STREAMS), seed), WARM_UP_TOKENS)
        for streams in STREAMS:
            step.note(f"speed at {streams} stream{'s' if streams > 1 else ''}")
            asked = prompts(streams * PROMPTS_PER_STREAM, seed + streams)
            found.append(await client.speed(streams, asked, GENERATED_TOKENS))
    return tuple(found)


def instruction_set(machine: Machine, choice: EngineChoice) -> str:
    """The widest that inference on this machine uses. Pure."""
    if choice.engine is Engine.CUDA:
        return "cuda"
    names = {
        "amx_int8": "amx", "avx512_vnni": "avx512-vnni", "avx512f": "avx512", "avx_vnni": "avx-vnni", "avx2": "avx2",
        "sve": "sve", "asimd": "neon",
    }  # fmt: skip
    return next((name for flag, name in names.items() if flag in machine.cpu_flags), "generic")
