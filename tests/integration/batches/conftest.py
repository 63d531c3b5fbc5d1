"""Both storages: a directory, and a bucket on a real S3 server."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import settings
from app.batches.bucket import Bucket
from app.batches.storage import Directory, Storage
from tests.ports import free_port
from tests.processes import Process


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Moto's S3 server, as a process of its own, with one bucket."""
    port = free_port()
    with Process([sys.executable, "-m", "moto.server", "-p", str(port)]) as server:
        server.wait_for_line("Running on")
        url = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/shelf", method="PUT")).close()
        yield url


@pytest.fixture(params=["directory", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "directory":
        directory = Directory(tmp_path / "kept")
        directory.open()
        return directory
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    url = request.getfixturevalue("s3")
    return Bucket(settings.Bucket(name="shelf", prefix=tmp_path.name, endpoint=url, region="us-east-1"))
