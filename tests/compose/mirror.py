"""Where a build finds packages: this machine's pip configuration, handed over as build secrets and kept nowhere."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.launcher.environments import Sources, read_sources


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        """Nothing: a build asks for hundreds of files."""


@contextmanager
def build_options(directory: Path) -> Iterator[list[str]]:
    """Options of `docker build`. Directories of this machine are served on its loopback for as long as this is open."""
    sources = read_sources()
    served = directory / "mirror"
    served.mkdir(parents=True, exist_ok=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            config = directory / "uv.toml"
            config.write_text(_uv_toml(sources, served, f"http://127.0.0.1:{server.server_port}"), encoding="utf-8")
            options = ["--secret", f"id=uv,src={config}", "--build-arg", f"TORCH={' '.join(sources.torch_arguments())}"]
            if sources.certificate:
                options += ["--secret", f"id=authorities,src={sources.certificate}"]
            yield options
        finally:
            server.shutdown()


def _uv_toml(sources: Sources, served: Path, url: str) -> str:
    """uv's own configuration; what pip takes from a directory comes from `url`."""

    def reached(place: str) -> str:
        path = Path(urlsplit(place).path)
        if not place.startswith(("file:", "/")) or not path.is_dir():
            return place
        # The parent, because pages of an index point to files beside it.
        link = served / path.parent.as_posix().strip("/").replace("/", "-")
        if not link.exists():
            link.symlink_to(path.parent)
        return f"{url}/{link.name}/{path.name}/"

    links = [reached(link) for link in sources.find_links]
    lines = ['index-strategy = "unsafe-best-match"', f"find-links = {json.dumps(links)}"]
    for index in sources.extra_index_urls:
        lines += ["[[index]]", f"url = {json.dumps(reached(index))}"]
    if sources.index_url:
        lines += ["[[index]]", f"url = {json.dumps(reached(sources.index_url))}", "default = true"]
    return "\n".join(lines) + "\n"
