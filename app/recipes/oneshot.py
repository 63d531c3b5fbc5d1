"""llm-compressor, told our samples and our progress."""

from __future__ import annotations

from typing import Any

from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from torch.utils.data import DataLoader

from app.recipes.work import Samples, Work


class Progress(Modifier):  # type: ignore[misc] # seen without its types outside its environment
    """Changes nothing: tells how many of the model's blocks the modifiers beside it have gone through."""

    _work: Work = PrivateAttr()
    _doing: str = PrivateAttr()
    _done: int = PrivateAttr(0)

    @classmethod
    def of(cls, work: Work, doing: str) -> Progress:
        progress = cls()
        progress._work, progress._doing = work, doing
        return progress

    def on_initialize(self, state: Any, **_given: Any) -> bool:
        return True

    def on_sequential_epoch_end(self, _state: Any, _event: Any, **_given: Any) -> None:
        self._done += 1
        self._work.report(self._doing, self._done, len(self._work.blocks) + 1)


def apply(work: Work, modifiers: list[Modifier], doing: str, samples: Samples | None = None) -> None:
    """Runs the modifiers over the model, block by block where they want samples."""
    work.report(doing, 0, None)
    loader = None
    if samples:
        rows = [{"input_ids": sample, "attention_mask": sample.new_ones(sample.shape)} for sample in samples]
        loader = DataLoader(rows, batch_size=None)
    # Its session is the process's and remembers the modifiers of a run before.
    active_session().reset()
    oneshot(model=work.model, recipe=[*modifiers, Progress.of(work, doing)], dataset=loader)
