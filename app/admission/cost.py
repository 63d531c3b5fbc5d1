"""What a request will cost, in tokens, before anybody knows; learned per model from what requests did cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from app.admission.quota import Tokens
from app.inference import TokenUsage

FIRST_BYTES_PER_TOKEN = 4.0  # English prose in most vocabularies; JSON framing and other scripts move it
FIRST_OUTPUT_TOKENS = 128.0
MEMORY = 1 / 64  # weight of the newest request in the learned bytes per token
QUANTILE = 0.8  # the learned output is exceeded by one request in five: too low a guess is a debt, settled later
STEP = 0.05
MAX_OUTPUT_TOKENS = 1e6


@dataclass(slots=True)
class Habits:
    """What is known of a model's requests."""

    bytes_per_token: float = FIRST_BYTES_PER_TOKEN
    output_tokens: float = FIRST_OUTPUT_TOKENS

    def estimate(self, prompt_bytes: int, max_tokens: int | None) -> float:
        """Prompt and output tokens."""
        output = self.output_tokens if max_tokens is None else min(self.output_tokens, max_tokens)
        return max(1.0, prompt_bytes / self.bytes_per_token + output)

    def guess(self, prompt_bytes: int) -> Tokens:
        """Prompt and output tokens of a request that does not say how many it wants."""
        return Tokens(ceil(prompt_bytes / self.bytes_per_token), ceil(self.output_tokens))

    def learn(self, prompt_bytes: int, usage: TokenUsage) -> None:
        """From a request that ended: a running mean of bytes per token, a step towards the quantile of output."""
        if usage.prompt_tokens > 0:
            seen = max(0.1, prompt_bytes / usage.prompt_tokens)
            self.bytes_per_token += MEMORY * (seen - self.bytes_per_token)
        if usage.completion_tokens > 0:
            is_below = usage.completion_tokens <= self.output_tokens
            step = 1 + STEP * (QUANTILE - is_below)
            self.output_tokens = min(max(self.output_tokens * step, 1.0), MAX_OUTPUT_TOKENS)


@dataclass(slots=True)
class Costs:
    """The habits of every model. Names come from the catalogue, so there are as many as models."""

    _of_model: dict[str, Habits] = field(default_factory=dict)

    def of(self, model: str) -> Habits:
        return self._of_model.setdefault(model, Habits())
