"""`python -m loadtest elastic`: what it brings to step down to lesser variants under twice the load.

Nothing here is timed: the gateway's own choice of variants (`app.routing.chooser`) and the order of its queue
(`app.admission.fairness.Queue`) drive modelled engines (`loadtest.scenarios.engine`) in virtual time, so the figures
are the same on every machine. The engines are as fast as the variants' cards say.
"""

import heapq
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.admission.fairness import Debt, Kind, Place, Queue, Rules
from app.catalogue import Catalogue
from app.inference import InferenceRequest, Route
from app.manifest import Manifest
from app.routing.chooser import Chooser
from app.routing.variant_choice import Choice
from app.settings import Logs, Model
from app.telemetry.account import Ttfts
from app.telemetry.logs import open_log
from app.telemetry.metrics import open_metrics
from app.tenant import Tenant
from app.workers.registry import Registry
from app.workers.worker import proven
from loadtest.report import table
from loadtest.samples import percentile
from loadtest.scenarios.engine import Engine, EngineShape
from loadtest.scenarios.engine import Sequence as Running

US = 1_000_000
BAND = 2
SEATS = 8
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}'


@dataclass(frozen=True)
class Form:
    """A variant as its card describes it: quality beside the best, and tokens/s a worker generates for 1 and 8 streams;
    `prefill_s` is what a prompt token takes."""

    name: str
    quality: float
    tokens_per_s_1: float
    tokens_per_s_8: float
    prefill_s: float

    @property
    def shape(self) -> EngineShape:
        """A step for n sequences takes a + b x n seconds, as the two measured points have it."""
        one, eight = 1 / self.tokens_per_s_1, SEATS / self.tokens_per_s_8
        more = max(0.0, (eight - one) / (SEATS - 1))
        return EngineShape(
            max_num_seqs=SEATS,
            step_s=max(1e-4, one - more),
            step_s_per_sequence=more,
            step_s_per_prompt_token=self.prefill_s,
        )


# SmolLM2-135M on vLLM's CPU build, one core a worker: medians of a first measurement, with no card to read. Quality is
# the dense variant's perplexity by the variant's own.
FORMS = (
    Form("dense", 1.0, 18.4, 77.3, 3.851 / 985),
    Form("w8a8", 13.90 / 14.87, 5.8, 41.4, 2.589 / 985),
    Form("depth26", 13.90 / 22.4, 20.5, 87.2, 3.380 / 985),
)


@dataclass(frozen=True)
class ElasticPlan:
    """One run: `workers` of each variant; tokens are log-normal around their medians; times in seconds."""

    requests: int = 1500
    workers: int = 2
    load: float = 2.0
    prompt: int = 120
    output: int = 60
    patience_s: float = 30.0
    target_s: float = 3.0
    prompt_of_card: int = 80
    forms: tuple[Form, ...] = FORMS


@dataclass
class Job:
    """One request on its way. `step` is that of its choice which it waits at."""

    name: str
    arrived_s: float
    prompt: int
    output: int
    choice: Choice | None = None
    step: int = 0
    variant: str = ""
    first_s: float | None = None
    ended_s: float | None = None

    @property
    def tokens(self) -> int:
        return self.prompt + self.output


def form_of(manifest: Manifest, prompt_tokens: int) -> Form:
    """Raises ValueError for a manifest whose card lacks the quality, or the speed at 1 and 8 streams."""
    card = manifest.card
    speeds = {speed.streams: speed for speed in card.speed} if card else {}
    if card is None or card.relative_quality is None or 1 not in speeds or SEATS not in speeds:
        raise ValueError(f"the card of {manifest.variant!r} lacks its quality, or its speed at 1 and {SEATS} streams")
    prefill_s = max(1e-6, speeds[1].ttft_p50_s - speeds[1].itl_p50_s) / prompt_tokens
    return Form(
        manifest.variant, card.relative_quality, 1 / speeds[1].itl_p50_s, SEATS / speeds[SEATS].itl_p50_s, prefill_s
    )


def forms_of(manifests: Sequence[Path], prompt_tokens: int) -> tuple[Form, ...]:
    """Raises ConfigurationError or ValueError."""
    return tuple(form_of(Manifest.read(path.parent), prompt_tokens) for path in manifests)


class Simulation:
    """All jobs of one run: chosen, queued, computed. `tenant` consents to lesser variants, or does not."""

    def __init__(self, plan: ElasticPlan, forms: Sequence[Form], tenant: Tenant) -> None:
        self._plan = plan
        self._tenant = tenant
        self.now_s = 0.0
        model = Model.model_validate(_model(plan, forms))
        catalogue = Catalogue.of((model,))
        self._registry = Registry(catalogue, open_log(Logs(level="error")))
        self._variants = {variant.name: variant for variant in catalogue.variants}
        self.metrics = open_metrics()
        self._chooser = Chooser(
            catalogue, self._registry, Ttfts(), self.metrics, lambda: self.now_s, lambda: self.now_s
        )
        self._queue = Queue(Rules(1000, 1000, 1000, 10**12, 10**12, 10**12, 10 * US, 0))
        shapes = {form.name: form.shape for form in forms}
        self._engines: dict[str, Engine] = {}
        for worker in self._registry:
            self._registry.change(worker, proven(worker.condition))
            self._engines[worker.id] = Engine(shapes[worker.variant.name])
            self._queue.set_slots(worker.id, SEATS, 0)
        self._jobs: dict[str, Job] = {}
        self._placed: dict[str, Job] = {}
        self._events: list[tuple[float, int, str, str]] = []
        self._numbers = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """To the end of the last job."""
        self._jobs = {job.name: job for job in jobs}
        for job in jobs:
            self._at(job.arrived_s, "arrives", job.name)
        while self._events:
            self.now_s, _, what, name = heapq.heappop(self._events)
            if what == "arrives":
                self._arrive(self._jobs[name])
            elif what == "expires":
                self._expire(name)
            else:
                self._advance(name)

    def _at(self, time_s: float, what: str, name: str) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (time_s, self._numbers, what, name))

    @property
    def _now_us(self) -> int:
        return int(self.now_s * US)

    def _arrive(self, job: Job) -> None:
        request = InferenceRequest.parse(BODY, request_id=job.name, route=Route.CHAT, arrived=self.now_s)
        request.tenant = self._tenant
        job.choice = self._chooser.choose(request)
        self._stand(job)

    def _stand(self, job: Job) -> None:
        """What `Gateway` does with the steps of a choice, but that a wait is an event here."""
        assert job.choice is not None
        step = job.choice.steps[job.step]
        pools = [self._registry.pool(rung) for rung in step.rungs]
        workers = [worker.id for pool in pools for worker in sorted(pool, key=lambda one: self._queue.held(one.id))]
        until_s = job.arrived_s + min(step.wait_s, self._plan.patience_s)
        name, patience_us = f"{job.name}/{job.step}", int(max(0.0, until_s - self.now_s) * US)
        route = " ".join(sorted(workers))
        place = Place(name, BAND, route, tuple(workers), "t", 1.0, float(job.tokens), patience_us)
        self._placed[name] = job
        verdict, grants = self._queue.arrive(place, self._now_us)
        if verdict.kind is Kind.GRANTED:
            self._start(name, verdict.worker)
        elif verdict.kind is Kind.WAITS:
            self._at(until_s, "expires", name)
        else:
            self._step_down(name)
        for granted, worker in grants:
            self._start(granted, worker)

    def _expire(self, name: str) -> None:
        if name in self._placed:
            self._queue.cancel(name)
            self._step_down(name)

    def _step_down(self, name: str) -> None:
        job = self._placed.pop(name)
        assert job.choice is not None
        if job.step < len(job.choice.steps) - 1:
            self._chooser.pressed(job.choice, job.step)
            job.step += 1
            self._stand(job)

    def _start(self, name: str, worker: str) -> None:
        job = self._placed.pop(name)
        job.variant = self._registry[worker].variant.name
        engine = self._engines[worker]
        engine.add(Running(name, job.prompt, job.output), self.now_s)
        self._wake(worker)

    def _wake(self, worker: str) -> None:
        due = self._engines[worker].due
        if due is not None:
            self._at(due, "steps", worker)

    def _advance(self, worker: str) -> None:
        engine = self._engines[worker]
        if engine.due is None or engine.due > self.now_s:
            return  # of a step that was looked at already
        ended = []
        for token in engine.advance(self.now_s):
            job = self._jobs[token.sequence.id.partition("/")[0]]
            job.first_s = self.now_s if token.number == 1 else job.first_s
            if token.is_last:
                job.ended_s = self.now_s
                ended.append(token.sequence.id)
        self._wake(worker)
        for name in ended:
            for granted, where in self._queue.release(name, worker, Debt(BAND, "t", 0.0), self._now_us):
                self._start(granted, where)


def _model(plan: ElasticPlan, forms: Sequence[Form]) -> dict[str, Any]:
    ports = iter(range(1, 1000))
    variants = [
        {
            "name": form.name,
            "quality": form.quality,
            "workers": [{"url": f"http://127.0.0.1:{next(ports)}"} for _ in range(plan.workers)],
        }
        for form in forms
    ]
    return {"name": "m", "policy": "quality", "ttft_target_s": plan.target_s, "variants": variants}


def jobs(plan: ElasticPlan, per_s: float, seed: int) -> list[Job]:
    """Poisson arrivals at `per_s`."""
    lot, now_s, found = random.Random(seed), 0.0, []
    for number in range(plan.requests):
        now_s += lot.expovariate(per_s)
        prompt, output = (max(1, round(lot.lognormvariate(0, 0.6) * median)) for median in (plan.prompt, plan.output))
        found.append(Job(f"j{number:06}", now_s, prompt, output))
    return found


def capacity_per_s(plan: ElasticPlan) -> float:
    """Requests a second that the best variant's workers end when there are always some waiting."""
    plan = replace(plan, requests=400, patience_s=1e6)
    asked = jobs(plan, 1e6, seed=0)
    Simulation(plan, plan.forms[:1], Tenant("t")).run(asked)
    return len(asked) / max(job.ended_s or 0.0 for job in asked)


@dataclass(frozen=True)
class Figures:
    """One row: shares of all requests, seconds, tokens a second of answers that began within the target."""

    served: float
    in_time: float
    goodput: float
    p50_s: float
    p99_s: float
    quality: float
    shares: dict[str, float] = field(default_factory=dict)
    steps: float = 0.0


def figures_of(asked: Sequence[Job], plan: ElasticPlan, steps: float) -> Figures:
    served = [job for job in asked if job.ended_s is not None and job.first_s is not None]
    ttft = sorted((job.first_s or 0.0) - job.arrived_s for job in served)
    good = [job for job in served if (job.first_s or 0.0) - job.arrived_s <= plan.target_s]
    qualities = {form.name: form.quality for form in plan.forms}
    counts = Counter(job.variant for job in served)
    return Figures(
        served=len(served) / len(asked),
        in_time=len(good) / len(asked),
        goodput=sum(job.output for job in good) / asked[-1].arrived_s,
        p50_s=percentile(ttft, 0.5),
        p99_s=percentile(ttft, 0.99),
        quality=sum(qualities[job.variant] for job in served) / len(served),
        shares={name: counts[name] / len(served) for name in qualities},
        steps=steps,
    )


def measure(plan: ElasticPlan, seed: int = 1) -> tuple[float, dict[str, Figures]]:
    """The best variant's capacity in requests/s, and each row: the same arrivals at `load` times that."""
    per_s = capacity_per_s(plan)
    alone = replace(plan, workers=plan.workers * len(plan.forms))
    runs: dict[str, tuple[ElasticPlan, Sequence[Form], Tenant]] = {
        f"{plan.forms[0].name} only, the other workers idle (no consent)": (plan, plan.forms, Tenant("t")),
        "steps down (consent)": (plan, plan.forms, Tenant("t", degrade=True)),
        f"as many workers, all {plan.forms[0].name}": (alone, plan.forms[:1], Tenant("t")),
    }
    found = {}
    for name, (used, forms, tenant) in runs.items():
        asked = jobs(plan, per_s * plan.load, seed)
        simulation = Simulation(used, forms, tenant)
        simulation.run(asked)
        counted = simulation.metrics.variant_steps.collect()
        steps = sum(one.value for family in counted for one in family.samples if one.name.endswith("_total"))
        found[name] = figures_of(asked, plan, steps)
    return per_s, found


def figures(found: dict[str, Figures], plan: ElasticPlan) -> str:
    shares = [f"on {form.name}" for form in plan.forms]
    header = ["", "served", f"TTFT ≤ {plan.target_s:g} s", "goodput [tokens/s]", "TTFT p50 [s]", "p99 [s]", "quality"]
    return table([*header, *shares, "steps"], [[name, *_row(row, plan)] for name, row in found.items()])


def _row(row: Figures, plan: ElasticPlan) -> Iterator[str]:
    yield from (f"{row.served:.1%}", f"{row.in_time:.1%}", f"{row.goodput:.0f}", f"{row.p50_s:.2f}", f"{row.p99_s:.2f}")
    yield f"{row.quality:.3f}"
    yield from (f"{row.shares[form.name]:.1%}" for form in plan.forms)
    yield f"{row.steps:.0f}"


_METHOD = """\
A simulation in virtual time: `app.routing.chooser` and `app.admission.fairness.Queue` drive modelled engines of
{seats} seats, {plan.workers} for each variant, policy `quality`. {plan.requests} requests arrive by Poisson's law at
{plan.load:g} × the {per_s:.2f} requests/s that the {first} workers end under constant backlog; prompts of some
{plan.prompt} tokens, answers of some {plan.output}, log-normal; nobody waits longer than {plan.patience_s:g} s for a
slot. Goodput: tokens of answers that began within the TTFT target. Quality: the mean over those that were served, 1 is
the best variant's. Steps: times that a ladder opened or closed. Engines as fast as {source}:

{forms}
"""


def section(found: dict[str, Figures], plan: ElasticPlan, per_s: float, source: str) -> str:
    """The results' section on stepping down."""
    header = ["variant", "tokens/s, 1 stream", f"{SEATS} streams", "ms a prompt token", "quality"]
    speeds = [(form.tokens_per_s_1, form.tokens_per_s_8, 1e3 * form.prefill_s, form.quality) for form in plan.forms]
    forms = table(
        header,
        [[form.name, *(f"{value:.3g}" for value in row)] for form, row in zip(plan.forms, speeds, strict=True)],
    )
    method = _METHOD.format(plan=plan, seats=SEATS, per_s=per_s, first=plan.forms[0].name, source=source, forms=forms)
    return "\n".join(["# Stepping down under twice the load\n", figures(found, plan), method])
