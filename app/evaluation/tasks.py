"""Three short tasks whose data is made here: what a model knows, finds in its prompt, and computes. Pure.

They are apart because compression hurts them differently: pruning takes knowledge first, low precision arithmetic, and
both leave looking things up in the prompt nearly alone ("Compressing LLMs: The Truth is Rarely Pure and Never Simple",
https://arxiv.org/abs/2310.01382, and "The Cost of Compression", https://arxiv.org/abs/2310.04680).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import get_args

from app.card import TaskName

TASKS: tuple[TaskName, ...] = get_args(TaskName)
ANSWER_TOKENS = 12
STOP = "\n"
PAIRS = 12
PROMPT_WORDS = 80
DIGITS_FROM, DIGITS_TO = 10, 99

CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Brazil": "Brasília", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogotá", "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest",
    "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad",
    "Ireland": "Dublin", "Israel": "Jerusalem", "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman",
    "Kenya": "Nairobi", "Lebanon": "Beirut", "Mexico": "Mexico City", "Morocco": "Rabat", "Nepal": "Kathmandu",
    "the Netherlands": "Amsterdam", "New Zealand": "Wellington", "Nigeria": "Abuja", "Norway": "Oslo",
    "Pakistan": "Islamabad", "Peru": "Lima", "the Philippines": "Manila", "Poland": "Warsaw", "Romania": "Bucharest",
    "Russia": "Moscow", "Saudi Arabia": "Riyadh", "Serbia": "Belgrade", "Slovakia": "Bratislava",
    "South Korea": "Seoul", "Sweden": "Stockholm", "Syria": "Damascus", "Thailand": "Bangkok", "Tunisia": "Tunis",
    "Turkey": "Ankara", "Ukraine": "Kyiv", "the United Kingdom": "London", "Uruguay": "Montevideo",
    "Venezuela": "Caracas", "Vietnam": "Hanoi", "Zambia": "Lusaka", "Zimbabwe": "Harare",
}  # fmt: skip
SHOTS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon"}
WORDS = (
    "anchor", "apple", "basket", "bridge", "candle", "castle", "cloud", "copper", "desert", "dragon", "engine",
    "feather",
    "forest", "garden", "hammer", "harbor", "island", "ladder", "lemon", "marble", "mirror", "mountain", "needle",
    "orange", "paper", "pepper", "piano", "pillow", "planet", "pocket", "rabbit", "river", "rocket", "saddle", "silver",
    "spider", "summer", "table", "temple", "thunder", "ticket", "tiger", "tunnel", "valley", "velvet", "violin",
    "window", "winter",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One question: a prompt to be continued up to the end of its line, and what the line must say."""

    prompt: str
    answer: str

    def is_right(self, line: str) -> bool:
        return plain(line) == plain(self.answer)


def plain(text: str) -> str:
    """The first line of `text` without case, punctuation and outer blanks: what lm-eval's `exact_match` sees."""
    line = text.lstrip().partition("\n")[0].lower()
    return line.translate(str.maketrans("", "", string.punctuation)).strip()


def items(task: TaskName, count: int, seed: int) -> list[Item]:
    """`count` questions of a task, the same ones for the same seed; fewer where the task has no more."""
    random = Random(f"{task} {seed}")  # noqa: S311 - a draw of questions, no secret
    return MAKERS[task](random, count)


def _knowledge(random: Random, count: int) -> list[Item]:
    head = "".join(_capital(country, f" {city}\n\n") for country, city in SHOTS.items())
    asked = random.sample(sorted(CAPITALS), min(count, len(CAPITALS)))
    return [Item(head + _capital(country, ""), CAPITALS[country]) for country in asked]


def _capital(country: str, answer: str) -> str:
    return f"Question: What is the capital of {country}?\nAnswer:{answer}"


def _retrieval(random: Random, count: int) -> list[Item]:
    return [_lookup(random) for _ in range(count)]


def _lookup(random: Random) -> Item:
    """A list of names and numbers, two look-ups answered, and a third one asked."""
    names = random.sample(WORDS, PAIRS)
    numbers = {name: str(random.randint(100, 999)) for name in names}
    rows = "".join(f"{name}: {number}\n" for name, number in numbers.items())
    first, second, asked = random.sample(names, 3)
    shown = "".join(f"The number of {name} is {numbers[name]}\n" for name in (first, second))
    return Item(f"{rows}\n{shown}The number of {asked} is", numbers[asked])


def _arithmetic(random: Random, count: int) -> list[Item]:
    sums = ((random.randint(DIGITS_FROM, DIGITS_TO), random.randint(DIGITS_FROM, DIGITS_TO)) for _ in range(count))
    head = "".join(f"{a} + {b} = {a + b}\n" for a, b in ((12, 25), (47, 36), (80, 19), (58, 67)))
    return [Item(f"{head}{a} + {b} =", str(a + b)) for a, b in sums]


def prompts(count: int, seed: int) -> list[str]:
    """Texts of about eighty tokens for measurements of speed; they differ from their first word on, so that none is
    found in a prefix cache."""
    random = Random(f"prompts {seed}")  # noqa: S311 - a draw of words, no secret
    return [" ".join(random.choices(WORDS, k=PROMPT_WORDS)) for _ in range(count)]


MAKERS: Mapping[TaskName, Callable[[Random, int], list[Item]]] = {
    "knowledge": _knowledge,
    "retrieval": _retrieval,
    "arithmetic": _arithmetic,
}
