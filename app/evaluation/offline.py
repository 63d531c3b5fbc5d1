"""What is measured without a worker, in the recipes environment: divergence from the dense sibling, and the peaks of
the machine."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import ConfigurationError
from app.evaluation.quality import TextSums, of_the_dense
from app.evaluation.siblings import Sibling
from app.launcher.home import Home
from app.launcher.preparation import run_in_recipes
from app.launcher.progress import Step

BUNDLED = Path(__file__).resolve().parent / "data" / "texts.jsonl"
TEXTS_MAX_BYTES = 16 * 1024 * 1024
MOST_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Text:
    """The text that variants are compared on: JSON Lines, one `text` each."""

    path: Path
    sha256: str

    @classmethod
    def at(cls, path: Path | None) -> Text:
        """`path`, or the passages that come with this package. Raises ConfigurationError."""
        file = (path or BUNDLED).absolute()
        try:
            data = file.read_bytes()
            usable = 0 < len(data) <= TEXTS_MAX_BYTES and all(
                json.loads(line)["text"].strip() for line in data.splitlines()
            )
        except OSError as error:
            raise ConfigurationError(f"--texts {file}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            usable = False
        if not usable:
            raise ConfigurationError(f'--texts {file}: expected JSON Lines like {{"text": "…"}}, 16 MiB at most')
        return cls(file, hashlib.sha256(data).hexdigest())


def divergences(home: Home, siblings: Sequence[Sibling], text: Text, step: Step) -> Mapping[str, list[TextSums] | str]:
    """By variant, the sums of each text, or why it could not be loaded. The first of `siblings` is the dense one."""
    dense, others = siblings[0], siblings[1:]
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory:
        output = Path(directory) / "divergences.jsonl"
        # Against itself the dense sibling needs no second run: any other's sums hold its own figures, too.
        pairs = [f"{sibling.name}={sibling.directory}" for sibling in others or [dense]]
        run_in_recipes(home, [
            "app.recipes.divergence", "--dense", str(dense.directory),
            *(argument for pair in pairs for argument in ("--variant", pair)),
            "--texts", str(text.path), "--most-tokens", str(MOST_TOKENS), "--output", str(output),
        ], step)  # fmt: skip
        found = dict(map(_read, output.read_text(encoding="utf-8").splitlines()))
    measured = next((sums for sums in found.values() if not isinstance(sums, str)), None)
    return {**found, dense.name: of_the_dense(measured) if measured else "no variant of it could be loaded beside it"}


def _read(line: str) -> tuple[str, list[TextSums] | str]:
    entry = json.loads(line)
    return entry["variant"], entry.get("error") or [TextSums(**sums) for sums in entry["texts"]]


def peaks(home: Home, step: Step) -> tuple[float, float]:
    """Bytes per second of memory, float32 operations per second."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory:
        output = Path(directory) / "peaks.json"
        run_in_recipes(home, ["app.recipes.peaks", "--output", str(output)], step)
        found = json.loads(output.read_text(encoding="utf-8"))
    return float(found["bytes_per_s"]), float(found["flops"])
