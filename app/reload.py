"""What the configuration says now, for as long as the gateway runs.

    a file changed, SIGHUP, POST /admin/reload ──> read ──> check ──> adopt, in one step
                            a name's addresses changed ──────┘  │
                                                                └─ refused: what was is kept, whole

Models, variants, workers and tenants may change; whatever else differs is refused by name, since it needs a restart.
Each process of a gateway finds a change on its own: the same text is taken by all of them or by none.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.catalogue import Catalogue
from app.errors import ConfigurationError
from app.settings import Settings, load_settings
from app.telemetry.logs import Log
from app.telemetry.metrics import Metrics
from app.tenancy.tenants import Tenants
from app.workers.discovery import Found, Names, expanded, files_in, names_in, read_workers
from app.workers.registry import Registry
from app.workers.worker import Worker

CHANGEABLE = ("models", "tenants", "default_tenant")
SWEEP_S = 2.0
Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class Source:
    """Where the settings come from: a file, under what the command line said."""

    path: Path
    host: str | None = None
    port: int | None = None
    processes: int | None = None

    def load(self) -> Settings:
        """Raises ConfigurationError."""
        return load_settings(self.path, host=self.host, port=self.port, processes=self.processes)


class Outcome(StrEnum):
    APPLIED = "applied"
    UNCHANGED = "unchanged"
    REFUSED = "refused"


class Looks:
    """What files looked like. Two looks must agree before a change counts: the first may see a half of one. Pure."""

    def __init__(self, now: Signature) -> None:
        self.take(now)

    def take(self, now: Signature) -> None:
        """What looks like this is known."""
        self._known = self._latest = now

    def has_settled(self, now: Signature) -> bool:
        """Whether there is something new, and it is whole. It is known from then on: what is refused is said once."""
        is_steady, self._latest = now == self._latest, now
        if not is_steady or now == self._known:
            return False
        self._known = now
        return True


class Reload:
    """Owns the settings of the moment, and gives what changed to those who live by it.

    `source` is None for settings that came from nowhere: then only names and files of workers are followed. `is_named`
    says whether somebody may still ask for a worker that leaves.
    """

    def __init__(
        self,
        settings: Settings,
        source: Source | None,
        catalogue: Catalogue,
        registry: Registry,
        tenants: Tenants,
        is_named: Callable[[Worker], bool],
        metrics: Metrics,
        log: Log,
    ) -> None:
        self.settings = settings
        self._source = source
        self._catalogue = catalogue
        self._registry = registry
        self._tenants = tenants
        self._is_named = is_named
        self._metrics = metrics
        self._log = log
        self._rules = settings.reload
        self._names = Names(settings.reload, log)
        self._found = Found()
        self._changing = asyncio.Lock()
        """Held from reading to adopting: what was read earlier must not be adopted later."""
        self._looks = Looks(self._signature(settings))
        metrics.config_current.set(1)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow names and files. At the start every name was asked for once. Raises ConfigurationError."""
        loop, asked = asyncio.get_running_loop(), asyncio.Event()
        # Before the first reading: a change that is signalled meanwhile is looked at afterwards.
        is_signalled = self._source is not None and _heeds(loop, asked)
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._begin()
            tasks = [asyncio.create_task(task) for task in (self._follow_names(), self._sweep(), self._heed(asked))]
            if self._rules.watch_interval_s:
                tasks.append(asyncio.create_task(self._follow_files()))
            yield
        finally:
            if is_signalled:
                loop.remove_signal_handler(signal.SIGHUP)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self) -> None:
        """With what the file says now: a process that replaces another comes with what it said when the first began.

        Where that is refused, as the other processes have refused it, with what they have. Raises ConfigurationError.
        """
        try:
            await self._take(await self._read())
        except ConfigurationError as error:
            self._note(Outcome.REFUSED, reason=str(error))
            await self._take(self.settings)

    async def _read(self) -> Settings:
        """What the file says now. Raises ConfigurationError, also for a change that needs a restart."""
        settings = await asyncio.to_thread(self._source.load) if self._source else self.settings
        refuse_changes(self.settings, settings)
        return settings

    async def now(self) -> Outcome:
        """Read everything again. Raises ConfigurationError when it is refused; then all is as it was."""
        try:
            async with self._changing:
                has_changed = await self._take(await self._read())
        except ConfigurationError as error:
            self._note(Outcome.REFUSED, reason=str(error))
            raise
        outcome = Outcome.APPLIED if has_changed else Outcome.UNCHANGED
        self._note(outcome)
        return outcome

    async def _take(self, settings: Settings) -> bool:
        """Have these settings, and what their names and files stand for now. Raises ConfigurationError."""
        seen = self._signature(settings)
        listed = {path: read_workers(path, self._rules.workers_per_name) for path in files_in(settings.models)}
        found = Found(await self._names.look_up(names_in(settings.models, Found(listed=listed))), listed)
        catalogue = Catalogue.of(expanded(settings.models, found))
        has_changed = settings != self.settings or found != self._found
        # From here on nothing waits and nothing fails: nobody sees a half of it.
        self._catalogue.adopt(catalogue)
        self._registry.adopt(self._catalogue)
        if (settings.tenants, settings.default_tenant) != (self.settings.tenants, self.settings.default_tenant):
            self._tenants.change(settings.tenants, settings.default_tenant)
        self.settings, self._found = settings, found
        self._looks.take(seen)
        return has_changed

    def _note(self, outcome: Outcome, **more: str) -> None:
        self._metrics.config_reloads.labels(outcome).inc()
        self._metrics.config_current.set(outcome is not Outcome.REFUSED)
        tell = self._log.warning if outcome is Outcome.REFUSED else self._log.info
        tell("configuration", outcome=outcome.value, **more)

    async def _try(self) -> None:
        """As `now`, for those whom nobody hears: the log and the metrics have said it."""
        try:
            await self.now()
        except ConfigurationError:
            return

    async def _heed(self, asked: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            await self._try()

    async def _follow_files(self) -> None:
        while True:
            await asyncio.sleep(self._rules.watch_interval_s)
            if self._looks.has_settled(await asyncio.to_thread(self._signature, self.settings)):
                await self._try()

    async def _follow_names(self) -> None:
        while True:
            await asyncio.sleep(self._rules.dns_interval_s)
            async with self._changing:
                names = names_in(self.settings.models, self._found)
                addresses = await self._names.look_up(names) if names else self._found.addresses
                if addresses != self._found.addresses:
                    self._adopt_addresses(addresses)

    def _adopt_addresses(self, addresses: Mapping[str, tuple[str, ...]]) -> None:
        found = Found(addresses, self._found.listed)
        try:
            catalogue = Catalogue.of(expanded(self.settings.models, found))
        except ConfigurationError as error:  # a manifest or a certificate that is not there any more
            self._note(Outcome.REFUSED, reason=str(error))
            return
        self._catalogue.adopt(catalogue)
        self._registry.adopt(self._catalogue)
        self._found = found
        self._log.info("workers found", **{name: len(found) for name, found in addresses.items()})

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._registry.forget(self._is_named)

    def _signature(self, settings: Settings) -> Signature:
        """What tells one state of all files from another. A ConfigMap changes by another file under the same name."""
        own = [self._source.path] if self._source else []
        return tuple(_signature(path) for path in (*own, *sorted(files_in(settings.models))))


def refuse_changes(before: Settings, after: Settings) -> None:
    """Raises ConfigurationError that names the first setting that differs and needs a restart."""
    for name in type(before).model_fields:
        if name not in CHANGEABLE and getattr(before, name) != getattr(after, name):
            raise ConfigurationError(f"{name}: cannot change while the gateway runs; restart it")


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _heeds(loop: asyncio.AbstractEventLoop, asked: asyncio.Event) -> bool:
    """Whether SIGHUP sets `asked` from now on: only the main thread's loop can be told."""
    try:
        loop.add_signal_handler(signal.SIGHUP, asked.set)
    except (ValueError, RuntimeError):
        return False
    return True
