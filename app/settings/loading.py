"""Reads the configuration: one YAML file, single values overridden by `SLUICE_…` environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from app.errors import ConfigurationError
from app.settings.network import Admin, Listen, is_loopback
from app.settings.whole import Settings

CONFIG_FILE_MAX_BYTES = 4 * 1024 * 1024


def load_settings(
    path: Path | None = None, *, host: str | None = None, port: int | None = None, processes: int | None = None
) -> Settings:
    """Settings from `path` (YAML), overridden by the environment, overridden by the given arguments.

    Raises ConfigurationError with one line that names the file and the first offending key.
    """
    where = str(path) if path else "environment"
    values = _read_yaml(path) if path else {}
    try:
        settings = Settings(**values)
        flags = {"host": host, "port": port, "processes": processes}
        listen = Listen(**{**settings.listen.model_dump(), **{k: v for k, v in flags.items() if v is not None}})
    except ValidationError as error:
        raise ConfigurationError(f"{where}: {_first_line(error)}") from None
    # What operators ask for is not for everybody who can reach a public address.
    admin = settings.admin or (None if is_loopback(listen.host) else Admin())
    settings = settings.model_copy(update={"listen": listen, "admin": admin})
    _check_listeners(settings, where)
    return settings


def _check_listeners(settings: Settings, where: str) -> None:
    if settings.is_guarded and settings.admission.trust_tenant_header:
        raise ConfigurationError(f"{where}: admission.trust_tenant_header: needs auth: {{enabled: false}}")
    if settings.admin and settings.admin.port == settings.listen.port != 0:
        raise ConfigurationError(f"{where}: admin.port: the same as listen.port")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > CONFIG_FILE_MAX_BYTES:
            raise ConfigurationError(f"{path}: larger than {CONFIG_FILE_MAX_BYTES} bytes")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: a mapping of settings is expected")
    return {str(key): value for key, value in values.items()}


def _first_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
