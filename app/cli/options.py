"""What several commands share: options, the home they work in, extras that may not be installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from app.errors import SluiceError

if TYPE_CHECKING:
    from app.launcher.home import Home

Command = TypeVar("Command", bound=Callable[..., Any])


def home_option(command: Command) -> Command:
    return click.option(
        "--home",
        type=click.Path(path_type=Path),
        help="Where environments, models and logs are kept.  [default: $SLUICE_HOME or ~/.local/share/sluice]",
    )(command)


def home_at(given: Path | None) -> Home:
    from app.launcher.home import Home

    return Home.at(given, os.environ)


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Turns the absence of an optional dependency into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "app":
            raise
        raise SluiceError(f"{error.name} is not installed: `pip install 'sluice[{extra}]'` brings it") from None
