"""One event is one line, and its text stays where it is (S27)."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Literal

import pytest

from app.settings import Logs
from app.telemetry.logs import open_log

FORGED = 'm\r\n{"level": "error", "event": "forged"}\x1b[2J\x9b31m\u2028\u202e'
Style = Literal["json", "text"]


@pytest.fixture(autouse=True)
def _restored() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


@pytest.mark.parametrize("style", ["json", "text"])
def test_text_of_others_cannot_forge_a_line(style: Style, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(Logs(format=style))
    log.warning("worker state", reason=FORGED, worker="\x1b[2J")
    logging.getLogger("uvicorn.error").warning("said %s", FORGED)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    if style == "json":
        assert json.loads(lines[0])["reason"] == FORGED


@pytest.mark.parametrize("style", ["json", "text"])
def test_nor_can_the_text_of_an_exception(style: Style, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(Logs(format=style))
    try:
        int(FORGED)
    except ValueError:
        log.exception("internal error", path=FORGED)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert (len(lines) == 1) == (style == "json")


LOGGING = """
import logging
from app.settings import Logs
from app.telemetry.logs import open_log
open_log(Logs(format="{style}")).info("first")
logging.getLogger("uvicorn.error").info("second")
"""


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_is_one_write(style: Style, unbuffered: str) -> None:
    """Several processes share one stderr: between two writes of a line comes another's. The image sets the variable."""
    reading, writing = os.pipe2(os.O_DIRECT)  # gives each write back by itself, see pipe(2)
    try:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-c", LOGGING.format(style=style)]
        subprocess.run(command, stderr=writing, env=environment, check=True, timeout=60)
    finally:
        os.close(writing)
    with open(reading, "rb", buffering=0) as written:
        writes = list(iter(lambda: written.read(65536), b""))
    assert [(b"first" in write, b"second" in write) for write in writes] == [(True, False), (False, True)]
    assert all(write.count(b"\n") == 1 and write.endswith(b"\n") for write in writes)
