"""How far variants are from their dense sibling on the same text: exact, from all logits.

`python -m app.recipes.divergence --dense DIR --variant NAME=DIR … --texts FILE --output FILE`, in the recipes
environment. TEXTS is JSON Lines with a `text`; OUTPUT gets one line per variant as soon as it is measured:
{"variant": …, "texts": [sums of each text]} or {"variant": …, "error": "why it cannot be loaded"}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import LaunchError, SluiceError
from app.recipes.progress import Report, reporter

REASON_CHARS = 400


def sums(dense: torch.Tensor, variant: torch.Tensor, following: torch.Tensor) -> dict[str, float]:
    """Sums over the positions of one text, in nats.

    `dense` and `variant` are logits of shape (positions, vocabulary), `following` the token that comes after each
    position. KL is D(dense || variant); JS the mean divergence of both from their mean, at most ln 2.
    """
    p, q = dense.double().log_softmax(-1), variant.double().log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    chosen = following[:, None]
    return {
        "tokens": len(following),
        "kl": _divergence(p, q),
        "js": (_divergence(p, middle) + _divergence(q, middle)) / 2,
        "agreeing": int((p.argmax(-1) == q.argmax(-1)).sum()),
        "nll": -float(q.gather(1, chosen).sum()),
        "dense_nll": -float(p.gather(1, chosen).sum()),
    }


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum of Kullback-Leibler divergences; what has no probability in `p` adds nothing. Never below its minimum, 0."""
    return max(0.0, float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum()))


class Models:
    """Checkpoints as transformers runs them: compressed-tensors ones with the rounding of weights and activations."""

    def __init__(self, texts: list[str], most_tokens: int, report: Report) -> None:
        self._texts = texts
        self._most_tokens = most_tokens
        self._report = report

    def tokens(self, directory: Path) -> list[torch.Tensor]:
        """The texts as token ids of shape (1, tokens). Raises LaunchError for texts that are too short."""
        tokenizer = AutoTokenizer.from_pretrained(directory)
        found = [tokenizer(text, return_tensors="pt").input_ids[:, : self._most_tokens] for text in self._texts]
        if short := next((text for text, ids in zip(self._texts, found, strict=True) if ids.shape[1] < 2), None):
            raise LaunchError(f"a text must have two tokens at least: {short[:40]!r}")
        return found

    def logits(self, name: str, directory: Path, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Float32 logits of each text, of shape (tokens - 1, vocabulary): the last position predicts nothing known."""
        self._report(f"{name}: reading the weights", 0, None)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        found = []
        for index, ids in enumerate(texts):
            self._report(f"{name}: text {index + 1} of {len(texts)}", index, len(texts))
            with torch.inference_mode():
                found.append(model(ids).logits[0, :-1].float())
        return found


def measure(
    dense: Path, variants: dict[str, Path], texts: list[str], most_tokens: int, output: TextIO, report: Report
) -> None:
    """Raises LaunchError where the dense sibling cannot be loaded; a variant that cannot is an answer."""
    models = Models(texts, most_tokens, report)
    try:
        ids = models.tokens(dense)
        reference = models.logits("dense", dense, ids)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise LaunchError(f"the dense sibling in {dense} cannot be loaded: {_reason(error)}") from None
    for name, directory in variants.items():
        print(
            json.dumps({"variant": name, **_compared(models, name, directory, ids, reference)}), file=output, flush=True
        )


def _compared(
    models: Models, name: str, directory: Path, texts: list[torch.Tensor], reference: list[torch.Tensor]
) -> dict[str, Any]:
    """Whatever the libraries raise is the answer: they refuse formats in as many ways as there are formats."""
    try:
        if any(not torch.equal(own, theirs) for own, theirs in zip(models.tokens(directory), texts, strict=True)):
            return {"error": "it has another tokenizer than its dense sibling"}
        found = models.logits(name, directory, texts)
        pairs = zip(reference, found, texts, strict=True)
        return {"texts": [sums(theirs, own, ids[0, 1:]) for theirs, own, ids in pairs]}
    except Exception as error:  # noqa: BLE001
        return {"error": _reason(error)}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:REASON_CHARS]


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    variants = dict(pair.split("=", 1) for pair in options.variant)
    texts = [json.loads(line)["text"] for line in options.texts.read_text(encoding="utf-8").splitlines()]
    try:
        with options.output.open("w", encoding="utf-8") as output:
            paths = {name: Path(path) for name, path in variants.items()}
            measure(options.dense, paths, texts, options.most_tokens, output, reporter(progress))
    except SluiceError as error:
        print(json.dumps({"error": str(error)}), file=progress, flush=True)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.recipes.divergence")
    parser.add_argument("--dense", required=True, type=Path)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--texts", required=True, type=Path, help="JSON Lines")
    parser.add_argument("--most-tokens", type=int, default=1024, help="of one text; the rest of it is left out")
    parser.add_argument("--output", required=True, type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
