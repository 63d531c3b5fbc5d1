"""`sluice keys`: who may ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from app.cli.options import Command

if TYPE_CHECKING:
    from app.launcher.serving import ReadyKeys
    from app.settings import Settings
    from app.tenancy.keys import Issued
    from app.tenancy.registrar import Registrar

DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
T = TypeVar("T")
KEYS_EXAMPLES = """
\b
Examples:
  sluice keys create --tenant acme --expires 90d --config sluice.yaml     in the configuration's Redis
  sluice keys create --admin --file keys.yaml                             in a file, digests only
  sluice keys rotate key_0123456789abcdef --overlap 7d --config sluice.yaml
"""


@click.group(epilog=KEYS_EXAMPLES)
def keys() -> None:
    """Make, show and end API keys. They are kept in the configuration's Redis, or in a file."""


def store_options(command: Command) -> Command:
    options = [
        click.option("--config", type=click.Path(path_type=Path),
                     help="The gateway's configuration (YAML): it names the Redis, and the secret of the digests."),
        click.option("--file", type=click.Path(path_type=Path),
                     help="Keep keys in this file instead; `auth.key_files` names it to the gateway."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@keys.command("create")
@click.option("--tenant", metavar="NAME", help="Who pays.  [default with --admin: operators]")
@click.option("--expires", metavar="90d", help="How long it works: s, m, h, d.  [default: until it is revoked]")
@click.option("--admin", is_flag=True, help="It opens the admin listener, too.")
@store_options
def create_key(tenant: str | None, expires: str | None, admin: bool, **store: Path | None) -> None:
    """Make a key and print it, this once."""
    from app.settings import TENANT_NAME
    from app.tenancy.keys import Scope

    name = tenant or ("operators" if admin else "")
    if not TENANT_NAME.match(name):
        raise click.UsageError("--tenant NAME: letters, digits and . _ - only, 64 at most.")
    scope, lifetime = Scope.ADMIN if admin else Scope.TENANT, duration(expires) if expires else None
    show_issued(with_registrar(lambda registrar: registrar.create(name, scope=scope, lifetime=lifetime), **store))


@keys.command("list")
@store_options
def list_keys(**store: Path | None) -> None:
    """Show all keys: whose they are, how they end, until when they work."""

    async def rows(registrar: Registrar) -> list[tuple[str, ...]]:
        used = await registrar.last_used()
        return [
            (key.id, f"…{key.hint}", key.tenant, key.scope, f"{key.created:%Y-%m-%d}",
             f"{key.expires:%Y-%m-%d %H:%M:%S}" if key.expires else "-", used.get(key.id, "-"))
            for key in await registrar.keys()
        ]  # fmt: skip

    for row in [("ID", "KEY", "TENANT", "SCOPE", "CREATED", "EXPIRES", "LAST USED"), *with_registrar(rows, **store)]:
        click.echo("{:22}{:8}{:24}{:9}{:12}{:21}{}".format(*row))


@keys.command("revoke")
@click.argument("key_id")
@store_options
def revoke_key(key_id: str, **store: Path | None) -> None:
    """End a key now: all gateways refuse it within a second."""
    ended = with_registrar(lambda registrar: registrar.revoke(key_id), **store)
    click.echo(f"{ended.id} of tenant {ended.tenant} has ended.", err=True)


@keys.command("rotate")
@click.argument("key_id")
@click.option("--overlap", metavar="1d", default="1d", show_default=True, help="How long the old key works on.")
@store_options
def rotate_key(key_id: str, overlap: str, **store: Path | None) -> None:
    """Make a key like another and print it; the other ends after a while."""
    after = duration(overlap)
    show_issued(with_registrar(lambda registrar: registrar.rotate(key_id, after), **store))


def with_registrar(work: Callable[[Registrar], Awaitable[T]], *, config: Path | None, file: Path | None) -> T:
    """What `work` brings, done on the keys of `file`, or else where the configuration keeps them."""
    from app.credentials import server_secret
    from app.settings import load_settings
    from app.tenancy.keys import Pepper
    from app.tenancy.registrar import Registrar
    from app.tenancy.stores import writable_store

    settings = load_settings(config)

    async def do() -> T:
        registrar = Registrar(writable_store(settings, file), Pepper(server_secret(settings.auth)), time.time)
        try:
            return await work(registrar)
        finally:
            await registrar.aclose()

    return asyncio.run(do())


def ready_keys(settings: Settings, file: Path) -> ReadyKeys:
    """A tenant's and an admin's key in a new file, for `sluice up`."""
    from app.credentials import server_secret
    from app.launcher.serving import ReadyKeys
    from app.tenancy.keys import Pepper, Scope
    from app.tenancy.registrar import Registrar
    from app.tenancy.stores import FileKeys

    registrar = Registrar(FileKeys(file), Pepper(server_secret(settings.auth)), time.time)

    async def issue() -> ReadyKeys:
        tenant = await registrar.create("up")
        return ReadyKeys(tenant.text, (await registrar.create("operators", scope=Scope.ADMIN)).text)

    return asyncio.run(issue())


def show_issued(issued: Issued) -> None:
    """The key itself on stdout and alone there, so that it can be taken from a pipe."""
    key = issued.key
    until = f"until {key.expires:%Y-%m-%d %H:%M:%S} UTC" if key.expires else "until it is revoked"
    click.echo(f"{key.id} for tenant {key.tenant}, scope {key.scope}, {until}. It is shown this once:", err=True)
    click.echo(issued.text)


def duration(text: str) -> timedelta:
    """`90d`, `12h`, `30m`, `45s`. Raises click.UsageError."""
    number, unit = text[:-1], text[-1:]
    if not (number.isdigit() and len(number) < 6 and unit in DURATION_UNITS):
        raise click.UsageError(f"{text}: expected a duration like 90d, 12h, 30m or 45s.")
    return timedelta(seconds=int(number) * DURATION_UNITS[unit])
