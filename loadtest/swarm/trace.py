"""Traces: when requests arrived and how long they were. Read, converted from public formats, made up. Pure.

A trace file is JSON lines in Mooncake's format: `timestamp` in milliseconds from the start, `input_length` and
`output_length` in tokens, and, where known, `hash_ids`: a name for each block of 512 prompt tokens and all before it.
Prompts whose ids begin alike begin alike. (Qin et al., "Mooncake", FAST 2025, github.com/kvcache-ai/Mooncake.)

Converted besides:
  BurstGPT: CSV, `Timestamp` in seconds, `Request tokens`, `Response tokens` (0 for failures); other columns are not
    read (Wang et al., "BurstGPT", KDD 2025, github.com/HPMLL/BurstGPT).
  Azure LLM inference: CSV, `TIMESTAMP` as a date and time with up to seven decimals, in 2024 with an offset,
    `ContextTokens`, `GeneratedTokens` (github.com/Azure/AzurePublicDataset).
"""

from __future__ import annotations

import csv
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import msgspec

BLOCK_TOKENS = 512
_WORDS = ("the", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as")
_FRACTION = re.compile(r"\.(\d{1,6})\d*")


class TraceError(ValueError):
    """What was given is no trace; the message names the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: due `at_s` after the start; lengths in tokens."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def convert(lines: Iterable[str]) -> Iterator[Arrival]:
    """The arrivals of a file in any of the three formats, as its first line tells; times as they stand there.

    Requests without a prompt or an answer failed when the trace was taken, and are left out. Raises TraceError.
    """
    source = iter(lines)
    first = next(source, "").lstrip("\ufeff")
    whole = itertools.chain([first], source)
    if first.startswith("{"):
        found = _mooncake(whole)
    elif "Request tokens" in first:
        found = _rows(whole, _burstgpt)
    elif "ContextTokens" in first:
        found = _rows(whole, _azure)
    else:
        raise TraceError(f"neither Mooncake's JSON lines nor the columns of BurstGPT or Azure: {first[:80]!r}")
    return (arrival for arrival in found if arrival.prompt_tokens > 0 and arrival.answer_tokens > 0)


def _mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.DecodeError as error:
            raise TraceError(f"line {number}: {error}") from None
        yield Arrival(line.timestamp / 1000, line.input_length, line.output_length, line.hash_ids)


def _rows(lines: Iterable[str], read: Callable[[Mapping[str, str]], Arrival]) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            yield read(row)
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"line {number}: {error!r}") from None


def _burstgpt(row: Mapping[str, str]) -> Arrival:
    return Arrival(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))


def _azure(row: Mapping[str, str]) -> Arrival:
    # Seven decimals are more than datetime takes.
    when = datetime.fromisoformat(_FRACTION.sub(lambda found: "." + found[1].ljust(6, "0"), row["TIMESTAMP"]))
    at_s = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return Arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def window(
    arrivals: Iterable[Arrival],
    *,
    begin_s: float = 0.0,
    lasts_s: float | None = None,
    speed: float = 1.0,
    most: int | None = None,
    prompt_limit: int | None = None,
    answer_limit: int | None = None,
) -> list[Arrival]:
    """A part of a trace, in order of arrival, from zero, `speed` times as fast, with lengths cut to the limits.

    `begin_s` and `lasts_s` are of the trace's own time, counted from its first arrival.
    """
    ordered = sorted(arrivals, key=lambda arrival: arrival.at_s)
    start_s = (ordered[0].at_s if ordered else 0.0) + begin_s
    end_s = float("inf") if lasts_s is None else start_s + lasts_s
    chosen = [arrival for arrival in ordered if start_s <= arrival.at_s < end_s][:most]
    return [
        replace(
            arrival,
            at_s=(arrival.at_s - start_s) / speed,
            prompt_tokens=min(arrival.prompt_tokens, prompt_limit or arrival.prompt_tokens),
            answer_tokens=min(arrival.answer_tokens, answer_limit or arrival.answer_tokens),
        )
        for arrival in chosen
    ]


def encode(arrivals: Iterable[Arrival]) -> Iterator[str]:
    """The lines of a trace file."""
    for arrival in arrivals:
        line = _Line(round(arrival.at_s * 1000), arrival.prompt_tokens, arrival.answer_tokens, arrival.blocks)
        yield msgspec.json.encode(line).decode() + "\n"


def prompt(arrival: Arrival, seed: int) -> str:
    """A prompt of so many short words, a little over one token each; equal blocks are equal words."""
    blocks: Sequence[int | str] = arrival.blocks or (f"{seed}:{arrival.at_s}:{arrival.prompt_tokens}",)
    words: list[str] = []
    for at, block in enumerate(blocks):
        left = arrival.prompt_tokens - len(words)
        count = left if at == len(blocks) - 1 else min(left, BLOCK_TOKENS)
        source = random.Random(f"{seed}:{block}")
        words += [_WORDS[source.randrange(len(_WORDS))] for _ in range(count)]
    return " ".join(words)


def synthetic(seconds: float, rate: float, seed: int) -> list[Arrival]:
    """A made-up trace: bursts on a slow wave, log-normal lengths, a third of the prompts going on from an earlier one.

    Lengths have medians of 180 prompt and 60 answer tokens, gaps a gamma distribution of shape 0.5 (BurstGPT's finding,
    burstier than Poisson), so that it resembles chat; it is measured nowhere.
    """
    source = random.Random(seed)
    arrivals: list[Arrival] = []
    at_s, blocks = 0.0, itertools.count()
    while (at_s := at_s + source.gammavariate(0.5, 2 / (rate * _wave(at_s / seconds)))) < seconds:
        tokens = min(2000, max(8, round(source.lognormvariate(5.2, 0.8))))
        answer = min(400, max(4, round(source.lognormvariate(4.1, 0.6))))
        before = source.choice(arrivals).blocks if arrivals and source.random() < 1 / 3 else ()
        length = len(before) * BLOCK_TOKENS + tokens if len(before) < 3 else tokens
        shared = before if len(before) < 3 else ()
        named = [*shared, *(next(blocks) for _ in range(-(-length // BLOCK_TOKENS) - len(shared)))]
        arrivals.append(Arrival(round(at_s, 3), length, answer, tuple(named)))
    return arrivals


def _wave(share: float) -> float:
    """From half the rate up to one and a half and back, twice."""
    return 1.0 - 0.5 * math.cos(4 * math.pi * share)
