"""The text that recipes measure on: the user's file, or the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import ConfigurationError

LEAST_CHARS = 4_000
LEAST_DOCSTRING_CHARS = 300
SEED = 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Texts, or conversations in OpenAI's shape, in the order in which they are used; and the digest of them all."""

    entries: tuple[str | list[dict[str, Any]], ...]
    sha256: str

    @classmethod
    def of(cls, entries: list[str | list[dict[str, Any]]]) -> Calibration:
        return cls(tuple(entries), hashlib.sha256(json.dumps(entries).encode()).hexdigest())


def read_calibration(path: Path | None) -> Calibration:
    """The calibration text in `path`, or the default one.

    A file is UTF-8: plain text whose entries are parted by blank lines, or with the suffix .jsonl an object a line
    with `text` or `messages`. Raises ConfigurationError where it cannot be read or is too short to measure anything.
    """
    if path is None:
        return Calibration.of(default_entries())
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"--calibration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"--calibration {path}: not UTF-8 text") from None
    if len(text) < LEAST_CHARS:
        raise ConfigurationError(
            f"--calibration {path}: too short, it has {len(text)} characters and {LEAST_CHARS} are needed at least"
        )
    if path.suffix == ".jsonl":
        return Calibration.of([_entry(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line])
    return Calibration.of([part.strip() for part in text.split("\n\n") if part.strip()])


def _entry(path: Path, number: int, line: str) -> str | list[dict[str, Any]]:
    try:
        entry = json.loads(line)
        found: str | list[dict[str, Any]] = entry["text"] if "text" in entry else entry["messages"]
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(
            f"--calibration {path}: line {number}: an object with `text` or `messages` is expected"
        ) from None
    return found


def default_entries() -> list[str | list[dict[str, Any]]]:
    """Long docstrings of the standard library's modules: prose, tables and code, the same for one version of Python.

    What came out is measured on other texts (`app/evaluation/data`).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py"))
    found = sorted({text for file in files for text in _docstrings(file)})
    random.Random(SEED).shuffle(found)  # noqa: S311 - a fixed order, nothing secret
    return list(found)


def _docstrings(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return [text for text in texts if text and len(text) >= LEAST_DOCSTRING_CHARS]
