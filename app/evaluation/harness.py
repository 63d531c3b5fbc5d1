"""Tasks as lm-evaluation-harness runs them, against any endpoint that speaks OpenAI's completions.

The harness lives in an environment of its own and gets data and task definitions as files: nothing is downloaded.
Formats: https://github.com/EleutherAI/lm-evaluation-harness, docs/new_task_guide.md and its `samples_*.jsonl`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from app.card import TaskName
from app.errors import LaunchError
from app.evaluation.endpoint import Endpoint
from app.evaluation.tasks import ANSWER_TOKENS, STOP, Item
from app.launcher.command import run_command

PREFIX = "sluice_"
CONCURRENCY = 8
RETRIES = 3
REQUEST_TIMEOUT_S = 300


def definition(task: TaskName, data: Path) -> dict[str, Any]:
    """A task of ours in the harness's words: greedy, one line, judged as `tasks.Item.is_right` judges it."""
    return {
        "task": PREFIX + task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": ANSWER_TOKENS, "do_sample": False, "temperature": 0.0},
        "filter_list": [{"name": "line", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
        "metadata": {"version": 1.0},
    }


def command(python: Path, endpoint: Endpoint, tasks: Sequence[TaskName], work: Path, seed: int) -> list[str]:
    """The harness's command line; it finds the tasks in `work` and leaves its answers there."""
    arguments = {
        "model": endpoint.model,
        "base_url": f"{endpoint.base_url}/completions",
        "num_concurrent": CONCURRENCY,
        "max_retries": RETRIES,
        "timeout": REQUEST_TIMEOUT_S,
        "tokenized_requests": False,
        "tokenizer_backend": "None",
    }
    return [
        str(python), "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", json.dumps(arguments),
        "--tasks", ",".join(PREFIX + task for task in tasks),
        "--include_path", str(work / "tasks"), "--output_path", str(work / "answers"),
        "--log_samples", "--seed", str(seed),
    ]  # fmt: skip


def run(
    python: Path, endpoint: Endpoint, asked: Mapping[TaskName, Sequence[Item]], seed: int, log: Path
) -> dict[TaskName, list[bool]]:
    """Whether each item of each task was answered right, in the items' order. Raises LaunchError."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as path:
        work = Path(path)
        _write(work / "tasks", asked)
        environ = {
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "cache"),
            "OPENAI_API_KEY": endpoint.api_key, "TQDM_DISABLE": "1",
        }  # fmt: skip
        run_command(command(python, endpoint, list(asked), work, seed), environ, log)
        return {task: _graded(work / "answers", task, len(items)) for task, items in asked.items()}


def _write(directory: Path, asked: Mapping[TaskName, Sequence[Item]]) -> None:
    directory.mkdir()
    for task, items in asked.items():
        data = directory / f"{task}.jsonl"
        rows = (json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items)
        data.write_text("\n".join(rows) + "\n", encoding="utf-8")
        (directory / f"{task}.yaml").write_text(yaml.safe_dump(definition(task, data)), encoding="utf-8")


def _graded(answers: Path, task: TaskName, count: int) -> list[bool]:
    """From the harness's own record of each item."""
    files = sorted(answers.rglob(f"samples_{PREFIX}{task}_*.jsonl"))
    if not files:
        raise LaunchError(f"lm-evaluation-harness left no answers to {task}")
    samples = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    graded = {sample["doc_id"]: sample["exact_match"] == 1 for sample in samples}
    if sorted(graded) != list(range(count)):
        raise LaunchError(f"lm-evaluation-harness answered {len(graded)} of {count} items of {task}")
    return [graded[index] for index in range(count)]
