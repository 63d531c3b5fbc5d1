"""A model of one vLLM engine: continuous batching, as its V1 scheduler does it. Pure: times come in as seconds.

In a step every running sequence computes the tokens that it lacks: one if it decodes, a chunk of its prompt if it does
not, as many as the step's token budget leaves. Whoever lacks nothing after it has generated a token. Waiting sequences
join between steps, first come first served, while there are seats and cache for them. When the cache is full the
youngest running sequence is preempted: it loses its cache, waits in front of all others and computes all of it again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class EngineShape:
    """How large and how fast an engine is. The first three are vLLM's options; a step takes `step_s` and so much more.

    The defaults are those of a small model on a small accelerator: 17 ms a token for eight at once.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    kv_tokens: int = 16_384
    step_s: float = 0.015
    step_s_per_sequence: float = 0.00025
    step_s_per_prompt_token: float = 0.0002


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine. `computed` are the tokens whose keys and values are in the cache."""

    id: str
    prompt_tokens: int
    output_tokens: int
    generated: int = 0
    computed: int = 0

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be generated."""
        return self.prompt_tokens + self.generated - self.computed

    @property
    def is_done(self) -> bool:
        return self.generated >= self.output_tokens


class Token(NamedTuple):
    """A sequence generated its token `number`, from 1 on, at the end of a step. It may have more by now."""

    sequence: Sequence
    number: int
    at: float

    @property
    def is_last(self) -> bool:
        return self.number == self.sequence.output_tokens


class Engine:
    """Call `advance` before anything else that has a time, and again when `due` has come.

    Steps follow one another by their own lengths, not by when somebody looks: who looks late loses no throughput.
    """

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._step: list[tuple[Sequence, int]] = []
        self.due: float | None = None
        """When the present step ends; None without work."""
        self.preemptions = 0
        self.generated = 0
        self.waiting_most = 0
        """The most that were left waiting by a step: what a scrape can see of the queue inside."""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        return self._cached / self._shape.kv_tokens

    @property
    def _cached(self) -> int:
        return sum(sequence.computed for sequence in self._running)

    def add(self, sequence: Sequence, now: float) -> None:
        """A request arrives. Raises ValueError for one that can never fit."""
        if sequence.prompt_tokens + sequence.output_tokens > self._shape.kv_tokens:
            raise ValueError("longer than the whole cache")
        self._waiting.append(sequence)
        if self.due is None:
            self._begin(now)

    def abort(self, sequence: Sequence) -> None:
        """Its client left. Nothing happens if it is over."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def advance(self, now: float) -> list[Token]:
        """Let time pass; the tokens of all steps that ended by now."""
        tokens: list[Token] = []
        while self.due is not None and self.due <= now:
            tokens += self._end(self.due)
            self._begin(self.due)
        return tokens

    def _end(self, at: float) -> list[Token]:
        tokens = []
        for sequence, count in self._step:
            if sequence not in self._running:
                continue  # aborted meanwhile
            sequence.computed += count
            if not sequence.missing:
                sequence.generated += 1
                self.generated += 1
                tokens.append(Token(sequence, sequence.generated, at))
                if sequence.is_done:
                    self._running.remove(sequence)
        return tokens

    def _begin(self, at: float) -> None:
        self._step = self._scheduled()
        self.waiting_most = max(self.waiting_most, len(self._waiting))
        if not self._step:
            self.due = None
            return
        prompt_tokens = sum(count for sequence, count in self._step if not sequence.generated or count > 1)
        shape = self._shape
        self.due = (
            at
            + shape.step_s
            + shape.step_s_per_sequence * len(self._step)
            + shape.step_s_per_prompt_token * prompt_tokens
        )

    def _scheduled(self) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens in the step that begins."""
        budget, planned = self._shape.max_num_batched_tokens, 0
        step: list[tuple[Sequence, int]] = []
        preemptions = self.preemptions
        for sequence in list(self._running):
            count = min(sequence.missing, budget)
            while sequence in self._running and self._cached + planned + count > self._shape.kv_tokens:
                self._preempt()
            if sequence in self._running and count:
                step.append((sequence, count))
                budget, planned = budget - count, planned + count
        if self.preemptions == preemptions:  # who was just put out must not come straight back in
            step += self._joining(budget, planned)
        return step

    def _joining(self, budget: int, planned: int) -> list[tuple[Sequence, int]]:
        joining = []
        while self._waiting and budget and len(self._running) < self._shape.max_num_seqs:
            first = self._waiting[0]
            if self._cached + planned + first.missing > self._shape.kv_tokens:
                break
            self._running.append(self._waiting.popleft())
            count = min(first.missing, budget)
            joining.append((first, count))
            budget, planned = budget - count, planned + count
        return joining

    def _preempt(self) -> None:
        youngest = self._running.pop()
        youngest.computed = 0
        self._waiting.appendleft(youngest)
        self.preemptions += 1
