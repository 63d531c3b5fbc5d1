"""Logs: one JSON object (or readable line) an event, on stderr."""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol

import structlog

from app.settings import Logs


class Log(Protocol):
    """What the rest of the gateway needs of a logger: an event and its fields."""

    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...
    def exception(self, event: str, **fields: Any) -> Any: ...


# uvicorn says this each time a broken stream is deliberately left without its end, which is how a client learns of it.
_DELIBERATE = "ASGI callable returned without completing response."


def open_log(settings: Logs) -> Log:
    """A logger that writes to stderr, and the standard library's loggers (uvicorn's among them) routed into it."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    shared, renderer = _shared(), _renderer(settings)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    handler.addFilter(lambda record: record.getMessage() != _DELIBERATE)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, logging.INFO))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return _logger(settings, level)


def open_audit(settings: Logs) -> Log:
    """A logger for what operators do: in the same place and form, whatever level the log has."""
    return _logger(settings, logging.INFO)


def _logger(settings: Logs, level: int) -> Log:
    # A line is one write, so that those of several processes do not run into each other.
    log: Log = structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=[*_shared(), structlog.processors.format_exc_info, _renderer(settings)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    return log


def _shared() -> list[structlog.typing.Processor]:
    return [structlog.stdlib.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]


def _renderer(settings: Logs) -> structlog.typing.Processor:
    if settings.format == "json":
        return structlog.processors.JSONRenderer()
    return _text_renderer()


def _text_renderer() -> structlog.typing.Processor:
    """A readable line. What servers and clients wrote stays inside it: no line, colour or cursor of theirs."""
    console = structlog.dev.ConsoleRenderer(colors=False)

    def render(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
        return str(console(logger, name, {key: _visible(value, key) for key, value in event.items()}))

    return render


def _visible(value: Any, key: str) -> Any:
    if not isinstance(value, str) or value.isprintable():
        return value
    kept = "\n" if key == "exception" else ""
    return "".join(char if char.isprintable() or char in kept else repr(char)[1:-1] for char in value)
