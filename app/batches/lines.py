"""The lines of a batch: what the input may be, and what is written about each of them. Pure.

The input is JSON Lines: `{"custom_id", "method": "POST", "url", "body"}`, one request a line, in UTF-8. A byte order
mark, CRLF, blank lines and a missing last newline are read over: editors put and leave them. What is wrong is told by
line number, and then no line is run. What is wrong with the body of one request is that line's own error, later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from app.batches.batch import Fault, Progress, Range
from app.errors import GatewayError, UpstreamBadResponse
from app.settings import Batches as Limits

BOM = b"\xef\xbb\xbf"
CUSTOM_ID_CHARS = 512
FAULTS_TOLD = 100
"""More than that tells nobody anything new; the rest is not looked for."""

_encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, frozen=True):
    """One request of the input; `body` as the client wrote it."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct, frozen=True):
    model: str


_decode_line = msgspec.json.Decoder(Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode


def read_lines(data: bytes) -> list[Line]:
    """The requests in a run of lines that was found sound."""
    return [_decode_line(text) for text in data.removeprefix(BOM).split(b"\n") if text.strip()]


@dataclass(frozen=True, slots=True)
class Sound:
    """An input that may be run."""

    model: str
    ranges: tuple[Range, ...]


class Inspection:
    """Looks through an input that comes in pieces, and cuts it into ranges. Holds one line and 16 bytes for each id."""

    def __init__(self, endpoint: str, limits: Limits, knows: Callable[[str], bool]) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._knows = knows
        self._ids: set[bytes] = set()
        self._faults: list[Fault] = []
        self._ranges: list[Range] = []
        self._rest = b""
        self._skipped = 0
        self._offset = 0
        self._number = 0
        self._model = ""
        self._open = Range(0, 0, 1, 0)
        self._lines = 0

    @property
    def is_over(self) -> bool:
        """Whether enough is known: what follows would be looked at in vain."""
        return len(self._faults) >= FAULTS_TOLD

    def feed(self, data: bytes) -> None:
        """The next bytes of the file."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for text in whole:
            self._take(text, len(text) + 1)
        if len(self._rest) > self._limits.line_bytes:
            # Only its length matters any more.
            self._skipped += len(self._rest)
            self._rest = b""

    def result(self) -> Sound | tuple[Fault, ...]:
        """The verdict, after the last bytes."""
        if self._rest or self._skipped:
            text, self._rest = self._rest, b""
            self._take(text, len(text))
        if not self._faults and not self._lines:
            self._faults.append(Fault("empty_file", "The input file has no requests."))
        if self._faults:
            return tuple(self._faults[:FAULTS_TOLD])
        self._close_range()
        return Sound(self._model, tuple(self._ranges))

    def _take(self, text: bytes, taken: int) -> None:
        self._number += 1
        taken += self._skipped
        if self._number == 1:
            text = text.removeprefix(BOM)
        if taken - 1 > self._limits.line_bytes:
            self._fault("line_too_long", f"The line is longer than {self._limits.line_bytes} bytes.")
        elif text.strip():
            self._inspect(text)
        self._skipped = 0
        self._offset += taken
        full = self._open.lines >= self._limits.range_lines
        if full or self._offset - self._open.start >= self._limits.range_bytes:
            self._close_range()

    def _close_range(self) -> None:
        run = self._open
        if run.lines:
            self._ranges.append(Range(run.start, self._offset, run.first, run.lines))
        self._open = Range(self._offset, self._offset, self._number + 1, 0)

    def _inspect(self, text: bytes) -> None:
        run = self._open
        self._open = Range(run.start, run.end, run.first, run.lines + 1)
        self._lines += 1
        if self._lines == self._limits.lines + 1:
            self._fault("too_many_lines", f"The file has more than {self._limits.lines} requests.")
        if self.is_over or self._lines > self._limits.lines:
            return
        try:
            line = _decode_line(text)
            model = _decode_body(line.body).model
        except msgspec.ValidationError as error:
            self._fault("invalid_request", f"This line is not a request: {error}.")
            return
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._fault("invalid_json_line", "This line is not parseable as valid JSON.")
            return
        self._judge(line, model)

    def _judge(self, line: Line, model: str) -> None:
        key = blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if not 0 < len(line.custom_id) <= CUSTOM_ID_CHARS:
            self._fault("invalid_custom_id", f"A custom_id has 1 to {CUSTOM_ID_CHARS} characters.", "custom_id")
        elif key in self._ids:
            self._fault("duplicate_custom_id", "The custom_id was used by an earlier line.", "custom_id")
        elif line.method != "POST":
            self._fault("invalid_method", "The method of a line is POST.", "method")
        elif line.url != self._endpoint:
            self._fault("mismatched_url", f"The url of each line is the batch's: {self._endpoint}.", "url")
        elif self._model and model != self._model:
            self._fault("mismatched_model", "All lines of a batch ask for the same model.", "body.model")
        elif not self._model and not self._knows(model):
            self._fault("model_not_found", "The model does not exist or you do not have access to it.", "body.model")
        self._model = self._model or model
        self._ids.add(key)

    def _fault(self, code: str, message: str, param: str | None = None) -> None:
        self._faults.append(Fault(code, message, self._number, param))


class Record(msgspec.Struct, frozen=True):
    """What is written about one line: its place in its range, whether it went well, one line of JSON, and its cost."""

    index: int
    is_good: bool
    text: bytes
    cost: Progress


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Answer(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


def answered(index: int, line: Line, request_id: str, body: bytes) -> Record:
    """The record of a line that was answered with `body`. Raises UpstreamBadResponse for what is no JSON object."""
    try:
        usage = _decode_answer(body).usage or _Usage()
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise UpstreamBadResponse("The worker's answer is not JSON.") from None
    cost = Progress(
        completed=1,
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens or 0,
        cached_tokens=(usage.prompt_tokens_details or _Details()).cached_tokens or 0,
        reasoning_tokens=(usage.completion_tokens_details or _Details()).reasoning_tokens or 0,
    )
    return Record(index, True, _response(line, request_id, 200, body), cost)


def refused(index: int, line: Line, request_id: str, error: GatewayError) -> Record:
    """The record of a line that ended in an error answer."""
    return Record(index, False, _response(line, request_id, error.status, error.body()), Progress(failed=1))


def not_run(index: int, line: Line, code: str, message: str) -> Record:
    """The record of a line that was never answered."""
    text = {
        "id": _record_id(line.custom_id),
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return Record(index, False, _encode(text) + b"\n", Progress(failed=1))


def _response(line: Line, request_id: str, status: int, body: bytes) -> bytes:
    text = {
        "id": f"batch_req_{request_id}",
        "custom_id": line.custom_id,
        # A newline in JSON is white space: inside a string it is always escaped.
        "response": {"status_code": status, "request_id": request_id, "body": msgspec.Raw(_on_one_line(body))},
        "error": None,
    }
    return _encode(text) + b"\n"


def _on_one_line(body: bytes) -> bytes:
    return body.replace(b"\r", b" ").replace(b"\n", b" ") if b"\n" in body or b"\r" in body else body


def _record_id(custom_id: str) -> str:
    return f"batch_req_{blake2b(custom_id.encode(), digest_size=16).hexdigest()}"


class _Place(msgspec.Struct, array_like=True, frozen=True):
    index: int
    is_good: bool
    length: int


class Head(msgspec.Struct, frozen=True):
    """The first line of a segment: all records of its range so far, and whether it is the last segment there can be."""

    progress: Progress
    is_sealed: bool = False


HEAD_BYTES = 512
"""Enough for any head."""

_decode_head = msgspec.json.Decoder(Head).decode
_decode_places = msgspec.json.Decoder(list[_Place]).decode


def segment(head: Head, records: list[Record]) -> bytes:
    """Some records of one range as they are stored: the head, a table of places, and the records."""
    places = [_Place(record.index, record.is_good, len(record.text)) for record in records]
    return b"\n".join((_encode(head), _encode(places), b"".join(record.text for record in records)))


def head_of(stored: bytes) -> Head:
    """The head of a segment of which `stored` are at least the first HEAD_BYTES."""
    return _decode_head(stored.partition(b"\n")[0])


def records_of(stored: bytes) -> Iterator[Record]:
    """The records in a segment; what they cost is in the head."""
    _, table, text = stored.split(b"\n", 2)
    start = 0
    for place in _decode_places(table):
        yield Record(place.index, place.is_good, text[start : start + place.length], Progress())
        start += place.length
