"""The Hugging Face hub: repositories as they are, into a directory or into the hub's own cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from app.errors import LaunchError
from app.recipes.progress import Report

# Weights in other formats, and the copies of the original training code, double the download.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*")
REASON_CHARS = 300
WATCH_INTERVAL_S = 0.5


def download(repository: str, output: Path, report: Report) -> None:
    """A repository's checkpoint into `output`. Raises LaunchError."""
    with _hub_errors(repository):
        files = HfApi().model_info(repository, files_metadata=True).siblings or []
        names = list(filter_repo_objects([file.rfilename for file in files], allow_patterns=list(WANTED)))
        total = sum(file.size or 0 for file in files if file.rfilename in set(names))
        with _watched(output, total, report):
            snapshot_download(repository, local_dir=output, allow_patterns=names)


def fetch(repository: str, report: Report) -> Path:
    """Where a repository's checkpoint lies in the hub's cache, downloaded if need be. Raises LaunchError."""
    report("downloading", 0, None)
    with _hub_errors(repository):
        return Path(snapshot_download(repository, allow_patterns=list(WANTED)))


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turns the many ways in which a download fails into one line."""
    try:
        yield
    except HFValidationError:
        raise LaunchError(f"{repository}: neither a path that exists nor a hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:REASON_CHARS]
        raise LaunchError(f"cannot download {repository} from the Hugging Face hub: {reason}") from None


@contextmanager
def _watched(directory: Path, total: int, report: Report) -> Iterator[None]:
    """Reports, twice a second, how many bytes of `total` have arrived."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_INTERVAL_S):
            arrived = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            report("downloading", arrived, total or None)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
