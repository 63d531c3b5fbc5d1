"""`python -m loadtest order`: first come first served, or shortest predicted first, on simulated vLLM workers.

Nothing here is timed: `app.admission.fairness.Queue` and the gateway's own estimates of cost drive a simulation, so
the figures are the same on every machine. A worker steps as vLLM does: each step decodes one token of every running
sequence and computes at most a budget of prompt tokens, first come first served.
"""

import heapq
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from app.admission.cost import Costs
from app.admission.fairness import Debt, Kind, Place, Queue, Rules
from app.inference import TokenUsage
from loadtest.report import table
from loadtest.samples import percentile

US = 1_000_000
BAND = 2
ROUTE = "pool"
BYTES_PER_TOKEN = 4.2
HOUR_S = 3600.0
LOADS = (0.9, 1.2, 2.0)
ORDERS_S = (0.0, 0.003, 0.01, 0.03)
SEEDS = 3


@dataclass(frozen=True)
class Demand:
    """What one request is in truth; of `output` nobody knows before, unless `max_tokens` tells."""

    prompt: int
    output: int
    max_tokens: int | None


Mix = Callable[[random.Random], Demand]


def _tokens(lot: random.Random, median: float, spread: float, most: int) -> int:
    return min(max(1, round(lot.lognormvariate(0.0, spread) * median)), most)


def chat(lot: random.Random) -> Demand:
    """Conversations; two of three clients do not limit the answer, the others far too generously."""
    output = _tokens(lot, 150, 0.9, 2048)
    limit = lot.choice((None, None, 2048))
    return Demand(_tokens(lot, 300, 1.0, 8192), output, limit)


def limited(lot: random.Random) -> Demand:
    """Clients that know what they want: most say a limit, and reach it half of the time."""
    limit = lot.choice((16, 64, 256, 1024))
    output = limit if lot.random() < 0.5 else max(1, round(limit * lot.random()))
    return Demand(_tokens(lot, 300, 1.0, 8192), output, limit)


def documents(lot: random.Random) -> Demand:
    """Short chats, and one in eight that brings a long document to be summarised."""
    if lot.random() < 1 / 8:
        return Demand(_tokens(lot, 6000, 0.4, 16_384), _tokens(lot, 200, 0.4, 1024), 1024)
    return Demand(_tokens(lot, 150, 0.8, 2048), _tokens(lot, 100, 0.8, 1024), None)


def alike(lot: random.Random) -> Demand:
    """Requests that nothing tells apart beforehand: the prompts are equal, the answers are not."""
    return Demand(500, _tokens(lot, 150, 0.9, 2048), None)


MIXES: dict[str, Mix] = {"chat": chat, "limited": limited, "documents": documents, "alike": alike}


@dataclass(frozen=True)
class OrderPlan:
    """One measurement. The engine's figures are of the size of an 8-billion model on one data-centre GPU."""

    requests: int = 3000
    tenants: int = 4
    workers: int = 2
    slots: int = 32
    patience_s: float = 30.0
    step_s: float = 0.010
    step_s_per_sequence: float = 0.0002
    step_s_per_prompt_token: float = 0.0001
    prompt_tokens_per_step: int = 2048


@dataclass
class Job:
    """One request on its way. `first_s` is when its first token came, None for one that was not served."""

    name: str
    tenant: str
    demand: Demand
    arrived_s: float
    cost: float = 0.0
    first_s: float | None = None

    @property
    def tokens(self) -> int:
        return self.demand.prompt + self.demand.output

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrived_s


@dataclass
class Prompt:
    """A job whose prompt has so many tokens left to compute."""

    job: Job
    missing: int


@dataclass
class Engine:
    """One worker: sequences whose prompts are being computed, in order, and those that decode, by their last step."""

    plan: OrderPlan
    name: str
    prompts: deque["Prompt"] = field(default_factory=deque)
    decoding: list[tuple[int, str, Job]] = field(default_factory=list)
    steps: int = 0
    is_stepping: bool = False
    begun: list[Job] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        return not self.prompts and not self.decoding

    def take(self, job: Job) -> None:
        self.prompts.append(Prompt(job, job.demand.prompt))

    def begin_step(self) -> float:
        """Seconds that the step takes which begins now; `end_step` tells what it brought."""
        plan, left = self.plan, self.plan.prompt_tokens_per_step
        while self.prompts and left:
            first = self.prompts[0]
            computed = min(left, first.missing)
            left -= computed
            first.missing -= computed
            if not first.missing:
                self.begun.append(self.prompts.popleft().job)
        computed = plan.prompt_tokens_per_step - left
        decoding_s = plan.step_s_per_sequence * len(self.decoding)
        return plan.step_s + decoding_s + plan.step_s_per_prompt_token * computed

    def end_step(self) -> tuple[list[Job], list[Job]]:
        """Those that got their first token, and those that got their last."""
        self.steps += 1
        begun, self.begun = self.begun, []
        for job in begun:
            heapq.heappush(self.decoding, (self.steps + job.demand.output - 1, job.name, job))
        ended = []
        while self.decoding and self.decoding[0][0] <= self.steps:
            ended.append(heapq.heappop(self.decoding)[2])
        return begun, ended


class Simulation:
    """All jobs of one run through one queue and its workers."""

    def __init__(self, plan: OrderPlan, rules: Rules, *, patience_s: float) -> None:
        self._plan = plan
        self._patience_s = patience_s
        self._queue = Queue(rules)
        self._costs = Costs()
        self._engines = {name: Engine(plan, name) for name in (f"w{n}" for n in range(plan.workers))}
        self._jobs: dict[str, Job] = {}
        self._events: list[tuple[float, int, str, str]] = []
        self._numbers = 0
        self.now_s = 0.0
        self.ended_s = 0.0
        for name in self._engines:
            self._queue.set_slots(name, plan.slots, 0)

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
                self._queue.cancel(name)
            else:
                self._step_ended(self._engines[name])

    def _at(self, time_s: float, what: str, name: str) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (time_s, self._numbers, what, name))

    @property
    def _now_us(self) -> int:
        return int(self.now_s * US)

    def _arrive(self, job: Job) -> None:
        demand = job.demand
        job.cost = self._costs.of("m").estimate(_bytes(demand), demand.max_tokens)
        workers = sorted(self._engines, key=self._queue.held)
        patience_us = int(self._patience_s * US)
        place = Place(job.name, BAND, ROUTE, tuple(workers), job.tenant, 1.0, job.cost, patience_us)
        verdict, grants = self._queue.arrive(place, self._now_us)
        if verdict.kind is Kind.GRANTED:
            self._start(job, verdict.worker)
        elif verdict.kind is Kind.WAITS:
            self._at(self.now_s + self._patience_s, "expires", job.name)
        for name, worker in grants:
            self._start(self._jobs[name], worker)

    def _start(self, job: Job, worker: str) -> None:
        engine = self._engines[worker]
        engine.take(job)
        if not engine.is_stepping:
            engine.is_stepping = True
            self._at(self.now_s + engine.begin_step(), "steps", engine.name)

    def _step_ended(self, engine: Engine) -> None:
        begun, ended = engine.end_step()
        for job in begun:
            job.first_s = self.now_s
        for job in ended:
            self.ended_s = self.now_s
            self._end(job, engine.name)
        engine.is_stepping = not engine.is_idle
        if engine.is_stepping:
            self._at(self.now_s + engine.begin_step(), "steps", engine.name)

    def _end(self, job: Job, worker: str) -> None:
        self._costs.of("m").learn(_bytes(job.demand), TokenUsage(job.demand.prompt, job.demand.output))
        debt = Debt(BAND, job.tenant, job.tokens - job.cost)
        for name, granted_on in self._queue.release(job.name, worker, debt, self._now_us):
            self._start(self._jobs[name], granted_on)


def _bytes(demand: Demand) -> int:
    return round(demand.prompt * BYTES_PER_TOKEN) + 100


def rules(order_s_per_token: float) -> Rules:
    """The default bounds, wide open in bytes."""
    return Rules(1000, 1000, 1000, 10**12, 10**12, 10**12, 10 * US, int(order_s_per_token * US))


def jobs(mix: Mix, plan: OrderPlan, per_s: float, seed: int) -> list[Job]:
    """Poisson arrivals at `per_s`, of tenants that ask for equally much."""
    lot, now_s, found = random.Random(seed), 0.0, []
    for number in range(plan.requests):
        now_s += lot.expovariate(per_s)
        found.append(Job(f"j{number:06}", f"t{lot.randrange(plan.tenants)}", mix(lot), now_s))
    return found


def capacity_per_s(mix: Mix, plan: OrderPlan) -> float:
    """Requests a second that the workers end when there are always some waiting."""
    plan = replace(plan, requests=900)
    asked = jobs(mix, plan, 1e6, seed=0)
    simulation = Simulation(plan, rules(0), patience_s=HOUR_S)
    simulation.run(asked)
    return len(asked) / simulation.ended_s


@dataclass(frozen=True)
class OrderFigures:
    """What one order brought: TTFT of those that were served, in seconds; `unserved` is the share of all that were not,
    `long_unserved` of the tenth with the most tokens; `jain` compares the tokens that tenants got."""

    mean_s: float
    p50_s: float
    p99_s: float
    most_s: float
    long_mean_s: float
    unserved: float
    long_unserved: float
    jain: float

    @classmethod
    def of(cls, asked: Sequence[Job]) -> "OrderFigures":
        served = [job for job in asked if job.first_s is not None]
        longest = sorted(asked, key=lambda job: job.tokens)[-len(asked) // 10 :]
        ttft = sorted(job.ttft_s for job in served)
        got: Counter[str] = Counter()
        for job in served:
            got[job.tenant] += job.tokens
        return cls(
            mean_s=fmean(ttft),
            p50_s=percentile(ttft, 0.5),
            p99_s=percentile(ttft, 0.99),
            most_s=ttft[-1],
            long_mean_s=fmean([job.ttft_s for job in longest if job.first_s is not None] or [0.0]),
            unserved=1 - len(served) / len(asked),
            long_unserved=fmean(job.first_s is None for job in longest),
            jain=sum(got.values()) ** 2 / (len(got) * sum(tokens * tokens for tokens in got.values())),
        )


Results = dict[tuple[str, float], dict[float, list[OrderFigures]]]


def measure(plan: OrderPlan, mixes: Sequence[str], orders_s: Sequence[float] = ORDERS_S, seeds: int = SEEDS) -> Results:
    """All orders on the same arrivals: {(mix, load): {order: one entry a seed}}."""
    found: Results = {}
    for name in mixes:
        capacity = capacity_per_s(MIXES[name], plan)
        for load in LOADS:
            row = found[name, load] = defaultdict(list)
            for order_s in orders_s:
                for seed in range(1, seeds + 1):
                    asked = jobs(MIXES[name], plan, capacity * load, seed)
                    Simulation(plan, rules(order_s), patience_s=plan.patience_s).run(asked)
                    row[order_s].append(OrderFigures.of(asked))
    return found


def figures(results: Results) -> str:
    """One row for each mix, load and order; means over the seeds."""
    return table(
        ["mix, load", "s/token", "TTFT mean", "p50", "p99", "most", "long mean", "unserved", "long unserved", "Jain"],
        [row for key, orders in results.items() for row in _rows(f"{key[0]} {key[1]:g}×", orders)],
    )


def _rows(label: str, orders: dict[float, list[OrderFigures]]) -> Iterator[list[str]]:
    for order_s, seen in orders.items():
        yield [
            label,
            f"{order_s:g}",
            *(
                f"{fmean(getattr(one, name) for one in seen):.2f}"
                for name in ("mean_s", "p50_s", "p99_s", "most_s", "long_mean_s")
            ),
            *(f"{fmean(getattr(one, name) for one in seen):.1%}" for name in ("unserved", "long_unserved")),
            f"{fmean(one.jain for one in seen):.3f}",
        ]


_METHOD = """\
A simulation, driven through `app.admission.fairness.Queue` with the gateway's own learned estimates of cost: the
prompt's tokens by bytes, the output by a learned quantile or the client's limit, settled with the real tokens. Every
row of a mix and a load has the same Poisson arrivals; the load is a multiple of what the workers end under constant
backlog. {plan.workers} workers of {plan.slots} slots; a step takes {plan.step_s:g} s, {plan.step_s_per_sequence:g} s
for each decoding sequence and {plan.step_s_per_prompt_token:g} s for each prompt token, at most
{plan.prompt_tokens_per_step} of them. {plan.tenants} tenants that ask for equally much; nobody waits longer than
{plan.patience_s:g} s. {plan.requests} requests in a run, means over {seeds} runs.

`s/token` is `admission.order_s_per_token`, 0 is first come first served. TTFT in seconds, of those that were served;
`long` are the tenth with the most tokens; `unserved` were refused or waited in vain; Jain's index compares the tokens
that tenants got. `chat`: two of three clients set no limit, the others one that says nothing. `limited`: limits that
are meant. `documents`: one request in eight brings 6,000 tokens. `alike`: nothing tells requests apart beforehand.
"""


def section(results: Results, plan: OrderPlan, seeds: int) -> str:
    """The results' section on the order in a flow."""
    return "\n".join(
        ["# First come first served, or shortest first\n", figures(results), _METHOD.format(plan=plan, seeds=seeds)]
    )
