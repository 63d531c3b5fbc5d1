"""What the recipes of a chain work on, one after the other, and how they look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.recipes.calibration import Calibration
from app.recipes.choice import windows
from app.recipes.progress import Report

Samples = list[torch.Tensor]


@dataclass
class Work:
    """A model in float32 on the CPU, its tokenizer, where both were read, and the text to measure on."""

    model: Any
    tokenizer: Any
    checkpoint: Path
    calibration: Calibration
    report: Report

    @property
    def blocks(self) -> Any:
        """The decoder's blocks, in order."""
        return self.model.model.layers

    def samples(self, count: int, tokens: int) -> Samples:
        """At most `count` samples of token ids, each of shape (1, tokens). Raises LaunchError for too little text."""
        end = self.tokenizer.eos_token_id
        joined: list[int] = []
        for entry in self.calibration.entries:
            if len(joined) >= count * tokens:
                break
            joined += [*self._ids(entry), *([] if end is None else [end])]
        return [torch.tensor([window]) for window in windows(joined, tokens, count)]

    def _ids(self, entry: str | list[dict[str, Any]]) -> list[int]:
        text = entry if isinstance(entry, str) else self.tokenizer.apply_chat_template(entry, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def run(self, samples: Samples, doing: str) -> None:
        """Shows the samples to the model, for the sake of those who observe it."""
        with torch.inference_mode():
            for number, sample in enumerate(samples):
                self.report(doing, number, len(samples))
                self.model.model(input_ids=sample, use_cache=False)


@contextmanager
def observed(modules: Iterable[Any], observer: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Within the block `observer` gets (index, input, output) of each module's calls, flattened to (tokens, width)."""

    def hook(index: int) -> Callable[[Any, Sequence[Any], dict[str, Any], Any], None]:
        def observe(_module: Any, given: Sequence[Any], named: dict[str, Any], result: Any) -> None:
            source = given[0] if given else named["hidden_states"]
            target = result[0] if isinstance(result, tuple) else result
            observer(index, source.detach().flatten(0, -2), target.detach().flatten(0, -2))

        return observe

    handles = [module.register_forward_hook(hook(index), with_kwargs=True) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats per token, of logits of shape (…, vocabulary)."""
    reference = torch.log_softmax(teacher.float(), -1)
    return (reference.exp() * (reference - torch.log_softmax(student.float(), -1))).sum(-1).mean()
