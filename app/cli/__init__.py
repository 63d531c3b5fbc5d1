"""The command line. Everything heavy is imported inside the command that needs it, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from app.cli.batches import batch
from app.cli.keys import keys
from app.cli.serving import gateway, up, worker
from app.cli.variants import compress, evaluate
from app.errors import ConfigurationError, SluiceError

FAILED = 1
WRONG_USAGE = 2


class OneLineErrors(click.Group):
    """Ends every command with its exit code: what goes wrong on purpose is one line, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            self._end(str(error), WRONG_USAGE)
        except SluiceError as error:
            self._end(str(error), FAILED, getattr(error, "log_lines", []), getattr(error, "log", None))
        except KeyboardInterrupt:
            self._end("interrupted", FAILED)
        return None

    def _end(self, message: str, status: int, log_lines: list[str] | None = None, log: Path | None = None) -> None:
        click.echo(f"error: {message}", err=True)
        for line in log_lines or []:
            click.echo(f"  | {line}", err=True)
        if log:
            click.echo(f"  all of it: {log}", err=True)
        raise SystemExit(status)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sluice")
def main() -> None:
    """OpenAI-compatible serving of compressed models: one fair queue in front of vLLM workers."""


for command in (up, gateway, worker, keys, compress, evaluate, batch):
    main.add_command(command)
