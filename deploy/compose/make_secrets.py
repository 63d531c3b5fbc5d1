"""Makes the keys and passwords of docker-compose.yml, each where only the parts that need it see it.

Runs in the gateway's image, with one volume for each part below /secrets, and makes them once: the operator's directory
is written last, and with it they are complete. With a name it prints what is kept for the operator under it:
`docker compose run --rm secrets client_key`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import sys
import time
from pathlib import Path

from app.tenancy.keys import Pepper, Scope
from app.tenancy.registrar import Registrar
from app.tenancy.stores import FileKeys

ROOT = Path("/secrets")
OPERATOR, COMPLETE = "operator", "complete"
READABLE = 0o444  # by the one user of each container that mounts it; no other container does
VALKEY = "valkey:6379"

# Nobody may do more than the part does. `sluice` is the key prefix of the gateway's settings, `redis.prefix`.
USERS = """\
user default on nopass resetkeys resetchannels -@all +ping
user sluice on #{sluice} ~{{sluice}}:* resetchannels &{{sluice}}:* -@all +@read +@write +@transaction +@scripting \
+@pubsub +@connection -@admin -@dangerous +time +info
user exporter on #{exporter} resetkeys resetchannels -@all +@connection -@admin -@dangerous +info +config|get \
+slowlog|get +slowlog|len +latency|latest +latency|histogram
"""


def valkey_users(sluice: str, exporter: str) -> str:
    """Valkey's access control list (its `aclfile`), for two passwords; it has their digests only."""
    digests = {"sluice": sluice, "exporter": exporter}
    return USERS.format(**{name: hashlib.sha256(password.encode()).hexdigest() for name, password in digests.items()})


def random_secret() -> str:
    return secrets.token_urlsafe(32)


def write(path: Path, text: str) -> None:
    """Replaces what an interrupted start left there."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(READABLE)


def make_keys(directory: Path) -> tuple[str, str]:
    """A client's key and an operator's, whose digests stand in `directory`."""
    secret = random_secret()
    write(directory / "auth_secret", secret)
    file = directory / "keys.yaml"
    file.unlink(missing_ok=True)
    registrar = Registrar(FileKeys(file), Pepper(secret.encode()), time.time)

    async def issue() -> tuple[str, str]:
        client = await registrar.create("compose")
        return client.text, (await registrar.create("operators", scope=Scope.ADMIN)).text

    keys = asyncio.run(issue())
    file.chmod(READABLE)
    return keys


def make_all(root: Path) -> None:
    client_key, admin_key = make_keys(root / "gateway")
    worker_key, sluice, exporter, grafana = (random_secret() for _ in range(4))
    for part in ("gateway", "worker"):
        write(root / part / "worker_key", worker_key)
    write(root / "gateway" / "valkey_password", sluice)
    write(root / "valkey" / "users.acl", valkey_users(sluice, exporter))
    # Releases of the exporter differ in whether they look a password up with the user's name.
    passwords = {f"redis://{VALKEY}": exporter, f"redis://exporter@{VALKEY}": exporter}
    write(root / "valkey-exporter" / "passwords.json", json.dumps(passwords))
    write(root / "prometheus" / "sluice_admin_key", admin_key)
    write(root / "grafana" / "admin_password", grafana)
    kept = {"client_key": client_key, "admin_key": admin_key, "grafana_password": grafana}
    for name, text in kept.items():
        write(root / OPERATOR / name, text)
    write(root / OPERATOR / COMPLETE, "")


def show(directory: Path, name: str) -> int:
    names = sorted(found.name for found in directory.iterdir() if found.name != COMPLETE)
    if name not in names:
        sys.stderr.write(f"error: {name}: there is {', '.join(names) or 'nothing yet'}\n")
        return 2
    sys.stdout.write((directory / name).read_text(encoding="utf-8") + "\n")
    return 0


def main(arguments: list[str], root: Path = ROOT) -> int:
    if arguments:
        return show(root / OPERATOR, arguments[0])
    if not (root / OPERATOR / COMPLETE).exists():
        make_all(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
