"""What the person at the terminal sees while `sluice` works: which step, how long, and how far where that is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Step:
    """The step under way."""

    def __init__(self, display: tuple[Progress, TaskID] | None = None) -> None:
        self._display = display

    def reached(self, completed: float, total: float | None) -> None:
        """`completed` of `total`, in any unit; without a total there is no bar to fill."""
        if self._display:
            progress, task = self._display
            progress.update(task, completed=completed if total is None else min(completed, total), total=total)

    def note(self, text: str) -> None:
        """One short line beside the step: what it is doing right now."""
        if self._display:
            progress, task = self._display
            progress.update(task, note=escape(text[:60]))


class Steps:
    """Numbered steps, one after the other. On a terminal the running one is alive; elsewhere each is two lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = 0
        self._number = 0

    def expect(self, count: int) -> None:
        """So many more steps will come."""
        self._total += count

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        self._number += 1
        head = f"[{self._number}/{self._total}] {title}"
        started = time.monotonic()
        if self._console.is_terminal:
            with self._live() as progress:
                yield Step((progress, progress.add_task(escape(head), total=None, note="")))
        else:
            self.say(f"{head} …")
            yield Step()
        self.say(f"{head}: {time.monotonic() - started:.0f} s")

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _live(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
