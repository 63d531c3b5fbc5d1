"""Conversations that grow turn by turn, some with the same system prompt: the load that prefix caching is for. Pure."""

import random
from dataclasses import dataclass, field
from typing import Any

_WORDS = """
river stone window market letter garden engine shadow bridge candle forest paper silver morning harbour question
winter copper village mirror thunder orchard pocket lantern valley anchor meadow compass ribbon castle station
journey feather kitchen blanket mountain picture button ladder island
"""


@dataclass(frozen=True)
class Workload:
    """Lengths are words, a little over one token each; `answer_tokens` are generated, whatever the model would like.

    Attributes:
        systems: how many system prompts there are; the conversations share them evenly.
    """

    conversations: int = 8
    turns: int = 6
    systems: int = 3
    system_words: int = 150
    question_words: int = 70
    answer_tokens: int = 12

    @property
    def requests(self) -> int:
        return self.conversations * self.turns


@dataclass
class Conversation:
    """What has been said so far, and what the user will still ask."""

    messages: list[dict[str, str]]
    questions: list[str] = field(default_factory=list)

    def ask(self, model: str, answer_tokens: int) -> dict[str, Any]:
        """The body of the next turn's request."""
        self.messages.append({"role": "user", "content": self.questions.pop(0)})
        return {
            "model": model,
            "messages": self.messages,
            "stream": True,
            "max_tokens": answer_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }

    def hear(self, answer: str) -> None:
        self.messages.append({"role": "assistant", "content": answer})


def conversations(load: Workload, seed: int, mark: str) -> list[Conversation]:
    """The same conversations for the same seed, but for `mark` at the start of each: nothing said under another mark
    is in any cache.
    """
    source = random.Random(seed)
    systems = [f"{mark} {_text(source, load.system_words)}" for _ in range(load.systems)]
    return [
        Conversation(
            [{"role": "system", "content": systems[at % load.systems]}],
            [_text(source, load.question_words) for _ in range(load.turns)],
        )
        for at in range(load.conversations)
    ]


def _text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(_WORDS.split(), k=words))
