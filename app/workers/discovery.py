"""Workers that the configuration names without listing them: behind a DNS name, or in a file of their own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from app.errors import ConfigurationError
from app.settings import CONFIG_FILE_MAX_BYTES, Model, Reload, Variant, Worker, WorkerTls
from app.telemetry.logs import Log

_WORKERS = TypeAdapter(tuple[Worker, ...])


@dataclass(frozen=True)
class Found:
    """What is known behind names and in files.

    `addresses` are HOST:PORT of each dns name, `listed` the workers of each file.
    """

    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    listed: Mapping[Path, tuple[Worker, ...]] = field(default_factory=dict)


def expanded(models: Iterable[Model], found: Found) -> tuple[Model, ...]:
    """`models` with every worker under a url of its own. Pure.

    A worker that is named twice belongs where it was named first: its slots are its own, and counted once.
    """
    taken: set[str] = set()

    def workers_of(variant: Variant) -> list[Worker]:
        listed = found.listed.get(variant.workers_file, ()) if variant.workers_file else ()
        given = [one for worker in (*variant.workers, *listed) for one in _addressed(worker, found)]
        fresh = [worker for worker in given if worker.authority not in taken]
        taken.update(worker.authority for worker in fresh)
        return list({worker.authority: worker for worker in reversed(fresh)}.values())[::-1]

    def variants_of(model: Model) -> tuple[Variant, ...]:
        return tuple(
            variant.model_copy(update={"workers": tuple(workers_of(variant)), "workers_file": None})
            for variant in model.variants
        )

    return tuple(model.model_copy(update={"variants": variants_of(model)}) for model in models)


def _addressed(worker: Worker, found: Found) -> list[Worker]:
    if worker.dns is None:
        return [worker]
    scheme, tls = "http", worker.tls
    if tls is not None:
        # The certificate is the name's: nobody has one for an address that was given out this morning.
        host = worker.dns.rpartition(":")[0]
        scheme, tls = "https", WorkerTls(**{**tls.model_dump(), "server_name": tls.server_name or host})
    return [
        worker.model_copy(update={"dns": None, "url": f"{scheme}://{address}", "tls": tls})
        for address in found.addresses.get(worker.dns, ())
    ]


def names_in(models: Iterable[Model], found: Found) -> set[str]:
    """The dns names that `models` ask for, those in their files among them."""
    listed = (worker for workers in found.listed.values() for worker in workers)
    own = (worker for model in models for variant in model.variants for worker in variant.workers)
    return {worker.dns for worker in (*own, *listed) if worker.dns is not None}


def files_in(models: Iterable[Model]) -> set[Path]:
    return {variant.workers_file for model in models for variant in model.variants if variant.workers_file}


def read_workers(path: Path, most: int) -> tuple[Worker, ...]:
    """The workers that a file lists. Raises ConfigurationError."""
    try:
        if path.stat().st_size > CONFIG_FILE_MAX_BYTES:
            raise ConfigurationError(f"{path}: larger than {CONFIG_FILE_MAX_BYTES} bytes")
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        workers = _WORKERS.validate_python(values)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(f"{path}: {where or 'a list of workers is expected'}: {first['msg']}") from None
    if len(workers) > most:
        raise ConfigurationError(f"{path}: more than {most} workers")
    return workers


Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
"""The addresses of a host. Raises OSError, as `getaddrinfo` does, and UnicodeError for what is no name."""


async def _as_the_system_does(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Names:
    """Asks for the addresses of dns names, and remembers the last answers: a name server's death empties no pool."""

    def __init__(self, rules: Reload, log: Log, resolve: Resolve = _as_the_system_does) -> None:
        self._rules = rules
        self._log = log
        self._resolve = resolve
        self._known: dict[str, tuple[str, ...]] = {}
        self._silent: set[str] = set()

    async def look_up(self, names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        """HOST:PORT of each name's addresses, in order; nothing for one that was never answered."""
        wanted = sorted(names)
        answers = await asyncio.gather(*(self._ask(name) for name in wanted))
        self._known = {name: answer for name, answer in zip(wanted, answers, strict=True) if answer is not None}
        return dict(self._known)

    async def _ask(self, name: str) -> tuple[str, ...] | None:
        host, _, port = name.rpartition(":")
        try:
            async with asyncio.timeout(self._rules.dns_timeout_s):
                found = await self._resolve(host, int(port))
        except socket.gaierror as error:
            if error.errno in NOBODY:
                return self._answered(name, ())
            return self._unanswered(name, error.strerror or str(error))
        except (OSError, UnicodeError) as error:  # a timeout is the former, a label that no name has the latter
            return self._unanswered(name, str(error) or "no answer in time")
        hosts = sorted(set(found))
        return self._answered(name, tuple(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts))

    def _answered(self, name: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
        self._silent.discard(name)
        most = self._rules.workers_per_name
        if len(addresses) > most:
            self._log.warning("more addresses than workers_per_name", dns=name, addresses=len(addresses), kept=most)
        return addresses[:most]

    def _unanswered(self, name: str, reason: str) -> tuple[str, ...] | None:
        if name not in self._silent:
            self._silent.add(name)
            self._log.warning("dns name not answered", dns=name, reason=reason, kept=len(self._known.get(name, ())))
        return self._known.get(name)


NOBODY = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
"""The name server answered, and nobody is there: a Service whose last pod is gone."""
