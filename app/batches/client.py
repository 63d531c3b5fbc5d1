"""`sluice batch run`: a file of requests in, a file of results out, through any gateway's Batch API.

What was begun is written beside the results, so that the same command goes on with it after Ctrl-C or a crash.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.errors import ConfigurationError, SluiceError

POLL_S = 1.0
PATIENCE_S = 300.0
"""How long a gateway may be out of reach before the command gives up; the batch goes on without it."""
RETRY_S = 2.0
TIMEOUT_S = 60.0
CHUNK_BYTES = 1024 * 1024
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
TOLD_ERRORS = 10


@dataclass(frozen=True, slots=True)
class Order:
    """What to run, where, and where to put the results; lines that failed go to a file beside them."""

    source: Path
    output: Path
    base_url: str
    api_key: str
    model: str | None
    window: str

    @property
    def errors(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.errors{self.output.suffix}")

    @property
    def state(self) -> Path:
        return self.output.with_name(f"{self.output.name}.batch")


def run(order: Order, console: Console) -> None:
    """Upload, follow, download. Raises SluiceError for a batch that did not complete, ConfigurationError."""
    body, endpoint = _read(order)
    mark = {"base_url": order.base_url, "sha256": sha256(body).hexdigest()}
    with httpx.Client(
        base_url=order.base_url.rstrip("/"),
        headers={"authorization": f"Bearer {order.api_key}"},
        timeout=TIMEOUT_S,
    ) as http:
        api = _Api(http)
        batch_id = _begun(order, mark)
        if batch_id is None:
            batch_id = _begin(api, order, body, endpoint)
            _keep(order.state, {**mark, "batch_id": batch_id})
            console.print(f"{batch_id} begun; the same command goes on with it after an interruption")
        else:
            console.print(f"going on with {batch_id}")
        batch = _follow(api, batch_id, console)
        _collect(api, batch, order, console)


def _read(order: Order) -> tuple[bytes, str]:
    """The input, asking for `--model` where one is given, and the endpoint of its first line."""
    try:
        body = order.source.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{order.source}: {error.strerror or error}") from None
    if order.model is not None:
        body = b"".join(_asking(order.model, text, number) for number, text in _lines(body))
    for number, text in _lines(body):
        return body, str(_parsed(text, number).get("url", ""))
    raise ConfigurationError(f"{order.source}: the file has no requests")


def _lines(body: bytes) -> Iterator[tuple[int, bytes]]:
    for number, text in enumerate(body.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if text.strip():
            yield number, text


def _asking(model: str, text: bytes, number: int) -> bytes:
    line = _parsed(text, number)
    if isinstance(line.get("body"), dict):
        line["body"]["model"] = model
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _parsed(text: bytes, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise ConfigurationError(f"line {number} of the input is not a JSON object")
    return line


def _begun(order: Order, mark: dict[str, str]) -> str | None:
    """The batch that an earlier run of the same command began."""
    try:
        kept = json.loads(order.state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(kept, dict) and all(kept.get(name) == value for name, value in mark.items())
    return str(kept["batch_id"]) if same else None


def _begin(api: _Api, order: Order, body: bytes, endpoint: str) -> str:
    form = {"purpose": "batch"}
    file = api.ask("POST", "/files", data=form, files={"file": (order.source.name, body, "application/jsonl")})
    asked = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": order.window}
    # The key makes asking again after a lost answer harmless.
    batch = api.ask("POST", "/batches", json=asked, headers={"idempotency-key": file["id"]})
    return str(batch["id"])


def _follow(api: _Api, batch_id: str, console: Console) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed  {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("validating", total=None, failed=0, speed="")
        first: tuple[float, int] | None = None
        while True:
            batch = api.ask("GET", f"/batches/{batch_id}")
            counts, now, tokens = batch["request_counts"], time.monotonic(), _tokens(batch)
            first = first or (now, tokens)
            speed = f"{(tokens - first[1]) / (now - first[0]):,.0f} tokens/s" if now > first[0] else ""
            bar.update(
                task,
                description=batch["status"],
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                failed=counts["failed"],
                speed=speed,
            )
            if batch["status"] in FINAL:
                return batch
            time.sleep(POLL_S)


def _tokens(batch: dict[str, Any]) -> int:
    return int((batch.get("usage") or {}).get("total_tokens", 0))


def _collect(api: _Api, batch: dict[str, Any], order: Order, console: Console) -> None:
    faults = (batch.get("errors") or {}).get("data") or []
    for fault in faults[:TOLD_ERRORS]:
        where = f"line {fault['line']}: " if fault.get("line") else ""
        console.print(f"{where}{fault['message']}", markup=False)
    counts = batch["request_counts"]
    for name, path in (("output_file_id", order.output), ("error_file_id", order.errors)):
        if batch.get(name):
            api.download(f"/files/{batch[name]}/content", path)
            console.print(f"{path}", markup=False)
    order.state.unlink(missing_ok=True)
    if batch["status"] != "completed":
        raise SluiceError(f"the batch is {batch['status']}: {counts['completed']} of {counts['total']} lines are done")
    if counts["failed"]:
        raise SluiceError(f"{counts['failed']} of {counts['total']} lines failed: see {order.errors}")


class _Api:
    """The gateway's API; what fails for a while is asked again. Raises SluiceError."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self._http.request(method, path, **given)
            except httpx.TransportError as error:
                problem = f"{self._http.base_url}: {error}"
            else:
                if answer.is_success:
                    told: dict[str, Any] = answer.json()
                    return told
                problem = _problem(answer)
                if answer.status_code < 500 and answer.status_code not in (408, 429):
                    raise SluiceError(problem)
            if time.monotonic() >= until:
                raise SluiceError(problem)
            time.sleep(RETRY_S)

    def download(self, path: str, target: Path) -> None:
        """Into a file that appears whole."""
        unfinished = target.with_name(f"{target.name}.unfinished")
        try:
            with self._http.stream("GET", path) as answer, unfinished.open("wb") as file:
                if not answer.is_success:
                    answer.read()
                    raise SluiceError(_problem(answer))
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except (httpx.TransportError, OSError) as error:
            raise SluiceError(f"{target}: {error}") from None
        unfinished.replace(target)


def _problem(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.url} answered {answer.status_code}"


def _keep(path: Path, state: dict[str, str]) -> None:
    try:
        path.write_text(json.dumps(state) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from None
