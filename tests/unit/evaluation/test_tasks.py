"""Questions that a seed brings back, and how lines are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.card import TaskName
from app.evaluation.endpoint import Endpoint
from app.evaluation.harness import command, definition
from app.evaluation.tasks import SHOTS, TASKS, Item, items, plain, prompts


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_asks_the_same_questions(task: TaskName) -> None:
    assert items(task, 20, 5) == items(task, 20, 5)
    assert items(task, 20, 5) != items(task, 20, 6)
    assert len(items(task, 20, 5)) == 20


@pytest.mark.parametrize("task", TASKS)
def test_every_question_ends_where_its_answer_begins(task: TaskName) -> None:
    for item in items(task, 30, 1):
        assert item.prompt == item.prompt.rstrip()
        assert item.is_right(f" {item.answer}\nmore")
        assert not item.is_right(f" {item.answer} or not")


def test_what_is_looked_up_stands_in_the_prompt_once() -> None:
    for item in items("retrieval", 30, 1):
        name = item.prompt.split()[-2]
        assert item.prompt.count(f"{name}: {item.answer}\n") == 1
        assert f"The number of {name} is {item.answer}" not in item.prompt


def test_no_capital_is_asked_that_was_shown() -> None:
    asked = items("knowledge", 1000, 1)
    assert len({item.prompt for item in asked}) == len(asked) > 50
    assert not any(item.prompt.endswith(f"{country}?\nAnswer:") for item in asked for country in SHOTS)


def test_sums_are_right() -> None:
    for item in items("arithmetic", 30, 1):
        left, _, right, _ = item.prompt.splitlines()[-1].split()
        assert int(item.answer) == int(left) + int(right)


@pytest.mark.parametrize("line", ["Paris", " paris.", "\n PARIS!\nLyon", "Paris \n\n"])
def test_case_punctuation_and_what_follows_do_not_count(line: str) -> None:
    assert Item("", "Paris").is_right(line)


def test_an_empty_answer_is_wrong() -> None:
    assert plain("") == ""
    assert not Item("", "Paris").is_right("")


def test_speed_prompts_share_no_beginning() -> None:
    asked = prompts(24, 1)
    assert len({prompt[:20] for prompt in asked}) == 24


def test_a_definition_reads_local_data_only() -> None:
    written: dict[str, Any] = yaml.safe_load(yaml.safe_dump(definition("knowledge", Path("/data/knowledge.jsonl"))))
    assert written["dataset_path"] == "json"
    assert written["dataset_kwargs"] == {"data_files": {"test": "/data/knowledge.jsonl"}}
    assert written["generation_kwargs"]["until"] == ["\n"]


def test_the_harness_is_told_whom_to_ask_and_never_the_key() -> None:
    endpoint = Endpoint("http://h:1/v1", "smollm2:w8a8", api_key="secret")
    line = " ".join(command(Path("python"), endpoint, ["knowledge", "retrieval"], Path("/work"), 3))
    assert '"base_url": "http://h:1/v1/completions"' in line
    assert "--tasks sluice_knowledge,sluice_retrieval" in line
    assert "--seed 3" in line
    assert "secret" not in line
